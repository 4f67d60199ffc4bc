"""Settings that are found from counted bytes and the devices' memory."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import rng
from ddo_jax import settings
from ddo_jax.method import negatives
from ddo_jax.models import toy
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import layout
from ddo_jax.runtime import memory
from ddo_jax.samplers import heun
from ddo_jax.training import fit
from ddo_jax.training import state as state_lib
from ddo_jax.training import step as step_lib
from ddo_jax.training import workspace

GIB = 2**30


def stage(batch_size: int = 512, **fields: Any) -> fit.Stage:
  """Returns a phase of the MLP."""
  phase = config_lib.at_round(
    config_lib.Phase(batch_size=batch_size, **fields), 0
  )

  def build(remat):
    return toy.ToyConfig(hidden=64).build(noise=phase.noise, remat=remat)

  return fit.Stage('ddo', phase, build, {}, None)


def plan(devices: int = 1, batch_size: int = 512, **wanted: Any) -> fit.Fit:
  executor = layout.ExecutorConfig(**wanted)
  return fit.plan(
    [stage(batch_size)], executor, devices_lib.Executor(executor, devices)
  )


@pytest.fixture
def a_gib_a_row(monkeypatch):
  """A row takes a GiB, less with remat; another one stands."""
  a_row = {False: 1, 'dots': 0.5, True: 0.125}

  def step_bytes(stage, executor, accumulate, remat):
    rows = stage.phase.batch_size / executor.num_devices / accumulate
    return int((1 + rows * a_row[remat]) * GIB)

  monkeypatch.setattr(fit, 'step_bytes', step_bytes)


def test_where_the_memory_is_unknown_nothing_is_counted(monkeypatch):
  monkeypatch.setattr(fit, 'step_bytes', None)
  assert plan() == (1, False, None, None)
  assert plan(accumulate=4, remat='dots') == (4, 'dots', None, None)
  assert str(plan()) == '1 microbatch a step, remat off'


@pytest.mark.parametrize(
  ('room', 'wanted', 'accumulate', 'remat', 'counted'),
  [
    (1000, {}, 1, False, 513),
    (80, {}, 16, False, 33),  # four fifths of 80 hold 63 rows, not 64
    (80, {'devices': 8}, 2, False, 33),
    (7, {}, 128, False, 5),
    # Fewer than four rows would be left without remat, or with its half.
    (5, {}, 128, 'dots', 3),
    (2.5, {}, 64, True, 2),
    (1.5, {}, 512, True, 1.125),
    (80, {'remat': True}, 2, True, 33),
    (80, {'remat': 'dots'}, 8, 'dots', 33),
    (50, {'accumulate': 8}, 8, 'dots', 33),
    (40, {'accumulate': 8}, 8, True, 9),
    (40, {'accumulate': 16}, 16, 'dots', 17),
    # More than four fifths, but there is nothing else.
    (40, {'accumulate': 16, 'remat': False}, 16, False, 33),
  ],
)
def test_the_fastest_settings_that_fit_are_taken(
  a_gib_a_row, room, wanted, accumulate, remat, counted
):
  found = plan(device_memory_gib=room, **wanted)
  assert found[:2] == (accumulate, remat)
  assert found.counted == counted * GIB
  assert str(found).endswith(f'{counted} of {room} GiB a device')


def test_settings_that_do_not_fit_are_told_what_would(a_gib_a_row):
  line = (
    r'^a step needs 513 GiB a device of 80 \(executor.accumulate=1,'
    r' remat=False\): --config.executor.accumulate=16'
    r' --config.executor.remat=False would fit, with 33 GiB$'
  )
  with pytest.raises(errors.UserError, match=line):
    plan(accumulate=1, remat=False, device_memory_gib=80)
  line = 'needs 1.125 GiB a device of 0.5 .*: take more devices'
  with pytest.raises(errors.UserError, match=line):
    plan(device_memory_gib=0.5)
  with pytest.raises(errors.UserError, match=r'config\.ddo\.batch_size 12'):
    plan(devices=8, batch_size=12)


def test_all_phases_fit(a_gib_a_row):
  """And their rows divide alike."""
  wanted = layout.ExecutorConfig(device_memory_gib=80)
  executor = devices_lib.Executor(wanted, 1)
  found = fit.plan([stage(48), stage(360)], wanted, executor)
  assert found == (6, False, 61 * GIB, 80 * GIB)


def test_a_step_takes_what_the_compiler_plans():
  """Params, moments, average, reference, gradient, and what rows keep."""
  what = stage(2_048, averages=config_lib.Averages(halflife=(100.0,)))
  executor = devices_lib.Executor(layout.ExecutorConfig(), 1)
  model = what.build(False)
  phase = what.phase
  params = jax.eval_shape(model.init, rng.stream(0))

  def create(params):
    return state_lib.at_start(params, model.rules, phase)

  rows = {
    'stored': jax.ShapeDtypeStruct((2_048, 8, 8, 1), jnp.uint8),
    'label': jax.ShapeDtypeStruct((2_048,), jnp.int32),
  }
  ids = {'id': jax.ShapeDtypeStruct((2_048,), jnp.uint32)}
  compiled = (
    jax.jit(step_lib.train_step, donate_argnums=0)
    .lower(
      jax.eval_shape(create, params),
      params,
      {},
      rows | ids,
      rows,
      *jax.tree.map(jnp.float32, (model, phase)),
      rng.stream(0),
    )
    .compile()
  )
  counted = fit.step_bytes(what, executor, accumulate=1, remat=False)
  assert 0.75 < counted / memory.allotted(compiled) < 1.1
  standing = sum(fit.standing(what, executor).values())
  assert standing == 5 * memory.size_of(params) + 12  # and three counters
  halved = fit.step_bytes(what, executor, accumulate=2, remat=False)
  assert standing < halved < 0.8 * counted


@pytest.mark.parametrize(
  'wanted',
  [
    {},
    {'kind': 'zero1'},
    {'kind': 'fsdp'},
    {'kind': 'fsdp', 'fsdp_devices': 4},
  ],
)
def test_what_stands_is_counted_to_the_byte(wanted):
  """Beside the arrays of a device that holds them."""
  what = stage(16, averages=config_lib.Averages(halflife=(9.0,), width=(0.1,)))
  executor = devices_lib.Executor(layout.ExecutorConfig(**wanted))
  model = what.build(False)

  def create(params):
    return state_lib.at_start(params, model.rules, what.phase)

  params = executor.make_state(model.init, rng.stream(0))
  state = executor.make_state(create, params)

  def held(tree):
    return sum(
      a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(tree)
    )

  assert fit.standing(what, executor) == {
    'params': held(state.params),
    'moments': held(state.opt_state) + 4,  # the number of the step
    'averages': held(state.ema),
    'reference': held(executor.make_state(model.rules.reduce, params)),
    'frozen': 0,
  }
  parts = fit.step_parts(what, executor, accumulate=2, remat=False)
  assert parts['gradient'] == held(state.opt_state[0].mu) * 2
  assert parts['activations'] > 0


def test_fsdp_splits_what_stands(monkeypatch):
  monkeypatch.setattr(layout, 'SMALLEST_SPLIT', 1_024)
  whole = devices_lib.Executor(layout.ExecutorConfig())
  split = devices_lib.Executor(layout.ExecutorConfig(kind='fsdp'))
  parts = [
    sum(fit.standing(stage(), executor).values()) for executor in (whole, split)
  ]
  assert parts[1] < 0.4 * parts[0]


def test_averages_on_the_host_are_not_counted_while_rows_are():
  what = stage(2_048, averages=config_lib.Averages(halflife=(100.0, 200.0)))

  def counted(offload, batch_size):
    wanted = layout.ExecutorConfig(kind='fsdp', offload=offload)
    phase = dataclasses.replace(what.phase, batch_size=batch_size)
    return fit.step_parts(
      dataclasses.replace(what, phase=phase), layout.Layout(wanted, 1), 1, False
    )

  here = counted((), 2_048)
  away = counted(('ema',), 2_048)
  params = here['params']
  assert (here['averages'], away['averages']) == (2 * params, 0)
  assert away == here | {'averages': 0}
  # With next to no rows they are counted as they are updated.
  assert counted(('ema',), 1)['activations'] == 2 * params
  # The reference is there for every microbatch.
  assert counted(('reference',), 2_048) == here


def test_zero1_splits_moments_averages_and_the_gradient(monkeypatch):
  monkeypatch.setattr(layout, 'SMALLEST_SPLIT', 1_024)
  what = stage(averages=config_lib.Averages(halflife=(100.0,)))

  def counted(kind):
    wanted = layout.ExecutorConfig(kind=kind)
    return fit.step_parts(what, layout.Layout(wanted, 8), 2, False)

  whole, zero1, split = map(counted, ('pmap', 'zero1', 'fsdp'))
  for part in ('params', 'reference'):
    assert zero1[part] == whole[part] > 2 * split[part]
  for part in ('moments', 'averages', 'gradient'):
    assert 2 * zero1[part] < whole[part]
    assert zero1[part] == split[part]


def test_calls_of_the_sampler(monkeypatch):
  """As large as fits, at most 1,000; what is given is taken."""
  monkeypatch.setattr(fit, 'sample_bytes', lambda stage, sampler, n: n * GIB)
  monkeypatch.setattr(fit, 'standing', lambda stage, layout: {'all': 20 * GIB})

  def size(devices=1, **wanted):
    knobs = layout.ExecutorConfig(**wanted)
    executor = devices_lib.Executor(knobs, devices)
    return fit.call_size(stage(), None, knobs, executor)

  assert size() == 1_000
  assert size(device_memory_gib=80) == 32
  assert size(device_memory_gib=80, devices=8) == 256
  assert size(device_memory_gib=20) == 1
  assert size(device_memory_gib=80, sample_batch=7) == 7


def test_an_image_of_a_sampler_takes_its_own():
  sampler = heun.Heun(4, 0.02, 40.0)
  few, more = (fit.sample_bytes(stage(), sampler, n) for n in (100, 200))
  assert 1.8 * few < more < 2.2 * few


def test_a_pool_keeps_the_shards_it_was_begun_with(tmp_path):
  """On another machine the calls may be of another size."""
  pool = negatives.FakePool(tmp_path, 100, 40, {'a': 1})
  assert len(pool.missing()) == 3
  again = negatives.FakePool(tmp_path, 100, 64, {'a': 1})
  assert again.shard_size == 40
  assert again.missing() == pool.missing()


@pytest.mark.parametrize(
  ('text', 'value'),
  [
    ('auto', 'auto'),
    ('Dots', 'dots'),
    ('16', 16),
    ('1e3', 1000),
    ('True', True),
    ('no', None),
  ],
)
def test_a_command_line_may_say_auto(text, value):
  if value is None:
    with pytest.raises(ValueError, match='no'):
      settings.parse_or_auto(text)
    return
  parsed = settings.parse_or_auto(text)
  assert parsed == value
  assert type(parsed) is type(value)


def test_a_run_that_goes_on_keeps_its_settings(tmp_path, monkeypatch):
  """On equal devices: to the bit, whatever a later version counts."""
  from tests.strangers import tiny

  def start(**changes):
    config = tiny.get_config()
    config.executor = dataclasses.replace(
      config.executor, device_memory_gib=80.0, **changes
    )
    return workspace.Run(config, pathlib.Path(tmp_path))

  def counts(rows):
    def step_bytes(stage, executor, accumulate, remat):
      return 79 * GIB if accumulate < rows else GIB

    monkeypatch.setattr(fit, 'step_bytes', step_bytes)

  counts(2)
  first = start()
  assert first.fit.accumulate == 2
  first.keep_fit()
  counts(1)
  assert start().fit.accumulate == 2
  assert start(sample_batch=32).fit.accumulate == 1
  monkeypatch.setattr(
    devices_lib, 'environment', lambda: {'devices': '1 × another'}
  )
  assert start().fit.accumulate == 1
