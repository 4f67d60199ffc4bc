"""A stranger's objective: the hinge loss of geometric GANs.

python -m ddo_jax.main --config=tests/strangers/hinge_objective.py \
  --workdir=runs/hinge
"""

import dataclasses

import jax
import jax.numpy as jnp

from ddo_jax import config as config_lib
from ddo_jax.method import objective
from tests.strangers import tiny


@jax.tree_util.register_dataclass
@dataclasses.dataclass(unsafe_hash=True)
class Hinge(objective.Objective):
  """L = E_real max(0, m − β r) + α E_fake max(0, m + β r).

  Attributes:
    alpha: the weight of the fakes, one value a round.
    beta: the scale of the log-ratio, one value a round.
    margin: m, beyond which a row has no say any more.
  """

  alpha: tuple[float, ...] = (1.0,)
  beta: tuple[float, ...] = (0.1,)
  margin: float = dataclasses.field(default=1.0, metadata={'static': True})

  def loss(
    self,
    log_ratio_real: jax.Array,
    log_ratio_other: jax.Array,
    rows: objective.Rows,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the two terms of each pair."""
    real = jnp.maximum(self.margin - self.logit(log_ratio_real), 0)
    fake = jnp.maximum(self.margin + self.logit(log_ratio_other), 0)
    return real, jnp.where(rows.dropped, 0, self.alpha * fake)


def get_config() -> config_lib.Config:
  """Returns the recipe."""
  config = tiny.get_config()
  config.name = 'hinge'
  config.ddo.objective = Hinge()
  return config
