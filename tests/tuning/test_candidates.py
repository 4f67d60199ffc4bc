"""Merges and post-hoc averages: exact ends, and averages that were tracked."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import placing
import pytest
from training import test_loop

from ddo_jax import config as config_lib
from ddo_jax.method import likelihood
from ddo_jax.models import edm2
from ddo_jax.models import edm2_layers
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.training import averages as averages_lib
from ddo_jax.training import loop as loop_lib
from ddo_jax.tuning import candidates

WIDTHS = (0.05, 0.1)


@pytest.fixture(name='executor', scope='module')
def fixture_executor():
  return devices_lib.Executor(config_lib.Executor(), num_devices=1)


def weights_of(seed, executor):
  random = np.random.default_rng(seed)
  tree = {
    'layer': {
      'kernel': random.normal(size=(3, 3, 4, 8)).astype(np.float32),
      'gain': random.normal(size=()).astype(np.float32),
    }
  }
  return placing.place_state(executor, tree)


def test_merges_begin_and_end_to_the_bit(executor):
  reference = weights_of(0, executor)
  params = weights_of(1, executor)
  made = candidates.merges(
    reference, params, (0.0, 1.0, 2.0), likelihood.WeightRules(), executor
  )
  assert isinstance(made, types.GeneratorType)  # none is made before its turn
  found = dict(made)
  assert list(found) == ['merge_0', 'merge_1', 'merge_2']
  assert found['merge_0'] is reference
  assert found['merge_1'] is params
  for name, leaf in found['merge_2']['layer'].items():
    start = np.asarray(reference['layer'][name], np.float64)
    end = np.asarray(params['layer'][name], np.float64)
    np.testing.assert_allclose(leaf, 2 * end - start, rtol=1e-5, atol=1e-6)
    assert leaf.sharding == params['layer'][name].sharding


def test_a_merge_stays_where_weights_are_constrained_to(executor):
  """EDM2's kernels have one length; the mean of two has not, until projected.

  Free weights are merged as they are.
  """
  rules = edm2.SphereRules()
  ends = []
  for seed in (0, 1):
    projected = rules.project(weights_of(seed, executor))
    ends.append(placing.place_state(executor, projected))
  ((_, half),) = candidates.merges(*ends, (0.5,), rules, executor)
  kernels = [end['layer']['kernel'] for end in ends]
  wanted = edm2_layers.normalize_kernel(jnp.mean(jnp.stack(kernels), axis=0))
  np.testing.assert_allclose(
    half['layer']['kernel'], wanted, rtol=1e-5, atol=1e-6
  )
  gains = [float(end['layer']['gain']) for end in ends]
  assert float(half['layer']['gain']) == pytest.approx(np.mean(gains))


def new_job(executor, folder, evaluate=None):
  """A round that tracks two power-function averages and keeps them."""
  job = test_loop.new_job(executor, folder, evaluate)
  averages = config_lib.Averages(width=WIDTHS)
  phase = dataclasses.replace(job.phase, averages=averages)
  return dataclasses.replace(job, phase=phase, keep_averages=True)


def test_an_average_that_was_not_tracked(executor, tmp_path):
  """It comes near to the average itself, of a path of 1,200 steps."""
  job = new_job(executor, tmp_path)
  path = np.cumsum(np.random.default_rng(2).normal(size=(1_200, 50)), axis=0)
  steps = (0, 300, 600, 900, 1_200)  # and the last is not looked at
  batch_size = job.phase.batch_size
  ends = batch_size * np.arange(1.0, len(path) + 1)
  followed = dict.fromkeys((*WIDTHS, 0.075), path[0])
  weights = {
    width: np.asarray(averages_lib.power_weight(width, batch_size, ends))
    for width in followed
  }
  for step, params in enumerate(path, start=1):
    for width, average in followed.items():
      weight = weights[width][step - 1]
      followed[width] = average + weight * (params - average)
    if step in steps:
      for name, width in zip(
        ('power_0.050', 'power_0.100'), WIDTHS, strict=True
      ):
        folder = loop_lib.averages_folder(job.folder, step) / name
        tree = {'w': followed[width].astype(np.float32)}
        checkpoint.save_params(folder, tree, {})
    if step == 900:
      wanted = dict(followed)
  shapes = {'w': jax.ShapeDtypeStruct((50,), np.float32)}
  target = checkpoint.abstract(shapes, executor.state_shardings(shapes))
  made = candidates.posthoc(job, steps, 900, (0.05, 0.075), target)
  assert isinstance(made, types.GeneratorType)
  found = dict(made)
  assert list(found) == ['posthoc_0.050', 'posthoc_0.075']
  # What was tracked is found again; what was not is much nearer than both.
  np.testing.assert_allclose(
    found['posthoc_0.050']['w'], wanted[0.05], rtol=1e-5
  )

  def distance(width):
    return np.linalg.norm(
      np.asarray(found['posthoc_0.075']['w']) - wanted[width]
    )

  assert distance(0.075) < 0.3 * min(distance(0.05), distance(0.1))
  assert list(candidates.posthoc(job, steps, 0, (0.05,), target)) == []


def test_a_phase_keeps_the_averages_of_evaluated_states(executor, tmp_path):
  seen = {}

  def evaluate(params, folder):
    step = int(folder.parent.name)
    seen[step, folder.name] = checkpoint.tree_hash(params)
    return {'fd_train': float(step)}

  job = new_job(executor, tmp_path, evaluate)
  loop_lib.run(job)
  kept = {
    (int(path.parent.name), path.name): checkpoint.load_meta(path)['sha256']
    for path in job.folder.glob('averages/*/*')
  }
  # The averages of step 0 are the reference.
  assert kept == {place: sha for place, sha in seen.items() if place[0]}
  assert len(kept) == 4
  # Nothing is kept unasked.
  unasked = new_job(executor, tmp_path / 'unasked', evaluate)
  loop_lib.run(dataclasses.replace(unasked, keep_averages=False))
  assert not (unasked.folder / 'averages').exists()
