"""The work of a program, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from ddo_jax.runtime import work


def count(fn, *shapes, dtype=jnp.float32):
  args = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
  return work.of(fn, *args)


def flops(fn, *shapes):
  return count(fn, *shapes).total


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


@pytest.mark.parametrize(
  ('asked', 'dtype', 'counted'),
  [
    (None, jnp.float32, 'default'),
    ('highest', jnp.float32, 'highest'),
    ('BF16_BF16_F32_X3', jnp.float32, 'bf16_bf16_f32_x3'),
    (None, jnp.bfloat16, 'bfloat16'),
  ],
)
def test_the_precision_of_a_product(asked, dtype, counted):
  def product(x, y):
    return jnp.dot(x, y, precision=asked)

  found = count(product, (3, 4), (4, 5), dtype=dtype).flops
  assert found == {counted: 2 * 3 * 4 * 5}


def test_what_nobody_reads_is_not_computed():
  def call(x):
    x @ x @ x
    return x @ x

  assert flops(call, (8, 8)) == 2 * 8**3


def test_bytes_that_a_program_moves():
  """In squares of 64: each product reads two and writes one."""
  size = 64 * 64 * 4

  def squares(fn):
    return count(fn, (64, 64)).moved / size

  assert squares(lambda x: x @ x) == 2  # one is read, though twice
  # A chain of elementwise functions is one loop: it reads and writes once.
  assert squares(lambda x: jnp.tanh(jnp.exp(x) * 2 + 1)) == 2
  # A sum of two is stored once, for the product reads it.
  assert squares(lambda x: (x @ x + x) @ x) == 2 + (2 + 1) + (2 + 1)
  # What reduces reads what is computed on the way.
  assert squares(lambda x: jnp.exp(x).sum()) == pytest.approx(1, abs=0.01)

  def scanned(x):
    return jax.lax.scan(lambda y, _: (y @ x, None), x, None, length=7)[0]

  assert squares(scanned) == 7 * 3
  assert count(scanned, (64, 64)).loops == 7
