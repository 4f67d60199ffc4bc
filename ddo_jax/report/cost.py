"""What a model costs: its parameters, and the arithmetic of a forward pass."""

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import rng
from ddo_jax.method import likelihood
from ddo_jax.runtime import work


def short(number: float) -> str:
  """Returns a number to three digits, as '94.2 k', for a unit to follow."""
  for prefix in ('', 'k', 'M', 'G', 'T', 'P', 'E'):
    if number < 999.5:
      return f'{number:.3g} {prefix}'
    number /= 1_000
  return f'{number:.3g} Z'


def describe(
  model: likelihood.LikelihoodModel,
  frozen: likelihood.Frozen,
  stored: np.ndarray,
) -> dict[str, int]:
  """Counts a model's parameters and its work; nothing is computed.

  Args:
    model: the family, with a noise law.
    frozen: weights beside the params.
    stored: one row [1,...] as the data stores it.

  Returns:
    {'parameters', 'flops': of a forward pass of one image}.
  """
  row_id = jnp.zeros(1, jnp.uint32)
  label = jnp.zeros(1, jnp.int32)
  keys = rng.per_example(rng.stream(0), row_id)
  params = jax.eval_shape(model.init, rng.stream(0))
  x = jax.eval_shape(model.codec.encode, frozen, stored, keys)
  batch = likelihood.Batch(x=x, label=label, id=row_id)
  return {
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(params)),
    'flops': work.of(model.mle_loss, params, frozen, batch, keys).total,
  }
