"""The blocks of VAR's transformer: adaptive norms, attention to the past."""

import functools
import math
from typing import Any

from flax import linen as nn
from flax.linen import dtypes
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors

# The keys and the values of earlier tokens, each [...,B,T,H,D].
Past = tuple[jax.Array, jax.Array]

EPSILON = 1e-6  # ε of the layer norms
# The scale of normalised attention is at most 100; this is ln 100 in float32.
_MAX_LOG_SCALE = 4.605170249938965


def convert(x: jax.Array, dtype: jnp.dtype | None) -> jax.Array:
  """Converts x to another type, and rounds it even where XLA would not.

  XLA drops a rounding if the type is changed back at once. The network would
  then differ from the one whose weights are stored in that type, which a
  reference of reduced precision must equal.

  Args:
    x: the array, or None.
    dtype: the type; None for that of x.
  """
  if dtype is None or x is None:
    return x
  kept = jnp.finfo(dtype)
  return jax.lax.reduce_precision(x, kept.nexp, kept.nmant).astype(dtype)


def _promoted(*arrays, dtype, inexact=True):
  """Converts the inputs and the weights of an `nn.Dense` to one type."""
  converted = [convert(x, dtype) for x in arrays]
  return dtypes.promote_dtype(*converted, dtype=dtype, inexact=inexact)


Dense = functools.partial(nn.Dense, promote_dtype=_promoted)


def product_type(name: str) -> Any:
  """Returns the type of a name in `dtype` of a config; None: that of params.

  Raises:
    errors.UserError: there is no type of that name.
  """
  known = {'float32': None, 'bfloat16': jnp.bfloat16}
  if name not in known:
    raise errors.UserError(
      f'config.model.dtype is {name!r}; it must be one of {sorted(known)}'
    )
  return known[name]


def normal(width: int, factor: float = 1.0) -> nn.initializers.Initializer:
  """Returns the initialiser of a width C: normal numbers times √(1/3C).

  The original cuts the distribution at ±2, which is so far out that it makes no
  difference.

  Args:
    width: C.
    factor: a further factor.
  """
  return nn.initializers.normal(math.sqrt(1 / (3 * width)) * factor)


def _modulation_init(width: int, gate: float) -> nn.initializers.Initializer:
  """Returns the initialiser of a modulation: `normal` times a factor.

  Args:
    width: C.
    gate: the factor on the gates; that on scales and shifts is ½.
  """
  factor = np.repeat([gate, 0.5], [2 * width, 4 * width])

  def init(key, shape, dtype=jnp.float32):
    value = normal(width)(key, shape, dtype)
    return value * jnp.asarray(factor, dtype)[None, :]

  return init


def layer_norm(x: jax.Array) -> jax.Array:
  """Scales x [...,C] to mean 0 and variance 1 over C, without parameters."""
  norm = nn.LayerNorm(
    EPSILON, use_bias=False, use_scale=False, use_fast_variance=False
  )
  return norm.apply({}, x)


def unit(x: jax.Array) -> jax.Array:
  """Divides x [...,D] by its length, or by 1e-12 if it is shorter.

  The gradient is finite at 0.
  """
  square = jnp.sum(x**2, axis=-1, keepdims=True)
  return x / jnp.sqrt(jnp.maximum(square, 1e-24))


class Attention(nn.Module):
  """Multi-head self-attention; the keys have no bias.

  Attributes:
    heads: the number of heads.
    depth: the number of blocks of the whole transformer; the initial weights of
      the last layer shrink with it.
    l2_norm: whether attention goes by the cosine, times a scale that each head
      learns; if not, by the product.
    dtype: the type of the products; None for the type of the inputs.
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
      x: the tokens, [B,L,C].
      mask: which token sees which, [L,L] bool; None if all of x is visible.
      past: the keys and the values of earlier tokens, each [B,T,H,D]; None if
        there are none.

    Returns:
      The output [B,L,C], and the keys and the values of x.
    """
    width = x.shape[-1]
    q, k, v = self._qkv(x)
    new = (k, v)
    if past is not None:
      past_keys, past_values = past
      k = jnp.concatenate([past_keys, k], axis=1)
      v = jnp.concatenate([past_values, v], axis=1)
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
    """Returns the scaled queries, the keys and the values, each [B,L,H,D]."""
    width = x.shape[-1]
    qkv = Dense(
      3 * width,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=normal(width),
      name='mat_qkv',
    )(x)
    q_bias = self.param('q_bias', nn.initializers.zeros, (width,))
    v_bias = self.param('v_bias', nn.initializers.zeros, (width,))
    bias = jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias])
    qkv = qkv + convert(bias, self.dtype)[None, None, :]
    qkv = qkv.reshape(*x.shape[:2], 3, self.heads, width // self.heads)
    q = qkv[:, :, 0]
    k = qkv[:, :, 1]
    v = qkv[:, :, 2]
    if not self.l2_norm:
      return q * (0.25 / math.sqrt(width // self.heads)), k, v
    log_four = nn.initializers.constant(math.log(4))
    shape = (1, self.heads, 1, 1)
    scale = self.param('scale_mul_1H11', log_four, shape)
    scale = jnp.exp(jnp.minimum(scale, _MAX_LOG_SCALE))
    scale = scale.reshape(1, 1, self.heads, 1)
    # Lengths have full precision, whatever the type of the products.
    wide = jnp.promote_types(v.dtype, jnp.float32)
    q = unit(q.astype(wide)) * scale
    k = unit(k.astype(wide))
    return q.astype(v.dtype), k.astype(v.dtype), v


class FeedForward(nn.Module):
  """Two linear layers with a GELU (in its tanh form) between them.

  Attributes:
    hidden: the width between the two layers.
    depth: see `Attention`.
    dtype: see `Attention`.
  """

  hidden: int
  depth: int
  dtype: jnp.dtype | None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns an array of the shape of x [B,L,C]."""
    width = x.shape[-1]
    small = normal(width, 1 / math.sqrt(2 * self.depth))
    first = Dense(
      self.hidden, dtype=self.dtype, kernel_init=normal(width), name='fc1'
    )
    second = Dense(width, dtype=self.dtype, kernel_init=small, name='fc2')
    return second(nn.gelu(first(x), approximate=True))


class Block(nn.Module):
  """Attention and a feed-forward layer, each with an adaptive norm and a gate.

  Attributes:
    heads: see `Attention`.
    hidden: see `FeedForward`.
    depth: see `Attention`.
    l2_norm: see `Attention`.
    shared: whether one modulation serves all blocks, each with an offset of its
      own; if not, every block computes its modulation from the class.
    gate_init: the factor on the initial weights of the gates.
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
    """Applies the block.

    Args:
      x: the tokens, [B,L,C].
      cond: the embedding of the class [B,C], or the shared modulation [B,6,C].
      mask: see `Attention`; teacher forcing has one.
      past: see `Attention`; decoding has one.

    Returns:
      The tokens [B,L,C], and the keys and the values of x; None under a mask,
      because teacher forcing does not ask for them.
    """
    gates, scales, shifts = jnp.split(self._modulation(cond), 3, axis=1)
    attention = Attention(
      heads=self.heads,
      depth=self.depth,
      l2_norm=self.l2_norm,
      dtype=self.dtype,
      name='attn',
    )
    feed_forward = FeedForward(
      hidden=self.hidden, depth=self.depth, dtype=self.dtype, name='ffn'
    )
    h = layer_norm(x) * (1 + scales[:, 0, None, :]) + shifts[:, 0, None, :]
    y, new = attention(h, mask, past)
    x = x + y * gates[:, 0, None, :]
    h = layer_norm(x) * (1 + scales[:, 1, None, :]) + shifts[:, 1, None, :]
    x = x + feed_forward(h) * gates[:, 1, None, :]
    if mask is not None:
      new = None
    return x, new

  def _modulation(self, cond: jax.Array) -> jax.Array:
    """Returns two gates, two scales and two shifts, [B,6,C]."""
    width = cond.shape[-1]
    if self.shared:
      offset = self.param('ada_gss', self._offset_init, (1, 1, 6, width))
      return cond + offset[0]
    init = _modulation_init(width, self.gate_init)
    linear = nn.Dense(6 * width, kernel_init=init, name='ada_lin')
    return linear(nn.silu(cond)).reshape(-1, 6, width)

  def _offset_init(self, key, shape):
    """Returns a block's initial offset from the shared modulation."""
    value = jax.random.normal(key, shape) / math.sqrt(shape[-1])
    factor = jnp.asarray([self.gate_init] * 2 + [0.5] * 4)
    return value * factor[None, None, :, None]


class HeadNorm(nn.Module):
  """The adaptive norm before the logits."""

  @nn.compact
  def __call__(self, x: jax.Array, cond: jax.Array) -> jax.Array:
    """Normalises x [B,L,C] by the embedding cond [B,C] of the class."""
    width = x.shape[-1]
    linear = nn.Dense(2 * width, kernel_init=normal(width, 0.5), name='ada_lin')
    scale, shift = jnp.split(linear(nn.silu(cond))[:, None, :], 2, axis=-1)
    return layer_norm(x) * (1 + scale) + shift


def token_log_prob(
  module: nn.Module, h: jax.Array, ids: jax.Array, chunk: int
) -> jax.Array:
  """Returns the log-probability of each token, in nats.

  It scans over runs of `chunk` tokens and recomputes their logits in the
  backward pass, so that no more than [B,chunk,V] logits are held at once.

  Args:
    module: what has the `head` that turns h into logits.
    h: the inputs of the head, [B,L,C].
    ids: the tokens, [B,L] int.
    chunk: the number of tokens of a run.

  Returns:
    The log-probabilities, [B,L].
  """
  rows, length = ids.shape
  count = -(-length // chunk)

  def split_runs(x):
    """Pads x [B,L,...] and splits it into runs, [count,B,chunk,...]."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, count * chunk - length)
    x = jnp.pad(x, widths)
    x = x.reshape(rows, count, chunk, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def run_log_prob(module, carry, run):
    run_h, run_ids = run
    logits = module.head(run_h)
    chosen = jnp.take_along_axis(logits, run_ids[:, :, None], axis=-1)
    return carry, chosen[:, :, 0] - jax.nn.logsumexp(logits, axis=-1)

  scan = nn.scan(
    nn.remat(run_log_prob, prevent_cse=False),
    variable_broadcast='params',
    split_rngs={'params': False},
  )
  _, parts = scan(module, None, (split_runs(h), split_runs(ids)))
  return jnp.moveaxis(parts, 0, 1).reshape(rows, -1)[:, :length]
