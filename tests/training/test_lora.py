"""Low-rank adapters: where they start, their gradient, what leaves them."""

import dataclasses
import math

import chex
import interruption
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import test_loop
from training import test_step

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import rng
from ddo_jax import settings
from ddo_jax.method import ddo
from ddo_jax.method import likelihood
from ddo_jax.models import toy
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import layout as layout_lib
from ddo_jax.runtime import memory
from ddo_jax.runtime import records
from ddo_jax.samplers import heun
from ddo_jax.training import averages
from ddo_jax.training import fit
from ddo_jax.training import loop as loop_lib
from ddo_jax.training import lora as lora_lib
from ddo_jax.training import state as state_lib
from ddo_jax.training import step as step_lib

RANK = 2
LORA = lora_lib.Lora(rank=RANK)
KEY = rng.stream(3)


def make_params(shapes):
  numbers = np.random.default_rng(0)
  return jax.tree.map(
    lambda shape: numbers.standard_normal(shape).astype(np.float32),
    shapes,
    is_leaf=lambda node: isinstance(node, tuple),
  )


SHAPES = {
  'wide': {'kernel': (6, 9), 'bias': (9,)},
  'table': {'embedding': (12, 6)},
  'conv': {'kernel': (3, 3, 4, 8)},
  'blocks': {'proj': {'kernel': (5, 6, 7)}, 'scale': (5, 6)},
  'narrow': {'kernel': (6, 1)},
}


def moved(factors):
  """Gives the second factor of each difference numbers of its own."""

  def up(shape):
    return 0.1 * jnp.cos(jnp.arange(math.prod(shape))).reshape(shape)

  return {n: {**f, 'up': up(f['up'].shape)} for n, f in factors.items()}


def test_what_is_adapted_and_where_it_starts():
  params = make_params(SHAPES)
  factors = LORA.start(params, KEY)
  shapes = {
    name: (factor['down'].shape, factor['up'].shape)
    for name, factor in factors.items()
  }
  assert shapes == {
    'wide.kernel': ((6, 2), (2, 9)),
    'conv.kernel': ((36, 2), (2, 8)),
    'blocks.proj.kernel': ((5, 6, 2), (5, 2, 7)),
    'narrow.kernel': ((6, 1), (1, 1)),
  }
  chex.assert_trees_all_equal(LORA.merge(params, factors), params)
  for factor in factors.values():
    down = factor['down']
    rows, rank = down.shape[-2:]
    gram = jnp.swapaxes(down, -1, -2) @ down
    wanted = jnp.broadcast_to(rows / rank * jnp.eye(rank), gram.shape)
    np.testing.assert_allclose(gram, wanted, atol=1e-5)
  # Each matrix has a draw of its own, a stacked one too.
  stack = factors['blocks.proj.kernel']['down']
  assert not np.allclose(stack[0], stack[1])
  assert not np.allclose(stack[0], factors['wide.kernel']['down'])


def test_a_merge_moves_adapted_leaves_alone():
  params = make_params(SHAPES)
  factors = moved(LORA.start(params, KEY))
  merged = LORA.merge(params, factors)
  for path in (('wide', 'bias'), ('table', 'embedding'), ('blocks', 'scale')):
    first, second = path
    np.testing.assert_array_equal(merged[first][second], params[first][second])
  factor = factors['conv.kernel']
  for tap in range(9):  # of 3×3
    product = factor['down'][4 * tap : 4 * tap + 4] @ factor['up']
    kernel = params['conv']['kernel'][tap // 3, tap % 3] + product
    found = merged['conv']['kernel'][tap // 3, tap % 3]
    np.testing.assert_allclose(found, kernel, rtol=1e-5)
  factor = factors['blocks.proj.kernel']
  for block in range(5):
    product = factor['down'][block] @ factor['up'][block]
    kernel = params['blocks']['proj']['kernel'][block] + product
    found = merged['blocks']['proj']['kernel'][block]
    np.testing.assert_allclose(found, kernel, rtol=1e-5)


def test_of_full_rank_the_first_step_is_that_of_the_weights():
  params = make_params({'kernel': (6, 9)})
  numbers = np.random.default_rng(1)
  direction = numbers.standard_normal((6, 9)).astype(np.float32)

  def step(rank, key=KEY):
    lora = lora_lib.Lora(rank)
    factors = lora.start(params, key)

    def loss(trained):
      return jnp.sum(direction * lora.merge(params, trained)['kernel'])

    grads = jax.grad(loss)(factors)
    after = jax.tree.map(lambda leaf, grad: leaf - grad, factors, grads)
    return lora.merge(params, after)['kernel'] - params['kernel']

  np.testing.assert_allclose(step(6), -direction, atol=1e-5)
  np.testing.assert_allclose(step(6), step(7), atol=1e-5)
  keys = jax.random.split(KEY, 2_000)
  mean = jnp.mean(jax.vmap(lambda key: step(2, key))(keys), axis=0)
  np.testing.assert_allclose(mean, -direction, atol=0.15)


def test_a_model_without_matrices_is_refused():
  params = make_params({'bias': (9,), 'mean': (3, 4)})
  with pytest.raises(errors.UserError, match='no leaf of the params is called'):
    LORA.start(params, KEY)


@pytest.fixture(scope='module')
def step_case():
  """A model, its params, a phase of low rank and the rows of a step."""
  model = test_step.make_model()
  params = test_step.make_params(model)
  phase = config_lib.Phase(
    objective=ddo.DDO(alpha=2.0, beta=0.05),
    batch_size=test_step.BATCH,
    images=100 * test_step.BATCH,
    averages=config_lib.Averages(halflife=(100.0,)),
    lora=LORA,
    optimizer=config_lib.Optimizer(learning_rate=1e-2),
  )
  ids = np.arange(test_step.BATCH, dtype=np.uint32)
  rows = step_lib.Microbatch(
    real={**test_step.make_rows(1), 'id': ids},
    fake=test_step.make_rows(2),
    keys=rng.per_example(rng.stream(0), ids),
    dropped=np.zeros(test_step.BATCH, bool),
  )
  return model, params, phase, rows


def test_the_gradient_is_the_chain_rule_through_the_merged_weights(step_case):
  model, params, phase, rows = step_case
  factors = moved(LORA.start(params, KEY))

  @jax.jit
  def both(factors):
    _, _, ours = step_lib.gradient_of(
      factors, params, {}, rows, model, phase, None
    )
    whole = dataclasses.replace(phase, lora=lora_lib.Lora())
    theta = LORA.merge(params, factors)
    _, _, theirs = step_lib.gradient_of(
      theta, params, {}, rows, model, whole, None
    )
    return ours, theirs

  ours, theirs = both(factors)
  kernels = {
    '.'.join(key.key for key in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(theirs)
  }
  assert ours.keys() < kernels.keys()
  for name, factor in factors.items():
    kernel = kernels[name]
    wanted = {'down': kernel @ factor['up'].T, 'up': factor['down'].T @ kernel}
    for side, leaf in wanted.items():
      size = np.abs(leaf).max()
      assert size > 1e-6
      np.testing.assert_allclose(ours[name][side], leaf, atol=1e-3 * size)


def low_rank(executor, folder):
  """Returns a job of a round of low rank, of which nothing is evaluated."""
  job = test_loop.new_job(executor, folder)
  phase = dataclasses.replace(
    test_loop.PHASE, lora=LORA, averages=config_lib.Averages(halflife=(30.0,))
  )
  return dataclasses.replace(job, phase=phase)


@pytest.fixture(scope='module')
def played(tmp_path_factory):
  """A job, which was played under pmap, and the weights of its last state."""
  executor = devices_lib.Executor(config_lib.Executor())
  folder = tmp_path_factory.mktemp('played')
  job = low_rank(executor, folder)
  promotion = loop_lib.run(job)
  return job, jax.device_get(promotion.params), records.read_log(folder)


def test_a_round_starts_at_chance_and_ends_in_plain_weights(played):
  job, found, logged = played
  reference = jax.device_get(job.reference)
  chex.assert_trees_all_equal_shapes_and_dtypes(found, reference)
  changes = jax.tree_util.tree_leaves_with_path(
    jax.tree.map(lambda a, b: np.abs(a - b).max(), found, reference)
  )
  for path, change in changes:
    assert (change > 1e-3) == (path[-1].key == 'kernel')
  assert logged[0]['reference_distance'] == 0.0
  chance = logged[0]['chance_loss']
  assert logged[0]['loss'] == pytest.approx(chance, rel=1e-6)
  assert logged[-1]['reference_distance'] > 1e-2


def test_law_4_a_killed_round_goes_on_from_its_factors(played, tmp_path):
  job, found, _ = played
  judged = []

  def judge(params, folder):
    del folder
    judged.append(jax.device_get(params))
    return {'fd_train': 9.0 - len(judged)}

  log = records.MetricsLog(tmp_path)
  job = dataclasses.replace(job, folder=tmp_path, log=log, evaluate=judge)
  interruption.interrupted(job, 7)
  again = loop_lib.run(dataclasses.replace(job, start=None))
  assert (again.step, len(judged)) == (test_loop.STEPS, 3)
  chex.assert_trees_all_equal(judged[0], jax.device_get(job.reference))
  chex.assert_trees_all_equal(judged[-1], found)
  chex.assert_trees_all_equal(jax.device_get(again.params), found)


def test_law_3_fsdp_and_microbatches_train_the_same(played, tmp_path):
  _, found, _ = played
  fsdp = devices_lib.Executor(config_lib.Executor(kind='fsdp'))
  job = dataclasses.replace(low_rank(fsdp, tmp_path), accumulate=2)
  params = loop_lib.run(job).params
  kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
  assert any(not leaf.sharding.is_fully_replicated for leaf in kernels)
  chex.assert_trees_all_close(
    jax.device_get(params), found, rtol=1e-3, atol=1e-4
  )


def test_averages_of_factors_stand_for_those_of_weights(played):
  job, found, _ = played
  step = loop_lib._compile_step(job)
  state = loop_lib._fresh_state(job)
  reference = jax.device_get(job.reference)
  wanted = reference
  for real, fake in loop_lib.batches(job, 0):
    [weight] = job.phase.averages.weights(state.step, job.phase.batch_size)
    state, _ = step(state, real, fake)
    theta = LORA.merge(reference, jax.device_get(state.params))
    wanted = averages.update(wanted, theta, weight)
  [trained] = state.ema.values()
  average = LORA.merge(reference, jax.device_get(trained))
  chex.assert_trees_all_close(average, found, rtol=1e-5)  # it was promoted

  def apart(first, second):
    return optax.tree.norm(jax.tree.map(jnp.subtract, first, second))

  distance = apart(wanted, reference)
  assert apart(theta, wanted) > 0.1 * distance
  assert apart(average, wanted) < 0.01 * distance


def test_weights_go_back_on_the_sphere():
  model = test_step.make_model('edm2')
  params = test_step.make_params(model)
  factors = moved(LORA.start(params, KEY))
  dtypes = tuple(leaf.dtype for leaf in jax.tree.leaves(params))
  plain = lora_lib.plain(LORA, model.rules, dtypes)(params, factors)
  kernel = plain['network']['enc_4x4_conv']['kernel']
  norms = jnp.sqrt(jnp.mean(kernel**2, axis=(0, 1, 2)))
  np.testing.assert_allclose(norms, 1.0, atol=1e-3)
  # The factors themselves are free.
  assert LORA.rules(model.rules) == likelihood.WeightRules()
  assert lora_lib.Lora().rules(model.rules) == model.rules


def test_a_reduced_reference_is_merged_into_whole_types():
  params = make_params({'kernel': (6, 9), 'bias': (9,)})
  reduced = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  factors = LORA.start(reduced, KEY)
  assert factors['kernel']['down'].dtype == jnp.float32
  merge = lora_lib.plain(LORA, likelihood.WeightRules(), (np.float32,) * 2)
  rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), reduced)
  chex.assert_trees_all_equal(merge(reduced, factors), rounded)
  # In a step θ is as its reference, and the same to a forward pass.
  factors = moved(factors)
  theta = jax.jit(LORA.merge)(reduced, factors)
  chex.assert_trees_all_equal_shapes_and_dtypes(theta, reduced)
  found = merge(reduced, factors)
  chex.assert_trees_all_equal_shapes_and_dtypes(found, params)
  assert not np.array_equal(found['kernel'], rounded['kernel'])
  found = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), found)
  chex.assert_trees_all_equal(found, theta)


def test_what_stands_is_counted_to_the_byte():
  config = toy.ToyConfig(hidden=64, blocks=3)
  phase = config_lib.at_round(
    config_lib.Phase(
      batch_size=16,
      lora=lora_lib.Lora(rank=4),
      averages=config_lib.Averages(halflife=(30.0, 60.0)),
    ),
    0,
  )

  def build(remat):
    return config.build(noise=phase.noise, remat=remat)

  stage = fit.Stage('ddo', phase, build, {}, None)
  layout = layout_lib.Layout(layout_lib.ExecutorConfig(), 1)
  model = build(False)
  params = model.init(rng.stream(0))
  state = state_lib.at_start(params, model.rules, phase)
  held = memory.size_of(state.params)
  kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
  assert held < memory.size_of(kernels) / 4
  found = fit.standing_to_sample(stage, layout)
  assert found == {
    'params': held,
    'moments': memory.size_of(state.opt_state) + 4,
    'averages': 2 * held,
    'reference': memory.size_of(params),
    'frozen': 0,
    'merged': memory.size_of(params),
  }
  assert found['moments'] == pytest.approx(2 * held, abs=16)
  parts = fit.step_parts(stage, layout, accumulate=2, remat=False)
  assert parts['gradient'] == 2 * held
  # The merged weights stand while the gradient is computed.
  whole = dataclasses.replace(phase, lora=lora_lib.Lora())
  whole = fit.Stage('ddo', whole, build, {}, None)
  both = fit.step_parts(whole, layout, accumulate=2, remat=False)
  assert 'merged' not in fit.standing(whole, layout)
  assert sum(parts.values()) < sum(both.values())


def test_settings_that_make_no_sense_are_one_line_each():
  config = config_lib.Config(model=toy.ToyConfig(), sampler=heun.Heun())
  config.pretrain.lora.rank = 4
  with pytest.raises(errors.UserError, match=r'pretrain\.lora\.rank is 4'):
    config_lib.validate(config)
  config.pretrain.lora.rank = 0
  config.ddo.lora.rank = 4
  config.ddo.rhythm.eval_images = 512
  config_lib.validate(config)
  config.tune.members = 4
  with pytest.raises(errors.UserError, match='0 where the probe is asked'):
    config_lib.validate(config)
  config.tune.alpha = (0.5, 2.0)
  config.tune.beta = (0.05, 0.2)
  config.tune.learning_rate = (1e-3, 2e-3)
  config_lib.validate(config)


def test_a_run_of_an_earlier_version_trained_the_weights():
  config = config_lib.Config()
  recorded = settings.to_json(config)
  for name in config_lib.PHASES:
    recorded = {
      field: value
      for field, value in recorded.items()
      if not field.startswith(f'{name}.lora')
    }
  assert len(recorded) < len(settings.to_json(config))
  assert settings.science_changes(config, recorded) == []
  config.ddo.lora.rank = 4
  [line] = settings.science_changes(config, recorded)
  assert 'ddo.lora.rank' in line
