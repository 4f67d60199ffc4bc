"""Ancestral sampling: VAR against the original, a tiny GPT, and the laws."""

import functools

import golden_io
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import var_golden

from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.models import var
from ddo_jax.models import vqvae
from ddo_jax.samplers import ancestral
from ddo_jax.samplers import contract


def _recorded(sampler, stages, label, keys):
  """Tokens, f̂ and the logits [B,L,V] that the filters were given."""
  seen = []
  keep = ancestral.keep
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      ancestral, 'keep', lambda *args: (seen.append(args[0]), keep(*args))[1]
    )
    ids, f_hat = sampler(stages, label, keys)
  return ids, f_hat, jnp.concatenate(seen, axis=1)


@pytest.mark.golden
@pytest.mark.parametrize('guidance', [0, 1, 1.5])
@pytest.mark.parametrize('case', var_golden.CASES)
def test_greedy_sampling(case, guidance):
  """var_*.npz: tokens, guided logits and f̂."""
  golden = golden_io.load(f'{case}.npz')
  label = golden['ar_labels'].astype(np.int32)
  keys = jax.random.split(jax.random.key(0), 3)
  with golden_io.precision('f64') as dtype:
    model, params = var_golden.transformer(case, dtype)
    tokenizer, frozen = var_golden.tokenizer(dtype)

    @jax.jit
    def run(params, frozen):
      stages = var.stages(model, tokenizer, params, frozen)
      sampler = ancestral.Ancestral(guidance=guidance, top_k=1)
      return _recorded(sampler, stages, label, keys)

    ids, f_hat, logits = map(np.asarray, run(params, frozen))
  name = f'ar_cfg{guidance}'
  np.testing.assert_array_equal(ids, golden[f'{name}_ids'])
  assert golden_io.max_error(logits, golden[f'{name}_logits']) <= 1e-9
  wanted = golden_io.nhwc(golden[f'{name}_fhat'])
  assert golden_io.max_error(f_hat, wanted) <= 1e-9


@pytest.mark.golden
def test_filters():
  """loss_functions.npz: which logits stay, and their probabilities."""
  golden = golden_io.load('loss_functions.npz')
  with golden_io.precision('f64'):
    logits = jnp.asarray(golden['filt_logits'])
    cases = ((1, 0), (5, 0), (0, 0.9), (20, 0.8), (900, 0.96))
    for top_k, top_p in cases:
      got = ancestral.keep(logits, top_k, top_p)
      name = f'k{top_k}_p{top_p}'
      np.testing.assert_array_equal(got > -np.inf, golden[f'filt_keep_{name}'])
      wanted = golden[f'filt_prob_{name}']
      assert golden_io.max_error(jax.nn.softmax(got), wanted) <= 1e-12
    assert ancestral.keep(logits, 0, 0.0) is logits


def test_ties_of_the_filters():
  """Ties with the k-th stay; top_p takes some of the equals, never all."""
  logits = jnp.array([[0.0, 2.0, 1.0, 1.0, -3.0]])

  def kept(*args):
    return np.asarray(ancestral.keep(*args) > -np.inf)[0].tolist()

  assert kept(logits, 2, 0.0) == [False, True, True, True, False]
  assert kept(logits, 1, 0.0) == [False, True, False, False, False]
  assert sum(kept(jnp.zeros((1, 4)), 0, 0.6)) == 3
  assert sum(kept(jnp.zeros((1, 4)), 0, 0.75)) == 3
  assert sum(kept(jnp.zeros((1, 4)), 0, 1e-9)) == 1
  assert all(kept(logits, 0, 1.0))


@pytest.mark.golden
def test_smoothing():
  """loss_functions.npz: weights of the mixtures at four ratios."""
  golden = golden_io.load('loss_functions.npz')
  with golden_io.precision('f64'):
    logits = ancestral.keep(jnp.asarray(golden['filt_logits']), 20, 0.8)
    gumbel = -jnp.log(jnp.asarray(golden['smooth_exponential']))
    for ratio, wanted in zip(
      golden['smooth_ratio'], golden['smooth_prob'], strict=True
    ):
      sharpness, temperature = ancestral.smoothing(ratio)
      got = ancestral.smooth_weights(logits, gumbel, sharpness, temperature)
      assert golden_io.max_error(got, wanted) <= 1e-12


SMALL = var.Var((1, 2, 3), 7, 2, width=16, depth=2, heads=2, chunk=14)
BOOK = vqvae.Quantizer((1, 2, 3), 7, 4)


@functools.lru_cache
def _small():
  """A small model's stages, random, and its teacher-forced logits."""
  draw = np.random.default_rng(0).normal

  def fill(s):
    return np.asarray(0.4 * draw(size=s.shape), np.float32)

  params = jax.tree.map(fill, var_golden.var_shapes(SMALL, 4))
  frozen = var_golden.shapes(BOOK, (1, 3, 3, 4))
  frozen = jax.tree.map(lambda s: 3 * fill(s), frozen)
  stages = var.stages(SMALL, BOOK, params, frozen)

  @jax.jit
  def forced(label, ids):
    inputs = BOOK.apply({'params': frozen}, ids, method='accumulate')[1]
    return SMALL.apply({'params': params}, label, inputs)

  return stages, forced


@functools.lru_cache
def _sampling(**options):
  """Compiled once for what several tests share."""
  sampler = ancestral.Ancestral(**options)
  stages, _ = _small()
  return jax.jit(lambda label, keys: _recorded(sampler, stages, label, keys))


LABEL = np.array([0, 1, 2, 1], np.int32)
KEYS = rng.per_example(rng.stream(0), np.arange(4, dtype=np.uint32))


def test_cached_decoding_is_the_full_forward_pass():
  """On the sampled tokens; guided: of both halves, and stage 0 is not."""
  _, forced = _small()
  ids, _, logits = _sampling()(LABEL, KEYS)
  wanted = forced(LABEL, ids)
  assert np.std(wanted) > 0.3
  np.testing.assert_allclose(logits, wanted, atol=2e-5)
  ids, _, logits = _sampling(guidance=3.0)(LABEL, KEYS)
  with_label = np.asarray(forced(LABEL, ids))
  without = np.asarray(forced(np.full(4, 2, np.int32), ids))
  t = 3 * var.scale_of_token((1, 2, 3))[None, :, None] / 2
  wanted = (1 + t) * with_label - t * without
  np.testing.assert_allclose(logits, wanted, atol=1e-4)
  np.testing.assert_allclose(logits[:, 0], with_label[:, 0], atol=2e-5)
  assert np.abs(logits - with_label).max() > 0.1


def test_an_image_depends_on_its_own_key():
  """Rows by halves, and in another order, are the rows whole."""
  draw = _sampling(guidance=3.0)
  ids, f_hat, _ = draw(LABEL, KEYS)
  orders = np.array([[1, 0], [3, 2]])
  parts = [draw(LABEL[order], KEYS[order]) for order in orders]
  halves = np.concatenate([part[0][::-1] for part in parts])
  np.testing.assert_array_equal(ids, halves)
  halves = np.concatenate([part[1][::-1] for part in parts])
  np.testing.assert_allclose(f_hat, halves, atol=1e-5)
  # Two rows of one label are two images.
  assert not np.array_equal(ids[1], ids[3])


def test_tokens_have_the_models_probabilities():
  """The first token's frequencies, and independence of the next ones."""
  rows = 2000
  keys = rng.per_example(rng.stream(1), np.arange(rows, dtype=np.uint32))
  ids, _, logits = _sampling()(np.zeros(rows, np.int32), keys)
  p = np.asarray(jax.nn.softmax(logits[0, 0]))
  share = np.bincount(np.asarray(ids[:, 0]), minlength=7) / rows
  np.testing.assert_allclose(share, p, atol=4 * np.sqrt(p.max() / rows))
  # Equal draws would make all four tokens agree given equal logits.
  p = np.asarray(jax.nn.softmax(logits[:, 1:3]))
  agree = np.mean(np.asarray(ids[:, 1] == ids[:, 2]))
  wanted = np.mean(np.sum(p[:, 0] * p[:, 1], axis=-1))
  assert abs(agree - wanted) < 0.05


def test_smooth_sampling_draws_the_same_first_token():
  """It changes f̂ alone, and by it what follows."""
  ids, f_hat, _ = _sampling()(LABEL, KEYS)
  soft, soft_f_hat, _ = _sampling(smooth=True)(LABEL, KEYS)
  np.testing.assert_array_equal(ids[:, 0], soft[:, 0])
  assert np.abs(f_hat - soft_f_hat).max() > 0.01


def test_conventions():
  """The two differ by one; either's neutral value costs no second half."""

  def strength(**options):
    return ancestral.Ancestral(**options).strength(0.5)

  assert strength() == 0
  assert strength(guidance=1.5) == 0.75
  assert strength(guidance=1.0, convention='minus_one') == 0
  assert strength(guidance=2.5, convention='minus_one') == 0.75
  assert strength(guidance=2.5, convention='constant') == 1.5
  assert strength(guidance=1.0, convention='constant') == 0
  stages, _ = _small()
  rows = []

  def predict(scale, label, inputs, past):
    rows.append(label.shape[0])
    return stages.predict(scale, label, inputs, past)

  watched = stages._replace(predict=predict)
  for guidance, convention in ((0.0, 'var'), (1.0, 'minus_one')):
    sampler = ancestral.Ancestral(guidance=guidance, convention=convention)
    jax.eval_shape(lambda s=sampler: s(watched, LABEL, KEYS))
  assert rows == [4] * 6
  jax.eval_shape(
    lambda: ancestral.Ancestral(guidance=1.0)(watched, LABEL, KEYS)
  )
  assert rows[6:] == [8] * 3


@pytest.mark.parametrize(
  ('options', 'match'),
  [
    ({'convention': 'cfg'}, 'convention'),
    ({'guidance': -0.1}, 'guide away'),
    ({'guidance': 0.0, 'convention': 'minus_one'}, 'guide away'),
    ({'top_k': -1}, 'top_k'),
    ({'top_p': 1.1}, 'top_p'),
  ],
)
def test_mistakes_are_refused(options, match):
  stages, _ = _small()
  sampler = ancestral.Ancestral(**options)
  with pytest.raises(errors.UserError, match=match):
    jax.eval_shape(lambda: sampler(stages, LABEL, KEYS))


@pytest.mark.parametrize('convention', ['var', 'minus_one', 'constant'])
def test_the_sampler_of_the_reference(convention):
  sampler = ancestral.Ancestral(3.0, convention, 5, 0.9, smooth=True)
  assert sampler.drives == 'stages'
  plain = sampler.unguided()
  assert plain.strength(1.0) == 0
  assert (plain.top_k, plain.top_p, plain.smooth) == (0, 0.0, False)


# A next-token model: one block of causal attention over the class and all
# earlier tokens, in plain NumPy-like functions.
LENGTH, WIDTH, VOCAB, CLASSES = 6, 8, 5, 2


@functools.lru_cache
def _gpt_params():
  draw = np.random.default_rng(1).normal
  return {
    name: np.asarray(0.7 * draw(size=shape), np.float32)
    for name, shape in {
      'label': (CLASSES + 1, WIDTH),
      'codebook': (VOCAB, 3),
      'read': (3, WIDTH),
      'position': (LENGTH, WIDTH),
      'query': (WIDTH, WIDTH),
      'key': (WIDTH, WIDTH),
      'value': (WIDTH, WIDTH),
      'head': (WIDTH, VOCAB),
    }.items()
  }


def _gpt_forced(label, tokens):
  """Logits [B,L,V] of all positions at once, from the tokens before each."""
  p = _gpt_params()
  x = p['codebook'][tokens[:, :-1]] @ p['read']
  x = np.concatenate([p['label'][label][:, None], x], axis=1) + p['position']
  logits = np.einsum('bqc,bkc->bqk', x @ p['query'], x @ p['key'])
  logits = np.where(np.tri(LENGTH, dtype=bool), logits, -np.inf)
  y = np.asarray(jax.nn.softmax(jnp.asarray(logits))) @ (x @ p['value'])
  return (x + y) @ p['head']


def _gpt_stages(scanned):
  """The same model one token a stage, with preallocated keys and values."""
  p = jax.tree.map(jnp.asarray, _gpt_params())

  def begin(rows):
    cache = jnp.zeros((2, rows, LENGTH, WIDTH))
    return jnp.zeros((rows, 1, 3)), cache, jnp.zeros((rows, LENGTH, 3))

  def predict(stage, label, inputs, past):
    first = p['label'][label][:, None]
    x = jnp.where(stage == 0, first, inputs @ p['read'])
    x = x + jax.lax.dynamic_slice_in_dim(p['position'], stage, 1)[None]
    new = jnp.stack([x @ p['key'], x @ p['value']])
    past = jax.lax.dynamic_update_slice_in_dim(past, new, stage, axis=2)
    logits = jnp.einsum('bqc,bkc->bqk', x @ p['query'], past[0])
    seen = jnp.arange(LENGTH)[None, None] <= stage
    logits = jnp.where(seen, logits, -jnp.inf)
    y = jax.nn.softmax(logits) @ past[1]
    return (x + y) @ p['head'], past

  def advance(stage, vectors, canvas):
    canvas = jax.lax.dynamic_update_slice_in_dim(canvas, vectors, stage, 1)
    return canvas, vectors

  return contract.Stages(
    sizes=(1,) * LENGTH,
    none=CLASSES,
    codebook=p['codebook'],
    begin=begin,
    predict=predict,
    advance=advance,
    scanned=scanned,
  )


GPT_LABEL = np.array([0, 1, 2, 1], np.int32)
GPT_SAMPLERS = [
  {},
  {'top_k': 3, 'top_p': 0.8},
  {'guidance': 1.5},
  {'guidance': 2.5, 'convention': 'constant', 'top_p': 0.9},
  {'guidance': 2.0, 'convention': 'minus_one', 'smooth': True},
]


@functools.lru_cache
def _gpt_draw(scanned, **options):
  sampler, stages = ancestral.Ancestral(**options), _gpt_stages(scanned)
  return jax.jit(lambda label, keys: sampler(stages, label, keys))


@pytest.mark.parametrize('options', GPT_SAMPLERS)
def test_a_scan_draws_what_the_unrolled_loop_draws(options):
  """Bit for bit: both round the same numbers of the schedule once."""
  keys = rng.per_example(rng.stream(2), np.arange(64, dtype=np.uint32))
  label = np.arange(64, dtype=np.int32) % (CLASSES + 1)
  scanned = _gpt_draw(True, **options)(label, keys)
  unrolled = _gpt_draw(False, **options)(label, keys)
  assert scanned[0].shape == (64, LENGTH) and scanned[0].dtype == np.int32
  assert len(np.unique(scanned[0], axis=0)) > 10
  np.testing.assert_array_equal(scanned[0], unrolled[0])
  np.testing.assert_array_equal(scanned[1], unrolled[1])
  if 'smooth' not in options:
    vectors = _gpt_params()['codebook'][scanned[0]]
    np.testing.assert_array_equal(scanned[1], vectors)


@pytest.mark.parametrize('guidance', [1.0, 2.5])
def test_cached_next_token_decoding_is_the_full_forward_pass(guidance):
  """Greedy: each token is the arg-max of the guided logits before it."""
  draw = _gpt_draw(True, guidance=guidance, convention='constant', top_k=1)
  tokens = np.asarray(draw(GPT_LABEL, KEYS)[0])
  with_label = _gpt_forced(GPT_LABEL, tokens)
  without = _gpt_forced(np.full(4, CLASSES), tokens)
  logits = guidance * with_label - (guidance - 1) * without
  gap = np.diff(np.sort(logits, axis=-1)[..., -2:], axis=-1)
  assert gap.min() > 1e-4  # no ties
  np.testing.assert_array_equal(tokens, logits.argmax(-1))
  assert (with_label.argmax(-1) != logits.argmax(-1)).any() == (guidance > 1)


def test_next_token_frequencies():
  """The second token's, given the first, against the full forward pass."""
  rows = 4000
  keys = rng.per_example(rng.stream(3), np.arange(rows, dtype=np.uint32))
  tokens = np.asarray(_gpt_draw(True)(np.zeros(rows, np.int32), keys)[0])
  p = np.asarray(jax.nn.softmax(_gpt_forced(np.zeros(rows, int), tokens)))
  for position in range(LENGTH):
    share = np.bincount(tokens[:, position], minlength=VOCAB) / rows
    expected = p[:, position].mean(0)
    np.testing.assert_allclose(share, expected, atol=4 * 0.5 / np.sqrt(rows))


def test_a_row_of_next_tokens_depends_on_its_own_key():
  draw = _gpt_draw(True, guidance=1.5)
  tokens, canvas = draw(GPT_LABEL, KEYS)
  order = np.array([2, 0])
  some, some_canvas = draw(GPT_LABEL[order], KEYS[order])
  np.testing.assert_array_equal(tokens[order], some)
  np.testing.assert_array_equal(canvas[order], some_canvas)
  # Two rows of one label are two samples.
  assert not np.array_equal(tokens[1], tokens[3])
