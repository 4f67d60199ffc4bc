"""State dicts of Inception made of params, for tests that want such files."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util
import numpy as np

from ddo_jax.weights import inception


def to_state(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns the state dict of params; this inverts `inception.to_flax`."""
  flat = traverse_util.flatten_dict(dict(params))
  axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
  state = {}
  for path, key, shape in inception._keys():
    array = np.transpose(flat[path], axes[len(shape)])
    state[key] = np.ascontiguousarray(array)
  return state
