"""The step at θ = θ_ref, its gradient, and one result on any devices."""

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

from ddo_jax import config
from ddo_jax import rng
from ddo_jax.method import ddo
from ddo_jax.method import likelihood
from ddo_jax.method import noise
from ddo_jax.models import dit
from ddo_jax.models import edm2
from ddo_jax.models import sit
from ddo_jax.models import toy
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.training import state as state_lib
from ddo_jax.training import step as step_lib

BATCH = 16
CLASSES = 3
DROP = 0.3
SHAPE = (4, 4, 1)
ALPHA, BETA = 2.0, 0.05
OBJECTIVE = ddo.DDO(alpha=ALPHA, beta=BETA)


class Case(NamedTuple):
  """How a step is compiled; 'jit' is the bare step, without an executor."""

  kind: str
  devices: int = 1
  accumulate: int = 1
  remat: bool | str = False
  label_drop: float = DROP
  normalize: bool = False
  network: str = 'mlp'
  fsdp_devices: int = 0
  offload: tuple[str, ...] = ()


JIT = Case('jit')
PMAP = Case('pmap', 8)
PMAP_ACCUMULATE = Case('pmap', 8, accumulate=2)
FSDP = Case('fsdp', 8)
HYBRID = Case('fsdp', 8, accumulate=2, fsdp_devices=4)
ZERO1 = Case('zero1', 8, accumulate=2)
OFFLOAD = FSDP._replace(offload=('reference', 'ema'))
EDM2 = [
  Case(kind, n, remat=True, network='edm2')
  for kind, n in (('jit', 1), ('pmap', 8), ('fsdp', 8))
]
SIT = [
  Case(kind, n, network='sit')
  for kind, n in (('jit', 1), ('pmap', 8), ('fsdp', 8))
]
DIT = Case('pmap', 8, accumulate=2, remat=True, network='dit')
NORMALIZED = Case('fsdp', 8, 2, label_drop=0, normalize=True)
# Every setting with more than one executor, not every combination: each is
# compiled, for seconds.
CASES = [
  JIT,
  PMAP,
  PMAP_ACCUMULATE,
  FSDP,
  HYBRID,
  ZERO1,
  OFFLOAD,
  Case('pmap', 1, label_drop=0, normalize=True),
  Case('pmap', 8, remat=True, normalize=True, network='unet'),
  NORMALIZED,
  *EDM2,
  *SIT,
  DIT,
]
NAMES = ['-'.join(map(str, case)) for case in CASES]


def make_rows(seed):
  numbers = np.random.default_rng(seed)
  image = numbers.integers(0, 17, (BATCH, *SHAPE), np.uint8)
  label = np.arange(BATCH, dtype=np.int32) % CLASSES
  return {'stored': image, 'label': label}


LAW = noise.LogNormal(-0.5, 1.2)


def make_model(network='mlp', remat=False):
  if network == 'edm2':
    knobs = edm2.Edm2Config(SHAPE, CLASSES, 4, (1,), 1, (), 4)
  elif network in ('dit', 'sit'):
    kind = {'dit': dit.DitConfig, 'sit': sit.SitConfig}[network]
    knobs = kind(SHAPE, CLASSES, 2, 8, 2, 2, pixel_values=17)
  else:
    knobs = toy.ToyConfig(network, 8, 1, SHAPE, CLASSES)
  return knobs.build(noise=LAW, remat=remat)


def make_params(model):
  """Weights without a zero: at Flax's own, the last layer hides the rest."""
  shapes = jax.eval_shape(model.init, rng.stream(0))
  numbers = np.random.default_rng(0)

  def normal(s):
    return 0.3 * numbers.standard_normal(s.shape, np.float32)

  return model.rules.project(jax.tree.map(normal, shapes))


class Bench:
  """A compiled step and what it takes; counts how often it is traced."""

  def __init__(self, case):
    self.case, self.traces = case, 0
    self.model = make_model(case.network, case.remat)
    self.params = make_params(self.model)
    self.phase = config.Phase(
      objective=ddo.DDO(normalize=case.normalize),
      batch_size=BATCH,
      images=100 * BATCH,
      label_drop=case.label_drop,
      averages=config.Averages(halflife=(100.0,)),
      # Adam's usual 1e-8 turns the rounding noise of a vanishing gradient
      # into a step of full length.
      optimizer=config.Optimizer(adam_eps=1e-3),
    )
    static = {'accumulate': case.accumulate}
    if case.kind == 'jit':
      self.place = self.place_batch = lambda tree: tree
      self.step_fn = jax.jit(functools.partial(self._traced, **static))
      self.reference = jax.tree.map(jnp.copy, self.params)
      return
    settings = config.Executor(
      kind=case.kind, fsdp_devices=case.fsdp_devices, offload=case.offload
    )
    executor = devices_lib.Executor(settings, case.devices)
    self.place, self.place_batch = executor.replicate, executor.place_batch
    self.step_fn = executor.compile_step(self._traced, **static)
    self.reference = placing.place_state(
      executor, self.params, part='reference'
    )
    self._executor = executor

  def _traced(self, *args, **kwargs):
    self.traces += 1
    return step_lib.train_step(*args, **kwargs)

  def start(self):
    transform = self.phase.optimizer.transform(
      self.model.rules, BATCH, self.phase.images
    )
    state = state_lib.create(self.params, transform, self.phase.averages)
    if self.case.kind == 'jit':
      return state
    return placing.place_state(self._executor, state)

  def run(self, steps, alpha=ALPHA, beta=BETA, learning_rate=1e-2, law=LAW):
    """The state after some steps from the reference, and all metrics."""
    phase = dataclasses.replace(
      self.phase,
      objective=dataclasses.replace(
        self.phase.objective, alpha=alpha, beta=beta
      ),
      optimizer=dataclasses.replace(
        self.phase.optimizer, learning_rate=learning_rate
      ),
    )
    model = self.model.replace(noise=law)
    numbers = jax.tree.map(jnp.float32, (model, config.at_round(phase, 0)))
    model, phase, key = self.place((*numbers, rng.stream(0, 'test')))
    state = self.start()
    history = []
    for step in range(steps):
      real, fake = make_rows(2 * step), make_rows(2 * step + 1)
      real['id'] = np.arange(BATCH, dtype=np.uint32) + step * BATCH
      real, fake = self.place_batch((real, fake))
      state, metrics = self.step_fn(
        state, self.reference, {}, real, fake, model, phase, key
      )
      history.append(jax.device_get(metrics))
    return state, history


bench = functools.cache(Bench)


@functools.cache
def ten_steps(case):
  state, history = bench(case).run(10)
  return jax.device_get(state), history


@functools.cache
def first_metrics(case):
  _, history = bench(case).run(1)
  return history[0]


def first_keys():
  """The row keys of step 0, by the definition in `train_step`."""
  ids = jnp.arange(BATCH, dtype=jnp.uint32)
  key = jax.random.fold_in(rng.stream(0, 'test'), 0)
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)


def first_drop(label_drop):
  """Which rows of step 0 lose their label, [B] bool."""
  keys = rng.split_rows(first_keys(), 'label_drop')
  return np.array(jax.vmap(jax.random.uniform)(keys)) < label_drop


def test_the_test_s_batch_has_rows_of_both_kinds():
  assert 0 < first_drop(DROP).sum() < BATCH


@pytest.mark.parametrize('case', CASES, ids=NAMES)
def test_law_1_the_loss_at_the_reference_is_chance(case):
  metrics = first_metrics(case)
  dropped = first_drop(case.label_drop).mean()
  weight_real = dropped * max(ALPHA, 1) + (1 - dropped)
  weight_fake = (1 - dropped) * ALPHA
  divisor = max(ALPHA, 1) if case.normalize else 1
  chance = math.log(2) * (weight_real + weight_fake) / divisor
  assert metrics['loss'] == pytest.approx(chance, rel=1e-5)
  assert metrics['chance_loss'] == pytest.approx(chance, rel=1e-5)
  assert metrics['max_abs_logit'] <= 1e-3
  assert metrics['reference_distance'] == 0
  assert metrics['grad_norm'] > 0.01


@pytest.mark.parametrize('case', CASES, ids=NAMES)
def test_law_1_the_accuracy_at_the_reference_is_one_half(case):
  assert first_metrics(case)['accuracy'] == 0.5


@pytest.mark.parametrize(
  ('network', 'remat'),
  [
    ('mlp', False),
    ('unet', False),
    ('unet', True),
    ('unet', 'dots'),
    ('dit', True),
    ('sit', 'dots'),
  ],
)
def test_law_1_the_log_ratio_to_itself_is_exactly_0(network, remat):
  model = make_model(network, remat)
  params = make_params(model)
  rows = make_rows(0)
  x = model.codec.encode({}, jnp.array(rows['stored']), first_keys())
  batch = likelihood.Batch(x, jnp.array(rows['label']), jnp.arange(BATCH))
  log_ratio = jax.jit(model.log_ratio)
  same, info = log_ratio(params, params, {}, batch, first_keys())
  np.testing.assert_array_equal(same, np.zeros(BATCH))
  metrics = ddo.diagnostics(same, same, info['noise_bin'], 8, OBJECTIVE.logit)
  assert metrics['accuracy'] == 0.5
  # And to another it is the difference of two log-likelihoods.
  other = jax.tree.map(lambda p: p + 0.01, params)
  ratio, _ = log_ratio(other, params, {}, batch, first_keys())
  log_prob = jax.jit(model.log_prob)
  terms = (log_prob(p, {}, batch, first_keys()) for p in (other, params))
  difference = jnp.subtract(*terms)
  assert float(jnp.abs(difference).min()) > 1e-3
  np.testing.assert_allclose(ratio, difference, rtol=1e-3, atol=1e-3)


@functools.cache
def expected_gradient(label_drop, case=JIT):
  """−(β/2) [∇E w_real log p(real) − ∇E w_fake log p(fake)] by autodiff."""
  model, keys = bench(case).model, first_keys()
  dropped = jnp.array(first_drop(label_drop))

  def expectation(params, rows, weight, weight_dropped):
    x = jnp.array(rows['stored'], jnp.float32) / 8 - 1
    label = jnp.where(dropped, CLASSES, rows['label'])
    batch = likelihood.Batch(x, label, jnp.arange(BATCH))
    log_prob = model.log_prob(params, {}, batch, keys)
    return jnp.mean(jnp.where(dropped, weight_dropped, weight) * log_prob)

  @jax.jit
  @jax.grad
  def gradient(params):
    real = expectation(params, make_rows(0), 1, max(ALPHA, 1))
    fake = expectation(params, make_rows(1), ALPHA, 0)
    return -BETA / 2 * (real - fake)

  return gradient(bench(case).params)


@pytest.mark.parametrize(
  ('case', 'divisor'),
  [(JIT, 1), (PMAP_ACCUMULATE, 1), (NORMALIZED, ALPHA), (SIT[0], 1)],
)
def test_law_2_the_gradient_at_the_reference(case, divisor):
  state, _ = bench(case).run(1)
  # Adam's first moment, of zero before, is (1 − b1) of the gradient.
  got = jax.tree.map(lambda m: m / (1 - 0.9), state.opt_state[0].mu)
  same = SIT[0] if case in SIT else JIT
  expected = expected_gradient(case.label_drop, same)
  expected = jax.tree.map(lambda g: g / divisor, expected)
  assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected)) > 0.01
  chex.assert_trees_all_close(
    jax.device_get(got), jax.device_get(expected), rtol=1e-3, atol=1e-5
  )


@pytest.mark.parametrize('case', [JIT, PMAP, FSDP], ids=['jit', 'pmap', 'fsdp'])
def test_law_2_the_reference_never_changes(case):
  before = checkpoint.tree_hash(bench(case).params)
  state, _ = ten_steps(case)
  assert checkpoint.tree_hash(bench(case).reference) == before
  assert checkpoint.tree_hash(state.params) != before


@pytest.mark.parametrize(
  ('case', 'bare'),
  [(case, JIT) for case in (PMAP, PMAP_ACCUMULATE, FSDP, HYBRID, ZERO1)]
  + [(case, EDM2[0]) for case in EDM2[1:]]
  + [(case, SIT[0]) for case in SIT[1:]],
  ids=[
    'pmap',
    'accumulate',
    'fsdp',
    'hybrid',
    'zero1',
    'edm2-pmap',
    'edm2-fsdp',
    'sit-pmap',
    'sit-fsdp',
  ],
)
def test_law_3_one_result_on_any_devices(case, bare):
  state, history = ten_steps(case)
  expected_state, expected = ten_steps(bare)
  for name in ('loss', 'mle_loss', 'margin', 'grad_norm', 'learning_rate'):
    series = [[m[name] for m in h] for h in (history, expected)]
    # float32 sums of other orders; what is near 0 cancels.
    np.testing.assert_allclose(*series, rtol=1e-4, atol=1e-4, err_msg=name)
  # What a device counted is there, of all devices.
  counts = history[-1]['logit_real_histogram']
  assert counts.sum() == BATCH
  np.testing.assert_array_equal(counts, expected[-1]['logit_real_histogram'])
  np.testing.assert_allclose(
    history[-1]['log_ratio_fake_p95'],
    expected[-1]['log_ratio_fake_p95'],
    rtol=1e-3,
  )
  assert expected[-1]['max_abs_logit'] > 0.01  # ten steps went somewhere
  trees = [(s.params, s.ema) for s in (state, expected_state)]
  chex.assert_trees_all_close(*trees, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('case', [JIT, PMAP, FSDP], ids=['jit', 'pmap', 'fsdp'])
def test_law_7_nothing_is_traced_twice(case, caplog):
  ten_steps(case)
  assert bench(case).traces == 1
  with jax.log_compiles():
    _, history = bench(case).run(
      3,
      alpha=3.0,
      beta=0.1,
      learning_rate=1e-3,
      law=noise.LogNormal(-0.4, 2.0),
    )
  assert bench(case).traces == 1
  assert not [m for m in caplog.messages if '_traced' in m]
  # The new values were heeded.
  assert history[0]['learning_rate'] == pytest.approx(1e-3)
  dropped = first_drop(DROP).mean()
  expected = math.log(2) * (dropped * 3 + (1 - dropped) * 4)
  assert history[0]['loss'] == pytest.approx(expected, rel=1e-5)


def test_what_is_offloaded_is_equal_to_the_bit_and_stays_there():
  state, _ = bench(OFFLOAD).run(10)
  kinds = {
    field.name: {a.sharding.memory_kind for a in jax.tree.leaves(part)}
    for field in dataclasses.fields(state)
    for part in [getattr(state, field.name)]
  }
  assert kinds.pop('ema') == {'pinned_host'}
  assert set.union(*kinds.values()) == {'device'}
  reference = jax.tree.leaves(bench(OFFLOAD).reference)
  assert {a.sharding.memory_kind for a in reference} == {'pinned_host'}
  expected, _ = ten_steps(FSDP)
  chex.assert_trees_all_equal(jax.device_get(state), expected)
  assert bench(OFFLOAD).traces == 1


def test_projected_weights_stay_projected():
  """EDM2's after ten steps: θ, its average and the reference alike."""
  state, _ = ten_steps(EDM2[1])
  average = next(iter(state.ema.values()))
  for params in (state.params, average, bench(EDM2[1]).reference):
    kernel = np.asarray(params['network']['emb_noise']['kernel'])
    rms = np.sqrt(np.mean(kernel**2, axis=0))
    np.testing.assert_allclose(rms, 1, rtol=1e-3)


def test_real_and_fake_rows_alternate():
  real, fake = {'a': jnp.arange(3)}, {'a': 10 + jnp.arange(3)}
  pairs = step_lib.interleave(real, fake)
  assert pairs['a'].tolist() == [0, 10, 1, 11, 2, 12]
  first, second = step_lib.split_pairs(pairs)
  np.testing.assert_array_equal(first['a'], real['a'])
  np.testing.assert_array_equal(second['a'], fake['a'])


def test_samples_of_a_step_are_rounded_to_pixel_values():
  """As if they had been stored: or else the discriminator sees it."""
  model = make_model()
  x = jnp.linspace(-1, 1, 3 * 16).reshape(3, *SHAPE)
  got = model.codec.round_trip({}, x, first_keys()[:3])
  np.testing.assert_array_equal(got * 8, np.round(got * 8))
  np.testing.assert_allclose(got, x, atol=1 / 16 + 1e-6)
  assert np.any(got != x)
