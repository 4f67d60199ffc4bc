"""Rows of numbers, one row an image, gathered in one pass over the images.

Images are drawn or read once, in chunks. Only what an evaluator makes of them
is kept: in memory, or in a folder, so that a pass which was cut off goes on
where it stopped.
"""

import collections
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import logging
import pathlib
from typing import Any
from typing import NamedTuple
import zlib

import numpy as np

from ddo_jax.evaluation.metrics import frechet
from ddo_jax.runtime import devices
from ddo_jax.runtime import disk
from ddo_jax.runtime import processes
from ddo_jax.runtime import progress

# What was measured, by kind: [N, D] floats, row i for image i.
Rows = dict[str, np.ndarray]

# Gives the images [b,H,W,C] of ascending ids [B], in chunks of any size. A
# chunk is an array, or reads what is asked of it: it has a length b, and at a
# mask [b] or a slice the images.
Images = Callable[[np.ndarray], Iterable[Any]]

# Gives exactly the images of the ids that are asked for.
Take = Callable[[np.ndarray], np.ndarray]

# Takes images in the order of the ids [B]; yields some ids and their rows.
Embed = Callable[[Take, np.ndarray], Iterator[tuple[np.ndarray, Rows]]]

# Ids that a process embeds at a time, of several: whole blocks of `extract`.
_SHARE = 1_024


_LOGGER = logging.getLogger(__name__)


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

  Of several processes each embeds a share of the images, and process 0 gets
  all rows; what the others return holds no more than zeros.

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
  if folder and processes.is_main():
    _name_lost(folder, kinds)
  for kind, (width, dtype) in kinds.items():
    rows[kind] = np.zeros((count, width), dtype)
    if folder and processes.is_main():
      kept.append(_Kept(folder / f'{kind}.rows', rows[kind]))
      missing |= kept[-1].missing
    else:
      missing[:] = True
  ids = np.flatnonzero(_of_main(missing))
  if processes.count() == 1:
    parts = embed(_Buffer(images(ids)), ids)
  else:
    parts = _embed_together(embed, kinds, images(ids), ids)
  with progress.follow(name, count, done=count - len(ids)) as bar:
    for mine, found in parts:
      if not processes.is_main():
        continue
      for kind, array in rows.items():
        array[mine] = frechet.check_features(kind, found[kind])
      for file in kept:
        file.write(mine)
      bar.update(len(mine))
  return rows


def _of_main(mask: np.ndarray) -> np.ndarray:
  """Returns process 0's bool mask [N] on all processes."""

  def as_text():
    return np.packbits(mask).tobytes().hex()

  text = processes.decide('missing rows', as_text)
  packed = np.frombuffer(bytes.fromhex(text), np.uint8)
  return np.unpackbits(packed, count=len(mask)).astype(bool)


def _embed_together(
  embed: Embed,
  kinds: Mapping[str, Kind],
  chunks: Iterable[Any],
  ids: np.ndarray,
) -> Iterator[tuple[np.ndarray, Rows]]:
  """Embeds images of ids [B] by all processes; yields ids and their rows.

  The processes take turns at blocks of `_SHARE` ids. What is drawn is drawn by
  all of them together, so each takes all chunks from the stream before the
  rows are exchanged; of a chunk that is still to be read it takes its own.
  """
  turn = _SHARE * processes.count()
  own = ids // _SHARE % processes.count() == processes.index()
  take = _Buffer(chunks, own)
  for number in np.unique(ids // turn):
    now = ids // turn == number
    found = {
      kind: np.zeros((_SHARE, width), dtype)
      for kind, (width, dtype) in kinds.items()
    }
    if (now & own).any():
      for mine, rows in embed(take, ids[now & own]):
        for kind, array in found.items():
          array[mine % _SHARE] = rows[kind]
    take.read_to(np.flatnonzero(now)[-1] + 1)
    every = devices.exchange(found)
    places = ids[now] % turn
    yield ids[now], {kind: array[places] for kind, array in every.items()}


class _Buffer:
  """Hands out a stream of chunks in the portions that are asked for."""

  def __init__(self, chunks: Iterable[Any], wanted: np.ndarray | None = None):
    """Reads nothing yet.

    Args:
      chunks: the images.
      wanted: [B] bool, those of them that will be asked for; None: all.
    """
    self._chunks = iter(chunks)
    self._wanted = wanted
    self._read = 0
    self._parts: collections.deque[np.ndarray] = collections.deque()
    self._held = 0

  def _read_chunk(self) -> None:
    chunk = next(self._chunks)
    taken: Any = slice(None)
    if self._wanted is not None:
      taken = self._wanted[self._read : self._read + len(chunk)]
    self._read += len(chunk)
    if self._wanted is None or taken.any():
      part = chunk[taken]
      self._parts.append(part)
      self._held += len(part)

  def read_to(self, place: int) -> None:
    """Reads the stream up to a place in it, at least."""
    while self._read < place:
      self._read_chunk()

  def __call__(self, ids: np.ndarray) -> np.ndarray:
    while self._held < len(ids):
      self._read_chunk()
    self._held -= len(ids)
    taken = []
    missing = len(ids)
    while missing:
      part = self._parts.popleft()
      taken.append(part[:missing])
      if len(part) > missing:
        self._parts.appendleft(part[missing:])
      missing -= len(taken[-1])
    return taken[0] if len(taken) == 1 else np.concatenate(taken)


def _name_lost(folder: pathlib.Path, kinds: Iterable[str]) -> None:
  """Names files of rows that are gone while others of their pass are there."""
  paths = [folder / f'{kind}.rows' for kind in kinds]
  lost = [path for path in paths if not path.exists()]
  if len(lost) < len(paths):
    for path in lost:
      _LOGGER.warning('%s is missing: making all of it again', path)


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
    if path.is_file() and path.stat().st_size != size:
      _LOGGER.warning('%s is damaged: making all of it again', path)
      path.unlink()
    if not path.is_file():
      with disk.whole(path) as file:
        file.truncate(size)
    stored = np.fromfile(path, self._type)
    sums = self._sums(np.arange(count), stored['row'])
    self.missing = stored['sum'] != sums
    came = stored['sum'] != 0  # a row that has not come is all 0
    damaged = int((came & self.missing).sum())
    if damaged:
      _LOGGER.warning(
        '%s: %d rows do not hold: making them again', path, damaged
      )
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
