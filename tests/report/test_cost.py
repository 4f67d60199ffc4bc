"""The arithmetic of a forward pass, against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.method import noise
from ddo_jax.models import toy
from ddo_jax.report import cost


def flops(fn, *shapes):
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return cost.count_flops(jax.make_jaxpr(fn)(*args).jaxpr)


def test_products_and_convolutions():
  assert flops(jnp.dot, (3, 4), (4, 5)) == 2 * 3 * 4 * 5
  assert flops(jnp.add, (3, 4), (3, 4)) == 0

  def depthwise(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      (2, 2),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=6,
    )

  wanted = 2 * (4 * 4 * 12) * (3 * 3)  # an output is a sum of nine products
  assert flops(depthwise, (1, 8, 8, 6), (3, 3, 1, 12)) == wanted


def test_loops_and_branches_are_entered():
  once = 2 * 4 * 4

  @jax.checkpoint
  def step(x, kernel):
    return jax.nn.relu(x @ kernel), None

  def scanned(x, kernels):
    return jax.lax.scan(step, x, kernels)[0]

  def either(x, kernel):
    return jax.lax.cond(x[0] > 0, jnp.dot, lambda x, _: x, x, kernel)

  assert flops(jax.jit(scanned), (4,), (7, 4, 4)) == 7 * once
  assert flops(either, (4,), (4, 4)) == once


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
