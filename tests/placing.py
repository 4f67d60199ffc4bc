"""Puts trees on an executor's devices, for tests that start from given ones."""

from typing import Any

import jax
import jax.numpy as jnp

from ddo_jax.runtime import devices


def place_state(
  executor: devices.Executor, tree: Any, part: str = 'params'
) -> Any:
  """Puts a state or params where the executor keeps them, in new buffers."""

  # A jitted copy: device_put may alias, and what is donated must not be.
  def copy(tree):
    return jax.tree.map(jnp.copy, tree)

  return executor.make_state(copy, tree, part=part)
