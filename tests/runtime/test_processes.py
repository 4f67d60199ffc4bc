"""Processes of one run: how they are told of each other, and who may write."""

import errno
import fcntl
import multiprocessing
import os
import signal
import time

import pytest

from ddo_jax import errors
from ddo_jax.runtime import lock
from ddo_jax.runtime import processes


@pytest.mark.parametrize(
  ('flags', 'line'),
  [
    ((None, 2, 0), '--coordinator missing: several processes want'),
    (('host:1', None, 0), '--num_processes missing'),
    (('host:1', 2, None), '--process_id missing'),
    ((None, None, 1), '--coordinator and --num_processes missing'),
    (('host', 2, 0), "--coordinator is 'host'; it must be host:port"),
    (('host:1', 2, 2), '--process_id is 2 .*; it must be from 0 to 1'),
    (('host:1', 2, -1), '--process_id is -1'),
    (('host:1', 0, 0), '--num_processes=0'),
  ],
)
def test_flags_that_do_not_go_together(flags, line):
  with pytest.raises(errors.UserError, match=line):
    processes.initialize(*flags)


def test_one_process_is_all():
  processes.initialize(num_processes=1)
  assert (processes.count(), processes.index()) == (1, 0)
  assert processes.decide('anything', lambda: (1, 2)) == (1, 2)
  with processes.main_first('anything'):
    assert processes.is_main()


def hold(folder, told):
  """Holds the lock of a folder, and leaves a child that outlives it."""
  with lock.held(folder):
    child = os.fork()
    if child:
      told.send(child)
    time.sleep(100)


def try_to_hold(folder, told):
  try:
    with lock.held(folder):
      told.send('held')
  except errors.UserError as error:
    told.send(str(error))


def in_fork(call, *args):
  """Begins a call in a fork of this process; returns it and what it tells."""
  context = multiprocessing.get_context('fork')
  heard, told = context.Pipe(duplex=False)
  process = context.Process(target=call, args=(*args, told), daemon=True)
  process.start()
  return process, heard.recv()


def test_a_second_process_is_refused_while_the_first_lives(tmp_path):
  holder, child = in_fork(hold, tmp_path)
  with pytest.raises(errors.UserError, match=f'by process {holder.pid}') as e:
    with lock.held(tmp_path):
      raise AssertionError('it was free')
  assert str(tmp_path) in str(e.value) and '\n' not in str(e.value)
  # It is free as soon as the holder is dead, though a child of it lives on.
  holder.kill()
  holder.join()
  for _ in range(2):
    with lock.held(tmp_path):
      _, told = in_fork(try_to_hold, tmp_path)
      assert f'is worked in by process {os.getpid()} on' in told
  assert in_fork(try_to_hold, tmp_path)[1] == 'held'
  os.kill(child, signal.SIGKILL)


def test_where_there_are_no_locks_a_user_is_warned(
  tmp_path, monkeypatch, caplog
):
  def refuse(*args):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'lockf', refuse)
  with lock.held(tmp_path):
    assert 'cannot be locked (No locks available)' in caplog.text
