"""Who plays which member, who goes on, and what a dead process leaves."""

import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax.runtime import lock
from ddo_jax.runtime import records
from ddo_jax.tuning import member as member_lib
from ddo_jax.tuning import study as study_lib

PERIOD = 10
MEMBERS = [
  member_lib.Member(n, 'sobol', {'beta': 0.1 * (n + 1)}) for n in range(5)
]


def opened(folder, reduction=2, storage=''):
  return study_lib.Study(
    name='a study',
    folder=folder,
    members=MEMBERS,
    tune=config_lib.Tune(members=5, reduction=reduction, storage=storage),
    first_rung=PERIOD,
  )


def curve(*selections):
  return [
    {'step': PERIOD * i, 'selection': value}
    for i, value in enumerate((9.0, *selections))
  ]


def end(study, folder, number, evaluations, ended=''):
  """Does what a member does that has come to its end."""
  result = {
    'settings': MEMBERS[number].settings,
    'selection': min(record['selection'] for record in evaluations),
    'evaluations': evaluations,
    'ended': ended,
  }
  path = folder / 'members' / MEMBERS[number].name / 'done.json'
  records.write_json(path, records.sealed(result))
  study.finish(number, result)
  return result


def states(study):
  return [trial.state.name for trial in study._trials()]


def test_each_member_is_claimed_once_and_told_once(tmp_path):
  study = opened(tmp_path)
  for number in range(5):
    with contextlib.ExitStack() as held:
      assert study.claim(held) == number
      result = end(study, tmp_path, number, curve(1.0 + number, 8.0))
      study.finish(number, result | {'selection': 0.0, 'ended': 'x'})
  assert study.claim(contextlib.ExitStack()) is None
  again = opened(tmp_path)
  assert again.claim(contextlib.ExitStack()) is None
  assert states(again) == ['COMPLETE'] * 5
  assert [trial.value for trial in again._trials()] == [1, 2, 3, 4, 5]
  assert [trial.params['beta'] for trial in again._trials()] == [
    member.settings['beta'] for member in MEMBERS
  ]


def test_halving_lets_the_best_go_on_and_is_asked_once(tmp_path):
  study = opened(tmp_path)
  for _ in range(3):
    study.claim(contextlib.ExitStack())
  assert study.judge(0, curve(), last=False) is None
  assert study.judge(0, curve(5.0), last=False) is None
  assert study.judge(1, curve(4.0), last=False) is None
  line = 'halving: 3 of the 3 that came so far'
  assert study.judge(2, curve(6.0), last=False) == line
  # Member 0 would be ended where it stands now, and was let go on before. To
  # ask again, in another process, changes nothing and counts nobody twice.
  again = opened(tmp_path)
  assert again.judge(0, curve(5.0), last=False) is None
  assert again.judge(2, curve(6.0), last=False) == line
  second = again.judge(0, curve(5.0, 5.0), last=False)
  assert second is None  # the first at the second rung
  line = 'halving: 2 of the 2 that came so far'
  assert again.judge(1, curve(4.0, 6.0), last=False) == line
  assert study.judge(1, curve(4.0, 6.0), last=False) == line
  assert again.judge(2, curve(6.0, 99.0), last=True) is None


def test_a_full_sweep_ends_nobody(tmp_path):
  study = opened(tmp_path, reduction=1)
  for number in range(3):
    study.claim(contextlib.ExitStack())
    assert study.judge(number, curve(1.0 + number), last=False) is None


def test_a_cut_off_line_is_left_out(tmp_path, caplog):
  study = opened(tmp_path)
  with contextlib.ExitStack() as held:
    study.claim(held)
    end(study, tmp_path, 0, curve(1.0))
  with (tmp_path / 'study.journal').open('ab') as file:
    file.write(b'{"op_code":6,"trial')
  again = opened(tmp_path)
  assert 'cut off' in caplog.text
  with contextlib.ExitStack() as held:
    assert again.claim(held) == 1
  assert states(opened(tmp_path))[:2] == ['COMPLETE', 'RUNNING']


def test_what_is_done_outlives_the_journal(tmp_path):
  study = opened(tmp_path)
  with contextlib.ExitStack() as held:
    study.claim(held)
    done = end(study, tmp_path, 0, curve(1.0))
  path = tmp_path / 'study.journal'
  path.write_bytes(b'{}\n' + path.read_bytes())
  with pytest.raises(errors.UserError, match=r'study\.journal .*; delete it'):
    opened(tmp_path)
  path.unlink()
  study = opened(tmp_path)
  with contextlib.ExitStack() as held:
    assert study.claim(held) == 0
    folder = tmp_path / 'members' / '000'
    assert member_lib.result(folder) == done
    study.finish(0, done)
  assert states(study)[0] == 'COMPLETE'


def test_a_finished_member_that_is_damaged_is_claimed_again(tmp_path, caplog):
  study = opened(tmp_path)
  for number in range(5):
    with contextlib.ExitStack() as held:
      study.claim(held)
      end(study, tmp_path, number, curve(1.0))
  path = tmp_path / 'members' / '003' / 'done.json'
  path.write_text(path.read_text().replace('9.0', '0.0'))
  with contextlib.ExitStack() as held:
    assert study.claim(held) == 3
    assert 'done.json is damaged' in caplog.text
    end(study, tmp_path, 3, curve(1.0))
  assert study.claim(contextlib.ExitStack()) is None


def test_a_storage_that_cannot_be_opened_is_one_line(tmp_path):
  with pytest.raises(errors.UserError, match=r'config\.tune\.storage') as e:
    opened(tmp_path, storage='nosuch://host/name')
  assert '\n' not in str(e.value)
  database = f'sqlite:///{tmp_path}/study.db'
  with contextlib.ExitStack() as held:
    assert opened(tmp_path, storage=database).claim(held) == 0
  assert not (tmp_path / 'study.journal').exists()


def claim_and_wait(folder, told):
  """Claims two members, ends one, and plays the other for ever."""
  study = opened(folder)
  with contextlib.ExitStack() as held:
    end(study, folder, study.claim(held), curve(1.0))
  with contextlib.ExitStack() as held:
    told.send(study.claim(held))
    signal.pause()


def test_what_a_dead_process_left_is_taken_up(tmp_path, caplog):
  caplog.set_level(logging.INFO, 'ddo_jax')
  context = multiprocessing.get_context('fork')
  heard, told = context.Pipe(duplex=False)
  other = context.Process(
    target=claim_and_wait, args=(tmp_path, told), daemon=True
  )
  other.start()
  assert heard.recv() == 1
  study = opened(tmp_path)
  for number in (2, 3, 4):
    with contextlib.ExitStack() as held:
      assert study.claim(held) == number
      end(study, tmp_path, number, curve(1.0))
  with contextlib.ExitStack() as held:
    with lock.tried(tmp_path / 'members' / '001') as free:
      assert not free
    # Who waits for it gets it as soon as the other dies.
    killer = context.Process(target=kill_soon, args=(other.pid,))
    killer.start()
    assert study.claim(held) == 1
    killer.join()
    end(study, tmp_path, 1, curve(1.0))
  other.join()
  assert 'waiting for 001, which other processes play' in caplog.text
  assert states(study) == ['COMPLETE'] * 5


def kill_soon(pid):
  time.sleep(0.3)
  os.kill(pid, signal.SIGKILL)


def test_the_core_does_without_optuna():
  code = (
    'import sys, ddo_jax.main, ddo_jax.tuning.study;'
    'print("optuna" in sys.modules)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout == 'False\n'
