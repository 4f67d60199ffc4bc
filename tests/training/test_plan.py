"""A run is planned before anything of it is there."""

import dataclasses

import pytest

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax.configs import cifar10_edm_uncond
from ddo_jax.runtime import chips
from ddo_jax.runtime import layout
from ddo_jax.runtime import records
from ddo_jax.training import fit
from ddo_jax.training import plan as plan_lib
from ddo_jax.training import probe
from tests import command_line
from tests.strangers import tiny


@pytest.fixture
def config():
  """A tiny run on data that is nowhere."""
  config = tiny.get_config()
  config.rounds = 3
  config.data = config_lib.Data(source='nowhere.npz')
  return config


def test_what_a_run_is_made_of(config):
  made = plan_lib.plan(config, 'h100', 8)
  found = {part.name: part for part in made.parts}
  assert {name: (p.times, p.images) for name, p in found.items()} == {
    'pretrain': (1, 64),
    'fake pool': (3, 64),
    'training': (3, 64),
    'selection': (3, 3 * 64),  # after 0, 2 and 4 steps, of one average
    'report': (4, 2 * 64),  # the first round's start, and the end of each
  }
  assert found['training'].calls == {'ddo step': 4}
  # A sheet of 80 images takes two calls of 64.
  assert found['report'].calls['sample'] == 2 + 2
  assert made.calls['sample'].images == 64
  assert made.room == 60 * 2**30
  assert made.total_hours == pytest.approx(
    sum(made.hours(part) for part in made.parts)
  )


def test_a_sweep_is_planned_as_if_no_member_were_ended(config):
  config.tune = config_lib.Tune(members=5, finalists=2, merges=(0.5, 2.0))
  made = plan_lib.plan(config, 'h100', 8)
  found = {part.name: (part.times, part.images) for part in made.parts}
  assert found['training'] == (3 * 5, 64)
  assert found['selection'] == (3 * 5, 3 * 64)
  assert found['finals'] == (3, (1 + 2 * 3) * 64)
  assert 'a sweep of 5 members a round' in made.notes[-1]


def test_products_are_counted_whatever_the_devices(config):
  """A step forward through two networks and backward through one: 4 and 3
  forward passes of a pair, but for the gradient of what comes in first."""

  def flops(devices, **executor):
    config.executor = layout.ExecutorConfig(sample_batch=64, **executor)
    made = plan_lib.plan(config, 'v5e', devices)
    return {part.name: made.flops(part) for part in made.parts}, made

  whole, made = flops(1)
  assert flops(4, accumulate=2)[0] == whole
  assert flops(4, kind='fsdp')[0] == whole
  forward = made.flops_an_image
  assert 2.5 < whole['pretrain'] / (64 * forward) <= 3
  assert whole['training'] / whole['pretrain'] == pytest.approx(3 * 8 / 3, 0.06)
  evaluations = 2 * 4 - 1  # of Heun's sampler
  assert whole['fake pool'] == 3 * 64 * evaluations * forward


def test_a_plan_is_read_in_a_terminal(config):
  made = plan_lib.plan(config, 'a100-40g', 2)
  text = str(made)
  assert max(len(line) for line in text.splitlines()) <= 80
  for part in (
    'digits on 2 × A100 SXM (40 GB)',
    'kind=pmap accumulate=1 remat=False sample_batch=64',
    'MiB a device',
    'room',
    'hours at 60% of published rates: NVIDIA A100',
    'a sweep over alpha and beta',
  ):
    assert part in text.replace('\n', ' '), part
  memory = made.memory['ddo']
  assert sum(memory.values()) <= made.most_bytes
  standing = fit.standing(
    plan_lib.on_chips(config, chips.get('h100'), 2).stage('ddo'),
    layout.Layout(config.executor, 2),
  )
  assert {name: memory[name] for name in standing} == standing


def test_what_is_done_is_left_out(config, tmp_path):
  for stage in ('pretrain', 'round_000'):
    records.write_json(tmp_path / stage / 'done.json', {})
  before = sorted(tmp_path.rglob('*'))
  made = plan_lib.plan(config, 'h100', workdir=tmp_path)
  assert [(part.name, part.times) for part in made.parts] == [
    ('fake pool', 2),
    ('training', 2),
    ('selection', 2),
    ('report', 2),
  ]
  assert sorted(tmp_path.rglob('*')) == before


def test_what_does_not_fit_is_told_what_would(config, monkeypatch):
  """Three GiB, split over the devices where the kind splits anything."""

  def step_parts(stage, layout, accumulate, remat):
    return {'params': 3 * 2**30 // layout.shards}

  monkeypatch.setattr(fit, 'step_parts', step_parts)
  monkeypatch.setattr(fit, 'sample_bytes', lambda stage, sampler, rows: 0)
  config.executor.device_memory_gib = 1.0
  line = (
    r'a step needs 3 GiB a device of 1 .*; 4 × H100 SXM \(80 GB\) would do with'
    ' --config.executor.kind=zero1 --config.executor.accumulate=1 '
  )
  with pytest.raises(errors.UserError, match=line):
    plan_lib.plan(config, 'h100')
  config.executor.device_memory_gib = 0.1  # and the batches have 16 rows
  with pytest.raises(errors.UserError, match=r'or a smaller model$'):
    plan_lib.plan(config, 'h100')


def test_a_call_of_the_sampler_that_does_not_fit(config):
  config.executor.sample_batch = 2**20
  config.executor.device_memory_gib = 0.1
  line = r'sampler needs .* of 0.1 .*=1048576\): try .*sample_batch=1000$'
  with pytest.raises(errors.UserError, match=line):
    plan_lib.plan(config, 'h100')


def test_settings_that_make_no_sense(config):
  config.ddo.batch_size = 12
  with pytest.raises(errors.UserError, match='12 is not divisible by 8'):
    plan_lib.plan(config, 'h100', 8)
  config.rounds = -1
  with pytest.raises(errors.UserError, match=r'config\.rounds is -1'):
    plan_lib.plan(config, 'h100', 2)


def test_a_protocol_is_part_of_it(config):
  """Its networks are counted without their files."""
  recipe = cifar10_edm_uncond.get_config()
  config.evaluation = dataclasses.replace(
    recipe.evaluation, selection_samples=128, samples=100, seeds=2
  )
  config.model.image_shape = (32, 32, 3)
  config.model.pixel_values = 256
  config.rounds = 1
  made = plan_lib.plan(config, 'h100', 2)
  inception = made.calls['scores'].work.total / 64
  assert inception == pytest.approx(11.4e9, rel=0.02)  # 5.7 G products
  found = {part.name: part for part in made.parts}
  assert found['selection'].calls['scores'] == 3 * 1  # of 64 on each device
  assert found['report'].calls['scores'] == 2 * 1
  assert found['report'].times == 2
  assert "classifier's scores" not in str(made)


def test_a_probe_measures_here(config, monkeypatch):
  """All but the scores, since the images are nowhere."""
  monkeypatch.setattr(probe, '_LEAST', 0.0)
  config.rounds = 1
  made = plan_lib.plan(config, probe=True)
  assert set(made.calls) <= {*made.seconds, 'scores'}
  # What was compiled for a test before needs no more than a later call.
  for name, seconds in made.seconds.items():
    assert seconds > 0 or name.startswith('first ')
  text = ' '.join(str(made).split())
  assert '8 × cpu' in text
  assert 'hours as measured here' in text
  assert 'not in the hours: the scores, for no file nowhere.npz' in text
  steps = [part for part in made.parts if part.name == 'training']
  assert made.hours(steps[0]) == made.seconds['ddo step'] * 4 / 3_600


def test_on_the_command_line(tmp_path):
  recipe = '--config=configs/digits.py'
  status, printed = command_line.run(
    recipe, '--mode=plan', '--chip=v5e', f'--workdir={tmp_path / "run"}'
  )
  assert status == 0, printed
  assert 'digits on 1 × TPU v5e (16 GB)' in printed
  assert not (tmp_path / 'run').exists()
  line = command_line.fatal(recipe, '--mode=plan', '--chip=h10')
  assert 'did you mean h100?' in line
  line = command_line.fatal(recipe, '--mode=plan', '--num_devices=8')
  assert '--num_devices goes with --chip' in line
  line = command_line.fatal(recipe, '--mode=plan', '--chip=h100', '--probe')
  assert 'give one of them' in line
  line = command_line.fatal(recipe, '--workdir=x', '--chip=h100')
  assert 'selfplay does not read --chip' in line
