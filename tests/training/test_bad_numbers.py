"""Steps whose loss or gradient is not finite, or far above the usual."""

import dataclasses

import chex
from flax import struct
import interruption
import jax
import jax.numpy as jnp
import numpy as np
import placing
import pytest
from strangers import tiny
import test_loop

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.method import ddo
from ddo_jax.method import diffusion
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.training import bad_numbers
from ddo_jax.training import loop as loop_lib
from ddo_jax.training import state as state_lib
from ddo_jax.training import step as step_lib

BATCH, STEPS = test_loop.BATCH, test_loop.STEPS
NAN, INFINITE, SPIKE = 3, 4, 11  # the steps at which one row goes bad


def stopped(x):
  return jax.lax.stop_gradient(x)


@struct.dataclass
class Faulty(diffusion.Diffusion):
  """A stranger's model, in which a row of some steps goes bad."""

  nan: int = struct.field(pytree_node=False, default=NAN)

  def log_ratio(self, params, reference, frozen, batch, keys):
    ratio, info = super().log_ratio(params, reference, frozen, batch, keys)

    def is_row(step):
      return batch.id == step * BATCH + 5

    ratio = jnp.where(is_row(self.nan), jnp.nan, ratio)
    # The loss stays what it is, and the gradient does not.
    steep = jnp.where(is_row(INFINITE), 1e30, 0)
    steep = jnp.where(is_row(SPIKE), 1e5, steep)
    return ratio + steep * (ratio - stopped(ratio)), info


def faulty(nan=NAN):
  return Faulty(**vars(test_loop.MODEL), nan=nan)


SKIP = config_lib.BadNumbers(policy='skip', spike=30.0)


def phase_of(rule):
  return config_lib.Phase(
    objective=ddo.DDO(alpha=2.0, beta=0.1),
    images=STEPS * BATCH,
    batch_size=BATCH,
    optimizer=config_lib.Optimizer(
      learning_rate=1e-2, warmup_images=STEPS * BATCH
    ),
    averages=config_lib.Averages(halflife=(30.0,)),
    bad_numbers=rule,
    rhythm=config_lib.Rhythm(save_images=4 * BATCH, log_images=5 * BATCH),
  )


@pytest.fixture(autouse=True)
def settled_early(monkeypatch):
  monkeypatch.setattr(bad_numbers, 'SETTLED', 4)


@pytest.fixture(scope='module')
def executor():
  """Of two devices; it keeps the compiled steps."""
  return devices_lib.Executor(config_lib.Executor(), 2)


@pytest.fixture
def make_job(executor, tmp_path):
  def make(rule=SKIP, nan=NAN, name='run'):
    job = test_loop.new_job(executor, tmp_path / name)
    return dataclasses.replace(job, phase=phase_of(rule), model=faulty(nan))

  return make


def bad_steps(job):
  found = [r for r in job.log.read() if r['kind'] == 'bad']
  return {record['step']: record['reason'] for record in found}


def test_bad_steps_are_skipped_counted_and_skipped_again(make_job):
  job = make_job()
  whole = loop_lib.run(job)
  assert all(map(jnp.all, map(jnp.isfinite, jax.tree.leaves(whole.params))))
  found = bad_steps(job)
  assert list(found) == [NAN, INFINITE, SPIKE]
  assert found[NAN] == 'loss is nan'
  assert found[INFINITE] == 'grad_norm is inf'
  assert 'more than 30 times' in found[SPIKE]
  # Killed after the save at 4, when 3 is behind it and 4 was seen.
  other = make_job(name='other')
  interruption.interrupted(other, 7)
  again = loop_lib.run(make_job(name='other'))
  hashes = [checkpoint.tree_hash(p.params) for p in (whole, again)]
  assert hashes[0] == hashes[1]
  assert bad_steps(other) == found


def step_of(executor, rule, accumulate, step):
  """Returns a state before and after one step, and the step's metrics."""
  run = executor.compile_step(step_lib.train_step, accumulate=accumulate)
  phase, model = phase_of(rule), faulty()
  params = test_loop.make_params(executor)
  state = state_lib.at_start(params, model.rules, phase)
  # Twenty steps of gradients of norm 1 are behind it.
  adam = state.opt_state[0]
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  mean = (1 - 0.999**20) / size
  nu = jax.tree.map(lambda leaf: jnp.full_like(leaf, mean), adam.nu)
  adam = adam._replace(nu=nu, count=jnp.int32(20))
  state = state.replace(opt_state=(adam, *state.opt_state[1:]))
  state = state_lib.at_step(state, jnp.int32(step))
  before = jax.device_get(state)
  stored = [
    test_loop.make_source('', seed).read(np.arange(BATCH)) for seed in (1, 2)
  ]
  real, fake = ({'stored': rows, 'label': label} for rows, label in stored)
  real['id'] = np.arange(BATCH, dtype=np.uint32) + step * BATCH
  real, fake = executor.place_batch((real, fake))
  numbers = jax.tree.map(jnp.float32, (model, phase))
  key = rng.stream(0)
  model, phase, key = executor.replicate((*numbers, key))
  state = placing.place_state(executor, state)
  after, metrics = run(state, params, {}, real, fake, model, phase, key)
  return before, jax.device_get(after), jax.device_get(metrics)


@pytest.mark.parametrize('kind', ('pmap', 'fsdp'))
def test_a_row_on_one_device_makes_the_step_bad_on_all(kind):
  executor = devices_lib.Executor(config_lib.Executor(kind=kind), 2)
  for step in (NAN, INFINITE, SPIKE):
    before, after, metrics = step_of(executor, SKIP, 2, step)
    assert metrics['bad']
    assert after.step == step + 1
    assert after.opt_state[-1].count == step + 1  # of the schedule
    for name in ('params', 'ema'):
      chex.assert_trees_all_equal(getattr(before, name), getattr(after, name))
    chex.assert_trees_all_equal(before.opt_state[0], after.opt_state[0])
  before, after, metrics = step_of(executor, SKIP, 2, 2)
  assert not metrics['bad']
  assert after.opt_state[0].count == 21
  difference = jax.tree.map(np.subtract, before.params, after.params)
  assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(difference)) > 0


def test_the_limit_stops_and_law_1_holds_at_the_first_good_step(
  make_job, monkeypatch
):
  rule = dataclasses.replace(SKIP, limit=2)
  job = make_job(rule, nan=0)
  for _ in range(2):  # the count is not forgotten, whatever becomes of the log
    job.log.path.unlink(missing_ok=True)
    with pytest.raises(errors.UserError) as caught:
      loop_lib.run(job)
    line = str(caught.value)
    assert line.startswith(f'round_000 step {INFINITE}: grad_norm is inf, and')
    assert f'{job.folder / "checkpoints" / "4"}; lower' in line
    assert 'bad_numbers.limit' in line
  assert list(bad_steps(job)) == [0, INFINITE]
  fetch = devices_lib.fetch

  def changed(tree):
    metrics, unjudged = fetch(tree)
    return metrics | {'loss': metrics['loss'] + 1}, unjudged

  monkeypatch.setattr(devices_lib, 'fetch', changed)
  with pytest.raises(errors.UserError, match=r'step 1: .* two passes'):
    loop_lib.run(make_job(rule, nan=0, name='other'))


def test_a_run_that_stopped_goes_on_under_another_policy(make_job):
  rule = config_lib.BadNumbers(spike=30.0)
  with pytest.raises(errors.UserError, match=r'step 3: loss is nan; last good'):
    loop_lib.run(make_job(rule))
  job = make_job()
  loop_lib.run(job)
  assert list(bad_steps(job)) == [NAN, INFINITE, SPIKE]


def test_the_log_of_an_earlier_version_counts(make_job, monkeypatch):
  """Its checkpoints held a list of evaluations, and no bad steps."""
  save = checkpoint.Checkpoints.save

  def formerly(checkpoints, state, step, notes, **kept):
    save(checkpoints, state, step, notes['evaluations'], **kept)

  rule = dataclasses.replace(SKIP, limit=3)
  job = make_job(rule)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpoints, 'save', formerly)
    interruption.interrupted(job, 9)
  assert list(bad_steps(job)) == [NAN, INFINITE]
  with pytest.raises(errors.UserError, match=f'step {SPIKE}: .* 3, is at its'):
    loop_lib.run(job)


def trained_by(job, steps):
  """The average of the weights after some steps and no others."""
  step_fn = loop_lib._compile_step(job)
  state = loop_lib._fresh_state(job)
  for step in steps:
    state = state_lib.at_step(state, job.executor.replicate(np.int32(step)))
    state = placing.place_state(job.executor, state)
    rows = loop_lib.batches(job, step)
    state, _ = step_fn(state, *next(rows))
    rows.close()
  return checkpoint.tree_hash(state.ema['halflife_30'])


def test_law_4_a_rollback_leaves_out_what_came_since_a_save(make_job):
  """It goes from 3 back to 0, from 4 to 4, and from 11 to 8."""
  rule = dataclasses.replace(SKIP, policy='rollback')
  job = make_job(rule)
  whole = checkpoint.tree_hash(loop_lib.run(job).params)
  assert list(bad_steps(job)) == [NAN, INFINITE, SPIKE]
  assert whole == trained_by(job, (5, 6, 7))
  # Killed before anything is saved, between two rollbacks, and after a save.
  other = make_job(rule, name='other')
  for step in (2, 7, 10):
    interruption.interrupted(other, step)
  assert checkpoint.tree_hash(loop_lib.run(other).params) == whole
  assert bad_steps(other) == bad_steps(job)
  # Saves by the clock, here at every step, are not what it goes back to.
  often = make_job(rule, name='often')
  rhythm = dataclasses.replace(often.phase.rhythm, save_minutes=1e-9)
  phase = dataclasses.replace(often.phase, rhythm=rhythm)
  often = dataclasses.replace(often, phase=phase)
  assert checkpoint.tree_hash(loop_lib.run(often).params) == whole


def test_values_that_make_no_sense_are_refused():
  for field, value in (('policy', 'skp'), ('spike', 0.5), ('limit', 0)):
    rule = config_lib.BadNumbers(**{field: value})
    with pytest.raises(errors.UserError, match=f'config.ddo.x.{field} is'):
      rule.check('ddo.x')
  config = tiny.get_config()
  config.ddo.bad_numbers.policy = 'rollback'
  wanted = 'config.ddo.rhythm.save_images is 0; it must be positive'
  with pytest.raises(errors.UserError, match=wanted):
    config_lib.validate(config)
