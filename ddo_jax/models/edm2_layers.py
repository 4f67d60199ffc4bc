"""The magnitude-preserving layers of EDM2 (Karras et al. 2024)."""

from collections.abc import Sequence
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.models import layers

CLIP = 256.0  # limits a block's output, to keep float16 in range
RESIDUAL = 0.3  # the share of a branch in its sum with the main path
TAPS = (1, 1)  # the resampling filter


def normalize(x: jax.Array, axes: int | Sequence[int]) -> jax.Array:
  """Scales x to a root mean square of 1 over `axes`."""
  rms = jnp.sqrt(jnp.mean(x**2, axis=axes, keepdims=True))
  return x / (1e-4 + rms)


def normalize_kernel(kernel: jax.Array) -> jax.Array:
  """Scales each output's weights of a kernel [..., out] to an RMS of 1."""
  return normalize(kernel, tuple(range(kernel.ndim - 1)))


def mp_silu(x: jax.Array) -> jax.Array:
  """Applies SiLU and keeps the magnitude of unit normal input (eq. 81)."""
  return nn.silu(x) / 0.596


def mp_sum(a: jax.Array, b: jax.Array, t: float) -> jax.Array:
  """Returns (1−t) a + t b, scaled to keep unit magnitude (eq. 88)."""
  return (a + t * (b - a)) / math.hypot(1 - t, t)


def mp_cat(a: jax.Array, b: jax.Array, t: float = 0.5) -> jax.Array:
  """Joins the channels of a and b, keeping unit magnitude (eq. 103).

  The two contribute in the proportion (1−t) : t, whatever their widths.
  """
  a_width = a.shape[-1]
  b_width = b.shape[-1]
  scale = math.sqrt(a_width + b_width) / math.hypot(1 - t, t)
  a = a * (scale * (1 - t) / math.sqrt(a_width))
  b = b * (scale * t / math.sqrt(b_width))
  return jnp.concatenate([a, b], axis=-1)


class MPFourier(nn.Module):
  """Random Fourier features of a scalar, of unit magnitude (eq. 75).

  Frequencies and phases are among the params because a checkpoint must hold
  them, but they have no gradient.

  Attributes:
    features: the width of the output.
  """

  features: int

  @nn.compact
  def __call__(self, value: jax.Array) -> jax.Array:
    """Embeds value [B] as [B, features]."""
    shape = (self.features,)
    freqs = self.param('freqs', nn.initializers.normal(2 * np.pi), shape)
    phases = self.param('phases', nn.initializers.uniform(2 * np.pi), shape)
    freqs, phases = jax.lax.stop_gradient((freqs, phases))
    angle = value[:, None] * freqs[None, :] + phases[None, :]
    return math.sqrt(2) * jnp.cos(angle)


class MPConv(nn.Module):
  """A convolution or a linear layer with normalised weights and no bias.

  Attributes:
    features: the width of the output.
    kernel: the side of the convolution; None for a linear layer.
  """

  features: int
  kernel: int | None = None

  @nn.compact
  def __call__(self, x: jax.Array, gain: jax.Array | float = 1.0) -> jax.Array:
    """Maps x [B,...,C] to [B,...,features] and multiplies it by `gain`."""
    window = (self.kernel, self.kernel) if self.kernel else ()
    shape = (*window, x.shape[-1], self.features)
    kernel = self.param('kernel', nn.initializers.normal(1.0), shape)
    kernel = normalize_kernel(kernel)
    kernel = kernel * (gain / math.sqrt(math.prod(shape[:-1])))
    if not self.kernel:
      return x @ kernel
    layout = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), 'SAME', dimension_numbers=layout
    )


class MPBlock(nn.Module):
  """A magnitude-preserving residual block, with optional self-attention.

  Attributes:
    channels: the width of the output.
    encoder: whether the block is in the encoder, where it normalises each pixel
      of its input.
    resample: 'keep', 'down' or 'up'; it comes before everything else.
    heads: the number of attention heads; 0 for no attention.
    dropout: the dropout rate in training.
  """

  channels: int
  encoder: bool
  resample: str = 'keep'
  heads: int = 0
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self, x: jax.Array, embedding: jax.Array, train: bool = False
  ) -> jax.Array:
    """Applies the block.

    Args:
      x: the activations, [B,H,W,C].
      embedding: the embedding of noise level and class, [B,E].
      train: whether there is dropout.

    Returns:
      The activations of the block's resolution, [B,H',W',channels].
    """
    channels = self.channels
    x = layers.resample(x, self.resample, TAPS)
    new_width = x.shape[-1] != channels
    if self.encoder:
      if new_width:
        x = MPConv(channels, 1, name='conv_skip')(x)
      x = normalize(x, -1)
    y = MPConv(channels, 3, name='conv_res0')(mp_silu(x))
    gain = self.param('emb_gain', nn.initializers.zeros, ())
    scale = MPConv(channels, name='emb_linear')(embedding, gain) + 1
    y = mp_silu(y * scale[:, None, None, :])
    y = nn.Dropout(self.dropout, deterministic=not train)(y)
    y = MPConv(channels, 3, name='conv_res1')(y)
    if new_width and not self.encoder:
      x = MPConv(channels, 1, name='conv_skip')(x)
    x = mp_sum(x, y, RESIDUAL)
    if self.heads:
      x = mp_sum(x, self._attention(x), RESIDUAL)
    return jnp.clip(x, -CLIP, CLIP)

  def _attention(self, x: jax.Array) -> jax.Array:
    """Returns the output of cosine attention, without the skip."""
    qkv = MPConv(3 * self.channels, 1, name='attn_qkv')(x)
    q, k, v = layers.split_heads(qkv, self.heads)
    q = normalize(q, -1)
    k = normalize(k, -1)
    v = normalize(v, -1)
    y = nn.dot_product_attention(q, k, v).reshape(x.shape)
    return MPConv(self.channels, 1, name='attn_proj')(y)
