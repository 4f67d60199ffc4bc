"""Processes that share a sweep: kills, waiting, and who else is refused.

The result of the long test is kept in experiments/results/sweep_kills.md.
"""

import collections
import json
import logging
import multiprocessing
import os
import random
import time

import optuna
import pytest
from training import test_resume as resume
from tuning import test_sweep

from ddo_jax import errors
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import lock
from ddo_jax.runtime import manifest
from ddo_jax.training import run as run_lib
from ddo_jax.tuning import alarms

images = resume.images
KILLS = int(os.environ.get('DDO_JAX_KILLS', '20'))
PEERS = 3


def make_config(images, **knobs):
  """As a sweep of 8 members, of which no alarm ends any."""
  config = test_sweep.make_config(images, members=8, merges=(), widths=())
  config.tune.alarms = alarms.Alarms(margin=0.0, mle_rise=0.0, recall_fall=0.0)
  config.tune.beta = (0.05, 0.2)
  config.tune.learning_rate = (1e-2, 1e-1)
  for name, value in knobs.items():
    setattr(config.tune, name, value)
  return config


def play_beside(images, workdir, knobs):
  """Plays a sweep, in a process of its own, beside others."""
  logging.disable(logging.INFO)
  run_lib.play(make_config(images, **knobs), workdir, peers=True)


@pytest.fixture(scope='module')
def context(tmp_path_factory):
  """Starts processes that have imported all, and share what they compile."""
  with pytest.MonkeyPatch.context() as patch:
    cache = tmp_path_factory.mktemp('compiled')
    patch.setenv('JAX_COMPILATION_CACHE_DIR', str(cache))
    patch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    found = multiprocessing.get_context('forkserver')
    found.set_forkserver_preload(
      ['tuning.test_peers', 'ddo_jax.report.page', 'optuna']
    )
    yield found


def start(context, images, workdir, **knobs):
  process = context.Process(target=play_beside, args=(images, workdir, knobs))
  process.start()
  return process


def replayed(journal):
  """What a journal tells: the ends of each trial, and each verdict.

  Holds every verdict to the rule: at a rung a member goes on if it is among the
  best half of those that came there before.
  """
  ends = collections.Counter()
  rungs = collections.defaultdict(dict)
  verdicts = {}
  for line in journal.read_text().splitlines():
    entry = json.loads(line)
    trial = entry.get('trial_id')
    if entry['op_code'] == 6 and entry['state'] in (1, 2, 3):
      ends[trial] += 1
    for name, verdict in entry.get('user_attr', {}).items():
      if not name.startswith('judged at '):
        continue
      assert (trial, name) not in verdicts, 'judged twice'
      reason = verdict['reason']
      verdicts[trial, name] = reason
      new = verdict['rungs'].keys() - rungs[trial].keys()
      for rung in sorted(new):
        value = verdict['rungs'][rung]
        there = [r[rung] for t, r in rungs.items() if rung in r and t != trial]
        there = sorted([*there, value])
        goes_on = value <= there[max(len(there) // 2 - 1, 0)]
        assert goes_on == (not reason or rung != max(new)), (trial, verdict)
      assert not reason or new, 'ended where nothing was asked'
      rungs[trial] |= verdict['rungs']
  return ends, verdicts


def check_sweep(workdir, curves):
  """Holds a finished sweep to the rules, and to an undisturbed one's curves."""
  folder = workdir / 'round_000'
  ledger = manifest.read_json(folder / 'ledger.json')
  members = ledger['members']
  # The same trials are finished, each of them once.
  assert [(m['number'], m['settings']) for m in members] == [
    (number, settings) for number, (settings, _) in enumerate(curves)
  ]
  ends, verdicts = replayed(folder / 'study.journal')
  assert ends == dict.fromkeys(range(len(curves)), 1)
  storage = optuna.storages.JournalStorage(
    optuna.storages.journal.JournalFileBackend(str(folder / 'study.journal'))
  )
  (name,) = optuna.get_all_study_names(storage)
  study = optuna.load_study(study_name=name, storage=storage)
  states = [trial.state for trial in study.trials]
  assert all(state.is_finished() for state in states), states
  for member, (_, curve) in zip(members, curves, strict=True):
    found = [r['selection'] for r in member['evaluations']]
    assert found == curve[: len(found)], member['number']
    ended = {r for (t, _), r in verdicts.items() if t == member['number'] and r}
    assert ended == ({member['ended']} if member['ended'] else set())
    assert len(found) == len(curve) or member['ended']
    assert member['selection'] == min(found)
  # The rule of promotion.
  ranked = sorted(members, key=lambda m: m['selection'])
  finalists = [m['number'] for m in ranked if m['step']][:2]
  assert [f['member'] for f in ledger['finals']] == [None, *finalists]
  best = min(ledger['finals'], key=lambda f: f['rescored'])
  assert ledger['promoted'] == best
  promoted = checkpoint.load_meta(folder / 'promoted')
  assert promoted['promoted']['rescored'] == best['rescored']
  wanted = ledger['reference_sha256']
  if best['member'] is not None:
    wanted = members[best['member']]['params_sha256']
  assert promoted['sha256'] == wanted
  assert manifest.read_json(workdir / 'summary.json')['rounds']


def curves_of(context, images, workdir):
  """Settings and whole curves of all members, of a sweep that ends nobody."""
  process = start(context, images, workdir, reduction=1)
  process.join()
  assert process.exitcode == 0
  ledger = manifest.read_json(workdir / 'round_000' / 'ledger.json')
  return [
    (m['settings'], [r['selection'] for r in m['evaluations']])
    for m in ledger['members']
  ]


@pytest.mark.faults
def test_killed_peers_end_as_an_undisturbed_sweep(context, images, tmp_path):
  curves = curves_of(context, images, tmp_path / 'whole')
  begin = time.monotonic()
  peers = [start(context, images, tmp_path / 'calm') for _ in range(PEERS)]
  for peer in peers:
    peer.join()
  length = time.monotonic() - begin
  assert [peer.exitcode for peer in peers] == [0] * PEERS
  check_sweep(tmp_path / 'calm', curves)
  clock = random.Random(0)
  kills = collections.Counter()
  runs = 0
  while kills.total() < KILLS:
    workdir = tmp_path / f'run_{runs}'
    runs += 1
    peers = [start(context, images, workdir) for _ in range(PEERS)]
    left = min(5, KILLS - kills.total())
    while any(peer.is_alive() for peer in peers):
      pause = clock.uniform(0.05, 0.4) * length if left else 1.0
      multiprocessing.connection.wait(
        [peer.sentinel for peer in peers if peer.is_alive()], pause
      )
      victim = clock.randrange(PEERS)
      if left and peers[victim].is_alive():
        peers[victim].kill()
        peers[victim].join()
        kills[stage_of(workdir)] += 1
        left -= 1
        peers[victim] = start(context, images, workdir)
    assert [peer.exitcode for peer in peers] == [0] * PEERS
    check_sweep(workdir, curves)
    print(f'SAME after {kills.total()} kills, {runs} runs', flush=True)
  print(f'KILLS {kills.total()} in {runs} runs: {dict(kills.most_common())}')


def stage_of(workdir):
  """What a sweep was at when one of its processes was killed."""
  folder = workdir / 'round_000'
  if not (workdir / 'pretrain' / 'done.json').exists():
    return 'pretraining'
  if not (folder / 'study.json').exists():
    return 'reference and pool'
  done = len(list(folder.glob('members/*/done.json')))
  if done < 8:
    return f'members, {4 * (done // 4)} of 8 done'
  if not (folder / 'promoted').exists():
    return 'finals'
  return 'scores of the report'


def hold(workdir, shared, told):
  with lock.held(workdir, shared=shared):
    told.send('held')
    time.sleep(100)


@pytest.mark.parametrize('tuning', [True, False])
def test_who_works_in_a_folder_refuses_others(images, tmp_path, tuning):
  """Peers refuse a run that is alone, and it refuses them."""
  context = multiprocessing.get_context('fork')
  heard, told = context.Pipe(duplex=False)
  holder = context.Process(
    target=hold, args=(tmp_path, tuning, told), daemon=True
  )
  holder.start()
  assert heard.recv() == 'held'
  who = '--mode=tune' if tuning else f'process {holder.pid}'
  with pytest.raises(errors.UserError, match=f'worked in by .*{who}') as e:
    run_lib.play(make_config(images), tmp_path, peers=not tuning)
  assert '\n' not in str(e.value)
  with lock.tried(tmp_path) as free:
    assert not free
  if tuning:  # another peer is welcome
    with lock.held(tmp_path, shared=True):
      pass
  holder.kill()
