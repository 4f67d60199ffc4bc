"""The command line: modes, and one clear line for each mistake."""

import json
import pathlib
import subprocess
import sys

import pytest

from configs import digits
from ddo_jax import config as config_lib
from ddo_jax import main

ROOT = pathlib.Path(__file__).parents[1]


def tiny() -> config_lib.Config:
  config = digits.get_config()
  config.rounds = 1
  config.model.hidden = 8
  for phase in (config.pretrain, config.ddo):
    phase.batch_size = 16
    phase.images = 4 * 16
    phase.decay_images = 16
    phase.ema_halflife = (16.0,)
  config.ddo.pool_size = 64
  config.ddo.eval_images = 2 * 16
  config.sampler.num_steps = 4
  config.executor.sample_batch = 64
  config.evaluation = config_lib.Evaluation(
    selection_samples=64, samples=64, seeds=2
  )
  return config


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  report = main.run(tiny(), folder)
  assert report == folder / 'report.html'
  return folder


def test_selfplay_leaves_summary_and_report(workdir):
  summary = json.loads((workdir / 'summary.json').read_text())
  (row,) = summary['rounds']
  assert row['round'] == 0
  assert row['before'].keys() == row['after'].keys()
  assert {'mean', 'sd'} <= row['after']['fd_train'].keys()
  assert row['promoted']['step'] in (0, 2, 4)
  assert summary['seconds']['total'] > 0
  assert (workdir / 'report.html').stat().st_size > 10_000


def test_sample_is_repeatable_and_guidance_changes_it(workdir, tmp_path):
  def draw(name, config):
    main.run(config, workdir, 'sample', num_samples=20, output=tmp_path / name)
    return (tmp_path / name / 'samples.npz').read_bytes()

  guided = tiny()
  guided.sampler.guidance = 100.0  # the tiny model has learned little
  assert draw('a', tiny()) == draw('b', tiny())
  assert draw('c', guided) != draw('a', tiny())
  assert (tmp_path / 'a' / 'samples.png').exists()


def test_evaluate_agrees_with_the_round(workdir):
  result = main.run(tiny(), workdir, 'evaluate')
  summary = json.loads((workdir / 'summary.json').read_text())
  after = summary['rounds'][0]['after']
  assert result['scores']['fd_train'] == after['fd_train']
  assert json.loads((workdir / 'eval.json').read_text()) == result


def fatal(*args: str) -> str:
  """The one line that a mistaken command prints."""
  done = subprocess.run(
    [sys.executable, '-m', 'ddo_jax.main', *args],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 1
  assert 'Traceback' not in done.stderr
  line = done.stderr.strip().splitlines()[-1]
  assert line.startswith('FATAL')
  return line


def test_mistakes_on_the_command_line(tmp_path):
  recipe = '--config=configs/digits.py'
  workdir = f'--workdir={tmp_path / "run"}'
  assert '--workdir' in fatal(recipe)
  line = fatal(recipe, workdir, '--config.ddo.bta=1')
  assert 'config.ddo' in line
  assert "'bta'" in line
  assert 'beta' in line
  assert 'config.ddo.alpha' in fatal(recipe, workdir, '--config.ddo.alpha=0')
  assert 'unexpected' in fatal(recipe, workdir, 'ddo.alpha=1')
  assert 'finished stage' in fatal(recipe, workdir, '--mode=sample')
  assert not (tmp_path / 'run').exists()
