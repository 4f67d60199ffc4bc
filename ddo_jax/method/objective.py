"""What an objective is: log-ratios in, one loss a row out.

An objective is a pytree dataclass. Numbers that a sweep or a round varies (α,
β) are its leaves: in a config they are tuples with one entry a round, in the
step they are traced scalars (`config.at_round` goes from the one to the
other). Flags are static fields. A new objective is one such class and touches
no other file; see CONTRIBUTING.md.
"""

import dataclasses
from typing import Any
from typing import ClassVar

from flax import struct
import jax
import jax.numpy as jnp

from ddo_jax import errors


@struct.dataclass
class Rows:
  """What an objective may know of B pairs of rows beside their log-ratios.

  Attributes:
    dropped: [B] bool, true where the pair lost its labels at random.
    label: [B] int32, the real rows' labels, after the drop.
    other_label: [B] int32, the labels of the second rows, after the drop.
    label_drop: the share of rows that lose their labels; 0 if none ever does.
  """

  dropped: jax.Array
  label: jax.Array
  other_label: jax.Array
  label_drop: float = struct.field(pytree_node=False, default=0.0)

  @classmethod
  def plain(cls, count: int) -> 'Rows':
    """Rows without labels, for a loop that has none."""
    label = jnp.zeros(count, jnp.int32)
    return cls(jnp.zeros(count, bool), label, label)


class Objective:
  """The contract: `loss`, and what the loop needs to know of it.

  Attributes:
    contrastive: whether the loss is one of log-ratios, and so needs second
      rows. Where it is not, the model's own `mle_loss` is minimised.
    compares_labels: whether the loss compares the labels of a pair, which only
      makes sense where the second rows are the real images under other labels
      (`negatives.OtherLabels`).
  """

  contrastive: ClassVar[bool] = True
  compares_labels: ClassVar[bool] = False
  beta: Any  # the scale of the log-ratio, where `logit` is not overridden

  def loss(
    self, log_ratio_real: jax.Array, log_ratio_other: jax.Array, rows: Rows
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the two terms of each pair, unreduced, weights and signs inside.

    Args:
      log_ratio_real: [B] log p_θ − log p_ref of the real rows, in nats.
      log_ratio_other: [B] the same of the second rows.
      rows: labels and label drop.

    Returns:
      ([B], [B]). The step minimises the sum of their means.
    """
    raise NotImplementedError

  def chance(self, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Returns the loss where θ = θ_ref, by which step 0 is checked."""
    zero = jnp.zeros(rows.dropped.shape)
    return self.loss(zero, zero, rows)

  def logit(self, log_ratio: jax.Array) -> jax.Array:
    """Returns what the discriminator's sigmoid takes: β · log-ratio."""
    return self.beta * log_ratio

  def check(self, name: str) -> None:
    """Raises UserError where a number is not positive, or β is missing.

    Args:
      name: dotted name of the objective in the config, for the message.
    """
    scaled = hasattr(self, 'beta') or type(self).logit is not Objective.logit
    if self.contrastive and not scaled:
      raise errors.UserError(
        f'config.{name} is {self}, without a field `beta`: give'
        f' {type(self).__name__} one, or override its `logit`'
      )
    fields: tuple[dataclasses.Field, ...] = dataclasses.fields(self)  # type: ignore[arg-type]
    for field in fields:
      if not field.metadata.get('static'):
        errors.require_positive(
          f'{name}.{field.name}', getattr(self, field.name)
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(unsafe_hash=True)
class MLE(Objective):
  """The model's own pretraining loss on real rows alone.

  It pretrains, and it is the fair control of every other objective.
  """

  contrastive: ClassVar[bool] = False
