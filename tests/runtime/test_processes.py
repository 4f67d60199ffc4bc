"""Processes of one run: how they are told of each other, and who may write."""

import errno
import fcntl
import multiprocessing
import os
import re
import signal
import time

import numpy as np
import pytest
import several

from ddo_jax import errors
from ddo_jax.runtime import lock
from ddo_jax.runtime import processes
from ddo_jax.runtime import records
from ddo_jax.training import loop


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


ONE_LINE = r'FATAL another process of this run ended without a word \(.*\n'


def results(folder):
  """The losses, scores and images of a round, and what is saved of it."""
  log = records.read_log(folder)
  steps = [(record['step'], record['kind']) for record in log]
  assert steps == [(0, 'eval'), *((s, 'train') for s in range(6)), (6, 'eval')]
  losses = [record['loss'] for record in log if record['kind'] == 'train']
  scores = [record['fd_train'] for record in log if record['kind'] == 'eval']
  drawn = [
    np.frombuffer(bytes.fromhex(record['drawn']), np.uint8).astype(int)
    for record in log
    if record['kind'] == 'eval'
  ]
  checkpoints = folder / 'round_000' / 'checkpoints'
  return (
    losses,
    scores,
    drawn,
    sorted(p.name for p in checkpoints.glob('[0-9]')),
  )


@pytest.fixture(scope='module')
def one_process(tmp_path_factory):
  """A round on four devices of one process; see `several.make_job`."""
  folder = tmp_path_factory.mktemp('one')
  promotion = loop.run(several.make_job(folder, 'pmap', num_devices=4))
  return results(folder), f'promoted {promotion.step} {promotion.profile}\n'


def assert_same(folder, one_process):
  losses, scores, drawn, kept = results(folder)
  (wanted_losses, wanted_scores, wanted_drawn, _), _ = one_process
  np.testing.assert_allclose(losses, wanted_losses, rtol=1e-6)
  np.testing.assert_allclose(scores, wanted_scores, rtol=1e-3)
  for images, wanted in zip(drawn, wanted_drawn, strict=True):
    # A value between two levels may be rounded either way.
    assert np.abs(images - wanted).max() <= 1
    assert np.mean(images != wanted) < 0.01
  assert kept[-1] == '6'


def test_law_3_two_processes_of_two_devices(one_process, tmp_path):
  """They agree where one of them gets a signal, and end where one errs."""
  pmap, fsdp = tmp_path / 'pmap', tmp_path / 'fsdp'
  played = several.play(
    2,
    2,
    ('train', {'folder': str(pmap), 'kind': 'pmap', 'signal_at': 2}),
    ('train', {'folder': str(pmap), 'kind': 'pmap'}),
    ('train', {'folder': str(fsdp), 'kind': 'fsdp'}),
    ('fail', {'process': 1, 'line': 'its disk is full'}),
  )
  promoted = one_process[1]
  for status, printed in played:
    assert status == 1, printed
    assert 'round_000: SIGTERM; saved step 4 of 6, run the same' in printed
    assert f'left with 75\n{promoted}{promoted}' in printed, printed
    assert 'Traceback' not in printed
  here = r'FATAL process 1 of 2 \(.*\) ended: its disk is full\n'
  assert len(re.findall(here, played[0][1])) == 1
  assert played[1][1].count('FATAL its disk is full\n') == 1
  assert_same(pmap, one_process)
  assert_same(fsdp, one_process)


def test_law_3_four_processes_of_one_device(one_process, tmp_path):
  """All end, with one line each, where the coordinator is killed."""
  played = several.play(
    4,
    1,
    ('train', {'folder': str(tmp_path), 'kind': 'fsdp'}),
    ('die', {'process': 0}),
  )
  for index, (status, printed) in enumerate(played):
    assert status == (75 if index else -signal.SIGKILL), printed
    assert one_process[1] in printed
    assert len(re.findall('FATAL', printed)) == (1 if index else 0), printed
    assert re.search(ONE_LINE, printed) or index == 0
  assert_same(tmp_path, one_process)
