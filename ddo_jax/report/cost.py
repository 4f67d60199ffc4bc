"""What a model costs: its parameters, and the arithmetic of a forward pass."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import rng
from ddo_jax.method import likelihood
from ddo_jax.runtime import memory


def count_flops(jaxpr: Any) -> int:
  """Returns the additions and multiplications in matrix products.

  Convolutions count as such; all else is left out, as papers do. XLA's own cost
  analysis would count the body of a loop once, and VAR's blocks are one loop.
  The body of a `while`, whose length nobody knows, does count once here too.

  Args:
    jaxpr: as `jax.make_jaxpr` makes it.
  """
  total = 0
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if name == 'dot_general':
      (summed, _), _ = equation.params['dimension_numbers']
      shape = equation.invars[0].aval.shape
      length = math.prod(shape[axis] for axis in summed)
      total += 2 * length * equation.outvars[0].aval.size
    elif name == 'conv_general_dilated':
      kernel = equation.invars[1].aval
      out_axis = equation.params['dimension_numbers'].rhs_spec[0]
      length = kernel.size // kernel.shape[out_axis]
      total += 2 * length * equation.outvars[0].aval.size
    elif name == 'cond':
      total += max(count_flops(body) for body in memory.bodies(equation))
    else:
      times = equation.params['length'] if name == 'scan' else 1
      inner = sum(count_flops(body) for body in memory.bodies(equation))
      total += times * inner
  return total


def short(number: float) -> str:
  """Returns a number to three digits, as '94.2 k', for a unit to follow."""
  for prefix in ('', 'k', 'M', 'G'):
    if number < 999.5:
      return f'{number:.3g} {prefix}'
    number /= 1_000
  return f'{number:.3g} T'


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
  traced = jax.make_jaxpr(model.mle_loss)(params, frozen, batch, keys)
  return {
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(params)),
    'flops': count_flops(traced.jaxpr),
  }
