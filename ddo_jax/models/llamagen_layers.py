"""The blocks of LlamaGen's transformer: RMS norms, rotations, gated layers."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.models import var_layers

# The keys and the values of all positions, each [...,B,L,H,D]; those of
# positions that are not drawn yet are hidden from the queries.
Past = tuple[jax.Array, jax.Array]

EPSILON = 1e-5  # ε of the norms
_BASE = 10_000  # the angles' frequencies fall from 1 towards 1/_BASE
_INIT = nn.initializers.normal(0.02)


def rotations(grid: tuple[int, int], channels: int) -> np.ndarray:
  """Returns the rotation of each position, as (cos, sin).

  Half of the D/2 pairs of a head's channels turn by the row of the token, the
  others by its column. Position 0, which reads the class, has (0, 0): its query
  and its key vanish.

  Args:
    grid: the number of rows and of columns.
    channels: D, a multiple of 4.

  Returns:
    [1 + rows · columns, D/2, 2] float64.
  """
  half = channels // 2
  frequencies = _BASE ** (-np.arange(0, half, 2) / half)
  rows, columns = np.indices(grid).reshape(2, -1, 1)
  angles = np.concatenate([rows * frequencies, columns * frequencies], axis=1)
  cells = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
  return np.concatenate([np.zeros_like(cells[:1]), cells])


def rotate(x: jax.Array, rotation: jax.Array) -> jax.Array:
  """Turns each pair of neighbouring channels.

  Args:
    x: queries or keys, [B,L,H,D].
    rotation: (cos, sin) of each position and pair, [L,D/2,2].

  Returns:
    An array of the shape and type of x.
  """
  wide = jnp.promote_types(x.dtype, jnp.float32)
  pairs = x.astype(wide).reshape(*x.shape[:-1], -1, 2)
  rotation = rotation.astype(wide)[None, :, None]
  cos = rotation[..., 0]
  sin = rotation[..., 1]
  first = pairs[..., 0] * cos - pairs[..., 1] * sin
  second = pairs[..., 1] * cos + pairs[..., 0] * sin
  return jnp.stack([first, second], axis=-1).reshape(x.shape).astype(x.dtype)


class RmsNorm(nn.Module):
  """x / √(mean x² + ε) times a weight for each channel."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns an array of the shape of x [...,C]."""
    weight = self.param('scale', nn.initializers.ones, x.shape[-1:])
    square = jnp.mean(x**2, axis=-1, keepdims=True)
    weight = weight.reshape(*[1] * (x.ndim - 1), -1)
    return x / jnp.sqrt(square + EPSILON) * weight


class Attention(nn.Module):
  """Causal self-attention with rotated queries and keys; no biases.

  Attributes:
    heads: the number of heads.
    shared_heads: the number of heads of keys and values, each of which serves
      as many consecutive heads of queries.
    dtype: the type of the products; None for the type of the inputs.
  """

  heads: int
  shared_heads: int
  dtype: jnp.dtype | None

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    begin: int | jax.Array,
    rotation: jax.Array,
    past: Past | None,
  ) -> tuple[jax.Array, Past | None]:
    """Attends to the past and to the tokens of x that come no later.

    Args:
      x: the tokens, [B,K,C].
      begin: the position of the first of them.
      rotation: that of each of them, [K,D/2,2].
      past: the keys and the values, each [B,L,H',D]; None if x is all there is.

    Returns:
      The output [B,K,C], and the past with the keys and the values of x in it;
      None if there was none.
    """
    width = x.shape[-1]
    depth = width // self.heads
    groups = self.heads // self.shared_heads
    linear = var_layers.Dense(
      (self.heads + 2 * self.shared_heads) * depth,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=_INIT,
      name='wqkv',
    )
    qkv = linear(x).reshape(*x.shape[:2], -1, depth)
    ends = (self.heads, self.heads + self.shared_heads)
    q, k, v = jnp.split(qkv, ends, axis=2)
    q = rotate(q, rotation)
    k = rotate(k, rotation)
    if past is not None:
      keys, values = past
      k = jax.lax.dynamic_update_slice_in_dim(keys, k, begin, axis=1)
      v = jax.lax.dynamic_update_slice_in_dim(values, v, begin, axis=1)
      past = (k, v)
    q = q.reshape(*x.shape[:2], self.shared_heads, groups, depth)
    wide = jnp.promote_types(v.dtype, jnp.float32)
    logits = jnp.einsum('bqhgd,bkhd->bhgqk', q, k, preferred_element_type=wide)
    position = begin + jnp.arange(x.shape[1])
    seen = jnp.arange(k.shape[1])[None, :] <= position[:, None]
    logits = jnp.where(seen[None, None, None], logits * depth**-0.5, -jnp.inf)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    y = jnp.einsum('bhgqk,bkhd->bqhgd', weights, v).reshape(x.shape)
    linear = var_layers.Dense(
      width, use_bias=False, dtype=self.dtype, kernel_init=_INIT, name='wo'
    )
    return linear(y), past


class FeedForward(nn.Module):
  """w2(SiLU(w1 x) · w3 x), without biases.

  Attributes:
    hidden: the width between the layers.
    dtype: see `Attention`.
  """

  hidden: int
  dtype: jnp.dtype | None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns an array of the shape of x [B,K,C]."""

    def linear(features, name):
      return var_layers.Dense(
        features, use_bias=False, dtype=self.dtype, kernel_init=_INIT, name=name
      )

    gate = nn.silu(linear(self.hidden, 'w1')(x))
    return linear(x.shape[-1], 'w2')(gate * linear(self.hidden, 'w3')(x))


class Block(nn.Module):
  """Attention and a feed-forward layer, each after a norm, added to x.

  Attributes:
    heads: see `Attention`.
    shared_heads: see `Attention`.
    hidden: see `FeedForward`.
    dtype: see `Attention`.
  """

  heads: int
  shared_heads: int
  hidden: int
  dtype: jnp.dtype | None

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    begin: int | jax.Array,
    rotation: jax.Array,
    past: Past | None,
  ) -> tuple[jax.Array, Past | None]:
    """Applies the block; see `Attention`."""
    attention = Attention(
      self.heads, self.shared_heads, self.dtype, name='attention'
    )
    feed_forward = FeedForward(self.hidden, self.dtype, name='feed_forward')
    y, past = attention(
      RmsNorm(name='attention_norm')(x), begin, rotation, past
    )
    x = x + y
    x = x + feed_forward(RmsNorm(name='ffn_norm')(x))
    return x, past
