"""Negatives: where the second row of each pair comes from.

Each kind says what it needs of the loop and gives the step its rows.
"""

import dataclasses
from typing import Any
from typing import ClassVar

from flax import struct
import jax

from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.method import likelihood

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
    return pairing.real.replace(
      x=model.codec.encode(pairing.frozen, stored, encode_keys), label=label
    )

  def check(self, name: str) -> None:
    """Raises UserError unless the size is positive."""
    errors.require(
      self.size > 0, f'{name}.size', self.size, 'a positive integer'
    )


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
    return pairing.real.replace(x=x)


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
    return pairing.real.replace(label=label)
