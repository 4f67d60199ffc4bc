"""The blocks of DiT's and SiT's transformer: adaptive norms that begin at 0."""

import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.models import edm_layers
from ddo_jax.models import var_layers

_FREQUENCIES = 256  # the width of the sines and cosines of the time
_ZEROS = nn.initializers.zeros
_SMALL = nn.initializers.normal(0.02)


def positions(height: int, width: int, features: int) -> np.ndarray:
  """Returns the fixed embedding of each token of a grid, in row-major order.

  A token's first half is of its column and the second of its row, and each half
  is the sines, then the cosines, at frequencies 10000^(−k/q) with q a quarter
  of the features. The grid is not scaled: its coordinates are 0, 1, 2, ….

  Args:
    height: the number of rows.
    width: the number of columns.
    features: the width of the embedding, a multiple of 4.

  Returns:
    [height · width, features] float64.
  """
  quarter = features // 4
  frequency = 10_000.0 ** (-np.arange(quarter) / quarter)

  def embed(coordinate):
    angle = coordinate[:, None] * frequency[None, :]
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

  column = np.tile(embed(np.arange(width)), (height, 1))
  row = np.repeat(embed(np.arange(height)), width, axis=0)
  return np.concatenate([column, row], axis=1)


def _xavier_patch(key, shape, dtype=jnp.float32):
  """Initialises a patch embedding [p,p,C,D] as the matrix [p·p·C, D]."""
  matrix = (math.prod(shape[:-1]), shape[-1])
  return nn.initializers.xavier_uniform()(key, matrix, dtype).reshape(shape)


def _dense(features: int, name: str, init=None) -> nn.Dense:
  """Returns a linear layer with a bias that begins at 0."""
  init = init or nn.initializers.xavier_uniform()
  return nn.Dense(features, kernel_init=init, name=name)


def _modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """Normalises x [B,T,D], then scales and shifts it by rows [B,D]."""
  x = var_layers.layer_norm(x)
  return x * (1 + scale[:, None, :]) + shift[:, None, :]


class PatchEmbedding(nn.Module):
  """Turns patches of an image into tokens.

  Attributes:
    patch: the side of a patch.
    width: the width of a token.
  """

  patch: int
  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the tokens [B,T,D] of x [B,H,W,C], row after row."""
    side = (self.patch, self.patch)
    x = nn.Conv(
      self.width,
      side,
      strides=side,
      padding='VALID',
      kernel_init=_xavier_patch,
      name='proj',
    )(x)
    return x.reshape(x.shape[0], -1, self.width)


class TimeEmbedding(nn.Module):
  """Embeds the time that the preconditioning tells the network.

  Attributes:
    width: the width of the embedding.
  """

  width: int

  @nn.compact
  def __call__(self, time: jax.Array) -> jax.Array:
    """Returns [B, width] of time [B], which need not be whole."""
    x = edm_layers.positional(time, _FREQUENCIES, endpoint=False)
    x = nn.silu(_dense(self.width, 'mlp_0', _SMALL)(x))
    return _dense(self.width, 'mlp_2', _SMALL)(x)


class LabelEmbedding(nn.Module):
  """A row for each class, and one for "no label".

  Attributes:
    num_classes: the number of classes.
    width: the width of the embedding.
  """

  num_classes: int
  width: int

  @nn.compact
  def __call__(self, label: jax.Array) -> jax.Array:
    """Returns [B, width] of label [B]; num_classes means "no label"."""
    rows = self.num_classes + 1
    return nn.Embed(
      rows, self.width, embedding_init=_SMALL, name='embedding_table'
    )(label)


class Attention(nn.Module):
  """Multi-head self-attention over all tokens.

  Attributes:
    heads: the number of heads.
  """

  heads: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns an array of the shape of x [B,T,D]."""
    width = x.shape[-1]
    size = width // self.heads
    # Queries, keys and values are three runs of channels, heads inside each.
    qkv = _dense(3 * width, 'qkv')(x)
    qkv = qkv.reshape(*x.shape[:2], 3, self.heads, size)
    q = qkv[:, :, 0] / math.sqrt(size)
    logits = jnp.einsum('bqhd,bkhd->bhqk', q, qkv[:, :, 1])
    weights = jax.nn.softmax(logits)
    y = jnp.einsum('bhqk,bkhd->bqhd', weights, qkv[:, :, 2])
    return _dense(width, 'proj')(y.reshape(x.shape))


class FeedForward(nn.Module):
  """Two linear layers with a GELU, in its tanh form, between them.

  Attributes:
    hidden: the width between the two layers.
  """

  hidden: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns an array of the shape of x [B,T,D]."""
    h = nn.gelu(_dense(self.hidden, 'fc1')(x), approximate=True)
    return _dense(x.shape[-1], 'fc2')(h)


class Block(nn.Module):
  """Attention and feed-forward layers, modulated and gated by the condition.

  All gates begin at 0, so that a fresh block changes nothing.

  Attributes:
    heads: the number of heads of the attention.
    hidden: the hidden width of the feed-forward layers.
  """

  heads: int
  hidden: int

  @nn.compact
  def __call__(self, x: jax.Array, condition: jax.Array) -> tuple:
    """Returns the tokens, and None, as a scan over blocks wants it.

    Args:
      x: the tokens, [B,T,D].
      condition: the SiLU of the embedded time and class, [B,D].
    """
    width = x.shape[-1]
    modulation = _dense(6 * width, 'adaLN_modulation', _ZEROS)(condition)
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(
      modulation, 6, axis=-1
    )
    attention = Attention(self.heads, name='attn')
    y = attention(_modulate(x, shift_1, scale_1))
    x = x + gate_1[:, None, :] * y
    feed_forward = FeedForward(self.hidden, name='mlp')
    y = feed_forward(_modulate(x, shift_2, scale_2))
    return x + gate_2[:, None, :] * y, None


class FinalLayer(nn.Module):
  """The modulated projection to the pixels of each patch; it begins at 0.

  Attributes:
    features: the number of values of a patch.
  """

  features: int

  @nn.compact
  def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
    """Returns [B,T,features] of tokens x [B,T,D]; see `Block`."""
    width = x.shape[-1]
    modulation = _dense(2 * width, 'adaLN_modulation', _ZEROS)(condition)
    shift, scale = jnp.split(modulation, 2, axis=-1)
    return _dense(self.features, 'linear', _ZEROS)(_modulate(x, shift, scale))
