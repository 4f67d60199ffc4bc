"""Negatives: where the second row of each pair comes from.

Each kind says what it needs of the loop and gives the step its rows. A fake
pool is stored as the data is, uint8 pixels or latents, and read through the
same `sources.Source`. Any difference between how real and fake rows are kept
would become the discriminator's shortcut.
"""

import dataclasses
import pathlib
from typing import Any
from typing import ClassVar

from flax import struct
import jax
import numpy as np

from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.data import labels as labels_lib
from ddo_jax.data import sources
from ddo_jax.method import likelihood
from ddo_jax.runtime import manifest
from ddo_jax.runtime import processes

# Fields that samplers have been given since pools are recorded, and what holds
# of a pool without a record of them.
LATER = {
  'precision': 'highest',
  'guidance_channels': 0,
  'discriminator': 0.0,
  'discriminator_min': 0.05,
  'discriminator_max': 80.0,
  'guided_stages': 0,
  'temperature': 1.0,
}
_RECORD = 'pool.json'

Stored = dict[str, jax.Array]  # 'stored' [B,...], 'label' [B], and others


@struct.dataclass
class Pairing:
  """What the second rows of a step may be made of.

  Attributes:
    real: the real rows in model units, labels dropped.
    stored: the real rows as stored: 'label' [B] before the drop, and
      'other_label' [B] where the negatives ask for it.
    fake: rows of the fake pool as stored; None unless the negatives ask for it.
    dropped: [B] bool, the pairs that lose their labels.
    keys: [B], the pairs' keys; both rows of a pair see the same noise.
    reference: θ_ref.
    frozen: weights beside it.
  """

  real: likelihood.Batch
  stored: Stored
  fake: Stored | None
  dropped: jax.Array
  keys: jax.Array
  reference: likelihood.Params
  frozen: likelihood.Frozen


class Negatives:
  """The contract: `rows`, and what it needs.

  Attributes:
    needs_pool: whether a pool of samples is drawn before the round.
    needs_sampler: whether samples are drawn inside the step.
    needs_other_label: whether the loader gives each row its neighbour's label.
  """

  needs_pool: ClassVar[bool] = False
  needs_sampler: ClassVar[bool] = False
  needs_other_label: ClassVar[bool] = False

  def rows(
    self, pairing: Pairing, model: likelihood.LikelihoodModel, sampler: Any
  ) -> likelihood.Batch:
    """Returns the second rows, the i-th for the i-th real row."""
    raise NotImplementedError

  def open_pool(
    self, path: pathlib.Path, shard_size: int, identity: dict[str, Any]
  ) -> 'FakePool':
    """Opens the folder of a pool; asked where `needs_pool` is true.

    Args:
      path: the folder.
      shard_size: the number of images in a shard.
      identity: what the images depend on, see `FakePool`.
    """
    raise NotImplementedError

  def check(self, name: str) -> None:
    """Raises UserError, naming the field, where a value makes no sense."""


@dataclasses.dataclass(unsafe_hash=True)
class Pool(Negatives):
  """Samples of the reference, drawn before a round and stored as the data is.

  Attributes:
    size: the number of samples in the pool.
  """

  needs_pool: ClassVar[bool] = True

  size: int = 50_000

  def open_pool(
    self, path: pathlib.Path, shard_size: int, identity: dict[str, Any]
  ) -> 'FakePool':
    """Opens the folder of the pool's shards."""
    return FakePool(path, self.size, shard_size, identity)

  def rows(
    self, pairing: Pairing, model: likelihood.LikelihoodModel, sampler: Any
  ) -> likelihood.Batch:
    """Encodes the pool's rows as the real ones were encoded."""
    del sampler
    encode_keys = rng.split_rows(pairing.keys, 'encode')
    stored = pairing.fake['stored']
    label = likelihood.hide_labels(
      pairing.fake['label'], pairing.dropped, model.num_classes
    )
    x = model.codec.encode(pairing.frozen, stored, encode_keys)
    return dataclasses.replace(pairing.real, x=x, label=label)

  def check(self, name: str) -> None:
    """Raises UserError unless the size is positive."""
    errors.require_integer(f'{name}.size', self.size, 1)


@dataclasses.dataclass(unsafe_hash=True)
class Online(Negatives):
  """Samples of the reference drawn in every step, as VAR's are.

  There is one for each real row, of that row's label before the drop.

  Attributes:
    round_trip: whether samples pass through the stored form and the encoder
      again, so that no artefact of sampling tells them from real rows.
  """

  needs_sampler: ClassVar[bool] = True

  round_trip: bool = True

  def rows(
    self, pairing: Pairing, model: likelihood.LikelihoodModel, sampler: Any
  ) -> likelihood.Batch:
    """Draws the samples."""
    x = model.sample(
      pairing.reference,
      pairing.frozen,
      pairing.stored['label'],
      rng.split_rows(pairing.keys, 'fakes'),
      sampler,
    )
    if self.round_trip:
      encode_keys = rng.split_rows(pairing.keys, 'encode')
      x = model.codec.round_trip(pairing.frozen, x, encode_keys)
    return dataclasses.replace(pairing.real, x=x)


@dataclasses.dataclass(unsafe_hash=True)
class OtherLabels(Negatives):
  """The real images under the labels of their neighbours: no samples."""

  needs_other_label: ClassVar[bool] = True

  def rows(
    self, pairing: Pairing, model: likelihood.LikelihoodModel, sampler: Any
  ) -> likelihood.Batch:
    """Replaces the labels; they are dropped in the same rows."""
    del sampler
    label = likelihood.hide_labels(
      pairing.stored['other_label'], pairing.dropped, model.num_classes
    )
    return dataclasses.replace(pairing.real, label=label)


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
      shard_size: the number of images in a shard; the last may hold fewer. A
        pool that was begun keeps its own.
      identity: JSON values that say what the images depend on: the hash of the
        reference, the sampler, the key stream.

    Raises:
      errors.UserError: the folder holds a pool of another identity.
    """
    self.folder = folder
    self.size = size
    identity = {**identity, 'size': size}
    self._missing: set[int] = set()
    self.shard_size = processes.decide(
      f'open {folder}', lambda: self._open(identity, shard_size)
    )

  def _open(self, identity: dict[str, Any], shard_size: int) -> int:
    """Opens or begins the pool, and looks which shards hold.

    Returns:
      The size of its shards.
    """
    self._manifest = manifest.Manifest(self.folder, (_RECORD, '*.npz'))
    before = self._manifest.entry(_RECORD)
    recorded = self._manifest.read_json(_RECORD)
    if recorded is not None:
      self._check(recorded, identity)
      self.shard_size = recorded['shard_size']
    else:
      self.shard_size = shard_size
      about = {**identity, 'shard_size': shard_size}
      self._manifest.write_json(_RECORD, about)
    self._missing = set(self._shards())
    # Without a record that can be read, shards are taken for the pool's only
    # where the same record was there before.
    if recorded is not None or before == self._manifest.entry(_RECORD):
      again = 'drawing it again'
      for shard in self._shards():
        if self._manifest.holds(self._path(shard).name, again):
          self._missing.remove(shard)
    return self.shard_size

  def _check(self, recorded: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raises UserError where the recorded identity is not the given one."""
    # Earlier versions drew every class equally often, and did not say so.
    recorded = {'labels': labels_lib.EQUAL} | LATER | recorded
    size = recorded.get('shard_size')
    if type(size) is not int or size < 1:
      raise errors.UserError(
        f'{self.folder / _RECORD} has shard_size {size!r}; wanted a positive'
        ' integer: delete that folder to draw the pool anew'
      )
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
    return sorted(self._missing)

  def write(self, shard: int, stored: np.ndarray, labels: np.ndarray) -> None:
    """Writes a shard, whole or not at all; process 0 alone does.

    Args:
      shard: its number.
      stored: [n,H,W,C], uint8 pixels or float32 latents, kept to the bit.
      labels: int32 [n].
    """
    if not processes.is_main():
      return
    with self._manifest.writing(self._path(shard).name) as file:
      np.savez(file, image=stored, label=labels)
    self._missing.discard(shard)

  def _open_shard(self, shard: int) -> sources.ArraySource:
    """Opens a shard.

    Raises:
      errors.UserError: it cannot be read, or is of another pool.
    """
    path = self._path(shard)
    found = sources.open_npz(path)
    wanted = len(self.ids(shard))
    if len(found) != wanted:
      raise errors.UserError(
        f'{path} has {len(found)} images, and shard {shard} {wanted}: delete it'
        ' to draw it again'
      )
    return found

  def source(self, num_classes: int, pixel_values: int) -> sources.ArraySource:
    """Opens the complete pool as a source like that of the real images.

    Args:
      num_classes: the number of classes of the real images.
      pixel_values: the number of values of their pixels.

    Raises:
      errors.UserError: a shard is missing or cannot be read.
    """
    missing = processes.decide(f'missing in {self.folder}', self.missing)
    if missing:
      raise errors.UserError(
        f'the fake pool in {self.folder} lacks {len(missing)} shards;'
        ' run the same command again to draw them'
      )
    shards = [self._open_shard(shard) for shard in self._shards()]
    return sources.ArraySource(
      name=str(self.folder),
      stored=np.concatenate([shard.stored for shard in shards]),
      classes=np.concatenate([shard.classes for shard in shards]),
      num_classes=num_classes,
      pixel_values=pixel_values,
    )
