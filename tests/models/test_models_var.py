"""VAR's transformer against the original's numbers, and its laws."""

import dataclasses
import functools
import itertools

import golden_io
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import var_golden

from ddo_jax import errors
from ddo_jax.models import var
from ddo_jax.models import var_presets
from ddo_jax.models import vqvae

TINY = var_golden.CONFIG


@functools.lru_cache
def _forward(model):
  """Compiled once for each type."""

  @jax.jit
  def forward(params, label, inputs, ids):
    variables = {'params': params}
    logits, captured = model.apply(
      variables, label, inputs, capture_intermediates=True
    )
    cond = params['class_emb']['embedding'][label]
    x = model.apply(variables, cond, inputs, method='embed')
    args = (variables, label, inputs, ids)
    tokens = model.apply(*args, method='token_log_prob')
    rows = tokens.sum(1)
    block = captured['intermediates']['blocks']['__call__'][0][0]
    return {
      'logits': logits,
      'x0': x,
      'block0': block[0],
      'block1': block[1],
      'logp_tokens': tokens,
      'logp_rows': rows,
    }

  return forward


@pytest.mark.golden
@pytest.mark.parametrize(
  ('case', 'precision'),
  list(itertools.product(var_golden.CASES, ('f64', 'f32'))),
)
def test_network(case, precision):
  """var_*.npz: embedding, every block, logits, log-probabilities."""
  golden = golden_io.load(f'{case}.npz')
  with golden_io.precision(precision) as dtype:
    model, params = var_golden.transformer(case, dtype)
    inputs = np.asarray(golden['var_input'], dtype)
    label, ids = golden['labels'].astype(np.int32), golden['ids']
    got = _forward(model)(params, label, inputs, ids.astype(np.int32))
    assert got['logits'].dtype == got['logp_rows'].dtype == dtype
  for name, value in got.items():
    atol = 1e-10 if precision == 'f64' else 5e-5
    if precision == 'f32' and name == 'logp_rows':
      atol = 1e-3
    assert golden_io.max_error(value, golden[name]) <= atol, name
  if precision == 'f32':
    wanted = golden['logits_f32']
    assert golden_io.max_error(got['logits'], wanted) <= 5e-5


def random_params(model, channels, seed=0, size=0.3):
  """Random leaves: at the fresh ones, gates are next to nothing."""
  draw = np.random.default_rng(seed).normal
  return jax.tree.map(
    lambda leaf: np.asarray(size * draw(size=leaf.shape), np.float32),
    var_golden.var_shapes(model, channels),
  )


def row_log_prob(model, params, *rows):
  """log p(image | label), [B]; `rows` are the labels, inputs and tokens."""
  variables = {'params': params}
  return model.apply(variables, *rows, method='token_log_prob').sum(1)


SMALL = var.Var((1, 2), 3, 2, width=8, depth=2, heads=2, chunk=4)


def _small_inputs(rows):
  draw = np.random.default_rng(1).normal
  return np.asarray(draw(size=(rows, 4, 3)), np.float32)


def test_causality():
  """No logit depends on the input of a finer scale; each on its own's."""
  model = SMALL.clone(patch_nums=(1, 2, 3), shared_modulation=True)
  params = random_params(model, 3)
  inputs = np.random.default_rng(0).normal(size=(1, 13, 3))

  @jax.jit
  def slopes(inputs):
    label = jnp.zeros(1, jnp.int32)

    def logits(x):
      return model.apply({'params': params}, label, x)[0].sum(-1)

    return jax.jacrev(lambda x: jnp.sin(logits(x)))(inputs)

  slope = np.abs(slopes(inputs.astype(np.float32))[:, 0]).sum(-1)
  level = var.scale_of_token((1, 2, 3))
  sees = level[:, None] >= level[None, 1:]
  np.testing.assert_array_equal(slope != 0, sees)
  np.testing.assert_array_equal(var.mask((1, 2, 3))[:, 1:], sees)


def test_probabilities_of_all_strings_sum_to_one():
  """Of each class, and without one; the tokens make their own inputs."""
  params = random_params(SMALL, 3, size=0.5)
  quantizer = vqvae.Quantizer((1, 2), 3, 3)
  strings = np.array(list(itertools.product(range(3), repeat=5)), np.int32)
  shapes = var_golden.shapes(quantizer, (1, 2, 2, 3))
  draw = np.random.default_rng(3).normal
  weights = jax.tree.map(
    lambda s: np.asarray(draw(size=s.shape), np.float32), shapes
  )

  @jax.jit
  def log_prob(label):
    inputs = quantizer.apply({'params': weights}, strings, method='accumulate')[
      1
    ]
    return row_log_prob(SMALL, params, label, inputs, strings)

  rows = [log_prob(np.full(243, label, np.int32)) for label in (0, 1, 2)]
  for row in rows:
    assert float(jnp.exp(row).sum()) == pytest.approx(1, abs=1e-5)
    assert np.ptp(row) > 1
  assert np.abs(rows[0] - rows[2]).max() > 0.01


@pytest.mark.parametrize('remat', [True, 'dots'])
def test_log_prob_is_that_of_the_logits(remat):
  """Gradients too, in runs of tokens, and with remat."""
  params = random_params(SMALL, 3)
  label = np.array([0, 2], np.int32)
  inputs = _small_inputs(2)
  ids = np.array([[0, 1, 2, 1, 0], [2, 2, 1, 0, 1]], np.int32)

  def plain(params):
    logits = SMALL.apply({'params': params}, label, inputs)
    logp = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(logp, ids[:, :, None], 2).sum((1, 2))

  def chunked(model, params):
    return row_log_prob(model, params, label, inputs, ids)

  def both(row_log_prob, params):
    weights = jnp.array([1.0, -2.0])

    def loss(p):
      return jnp.sum(weights * row_log_prob(p))

    def run(p):
      return (row_log_prob(p), jax.grad(loss)(p))

    return jax.jit(run)(params)

  wanted = both(plain, params)
  got = both(functools.partial(chunked, SMALL.clone(remat=remat)), params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    got,
    wanted,
  )
  assert min(np.abs(g).max() for g in jax.tree.leaves(wanted[1])) > 0


def test_log_ratio_is_zero_at_the_reference():
  """Law 1: exactly so forward, and nearly inside the gradient's program."""
  params = random_params(SMALL, 3)
  reference = jax.tree.map(np.array, params)
  args = (np.array([0, 2], np.int32), _small_inputs(2), np.zeros((2, 5), int))

  def log_ratio(params, reference):
    rows = [row_log_prob(SMALL, p, *args) for p in (params, reference)]
    return rows[0] - rows[1]

  def run(p, q):
    return (log_ratio(p, q), jax.vjp(log_ratio, p, q))

  exact, (inside, _) = jax.jit(run)(params, reference)
  np.testing.assert_array_equal(exact, 0)
  np.testing.assert_allclose(inside, 0, atol=1e-5)
  params['head']['bias'] += np.array([0.1, 0, 0], np.float32)
  moved = jax.jit(log_ratio)(params, reference)
  assert np.all(np.abs(moved) > 1e-3)


def test_few_logits_are_held_at_once():
  """The compiled gradient needs less memory than one set of all logits."""
  model = var.Var((1, 2, 10), 65536, 2, width=8, depth=1, heads=1, chunk=7)
  shapes = var_golden.var_shapes(model, 3)

  def loss(params, label, inputs, ids):
    return row_log_prob(model, params, label, inputs, ids).sum()

  rows = [
    jax.ShapeDtypeStruct((2,), np.int32),
    jax.ShapeDtypeStruct((2, 104, 3), np.float32),
    jax.ShapeDtypeStruct((2, 105), np.int32),
  ]
  compiled = jax.jit(jax.grad(loss)).lower(shapes, *rows).compile()
  logits = 2 * 105 * 65536 * 4
  assert compiled.memory_analysis().temp_size_in_bytes < logits / 2


def test_initial_weights():
  """Spreads of a fresh transformer, by the published rule."""
  config = dataclasses.replace(TINY, depth=2, width=64, heads=2)
  model = var.transformer(config)
  label, inputs = np.zeros(1, np.int32), np.zeros((1, 29, 8), np.float32)
  key = jax.random.key(0, impl='rbg')  # compiles in less time
  params = jax.jit(model.init)(key, label, inputs)['params']
  unit = (1 / (3 * 64)) ** 0.5
  blocks = params['blocks']
  modulation = np.asarray(blocks['ada_lin']['kernel'])
  spreads = [
    (modulation[..., :128], 1e-3),
    (modulation[..., 128:], 0.5),
    (blocks['attn']['mat_qkv']['kernel'], 1),
    (blocks['attn']['proj']['kernel'], 0.5),
    (blocks['ffn']['fc1']['kernel'], 1),
    (blocks['ffn']['fc2']['kernel'], 0.5),
    (params['class_emb']['embedding'], 1),
    (params['lvl_embed']['embedding'], 1),
    (params['pos_1LC'], 1),
    (params['word_embed']['kernel'], 1),
    (params['head_nm']['ada_lin']['kernel'], 0.5),
    (params['head']['kernel'], 0.02),
  ]
  for leaf, factor in spreads:
    assert np.std(leaf) == pytest.approx(factor * unit, rel=0.15)
    assert abs(np.mean(leaf)) < 0.2 * factor * unit
  # The blocks start from different numbers.
  assert not np.array_equal(modulation[0], modulation[1])
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if path[-1].key.endswith('bias'):
      np.testing.assert_array_equal(leaf, 0)
  np.testing.assert_allclose(blocks['attn']['scale_mul_1H11'], np.log(4))
  model = var.transformer(dataclasses.replace(config, shared_modulation=True))
  params = jax.jit(model.init)(key, label, inputs)['params']
  offset = np.asarray(params['blocks']['ada_gss'])
  assert offset.shape == (2, 1, 1, 6, 64)
  assert np.std(offset[..., :2, :]) == pytest.approx(1e-3 / 8, rel=0.15)
  assert np.std(offset[..., 2:, :]) == pytest.approx(0.5 / 8, rel=0.15)
  kernel = params['shared_ada_lin']['kernel']
  assert np.std(kernel) == pytest.approx(unit, rel=0.05)


def test_weight_decay():
  """Linear layers and the classes, nothing else."""
  config = dataclasses.replace(TINY, shared_modulation=True)
  shapes = var_golden.var_shapes(var.transformer(config), 8)
  decays = jax.tree_util.tree_leaves_with_path(var.decay_mask(shapes))
  assert {'.'.join(e.key for e in path) for path, on in decays if on} == {
    'blocks.attn.mat_qkv.kernel',
    'blocks.attn.proj.kernel',
    'blocks.ffn.fc1.kernel',
    'blocks.ffn.fc2.kernel',
    'class_emb.embedding',
    'head.kernel',
    'head_nm.ada_lin.kernel',
    'shared_ada_lin.kernel',
    'word_embed.kernel',
  }


def test_bfloat16_products_are_close():
  """And parameters, residuals and logits stay float32."""
  params = random_params(SMALL, 3)
  label, inputs = np.array([0, 1], np.int32), _small_inputs(2)

  def apply(model):
    return jax.jit(model.apply)({'params': params}, label, inputs)

  wanted, got = apply(SMALL), apply(SMALL.clone(dtype=jnp.bfloat16))
  assert got.dtype == np.float32
  error = golden_io.relative_error(got, wanted)
  assert 1e-5 < error < 3e-2


@pytest.mark.parametrize(
  ('name', 'count'),
  [
    ('var_d16', 310_283_520),
    ('var_d20', 600_917_136),
    ('var_d24', 1_033_399_360),
    ('var_d30', 2_010_020_356),
    ('var_d36', 2_353_893_904),
  ],
)
def test_parameters_of_the_released_models(name, count):
  config = var_presets.get(name)
  vqvae.build(config.tokenizer)
  shapes = var_golden.var_shapes(
    var.transformer(config), config.tokenizer.channels
  )
  assert golden_io.count(shapes) == count


def test_parameters_of_a_shared_modulation():
  config = dataclasses.replace(var_presets.get('var_d16'))
  config.shared_modulation = True
  assert (
    golden_io.count(var_golden.var_shapes(var.transformer(config), 32))
    == 215_917_824
  )


def test_presets_are_copies():
  var_presets.get('var_d36').tokenizer.base = 1
  assert var_presets.get('var_d36').tokenizer.base == 160
  with pytest.raises(errors.UserError, match='var_d16'):
    var_presets.get('var_d1')


@pytest.mark.parametrize(
  'options',
  [
    {'heads': 3},
    {'dtype': 'float16'},
    {'chunk': 0},
    {'depth': 0},
    {'heads': 0},
    {'width': -1},
    {'num_classes': 0},
  ],
)
def test_misfits_are_refused(options):
  with pytest.raises(errors.UserError, match='must'):
    var.transformer(dataclasses.replace(TINY, **options))
