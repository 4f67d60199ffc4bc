"""Processes that read the rows of a source side by side.

Python decodes in one thread at a time, and a thread that decodes also keeps the
loop from dispatching its next step. A process started here imports neither JAX
nor the program's main module, which takes a fifth of a second and 40 MB. It
ends when the process that started it closes it or dies, however it dies.

Rows come back in memory that both processes map, without a name that could be
left behind.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import logging
import mmap
from multiprocessing import connection
from multiprocessing import reduction
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import typing
from typing import Any
from typing import BinaryIO

import numpy as np

from ddo_jax import errors
from ddo_jax import settings
from ddo_jax.runtime import interruption

if typing.TYPE_CHECKING:  # a source may be any that can be pickled
  from ddo_jax.data import sources

_LOGGER = logging.getLogger(__name__)
_GONE = (EOFError, ConnectionError)  # What a connection raises at its end.

# Gives rows and labels at indices [B], as `sources.Source.read` does.
Read = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def count(setting: settings.OrAuto) -> int:
  """Returns the number of processes that `config.data.workers` stands for.

  'auto' is half of the cores that this process may use, and eight at most,
  which read more than eight GPUs take: `experiments/results/loader.json`.
  """
  if setting != settings.AUTO:
    return setting
  if hasattr(os, 'sched_getaffinity'):
    cores = len(os.sched_getaffinity(0))
  else:
    cores = os.cpu_count() or 1
  return min(8, cores // 2)


@contextlib.contextmanager
def reading(source: 'sources.Source', count: int) -> Iterator[Read]:
  """Yields what reads a source, which may be called in threads.

  Args:
    source: the source.
    count: the number of processes that read, side by side; 0 reads in the
      thread that asks. They end with the block.
  """
  packed = _pack(source) if count else None
  if packed is None:
    yield source.read
    return
  idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

  def read(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    worker = idle.get()
    try:
      return worker.read(index)
    finally:
      idle.put(worker)

  with packed, contextlib.ExitStack() as stack:
    for _ in range(count):
      worker = _Worker(source.name, packed)
      stack.callback(worker.close)
      idle.put(worker)
    yield read


def _pack(source: 'sources.Source') -> BinaryIO | None:
  """Returns a nameless file of the source; None where it cannot be sent."""
  try:
    packed = pickle.dumps(source, protocol=5)
  except (pickle.PicklingError, AttributeError, TypeError) as error:
    _LOGGER.info('%s is read in threads (%s)', source.name, error)
    return None
  file = _nameless_file()
  file.write(packed)
  file.flush()
  return file


def _nameless_file() -> BinaryIO:
  """Opens a file in memory, which ends with the last process that has it."""
  if hasattr(os, 'memfd_create'):
    return os.fdopen(os.memfd_create('rows'), 'w+b')
  return tempfile.TemporaryFile()


def _map(fd: int) -> mmap.mmap:
  """Maps a file whole."""
  flags = mmap.MAP_SHARED | getattr(mmap, 'MAP_POPULATE', 0)
  return mmap.mmap(fd, 0, flags=flags)


class _Worker:
  """One process, which reads for one thread at a time."""

  def __init__(self, name: str, packed: BinaryIO):
    """Starts the process; it is there at once and ready a little later.

    Args:
      name: the source's, for errors.
      packed: the source.
    """
    self._name = name
    self._connection, theirs = connection.Pipe()
    files = [theirs.fileno(), packed.fileno()]
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)}
    # A signal to all of the program's processes is the loop's to answer, which
    # may want one more batch before it saves.
    with theirs, interruption.unheard():
      self._process = subprocess.Popen(
        [sys.executable, '-m', __name__, *map(str, files)],
        stdin=subprocess.DEVNULL,
        env=environment,
        pass_fds=files,
      )

  def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads rows, as `sources.Source.read` does."""
    try:
      self._connection.send(index)
      answer = self._connection.recv()
      if isinstance(answer, str):
        raise errors.UserError(answer)
      labels, dtype, shape = answer
      fd = reduction.recv_handle(self._connection)
    except _GONE as error:
      raise errors.UserError(
        f'a process that reads {self._name} ended with status'
        f' {self._process.wait()}: where memory is short, set'
        ' --config.data.workers to fewer; 0 reads in threads'
      ) from error
    try:
      return np.frombuffer(_map(fd), dtype).reshape(shape), labels
    finally:
      os.close(fd)

  def close(self) -> None:
    """Ends the process, which is idle."""
    self._connection.close()
    self._process.wait()


def _serve(pipe: connection.Connection, source: Any) -> None:
  """Answers what is asked for until nobody can ask any more."""
  while True:
    index = pipe.recv()
    try:
      stored, labels = source.read(index)
    except errors.UserError as error:
      pipe.send(str(error))
      continue
    with _nameless_file() as file:
      file.write(np.ascontiguousarray(stored).data)
      file.flush()
      pipe.send((labels, stored.dtype, stored.shape))
      reduction.send_handle(pipe, file.fileno(), None)


def main() -> None:
  """Serves the process that gave the numbers of two open files."""
  numbers = [int(number) for number in sys.argv[1:]]
  pipe = connection.Connection(numbers[0])
  with _map(numbers[1]) as packed:
    source = pickle.loads(packed)
  os.close(numbers[1])
  with contextlib.suppress(*_GONE):
    _serve(pipe, source)


if __name__ == '__main__':
  main()
