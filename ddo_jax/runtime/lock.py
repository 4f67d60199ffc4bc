"""Locks on a run's folders, which end with the process that holds them.

The operating system lets go of a lock however its holder ends. They are the
process's, not a thread's, and children that outlive it do not keep them. A file
system without locks gets a warning, and every lock there is free.
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import socket
import time
from typing import BinaryIO

from ddo_jax import errors
from ddo_jax.runtime import disk
from ddo_jax.runtime import processes

_LOGGER = logging.getLogger(__name__)
_NAME = '.lock'
_TURN = '.turn'
_TAKEN = (errno.EACCES, errno.EAGAIN)


def _open(path: pathlib.Path) -> BinaryIO:
  """Opens the file of a lock; it and its folder are created."""
  with disk.guarded(path.parent):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open('a+b', buffering=0)


def _take(file: BinaryIO, how: int) -> bool:
  """Takes a lock; says whether it is taken now, or another process has it."""
  try:
    fcntl.lockf(file, how)
  except OSError as error:
    if error.errno in _TAKEN:
      return False
    _LOGGER.warning(
      '%s cannot be locked (%s): see to it that no other run works in it',
      pathlib.Path(file.name).parent,
      error.strerror,
    )
    return True
  who: dict[str, str | int] = {}  # of several, none is named
  if not how & fcntl.LOCK_SH:
    since = time.strftime('%Y-%m-%d %H:%M:%S')
    who = {'pid': os.getpid(), 'host': socket.gethostname(), 'since': since}
  with disk.guarded(pathlib.Path(file.name)):
    file.truncate(0)
    file.write(json.dumps(who).encode())
  return True


def _holder(path: pathlib.Path) -> str:
  """Says who holds a lock."""
  try:
    who = json.loads(path.read_text())
    if not who:
      return 'processes of --mode=tune'
    return f'process {who["pid"]} on {who["host"]}, since {who["since"]}'
  except (OSError, ValueError, KeyError, TypeError):  # it is being written
    return 'another process'


@contextlib.contextmanager
def held(folder: pathlib.Path, shared: bool = False) -> Iterator[None]:
  """Inside, no other process holds the lock of the folder, which is created.

  Args:
    folder: the folder.
    shared: whether others may share it, which ask for that too.

  Raises:
    errors.UserError: another process holds it, or the folder cannot be
      written.
  """
  path = folder / _NAME
  how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
  with _open(path) as file:
    if not _take(file, how | fcntl.LOCK_NB):
      remedy = 'let it finish or end it, or choose another folder'
      if shared:
        remedy += '; of --mode=tune any number may work in one'
      raise errors.UserError(
        f'{folder} is worked in by {_holder(path)}: {remedy}; the processes of'
        ' one run are started together, with --coordinator'
      )
    yield


@contextlib.contextmanager
def tried(folder: pathlib.Path) -> Iterator[bool]:
  """Inside, the lock of the folder is held, if it was free; yields whether."""
  with _open(folder / _NAME) as file:
    yield _take(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def wait(folder: pathlib.Path) -> None:
  """Returns once no other process holds the lock of the folder."""
  with _open(folder / _NAME) as file:
    _take(file, fcntl.LOCK_EX)


class Turn:
  """What only one of several processes may do at a time.

  Of several processes of one run, process 0 waits for the turn.
  """

  def __init__(self, folder: pathlib.Path):
    """Nobody has the turn yet.

    Args:
      folder: the processes that name it take turns.
    """
    self._path = folder / _TURN
    self._file: BinaryIO | None = None

  @contextlib.contextmanager
  def taken(self) -> Iterator[None]:
    """Inside, no other process has the turn; waits for it."""
    with contextlib.ExitStack() as stack:

      def take():
        self._file = stack.enter_context(_open(self._path))
        self._wait()

      processes.decide(f'turn in {self._path}', take)
      yield

  @contextlib.contextmanager
  def passed_on(self) -> Iterator[None]:
    """Inside a turn: others may have it; then waits for it once more."""

    def pass_on():
      with contextlib.suppress(OSError):  # a file system without locks
        fcntl.lockf(self._file, fcntl.LOCK_UN)

    processes.decide(f'no turn in {self._path}', pass_on)
    yield
    processes.decide(f'turn in {self._path}', self._wait)

  def _wait(self) -> None:
    if _take(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB):
      return
    _LOGGER.info(
      '%s: waiting for %s, whose turn it is',
      self._path.parent,
      _holder(self._path),
    )
    _take(self._file, fcntl.LOCK_EX)
