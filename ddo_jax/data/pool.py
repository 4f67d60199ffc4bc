"""The fake pool: samples of the reference, drawn before a round and kept.

Fakes are stored as the data is, as uint8 pixels or as latents, and read through
the same `sources.Source`. Any difference between how real and fake rows are
kept would become the discriminator's shortcut.
"""

import os
import pathlib
from typing import Any

import numpy as np

from ddo_jax import errors
from ddo_jax.data import sources
from ddo_jax.runtime import records


def balanced_labels(ids: np.ndarray, num_classes: int) -> np.ndarray:
  """Returns int32 labels [B] for ids [B], such that classes occur equally."""
  return (ids % max(num_classes, 1)).astype(np.int32)


class FakePool:
  """A folder of shards, which survives being cut off between any two of them.

  Which images a shard holds follows from its number alone. Filling the pool
  again after a kill therefore draws only the shards that are missing, and
  draws them as they would have been.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    size: int,
    shard_size: int,
    identity: dict[str, Any],
  ):
    """Opens a pool, or begins one in an empty folder.

    Args:
      folder: where the shards are.
      size: the number of images in the pool.
      shard_size: the number of images in a shard; the last may hold fewer.
      identity: JSON values that say what the images depend on: the hash of the
        reference, the sampler, the key stream.

    Raises:
      errors.UserError: the folder holds a pool of another identity.
    """
    self.folder = folder
    self.size = size
    self.shard_size = shard_size
    identity = {**identity, 'size': size, 'shard_size': shard_size}
    path = folder / 'pool.json'
    if path.exists():
      self._check(records.read_json(path), identity)
    else:
      records.write_json(path, identity)

  def _check(self, recorded: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raises UserError where the recorded identity is not the given one."""
    for name, wanted in identity.items():
      got = recorded.get(name)
      if got != wanted:
        raise errors.UserError(
          f'the fake pool in {self.folder} was drawn with {name} = {got!r};'
          f' this round has {wanted!r}: delete that folder to draw it anew'
        )

  def _shards(self) -> range:
    """The numbers of all shards."""
    return range(-(-self.size // self.shard_size))

  def _path(self, shard: int) -> pathlib.Path:
    return self.folder / f'{shard:06d}.npz'

  def ids(self, shard: int) -> np.ndarray:
    """Returns the positions in the pool of a shard's images, int64 [n]."""
    start = shard * self.shard_size
    return np.arange(start, min(start + self.shard_size, self.size))

  def missing(self) -> list[int]:
    """Returns the numbers of the shards that are still to be drawn."""
    return [s for s in self._shards() if not self._path(s).exists()]

  def write(self, shard: int, stored: np.ndarray, labels: np.ndarray) -> None:
    """Writes a shard, whole or not at all.

    Args:
      shard: its number.
      stored: [n,H,W,C], uint8 pixels or float32 latents, kept to the bit.
      labels: int32 [n].
    """
    path = self._path(shard)
    partial = path.with_suffix('.partial.npz')
    np.savez(partial, image=stored, label=labels)
    os.replace(partial, path)

  def source(self, num_classes: int, pixel_values: int) -> sources.ArraySource:
    """Opens the complete pool as a source like that of the real images.

    Args:
      num_classes: the number of classes of the real images.
      pixel_values: the number of values of their pixels.

    Raises:
      errors.UserError: a shard is missing or cannot be read.
    """
    missing = self.missing()
    if missing:
      raise errors.UserError(
        f'the fake pool in {self.folder} lacks {len(missing)} shards;'
        ' run the same command again to draw them'
      )
    shards = [sources.open_npz(self._path(s)) for s in self._shards()]
    return sources.ArraySource(
      name=str(self.folder),
      stored=np.concatenate([shard.stored for shard in shards]),
      labels=np.concatenate([shard.labels for shard in shards]),
      num_classes=num_classes,
      pixel_values=pixel_values,
    )
