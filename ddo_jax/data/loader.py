"""The order in which training sees the images, and the batches read by it.

The rows of step s are positions s·B .. s·B + B − 1 of an endless stream, and
`order` says which image stands at a position. A batch is therefore a pure
function of (seed, step): nothing is saved to resume, and any number of
processes reads the same stream.

Grain's `MapDataset` obeys the same law, but reads these sets more slowly and
does not promise that its shuffle outlives an update; `experiments.bench.loader`
compares the two.
"""

import collections
from collections.abc import Callable
from collections.abc import Generator
from collections.abc import Iterator
from concurrent import futures
import functools
from typing import TypeVar

import numpy as np

from ddo_jax import errors
from ddo_jax.data import sources
from ddo_jax.data import workers as workers_lib

# The rows of a step: 'stored' [b,H,W,C], 'label' [b], 'id' [b] and, if asked
# for, 'other_label' [b].
Stored = dict[str, np.ndarray]

# What is read at once, in whatever form.
Rows = TypeVar('Rows')

_AHEAD = 4  # Batches that are read before they are asked for, at least.


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
  # NumPy promises that the numbers of RandomState never change.
  return np.random.RandomState([seed, epoch]).permutation(length)


def order(seed: int, positions: np.ndarray, length: int) -> np.ndarray:
  """Returns the indices of the images at positions of the endless stream.

  Every epoch of `length` positions is a permutation of its own.

  Args:
    seed: the stream's seed, in [0, 2**32).
    positions: step · batch_size + row, in an array of any shape.
    length: the number of images.

  Returns:
    int64 in 0 .. length−1, of the shape of `positions`.
  """
  epochs, offsets = np.divmod(np.asarray(positions, np.int64), length)
  index = np.empty_like(offsets)
  for epoch in np.unique(epochs):
    inside = epochs == epoch
    index[inside] = _permutation(seed, int(epoch), length)[offsets[inside]]
  return index


def read_ahead(
  source: sources.Source,
  workers: int,
  read_step: Callable[[workers_lib.Read, int], Rows],
  steps: range,
) -> Generator[Rows, None, None]:
  """Yields read_step(read, step) for each step in order, read ahead.

  Args:
    source: what `read` reads.
    workers: the number of processes; 0 reads in threads.
    read_step: returns the rows of a step.
    steps: the steps.
  """
  ahead = max(_AHEAD, workers)
  pending: collections.deque[futures.Future[Rows]] = collections.deque()
  with workers_lib.reading(source, workers) as read:
    pool = futures.ThreadPoolExecutor(ahead)
    try:
      for step in steps:
        pending.append(pool.submit(read_step, read, step))
        if len(pending) > ahead:
          yield pending.popleft().result()
      while pending:
        yield pending.popleft().result()
    finally:  # Also where the iterator is closed early, or a read fails.
      pool.shutdown(cancel_futures=True)


def batches(
  source: sources.Source,
  seed: int,
  batch_size: int,
  start_step: int,
  stop_step: int,
  process_index: int = 0,
  process_count: int = 1,
  other_label: bool = False,
  workers: int = 0,
) -> Iterator[Stored]:
  """Returns an iterator over this process's rows of each training step.

  Images on disk are read ahead, in threads or in processes, which end with the
  iterator or when it is closed.

  Args:
    source: the images.
    seed: the seed of `order`.
    batch_size: B, the rows of a step over all processes. Each process reads
      b = B / process_count consecutive ones.
    start_step: the first step.
    stop_step: the step after the last.
    process_index: this process, in 0 .. process_count−1.
    process_count: the number of processes.
    other_label: whether to give each row the label of the row that follows it
      in the step, too. The last row of the step gets the label of the first.
    workers: the number of processes that read images on disk; 0 reads them in
      threads. The batches are the same.

  Returns:
    An iterator over dicts of 'stored' [b,H,W,C] as the source stores them,
    'label' int32 [b], 'id' uint32 [b] and, if asked for, 'other_label' int32
    [b]. The ids are the rows' positions in the stream, modulo 2**32.

  Raises:
    errors.UserError: B is no multiple of process_count; while iterating, a row
      cannot be read.
  """
  if batch_size % process_count:
    raise errors.UserError(
      f'batch_size {batch_size} must be a multiple of {process_count} processes'
    )
  share = batch_size // process_count
  in_step = process_index * share + np.arange(share, dtype=np.int64)

  def read_step(read: workers_lib.Read, step: int) -> Stored:
    positions = step * batch_size + in_step
    stored, label = read(order(seed, positions, len(source)))
    rows = {
      'stored': stored,
      'label': label,
      'id': (positions % 2**32).astype(np.uint32),
    }
    if other_label:
      # The row after this process's last belongs to the next process.
      after = step * batch_size + (in_step[-1:] + 1) % batch_size
      _, label_after = read(order(seed, after, len(source)))
      rows['other_label'] = np.append(label[1:], label_after)
    return rows

  steps = range(start_step, stop_step)
  if isinstance(source, sources.ArraySource):
    return (read_step(source.read, step) for step in steps)
  return read_ahead(source, workers, read_step, steps)
