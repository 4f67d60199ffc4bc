"""A model's parameters, and the arithmetic of its forward pass."""

import jax
import numpy as np

from ddo_jax.method import noise
from ddo_jax.models import toy
from ddo_jax.report import cost


def test_a_model_is_counted_as_it_is_built():
  config = toy.ToyConfig(hidden=16)
  model = config.build(noise=noise.LogNormal(p_mean=0.0, p_std=1.0))
  stored = np.zeros((1, 8, 8, 1), np.uint8)
  params = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
  labels = (config.num_classes + 1, 16)  # a table, of which a row is read
  kernels = [k for k in params if k.ndim == 2 and k.shape != labels]
  result = cost.describe(model, {}, stored)
  assert result['parameters'] == sum(leaf.size for leaf in params)
  # Every weight of an MLP meets one number of the image.
  assert result['flops'] == 2 * sum(leaf.size for leaf in kernels)
