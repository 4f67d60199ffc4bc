"""A sweep in a run: what its members share, what is promoted, and kills."""

import functools
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
from training import test_resume as resume

from ddo_jax import config as config_lib
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import manifest
from ddo_jax.runtime import records
from ddo_jax.training import loop as loop_lib
from ddo_jax.training import run as run_lib
from ddo_jax.tuning import member as member_lib
from ddo_jax.tuning import study as study_lib
from ddo_jax.tuning import sweep

images = resume.images
compiled = resume.compiled
traces = resume.traces
ROUND_STEPS = resume.ROUND_STEPS


def make_config(images, **knobs):
  """One round of up to 12 steps, evaluated at every third, with 5 members."""
  config = resume.make_config(images, rounds=1)
  config.ddo.if_hopeless = 'warn'  # so short a round hardly begins
  config.ddo.rhythm.eval_images = 3 * resume.BATCH
  config.ddo.averages = config_lib.Averages((30.0, 60.0), width=(0.1,))
  config.tune = config_lib.Tune(
    **{
      'members': 5,
      'alpha': (0.5, 4.0),
      'learning_rate': (1e-2, 1e-1),
      'reduction': 2,
      'finalists': 2,
      'merges': (0.5,),
      'widths': (0.15,),
    }
    | knobs
  )
  return config


@pytest.fixture(scope='module')
def whole(images, tmp_path_factory, traces):
  """The run that nothing interrupts; nobody may change its folder."""
  workdir = tmp_path_factory.mktemp('whole')
  run_lib.play(make_config(images), workdir)
  # Law 7: one step for all members, whatever their α, β and learning rate.
  assert traces == ['MLE', 'DDO']
  return workdir


@pytest.mark.parametrize(
  'steps, every, rung', [(400, 50, 100), (400, 100, 100), (400, 300, 300)]
)
def test_the_first_rung_is_the_evaluation_near_a_quarter(steps, every, rung):
  phase = config_lib.Phase(batch_size=8, images=8 * steps)
  phase.rhythm.eval_images = 8 * every
  assert sweep._first_rung(phase) == rung


def outcome(workdir):
  """All that a sweep decides and makes, less what the wall clock says."""
  folder = workdir / 'round_000'
  done = records.read_json(folder / 'done.json')
  return {
    'ledger': resume.without(
      manifest.read_json(folder / 'ledger.json'), 'seconds'
    ),
    'promoted': checkpoint.load_meta(folder / 'promoted')['sha256'],
    'done': resume.without(done, 'seconds'),
    'log': resume.log_of(workdir),
  }


def begun(whole, workdir):
  """Makes a folder of a run whose pretraining is done."""
  shutil.copytree(whole / 'pretrain', workdir / 'pretrain')
  for name in ('config.json', 'manifest.json'):
    shutil.copy(whole / name, workdir / name)


def assert_same(workdir, whole):
  got = outcome(workdir)
  for part, value in outcome(whole).items():
    if part == 'log':  # that of the pretraining was not copied
      value = [r for r in value if r['stage'] != 'pretrain']
    assert got[part] == value, part


def test_a_sweep_says_what_it_did(whole):
  ledger = manifest.read_json(whole / 'round_000' / 'ledger.json')
  members = ledger['members']
  assert [m['number'] for m in members] == [0, 1, 2, 3, 4]
  assert [m['origin'] for m in members] == ['probe', *['sobol'] * 4]
  proposal = manifest.read_json(whole / 'round_000' / 'probe.json')
  assert ledger['probe']['forwards'] == proposal['images']
  # β goes with α, in the range that the probe proposes for α = 1.
  low, high = ledger['probe']['ranges']['beta']
  for settings in (m['settings'] for m in members):
    assert low <= settings['beta'] / settings['alpha'] <= high
    assert 0.5 <= settings['alpha'] <= 4 and settings['learning_rate'] >= 0.01
  # All begin from one reference, whose score is taken once.
  assert len({str(m['evaluations'][0]['selection']) for m in members}) == 1
  assert len({m['evaluations'][1]['selection'] for m in members}) == 5
  ended = [m for m in members if m['ended']]
  assert ended, 'none was ended early: nothing is compared'
  assert any(m['ended'].startswith('halving: ') for m in ended)
  for member in ended:
    assert member['trained'] < ROUND_STEPS
  real = sum(m['trained'] for m in members) * resume.BATCH
  scored = sum(len(m['evaluations']) - 1 for m in members) * 3 * 64
  finals = ledger['finals']
  cost = ledger['cost']
  assert cost['real'] == real
  assert cost['evaluation'] == scored + 64 + 64 * len(finals)
  assert cost['pool'] == 160
  assert cost['images'] == real + 160 + cost['evaluation']
  draw = cost['forwards_a_drawn_image']
  assert draw == pytest.approx(5, rel=0.01)  # Heun of 3 steps
  drawn = 160 + cost['evaluation']
  forwards = 8 * real + drawn * draw + proposal['images']
  assert cost['forwards'] == pytest.approx(forwards, rel=0.01)
  # The finalists are the best by selection, and the best of them is promoted.
  assert [f['candidate'] for f in finals] == [
    'reference',
    *['member', 'merge_0.5', 'posthoc_0.150'] * 2,
  ]
  ranked = sorted(members, key=lambda m: m['selection'])
  numbers = [m['number'] for m in ranked[:2] for _ in range(3)]
  assert [f['member'] for f in finals[1:]] == numbers
  assert len({f['rescored'] for f in finals}) == len(finals)
  best = min(finals, key=lambda f: f['rescored'])
  assert ledger['promoted'] == best
  assert best['rescored'] != best['selection']
  done = manifest.read_json(whole / 'round_000' / 'done.json')
  assert done['promoted']['settings'] == best['settings']
  assert done['promoted']['step'] == best['step']
  folder = whole / 'round_000'
  reference = checkpoint.load_meta(folder / 'reference')['sha256']
  assert ledger['reference_sha256'] == reference
  assert ledger['pool_sha256'] == manifest.digest(folder / 'fakes')
  assert not list(folder.glob('members/*/checkpoints'))
  assert not list(folder.glob('members/*/averages'))


def test_members_are_a_pure_function():
  ranges = {'alpha': (1.0, 4.0), 'beta': (0.1, 0.1), 'learning_rate': (1, 10)}
  first = [('probe', {'alpha': 2.0}), ('winner', {'alpha': 3.0, 'p_std': 1.0})]
  made = [member_lib.plan(7, 'round_001', 6, ranges, first) for _ in range(2)]
  assert made[0] == made[1]
  settings = [member.settings for member in made[0]]
  assert settings[0] == {
    'alpha': 2.0,
    'beta': pytest.approx(0.1),
    'learning_rate': pytest.approx(10**0.5),
  }
  assert settings[1]['alpha'] == 3.0 and 'p_std' not in settings[1]
  assert len({s['alpha'] for s in settings}) == 6
  assert all(1 <= s['alpha'] <= 4 and s['beta'] == 0.1 for s in settings[2:])
  other = member_lib.plan(7, 'round_002', 6, ranges, first)
  assert other[2:] != made[0][2:]
  # The first of a longer sweep are those of a shorter one.
  longer = member_lib.plan(7, 'round_001', 6, ranges, first[:1])
  assert longer[0] == made[0][0]


# Where one sweep is killed, time after time; calls count from its restart.
KILLS = [
  ('claim', study_lib.Study, '_report', 1),
  ('verdict', study_lib.Study, '_ask_pruner', 2),
  ('the end of a member', study_lib.Study, 'finish', 2),
  ('params of a member', checkpoint, 'save_params', 2),
  ('finals', resume.Evaluator, 'scores', 9),
]


def test_law_4_a_sweep_killed_anywhere_ends_as_the_whole_one(
  images, whole, tmp_path
):
  config = make_config(images)
  begun(whole, tmp_path)
  for name, *call in KILLS:
    with pytest.MonkeyPatch.context() as patch:
      resume.at_call(patch, *call, resume.interrupt)
      with pytest.raises(KeyboardInterrupt):
        run_lib.play(config, tmp_path)
    assert not (tmp_path / 'round_000' / 'promoted').exists(), name
  run_lib.play(config, tmp_path)
  assert_same(tmp_path, whole)


def killed_child(images, workdir):
  """Plays beside others until it kills itself in its second member."""
  kill = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
  resume.at_call(pytest.MonkeyPatch(), loop_lib._Logger, 'push', 9, kill)
  config = make_config(pathlib.Path(images))
  run_lib.play(config, pathlib.Path(workdir), peers=True)


def test_what_a_killed_peer_left_is_taken_up(
  images, whole, compiled, tmp_path, caplog
):
  begun(whole, tmp_path)
  tests = pathlib.Path(__file__).parents[1]
  code = (
    f'import sys; sys.path[:0] = {[str(tests), str(tests.parent)]!r}\n'
    'import conftest; from tuning import test_sweep;'
    f' test_sweep.killed_child({str(images)!r}, {str(tmp_path)!r})'
  )
  environment = os.environ | compiled
  done = subprocess.run(
    [sys.executable, '-c', code], env=environment, stderr=subprocess.PIPE
  )
  assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
  folders = sorted((tmp_path / 'round_000' / 'members').glob('0*'))
  assert [(f / 'done.json').exists() for f in folders] == [True, False]
  caplog.set_level(logging.INFO, 'ddo_jax')
  run_lib.play(make_config(images), tmp_path, peers=True)
  assert 'round_000/001: from step' in caplog.text
  assert 'round_000/000: from step' not in caplog.text
  assert_same(tmp_path, whole)
