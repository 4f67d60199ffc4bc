"""Rows of numbers, one row an image, gathered in one pass over the images.

Images are drawn or read once, in chunks. Only what an evaluator makes of them
is kept: in memory, or in a folder, so that a pass which was cut off goes on
where it stopped.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import pathlib
from typing import NamedTuple
import zlib

import numpy as np

from ddo_jax.evaluation.metrics import frechet
from ddo_jax.runtime import disk
from ddo_jax.runtime import progress

# What was measured, by kind: [N, D] floats, row i for image i.
Rows = dict[str, np.ndarray]

# Gives the images [b,H,W,C] of ascending ids [B], in chunks of any size.
Images = Callable[[np.ndarray], Iterable[np.ndarray]]

# Gives exactly the images of the ids that are asked for.
Take = Callable[[np.ndarray], np.ndarray]

# Takes images in the order of the ids [B]; yields some ids and their rows.
Embed = Callable[[Take, np.ndarray], Iterator[tuple[np.ndarray, Rows]]]


class Kind(NamedTuple):
  """The numbers of one kind that a row holds."""

  width: int
  dtype: type = np.float32


def gather(
  embed: Embed,
  kinds: Mapping[str, Kind],
  images: Images,
  count: int,
  name: str,
  folder: pathlib.Path | None = None,
) -> Rows:
  """Makes the rows of images 0 .. count−1 in one pass.

  Args:
    embed: makes rows of images.
    kinds: what a row holds, by name.
    images: gives the images of the ids that are still missing.
    count: N.
    name: what the progress is called.
    folder: rows are kept here as they come, and a later call makes only those
      that are missing; None keeps them in memory.

  Raises:
    errors.UserError: a row holds NaN or Inf, or the disk is full.
  """
  rows = {}
  kept = []
  missing = np.zeros(count, bool)
  for kind, (width, dtype) in kinds.items():
    rows[kind] = np.zeros((count, width), dtype)
    if folder:
      kept.append(_Kept(folder / f'{kind}.rows', rows[kind]))
      missing |= kept[-1].missing
    else:
      missing[:] = True
  ids = np.flatnonzero(missing)
  take = _Buffer(images(ids))
  with progress.follow(name, count, done=count - len(ids)) as bar:
    for mine, found in embed(take, ids):
      for kind, array in rows.items():
        array[mine] = frechet.check_features(kind, found[kind])
      for file in kept:
        file.write(mine)
      bar.update(len(mine))
  return rows


class _Buffer:
  """Hands out a stream of chunks in the portions that are asked for."""

  def __init__(self, chunks: Iterable[np.ndarray]):
    self._chunks = iter(chunks)
    self._parts = []
    self._held = 0

  def __call__(self, ids: np.ndarray) -> np.ndarray:
    while self._held < len(ids):
      part = next(self._chunks)
      self._parts.append(part)
      self._held += len(part)
    held = np.concatenate(self._parts)
    rest = held[len(ids) :]
    self._parts = [rest]
    self._held = len(rest)
    return held[: len(ids)]


class _Kept:
  """The file of one kind's rows; each row stands beside its checksum.

  A row whose checksum does not hold has not come yet: it was never written,
  half written, or damaged since. Rows of another pass, in a file that was put
  in the place of this one, do not hold either.

  Attributes:
    missing: [N] bool, the rows that the file does not hold.
  """

  def __init__(self, path: pathlib.Path, rows: np.ndarray):
    """Reads what an earlier pass left.

    Args:
      path: the file.
      rows: [N, D], which gets the rows that hold.
    """
    self._path = path
    self._rows = rows
    count, width = rows.shape
    self._type = np.dtype([('row', rows.dtype, (width,)), ('sum', np.uint32)])
    # Of the round, the scores and the block that they are of, not of the run,
    # which may be moved.
    self._pass = '/'.join(path.parts[-5:])
    size = count * self._type.itemsize
    if not path.is_file() or path.stat().st_size != size:
      with disk.whole(path) as file:
        file.truncate(size)
    stored = np.fromfile(path, self._type)
    sums = self._sums(np.arange(count), stored['row'])
    self.missing = stored['sum'] != sums
    rows[~self.missing] = stored['row'][~self.missing]

  def _sums(self, ids: np.ndarray, rows: np.ndarray) -> list[int]:
    """Returns the checksums of rows."""
    starts = [zlib.crc32(f'{self._pass} {number}'.encode()) for number in ids]
    rows = np.ascontiguousarray(rows)
    return [zlib.crc32(row, s) for row, s in zip(rows, starts, strict=True)]

  def write(self, ids: np.ndarray) -> None:
    """Writes rows that have come, of ascending ids.

    Raises:
      errors.UserError: the disk is full.
    """
    records = np.empty(len(ids), self._type)
    records['row'] = self._rows[ids]
    records['sum'] = self._sums(ids, records['row'])
    gaps = np.flatnonzero(np.diff(ids) != 1) + 1
    with disk.guarded(self._path), self._path.open('r+b') as file:
      for part in np.split(np.arange(len(ids)), gaps):
        file.seek(int(ids[part[0]]) * self._type.itemsize)
        file.write(records[part].tobytes())
