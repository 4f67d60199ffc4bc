"""Law 4, at random: runs are killed at any moment, and end as whole ones.

The results of the long tests are kept in experiments/results/faults.md.
"""

import collections
import functools
import logging
import multiprocessing
import os
import random
import time

import pytest
import test_resume as resume

from ddo_jax.configs import digits
from ddo_jax.runtime import records
from ddo_jax.training import run as run_lib

images = resume.images
KILLS = int(os.environ.get('DDO_JAX_KILLS', '50'))


def make_digits():
  """The digits' recipe, one round of it, which saves every few seconds."""
  config = digits.get_config()
  config.rounds = 1
  config.pretrain.rhythm.save_minutes = 0.1
  config.ddo.rhythm.save_minutes = 0.05
  return config


def child(make, workdir):
  logging.disable(logging.INFO)
  run_lib.play(make(), workdir)


def stage_of(workdir):
  """What a run was at when it was killed."""
  if not (workdir / 'config.json').exists():
    return 'start'
  if not (workdir / 'pretrain' / 'done.json').exists():
    return 'pretraining'
  for folder in sorted(workdir.glob('round_*')):
    if (folder / 'done.json').exists():
      continue
    if not (folder / 'reference').exists():
      return 'reference'
    if not (folder / 'checkpoints').exists():
      return 'pool'
    if not (folder / 'promoted').exists():
      busy = any(folder.glob('selection/*/*/*'))
      saving = any(folder.glob('checkpoints/*tmp*'))
      return 'saving' if saving else 'selection' if busy else 'training'
    return 'report scores'
  return 'summary and report'


@pytest.fixture(scope='module')
def context(tmp_path_factory):
  """Starts processes that have imported all, and share what they compile."""
  with pytest.MonkeyPatch.context() as patch:
    cache = tmp_path_factory.mktemp('compiled')
    patch.delenv('XLA_FLAGS')  # which are for tests that compute little
    patch.setenv('JAX_COMPILATION_CACHE_DIR', str(cache))
    patch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    found = multiprocessing.get_context('forkserver')
    found.set_forkserver_preload(['test_random_kills', 'ddo_jax.report.page'])
    yield found


def play(context, make, workdir, delay=None):
  """Plays in a process of its own; returns its exit status."""
  process = context.Process(target=child, args=(make, workdir))
  process.start()
  process.join(delay)
  process.kill()
  process.join()
  return process.exitcode


@pytest.mark.faults
def test_runs_that_are_killed_end_as_the_whole_one(context, images, tmp_path):
  kill_at_random(
    context, functools.partial(resume.make_config, images), tmp_path, KILLS
  )


@pytest.mark.faults
def test_the_digits_killed_end_as_the_whole_run(context, tmp_path):
  kill_at_random(context, make_digits, tmp_path, max(10, KILLS // 4))


def kill_at_random(context, make, tmp_path, kills):
  """Plays runs until as many kills are behind them, and compares each."""
  assert play(context, make, tmp_path / 'warm') == 0  # compiles all
  begin = time.monotonic()
  assert play(context, make, tmp_path / 'whole') == 0
  length = time.monotonic() - begin
  expected = resume.outcome(tmp_path / 'whole')
  warm = resume.outcome(tmp_path / 'warm')
  assert expected == warm
  promoted = [r['promoted']['step'] for r in expected['summary']['rounds']]
  assert any(promoted), promoted  # or there is little to compare
  clock = random.Random(0)
  where = collections.Counter()
  runs = 0
  while where.total() < kills:
    workdir = tmp_path / f'run_{runs}'
    runs += 1
    status = None
    while status != 0:
      last = where.total() >= kills
      delay = None if last else clock.uniform(0.2, 1) * length
      status = play(context, make, workdir, delay)
      assert status in (0, -9), f'after {where.total()} kills: {status}'
      if status:
        where[stage_of(workdir)] += 1
    got = resume.outcome(workdir)
    for part, value in expected.items():
      assert got[part] == value, (part, runs, where)
    evals = [
      records.read_json(path) for path in sorted(workdir.glob('*/eval.json'))
    ]
    assert [e['after'] for e in evals] == [
      r['after'] for r in expected['summary']['rounds']
    ]
    print(f'SAME after {where.total()} kills, {runs} runs', flush=True)
  seconds = time.monotonic() - begin
  print(
    f'KILLS {where.total()} in {runs} runs of {length:.0f} s,'
    f' {seconds:.0f} s: {dict(where.most_common())}'
  )
