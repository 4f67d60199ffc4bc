"""The attention's queries and keys."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.models import var_layers


class _Products(var_layers.Attention):
  """Gives what is multiplied, in place of what comes out."""

  @nn.compact
  def __call__(self, x):
    return self._qkv(x)


def test_lengths_are_float32_under_bfloat16_products():
  """Queries and keys are rounded once: at the end."""
  module = _Products(heads=2, depth=1, l2_norm=True, dtype=jnp.bfloat16)
  draw = np.random.default_rng(0).normal
  x = np.asarray(draw(size=(2, 5, 64)), np.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)['params']
  params = jax.tree.map(
    lambda s: np.asarray(0.3 * draw(size=s.shape), np.float32), shapes
  )
  params['q_bias'] *= 0
  # Not compiled as a whole: XLA may leave out roundings between products.
  (q, k, _), seen = module.apply(
    {'params': params}, x, capture_intermediates=True
  )
  assert q.dtype == k.dtype == jnp.bfloat16
  qkv = np.asarray(seen['intermediates']['mat_qkv']['__call__'][0], np.float64)
  qkv = qkv.reshape(2, 5, 3, 2, 32)
  unit = qkv / np.linalg.norm(qkv, axis=-1, keepdims=True)
  scale = np.exp(params['scale_mul_1H11'].reshape(2, 1).astype(np.float64))
  for got, wanted in ((q, unit[:, :, 0] * scale), (k, unit[:, :, 1])):
    half_unit = np.ldexp(1.0, np.frexp(wanted)[1] - 9)
    error = np.abs(np.asarray(got, np.float64) - wanted)
    assert 0.9 < np.max(error / half_unit) < 1.001
