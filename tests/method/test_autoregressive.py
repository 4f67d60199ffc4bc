"""The laws of the step for models of tokens, and what VAR's step adds."""

import dataclasses
import functools
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import placing
import pytest
import tiny_var

from ddo_jax import config as config_lib
from ddo_jax import rng
from ddo_jax.method import ddo
from ddo_jax.method import likelihood
from ddo_jax.method import negatives
from ddo_jax.method import siblings
from ddo_jax.models import llamagen
from ddo_jax.models import var
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.samplers import ancestral
from ddo_jax.training import state as state_lib
from ddo_jax.training import step as step_lib

BATCH = tiny_var.BATCH
DROP = 0.3
MODEL = tiny_var.MODEL
RASTER = llamagen.PixelGptConfig(
  image_shape=tiny_var.SHAPE,
  pixel_values=17,
  num_classes=tiny_var.CLASSES,
  depth=1,
  width=8,
  heads=2,
  hidden=8,
  chunk=3,
)
ALPHA, BETA = 2.0, 0.05
OBJECTIVES = {
  'ddo': ddo.DDO(alpha=ALPHA, beta=BETA, normalize=True),
  'cca': siblings.CCA(alpha=ALPHA, beta=BETA, normalize=True),
}


class Case(NamedTuple):
  """How a step is compiled."""

  kind: str
  devices: int = 1
  accumulate: int = 1
  objective: str = 'ddo'
  negatives: str = 'pool'
  round_trip: bool = True
  dtype: str = 'float32'
  network: str = 'var'


ONE = Case('pmap')
ONLINE = Case('pmap', negatives='online')
CCA = Case('pmap', objective='cca', negatives='other_labels')
HALF = Case('pmap', dtype='bfloat16')
PIXELS = Case('pmap', network='raster')
PIXELS_ONLINE = Case('pmap', negatives='online', network='raster')
MANY = {
  'pmap': (Case('pmap', 8), ONE),
  'fsdp-accumulate': (Case('fsdp', 8, accumulate=2), ONE),
  'online-pmap': (Case('pmap', 8, negatives='online'), ONLINE),
  'online-fsdp': (Case('fsdp', 8, negatives='online'), ONLINE),
  'cca-pmap': (
    Case('pmap', 8, objective='cca', negatives='other_labels'),
    CCA,
  ),
  'raster-fsdp': (Case('fsdp', 8, accumulate=2, network='raster'), PIXELS),
  'raster-online-pmap': (PIXELS_ONLINE._replace(devices=8), PIXELS_ONLINE),
}


@functools.cache
def build(network, dtype='float32'):
  """A model of tokens, params without a zero, and the frozen ones."""
  if network == 'var':
    return tiny_var.with_dtype(dtype), *tiny_var.weights()
  model = dataclasses.replace(RASTER, dtype=dtype).build()
  shapes = jax.eval_shape(model.init, rng.stream(0))
  return model, tiny_var.filled(shapes, 0), {}


@functools.cache
def compiled(case):
  """The devices, the phase and the step, which is compiled when first run."""
  second_rows = {
    'pool': negatives.Pool(),
    'online': negatives.Online(case.round_trip),
    'other_labels': negatives.OtherLabels(),
  }
  phase = config_lib.Phase(
    objective=OBJECTIVES[case.objective],
    negatives=second_rows[case.negatives],
    batch_size=BATCH,
    images=100 * BATCH,
    label_drop=DROP,
    optimizer=config_lib.Optimizer(
      learning_rate=1e-2,
      weight_decay=0.05,
      clip_norm=2.0,
      adam_eps=1e-3,  # or rounding noise becomes steps of full length
    ),
  )
  settings = config_lib.Executor(kind=case.kind)
  executor = devices_lib.Executor(settings, case.devices)
  step_fn = executor.compile_step(
    step_lib.train_step,
    sampler=ancestral.Ancestral(guidance=1.5, top_k=3).unguided(),
    accumulate=case.accumulate,
  )
  return executor, phase, step_fn


@functools.cache
def run(case, steps=6):
  """The state after some steps from the reference, and all metrics."""
  executor, phase, step_fn = compiled(case)
  model, params, frozen = build(case.network, case.dtype)
  whole = model.rules.reduce(params)
  reference = placing.place_state(executor, whole)
  frozen = placing.place_state(executor, frozen)
  key = executor.replicate(rng.stream(0, 'test'))
  transform = phase.optimizer.transform(model.rules, BATCH, phase.images)
  state = state_lib.create(params, transform, phase.averages)
  state = placing.place_state(executor, state)
  history = []
  for step in range(steps):
    real, fake = tiny_var.make_rows(2 * step), tiny_var.make_rows(2 * step + 1)
    real['id'] = np.arange(BATCH, dtype=np.uint32) + step * BATCH
    if case.objective == 'cca':
      real['other_label'] = np.roll(real['label'], -1)
    fake = executor.place_batch(fake) if case.negatives == 'pool' else None
    real = executor.place_batch(real)
    state, metrics = step_fn(
      state, reference, frozen, real, fake, model, phase, key
    )
    history.append(jax.device_get(metrics))
  assert_unchanged(reference, whole)
  return jax.device_get(state), history


def assert_unchanged(tree, wanted):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(tree), wanted)


def first_keys():
  """The row keys of step 0, by the definition in `train_step`."""
  key = jax.random.fold_in(rng.stream(0, 'test'), 0)
  return rng.per_example(key, jnp.arange(BATCH, dtype=jnp.uint32))


def first_drop():
  """Which rows of step 0 lose their label, [B] bool."""
  keys = rng.split_rows(first_keys(), 'label_drop')
  return np.array(jax.vmap(jax.random.uniform)(keys)) < DROP


def tokens(seed, network='var'):
  """Rows of step 0 as a batch of tokens, labels dropped."""
  model, _, frozen = build(network)
  rows = tiny_var.make_rows(seed)
  encode = jax.jit(model.codec.encode)
  x = encode(frozen, jnp.asarray(rows['stored']), first_keys())
  label = np.where(first_drop(), tiny_var.CLASSES, rows['label'])
  return likelihood.Batch(x, jnp.asarray(label), jnp.arange(BATCH))


@pytest.mark.parametrize('network', ['var', 'raster'])
def test_law_1_the_log_ratio_to_itself_is_exactly_0(network):
  model, params, frozen = build(network)
  batch = tokens(0, network)
  length = batch.x.shape[1]
  assert len(np.unique(batch.x)) > 2
  log_ratio = jax.jit(model.log_ratio)
  same, info = log_ratio(params, params, frozen, batch, first_keys())
  np.testing.assert_array_equal(same, np.zeros(BATCH))
  log_prob = jax.jit(model.log_prob)
  ours = log_prob(params, frozen, batch, first_keys())
  np.testing.assert_allclose(info['mle_loss'], -ours / length, rtol=1e-6)
  mean = jax.jit(model.mle_loss)(params, frozen, batch, first_keys())
  np.testing.assert_allclose(mean, -ours / length, rtol=1e-5)
  # And to another it is the difference of two log-likelihoods.
  other = jax.tree.map(lambda p: 1.1 * p, params)
  ratio, _ = log_ratio(other, params, frozen, batch, first_keys())
  difference = log_prob(other, frozen, batch, first_keys()) - ours
  assert float(jnp.abs(difference).max()) > 0.01
  np.testing.assert_allclose(ratio, difference, atol=1e-5)


def test_a_reduced_reference_is_the_same_function():
  """Bit for bit; biases and scales that are not converted stay as they are."""
  params, frozen = tiny_var.weights()
  model = tiny_var.with_dtype('bfloat16')
  small = model.rules.reduce(params)
  kept = {
    '.'.join(entry.key for entry in path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(small['blocks'])
    if leaf.dtype == np.float32
  }
  assert kept == {'ada_lin.kernel', 'ada_lin.bias', 'attn.scale_mul_1H11'}
  assert small['head']['kernel'].dtype == np.float32
  batch = tokens(0)
  log_ratio = jax.jit(lambda *p: model.log_ratio(*p, frozen, batch, None)[0])
  np.testing.assert_array_equal(log_ratio(params, small), np.zeros(BATCH))
  other = jax.tree.map(lambda p: 1.1 * p, params)
  wanted = log_ratio(other, params)
  np.testing.assert_array_equal(log_ratio(other, small), wanted)
  assert np.abs(wanted).max() > 0.01
  assert MODEL.rules.reduce(params) is params


def test_law_1_the_compiler_drops_no_rounding():
  """Optimised as users have it: a kernel converted there and back is not."""
  transformer = var.Var((1, 8), 32, 3, 128, 2, 2, dtype=jnp.bfloat16)
  tokenizer = tiny_var.Tokenizer((1, 8), 32, 8, 32, (1,), 1)
  model = tiny_var.with_tokenizer(MODEL, tokenizer)
  network = dataclasses.replace(model.network, transformer=transformer)
  rules = var.VarRules(jnp.bfloat16)
  model = dataclasses.replace(model, network=network, rules=rules)
  params = tiny_var.filled(jax.eval_shape(model.init, rng.stream(0)), 0)
  inits = functools.partial(tokenizer.init, rng.stream(0))
  shapes = jax.eval_shape(inits, jnp.zeros((1, 8, 8, 1)))['params']
  frozen = {'tokenizer': tiny_var.filled(shapes, 1)}
  ids = np.random.default_rng(2).integers(0, 32, (64, 65), np.int32)
  rows = np.arange(64, dtype=np.int32)
  batch = likelihood.Batch(ids, rows % 3, rows)
  fn = jax.jit(lambda *p: model.log_ratio(*p, frozen, batch, None)[0])
  args = (params, jax.jit(model.rules.reduce)(params))
  options = {'xla_backend_optimization_level': 3}
  log_ratio = fn.lower(*args).compile(compiler_options=options)
  np.testing.assert_array_equal(log_ratio(*args), np.zeros(64))


def chance(case):
  """The loss at the reference, from the batch's own weights."""
  dropped = first_drop()
  if case.objective == 'ddo':
    real = np.where(dropped, max(ALPHA, 1), 1)
    fake = np.where(dropped, 0, ALPHA)
  else:
    label = tiny_var.make_rows(0)['label']
    real = np.ones(BATCH)
    same = dropped | (label == np.roll(label, -1))
    assert dropped.sum() < same.sum() < BATCH
    fake = np.where(same, 1, ALPHA)
  return math.log(2) * (real.mean() + fake.mean()) / max(ALPHA, 1)


CASES = {HALF, *(case for pair in MANY.values() for case in pair)}


@pytest.mark.parametrize(
  'case', sorted(CASES), ids=lambda c: '-'.join(map(str, c))
)
def test_law_1_the_loss_at_the_reference_is_chance(case):
  metrics = run(case)[1][0]
  assert 0 < first_drop().sum() < BATCH
  assert metrics['loss'] == pytest.approx(chance(case), rel=1e-5)
  assert metrics['chance_loss'] == pytest.approx(chance(case), rel=1e-5)
  assert metrics['max_abs_logit'] <= 1e-3
  assert metrics['reference_distance'] == 0
  assert metrics['grad_norm'] > 1e-3


@pytest.mark.parametrize('case', [ONE, PIXELS], ids=['var', 'raster'])
def test_law_2_the_gradient_at_the_reference(case):
  """−(β/2)[∇E w_real log p(real) − ∇E w_fake log p(fake)] / max(α, 1)."""
  model, params, frozen = build(case.network)
  dropped = first_drop()
  batches = [tokens(seed, case.network) for seed in (0, 1)]

  @jax.jit
  @jax.grad
  def gradient(params):
    real, fake = (
      model.log_prob(params, frozen, batch, first_keys()) for batch in batches
    )
    real = jnp.mean(jnp.where(dropped, ALPHA, 1) * real)
    fake = jnp.mean(jnp.where(dropped, 0, ALPHA) * fake)
    return -BETA / 2 * (real - fake) / ALPHA

  expected = gradient(params)
  state, _ = run(case, 1)
  got = jax.tree.map(lambda m: m / (1 - 0.9), state.opt_state[1].mu)
  assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected)) > 1e-3
  chex.assert_trees_all_close(got, jax.device_get(expected), atol=1e-6)


@pytest.mark.parametrize('name', MANY)
def test_law_3_one_result_on_any_devices(name):
  """Fakes drawn inside the step included."""
  case, one = MANY[name]
  (state, history), (wanted_state, wanted) = run(case), run(one)
  for name in ('loss', 'mle_loss', 'margin', 'grad_norm'):
    series = [[m[name] for m in h] for h in (history, wanted)]
    np.testing.assert_allclose(*series, rtol=1e-4, atol=1e-4, err_msg=name)
  assert wanted[-1]['max_abs_logit'] > 0.01  # the steps went somewhere
  chex.assert_trees_all_close(
    state.params, wanted_state.params, rtol=1e-4, atol=1e-5
  )


def test_online_fakes_are_the_references_own():
  """Of the real rows' labels, before the drop, through pixels and back."""
  params, frozen = tiny_var.weights()
  rows = tiny_var.make_rows(0)
  keys = first_keys()
  stored = jnp.asarray(rows['stored'])
  step_rows = step_lib.Microbatch(
    real={**rows, 'stored': stored, 'id': jnp.arange(BATCH)},
    fake=None,
    keys=keys,
    dropped=jnp.asarray(first_drop()),
  )
  sampler = ancestral.Ancestral()

  @functools.partial(jax.jit, static_argnames='online')
  def pairs(params, frozen, rows, online):
    phase = config_lib.Phase(negatives=online, label_drop=DROP)
    return step_lib.make_pairs(rows, params, frozen, MODEL, phase, sampler)

  skipped = pairs(params, frozen, step_rows, negatives.Online(False))
  settled = pairs(params, frozen, step_rows, negatives.Online(True))
  x = jax.jit(
    lambda p, f: MODEL.sample(
      p, f, rows['label'], rng.split_rows(keys, 'fakes'), sampler
    )
  )(params, frozen)
  np.testing.assert_array_equal(skipped.other.x, x)
  np.testing.assert_array_equal(skipped.real.label, skipped.other.label)
  np.testing.assert_array_equal(skipped.real.x, tokens(0).x)
  # Unrounded: the decoder's image, not the uint8 one.
  apply = functools.partial(
    tiny_var.TINY_TOKENIZER.apply, {'params': frozen['tokenizer']}
  )
  image = apply(apply(x, method='f_hat'), method='decode')
  again = apply(image, method='encode')
  np.testing.assert_array_equal(settled.other.x, again)
  assert np.any(again != x)


@pytest.mark.parametrize('network', ['var', 'raster'])
def test_a_guide_has_the_labels_that_the_model_has(network):
  """The likeliest token of (1 + t) logits − t the guide's; t = 2."""
  model, params, frozen = build(network)
  if network == 'var':
    guide = model
  else:
    guide = dataclasses.replace(RASTER, width=16, hidden=4).build()
  guide_params = tiny_var.filled(jax.eval_shape(guide.init, rng.stream(0)), 7)
  label = jnp.arange(6, dtype=jnp.int32) % tiny_var.CLASSES
  keys = rng.per_example(rng.stream(4), jnp.arange(6, dtype=jnp.uint32))
  drawn = jax.jit(model.guided_by(guide).sample, static_argnums=4)
  sampler = ancestral.Ancestral(3.0, 'constant', top_k=1)
  with_guide = frozen | {'guide': guide_params}
  tokens = drawn(params, with_guide, label, keys, sampler)
  assert np.any(tokens != drawn(params, frozen, label, keys, sampler))
  plain = sampler.unguided()
  np.testing.assert_array_equal(
    drawn(params, with_guide, label, keys, plain),
    drawn(params, frozen, label, keys, plain),
  )
  vocab = model.network.stages(params, frozen).codebook.shape[0]

  @jax.jit
  def score(token, index):
    """What a token has at a position, given those that were drawn before."""
    other = tokens.at[:, index].set(token)

    def log_prob(net, weights):
      return net.network.token_log_prob(weights, frozen, label, other)[:, index]

    return 3 * log_prob(model, params) - 2 * log_prob(guide, guide_params)

  for index in range(tokens.shape[1]):
    scores = jax.vmap(score, (0, None))(jnp.arange(vocab), index)
    np.testing.assert_array_equal(jnp.argmax(scores, 0), tokens[:, index])


def test_ccas_second_labels_are_dropped_in_the_same_rows():
  _, frozen = tiny_var.weights()
  rows = tiny_var.make_rows(0)
  dropped = first_drop()
  rows |= {'other_label': np.roll(rows['label'], -1), 'id': np.arange(BATCH)}
  phase = config_lib.Phase(
    objective=siblings.CCA(),
    negatives=negatives.OtherLabels(),
    label_drop=DROP,
  )

  @jax.jit  # of all that is computed, only the labels
  def labels(frozen, rows):
    pairs = step_lib.make_pairs(rows, None, frozen, MODEL, phase, None)
    return pairs.real.label, pairs.other.label, pairs.dropped

  step_rows = step_lib.Microbatch(rows, None, first_keys(), dropped)
  label, other_label, pairs_dropped = labels(frozen, step_rows)
  np.testing.assert_array_equal(pairs_dropped, dropped)
  for got, name in ((label, 'label'), (other_label, 'other_label')):
    wanted = np.where(dropped, tiny_var.CLASSES, rows[name])
    np.testing.assert_array_equal(got, wanted)
  assert 0 < dropped.sum() < BATCH
