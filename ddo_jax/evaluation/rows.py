"""Rows of numbers, one row an image, gathered in one pass over the images.

Images are drawn or read once, in chunks. Only what an evaluator makes of them
is kept: in memory, or in a folder, so that a pass which was cut off goes on
where it stopped.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import os
import pathlib
from typing import NamedTuple

import numpy as np

from ddo_jax.evaluation.metrics import frechet
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
    errors.UserError: a row holds NaN or Inf.
  """
  rows = {}
  # A row is NaN until it has come; none that has come holds one.
  missing = np.zeros(count, bool)
  for kind, (width, dtype) in kinds.items():
    rows[kind] = _open(folder, kind, (count, width), dtype)
    missing |= np.isnan(rows[kind][:, [0, -1]]).any(axis=1)
  ids = np.flatnonzero(missing)
  take = _Buffer(images(ids))
  with progress.follow(name, count, done=count - len(ids)) as bar:
    for mine, found in embed(take, ids):
      for kind, array in rows.items():
        array[mine] = frechet.check_features(kind, found[kind])
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


def _open(
  folder: pathlib.Path | None, kind: str, shape: tuple[int, int], dtype: type
) -> np.ndarray:
  """Opens what an earlier pass left in the folder, or rows of NaN."""
  if folder is None:
    return np.full(shape, np.nan, dtype)
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f'{kind}.npy'
  if path.exists():
    rows = np.lib.format.open_memmap(path, 'r+')
    if rows.shape == shape:
      return rows
  partial = path.with_suffix('.partial')
  rows = np.lib.format.open_memmap(partial, 'w+', dtype, shape)
  rows[:] = np.nan
  os.replace(partial, path)  # else rows of 0 would pass for some that came
  return rows
