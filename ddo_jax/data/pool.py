"""Where fakes come from: an offline pool of the reference's samples.

The pool is stored as the data is, uint8 pixels or raw latents, and read
through the same `Source`: any difference between how real and fake rows are
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
  """[B] int32 labels of images by id: every class equally often."""
  return (ids % max(num_classes, 1)).astype(np.int32)


class Pool:
  """A folder of shards that survives being cut off between any two.

  Which images a shard holds follows from its number alone, so filling the
  pool again after a kill draws only what is missing, and the same.
  """

  def __init__(
    self, folder: pathlib.Path, size: int, shard_size: int, identity: dict
  ):
    """Opens or begins a pool.

    Args:
      folder: where the shards are.
      size: images in the pool.
      shard_size: images in a shard; the last may hold fewer.
      identity: JSON values of what the images depend on: the hash of the
        reference, the sampler, the key stream.

    Raises:
      errors.UserError: the folder holds the pool of another identity.
    """
    self.folder = folder
    self.size = size
    self.shard_size = shard_size
    identity = identity | {'size': size, 'shard_size': shard_size}
    path = folder / 'pool.json'
    if path.exists():
      self._check(records.read_json(path), identity)
    else:
      records.write_json(path, identity)

  def _check(self, recorded: dict[str, Any], identity: dict[str, Any]) -> None:
    for name, wanted in identity.items():
      got = recorded.get(name)
      if got != wanted:
        raise errors.UserError(
          f'the fake pool in {self.folder} was drawn with {name} = {got!r};'
          f' this round has {wanted!r}: delete that folder to draw it anew'
        )

  def _path(self, shard: int) -> pathlib.Path:
    return self.folder / f'{shard:06d}.npz'

  def ids(self, shard: int) -> np.ndarray:
    """The positions in the pool of a shard's images."""
    start = shard * self.shard_size
    return np.arange(start, min(start + self.shard_size, self.size))

  def missing(self) -> list[int]:
    """The shards that are still to be drawn."""
    count = -(-self.size // self.shard_size)
    return [s for s in range(count) if not self._path(s).exists()]

  def write(self, shard: int, images: np.ndarray, labels: np.ndarray) -> None:
    """Stores a shard, whole or not at all.

    Args:
      shard: its number.
      images: [n,H,W,C], uint8 or float32 latents, kept to the bit.
      labels: [n] int32.
    """
    partial = self._path(shard).with_suffix('.partial.npz')
    np.savez(partial, image=images, label=labels)
    os.replace(partial, self._path(shard))

  def source(self, num_classes: int, pixel_values: int) -> sources.ArraySource:
    """The complete pool, as any other source of images.

    Raises:
      errors.UserError: a shard is missing or cannot be read.
    """
    if self.missing():
      raise errors.UserError(
        f'the fake pool in {self.folder} lacks {len(self.missing())} shards;'
        ' run the same command again to draw them'
      )
    paths = [self._path(s) for s in range(-(-self.size // self.shard_size))]
    shards = [sources.open_npz(path) for path in paths]
    images = np.concatenate([shard.images for shard in shards])
    labels = np.concatenate([shard.labels for shard in shards])
    return sources.ArraySource(
      str(self.folder), images, labels, num_classes, pixel_values
    )
