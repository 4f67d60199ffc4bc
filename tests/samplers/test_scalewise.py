"""Sampling scale by scale: against the original, and its laws."""

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
from ddo_jax.samplers import scalewise


def _recorded(sampler, stages, label, keys):
  """Tokens, f̂ and the logits [B,L,V] that the filters were given."""
  seen = []
  keep = scalewise.keep
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      scalewise, 'keep', lambda *args: (seen.append(args[0]), keep(*args))[1]
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
      stages = scalewise.bind(model, tokenizer, params, frozen)
      sampler = scalewise.Scalewise(guidance=guidance, top_k=1)
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
      got = scalewise.keep(logits, top_k, top_p)
      name = f'k{top_k}_p{top_p}'
      np.testing.assert_array_equal(got > -np.inf, golden[f'filt_keep_{name}'])
      wanted = golden[f'filt_prob_{name}']
      assert golden_io.max_error(jax.nn.softmax(got), wanted) <= 1e-12
    assert scalewise.keep(logits, 0, 0.0) is logits


def test_ties_of_the_filters():
  """Ties with the k-th stay; top_p takes some of the equals, never all."""
  logits = jnp.array([[0.0, 2.0, 1.0, 1.0, -3.0]])
  kept = lambda *args: np.asarray(scalewise.keep(*args) > -np.inf)[0].tolist()
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
    logits = scalewise.keep(jnp.asarray(golden['filt_logits']), 20, 0.8)
    gumbel = -jnp.log(jnp.asarray(golden['smooth_exponential']))
    codebook = jnp.asarray(np.random.default_rng(0).normal(size=(40, 3)))
    for ratio, wanted in zip(
      golden['smooth_ratio'], golden['smooth_prob'], strict=True
    ):
      got = scalewise.smooth_weights(logits, gumbel, float(ratio))
      assert golden_io.max_error(got, wanted) <= 1e-12
      got = scalewise.smoothed(logits, gumbel, float(ratio), codebook)
      assert golden_io.max_error(got, wanted @ np.asarray(codebook)) <= 1e-12


SMALL = var.Var((1, 2, 3), 7, 2, width=16, depth=2, heads=2, chunk=14)
BOOK = vqvae.Quantizer((1, 2, 3), 7, 4)


@functools.lru_cache
def _small():
  """A small model's stages, random, and its teacher-forced logits."""
  draw = np.random.default_rng(0).normal
  fill = lambda s: np.asarray(0.4 * draw(size=s.shape), np.float32)
  params = jax.tree.map(fill, var_golden.var_shapes(SMALL, 4))
  frozen = var_golden.shapes(BOOK, (1, 3, 3, 4))
  frozen = jax.tree.map(lambda s: 3 * fill(s), frozen)
  stages = scalewise.bind(SMALL, BOOK, params, frozen)

  @jax.jit
  def forced(label, ids):
    inputs = BOOK.apply({'params': frozen}, ids, method='accumulate')[1]
    return SMALL.apply({'params': params}, label, inputs)

  return stages, forced


@functools.lru_cache
def _sampling(**options):
  """Compiled once for what several tests share."""
  sampler = scalewise.Scalewise(**options)
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
  strength = lambda **options: scalewise.Scalewise(**options).strength(0.5)
  assert strength() == 0
  assert strength(guidance=1.5) == 0.75
  assert strength(guidance=1.0, convention='minus_one') == 0
  assert strength(guidance=2.5, convention='minus_one') == 0.75
  stages, _ = _small()
  rows = []

  def predict(scale, label, inputs, past):
    rows.append(label.shape[0])
    return stages.predict(scale, label, inputs, past)

  watched = stages._replace(predict=predict)
  for guidance, convention in ((0.0, 'var'), (1.0, 'minus_one')):
    sampler = scalewise.Scalewise(guidance=guidance, convention=convention)
    jax.eval_shape(lambda s=sampler: s(watched, LABEL, KEYS))
  assert rows == [4] * 6
  jax.eval_shape(
    lambda: scalewise.Scalewise(guidance=1.0)(watched, LABEL, KEYS)
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
  sampler = scalewise.Scalewise(**options)
  with pytest.raises(errors.UserError, match=match):
    jax.eval_shape(lambda: sampler(stages, LABEL, KEYS))
