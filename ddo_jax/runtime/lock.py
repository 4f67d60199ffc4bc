"""A lock on a run's folder, which ends with the process that holds it."""

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

from ddo_jax import errors
from ddo_jax.runtime import disk

_LOGGER = logging.getLogger(__name__)
_NAME = '.lock'
_TAKEN = (errno.EACCES, errno.EAGAIN)


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
  """Inside, no other process holds the lock of the folder, which is created.

  The operating system lets go of it however the process ends. A file system
  without locks gets a warning.

  Raises:
    errors.UserError: another process holds it, or the folder cannot be
      written.
  """
  with disk.guarded(folder):
    folder.mkdir(parents=True, exist_ok=True)
    opened = (folder / _NAME).open('a+b', buffering=0)
  with opened as file:
    try:
      # It is this process's: children that outlive it do not keep it.
      fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno in _TAKEN:
        raise errors.UserError(_taken(folder)) from error
      _LOGGER.warning(
        '%s cannot be locked (%s): see to it that no other run works in it',
        folder,
        error.strerror,
      )
    else:
      who = {'pid': os.getpid(), 'host': socket.gethostname()}
      since = time.strftime('%Y-%m-%d %H:%M:%S')
      with disk.guarded(folder / _NAME):
        file.truncate(0)
        file.write(json.dumps(who | {'since': since}).encode())
    yield


def _taken(folder: pathlib.Path) -> str:
  try:
    who = json.loads((folder / _NAME).read_text())
    holder = f'process {who["pid"]} on {who["host"]}, since {who["since"]}'
  except (OSError, ValueError, KeyError, TypeError):  # it is being written
    holder = 'another process'
  return (
    f'{folder} is worked in by {holder}: let it finish or end it, or choose'
    ' another --workdir; the processes of one run are started together, with'
    ' --coordinator'
  )
