"""Blocks of VAR's transformer: adaptive norms, attention over past scales."""

import functools
import math

from flax import linen as nn
from flax.linen import dtypes
import jax
import jax.numpy as jnp
import numpy as np

Past = tuple[jax.Array, jax.Array]  # keys and values, each [...,B,T,H,D]

EPSILON = 1e-6
# exp(scale) of normalised attention is at most 100; float32's log of that.
_MAX_LOG_SCALE = 4.605170249938965


def convert(x: jax.Array, dtype: jnp.dtype | None) -> jax.Array:
  """X in another type; None for its own.

  Left to itself, XLA drops a rounding if the type is changed back at once: then
  a network is not that of its weights in that type, see
  `autoregressive.Autoregressive.reduced`.
  """
  if dtype is None or x is None:
    return x
  kept = jnp.finfo(dtype)
  return jax.lax.reduce_precision(x, kept.nexp, kept.nmant).astype(dtype)


def _promoted(*arrays, dtype, inexact=True):
  """What `nn.Dense` does with its inputs and weights."""
  arrays = (convert(x, dtype) for x in arrays)
  return dtypes.promote_dtype(*arrays, dtype=dtype, inexact=inexact)


Dense = functools.partial(nn.Dense, promote_dtype=_promoted)


def normal(width: int, factor: float = 1.0) -> nn.initializers.Initializer:
  """Fresh weights: normal, √(1/3C) times a factor.

  The original cuts the distribution at ±2 absolute: so far out as not to.
  """
  return nn.initializers.normal(math.sqrt(1 / (3 * width)) * factor)


def _modulation_init(width: int, gate: float) -> nn.initializers.Initializer:
  """As `normal`; scales and shifts at half, gates at next to nothing."""
  factor = np.repeat([gate, 0.5], [2 * width, 4 * width])

  def init(key, shape, dtype=jnp.float32):
    value = normal(width)(key, shape, dtype)
    return value * jnp.asarray(factor, dtype)[None, :]

  return init


def layer_norm(x: jax.Array) -> jax.Array:
  """X [...,C] at mean 0 and variance 1 over C, without parameters."""
  norm = nn.LayerNorm(
    EPSILON, use_bias=False, use_scale=False, use_fast_variance=False
  )
  return norm.apply({}, x)


def _unit(x: jax.Array) -> jax.Array:
  """X [...,D] over its length, at least 1e-12; finite slope at 0."""
  square = jnp.sum(x**2, axis=-1, keepdims=True)
  return x / jnp.sqrt(jnp.maximum(square, 1e-24))


class Attention(nn.Module):
  """Multi-head self-attention; keys have no bias.

  Attributes:
    heads: number of heads.
    depth: of the whole transformer; fresh weights shrink with it.
    l2_norm: attend by cosine times a learned scale a head.
    dtype: of the products; None for the inputs'.
  """

  heads: int
  depth: int
  l2_norm: bool
  dtype: jnp.dtype | None

  @nn.compact
  def __call__(
    self, x: jax.Array, mask: jax.Array | None, past: Past | None
  ) -> tuple[jax.Array, Past]:
    """Attends to the past and, where the mask allows it, to x.

    Args:
      x: [B,L,C].
      mask: [L,L] bool, or None where all of x is visible.
      past: keys and values [B,T,H,D] of earlier tokens.

    Returns:
      [B,L,C], and the keys and values of x.
    """
    width = x.shape[-1]
    q, k, v = self._qkv(x)
    new = (k, v)
    if past is not None:
      k, v = (jnp.concatenate(p, axis=1) for p in zip(past, new, strict=True))
    wide = jnp.promote_types(v.dtype, jnp.float32)
    logits = jnp.einsum('bqhd,bkhd->bhqk', q, k, preferred_element_type=wide)
    if mask is not None:
      logits = jnp.where(mask[None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    y = jnp.einsum('bhqk,bkhd->bqhd', weights, v).reshape(x.shape)
    small = normal(width, 1 / math.sqrt(2 * self.depth))
    proj = Dense(width, dtype=self.dtype, kernel_init=small, name='proj')
    return proj(y), new

  def _qkv(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scaled queries, keys and values, each [B,L,H,D]."""
    width = x.shape[-1]
    qkv = Dense(
      3 * width,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=normal(width),
      name='mat_qkv',
    )(x)
    biases = [
      self.param(f'{name}_bias', nn.initializers.zeros, (width,))
      for name in 'qv'
    ]
    bias = jnp.concatenate([biases[0], jnp.zeros_like(biases[0]), biases[1]])
    qkv = qkv + convert(bias, self.dtype)[None, None, :]
    qkv = qkv.reshape(*x.shape[:2], 3, self.heads, width // self.heads)
    q, k, v = (qkv[:, :, i] for i in range(3))
    if not self.l2_norm:
      return q * (0.25 / math.sqrt(width // self.heads)), k, v
    log_four = nn.initializers.constant(math.log(4))
    shape = (1, self.heads, 1, 1)
    scale = self.param('scale_mul_1H11', log_four, shape)
    scale = jnp.exp(jnp.minimum(scale, _MAX_LOG_SCALE))
    scale = scale.reshape(1, 1, self.heads, 1)
    # The lengths in full precision, whatever that of the products.
    wide = jnp.promote_types(v.dtype, jnp.float32)
    q, k = _unit(q.astype(wide)) * scale, _unit(k.astype(wide))
    return q.astype(v.dtype), k.astype(v.dtype), v


class FeedForward(nn.Module):
  """Two linear layers around a GELU (tanh form).

  Attributes:
    hidden: width between the two.
    depth: as for `Attention`.
    dtype: as for `Attention`.
  """

  hidden: int
  depth: int
  dtype: jnp.dtype | None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """X [B,L,C] -> the same."""
    width = x.shape[-1]
    wide, small = normal(width), normal(width, 1 / math.sqrt(2 * self.depth))
    dense = lambda size, init, name: Dense(
      size, dtype=self.dtype, kernel_init=init, name=name
    )
    x = nn.gelu(dense(self.hidden, wide, 'fc1')(x), approximate=True)
    return dense(width, small, 'fc2')(x)


class Block(nn.Module):
  """Attention and feed-forward layer between gates and adaptive norms.

  Attributes:
    heads: see `Attention`.
    hidden: see `FeedForward`.
    depth: see `Attention`.
    l2_norm: see `Attention`.
    shared: whether one modulation, plus an own offset, serves all blocks.
    gate_init: factor of the fresh gates.
    dtype: see `Attention`.
  """

  heads: int
  hidden: int
  depth: int
  l2_norm: bool
  shared: bool
  gate_init: float
  dtype: jnp.dtype | None

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    cond: jax.Array,
    mask: jax.Array | None,
    past: Past | None,
  ) -> tuple[jax.Array, Past | None]:
    """One block.

    Args:
      x: [B,L,C].
      cond: the class's embedding [B,C], or the shared modulation [B,6,C].
      mask: of teacher forcing, see `Attention`.
      past: of decoding, see `Attention`.

    Returns:
      [B,L,C], and keys and values of x; with a mask, nothing will ask for
      them: None.
    """
    gates, scales, shifts = jnp.split(self._modulation(cond), 3, axis=1)
    at = lambda m, i: m[:, i, None, :]
    branches = (
      Attention(self.heads, self.depth, self.l2_norm, self.dtype, name='attn'),
      FeedForward(self.hidden, self.depth, self.dtype, name='ffn'),
    )
    h = layer_norm(x) * (1 + at(scales, 0)) + at(shifts, 0)
    y, new = branches[0](h, mask, past)
    x = x + y * at(gates, 0)
    h = layer_norm(x) * (1 + at(scales, 1)) + at(shifts, 1)
    x = x + branches[1](h) * at(gates, 1)
    return x, new if mask is None else None

  def _modulation(self, cond: jax.Array) -> jax.Array:
    """[B,6,C]: two gates, two scales, two shifts."""
    width = cond.shape[-1]
    if self.shared:
      offset = self.param('ada_gss', self._offset_init, (1, 1, 6, width))
      return cond + offset[0]
    init = _modulation_init(width, self.gate_init)
    linear = nn.Dense(6 * width, kernel_init=init, name='ada_lin')
    return linear(nn.silu(cond)).reshape(-1, 6, width)

  def _offset_init(self, key, shape):
    value = jax.random.normal(key, shape) / math.sqrt(shape[-1])
    factor = jnp.asarray([self.gate_init] * 2 + [0.5] * 4)
    return value * factor[None, None, :, None]


class HeadNorm(nn.Module):
  """The adaptive norm before the logits."""

  @nn.compact
  def __call__(self, x: jax.Array, cond: jax.Array) -> jax.Array:
    """X [B,L,C], cond [B,C] -> [B,L,C]."""
    width = x.shape[-1]
    linear = nn.Dense(2 * width, kernel_init=normal(width, 0.5), name='ada_lin')
    scale, shift = jnp.split(linear(nn.silu(cond))[:, None, :], 2, axis=-1)
    return layer_norm(x) * (1 + scale) + shift
