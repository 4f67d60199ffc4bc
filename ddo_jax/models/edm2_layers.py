"""The magnitude-preserving layers of EDM2 (Karras et al. 2024)."""

from collections.abc import Sequence
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.models import layers

CLIP = 256.0  # of a block's output: keeps float16 in range
RESIDUAL = 0.3  # share of a branch in its sum with the main path
TAPS = (1, 1)


def normalize(x: jax.Array, axes: int | Sequence[int]) -> jax.Array:
  """X scaled to root mean square 1 over `axes`."""
  rms = jnp.sqrt(jnp.mean(x**2, axis=axes, keepdims=True))
  return x / (1e-4 + rms)


def normalize_kernel(kernel: jax.Array) -> jax.Array:
  """[..., out] with the weights of each output scaled to RMS 1."""
  return normalize(kernel, tuple(range(kernel.ndim - 1)))


def mp_silu(x: jax.Array) -> jax.Array:
  """SiLU that keeps the magnitude of unit normal input (eq. 81)."""
  return nn.silu(x) / 0.596


def mp_sum(a: jax.Array, b: jax.Array, t: float) -> jax.Array:
  """(1−t) a + t b, of unit magnitude where a, b are so (eq. 88)."""
  return (a + t * (b - a)) / math.hypot(1 - t, t)


def mp_cat(a: jax.Array, b: jax.Array, t: float = 0.5) -> jax.Array:
  """Joins the channels of a and b, which contribute (1−t) : t (eq. 103)."""
  widths = (a.shape[-1], b.shape[-1])
  scale = math.sqrt(sum(widths)) / math.hypot(1 - t, t)
  parts = [
    x * (scale * share / math.sqrt(width))
    for x, share, width in zip((a, b), (1 - t, t), widths, strict=True)
  ]
  return jnp.concatenate(parts, axis=-1)


class MPFourier(nn.Module):
  """Random Fourier features of a scalar, of unit magnitude (eq. 75).

  Frequencies and phases stand among the params because a checkpoint must hold
  them; they have no gradient.

  Attributes:
    features: width of the output.
  """

  features: int

  @nn.compact
  def __call__(self, value: jax.Array) -> jax.Array:
    """Value [B] -> [B, features]."""
    shape = (self.features,)
    freqs = self.param('freqs', nn.initializers.normal(2 * np.pi), shape)
    phases = self.param('phases', nn.initializers.uniform(2 * np.pi), shape)
    freqs, phases = jax.lax.stop_gradient((freqs, phases))
    angle = value[:, None] * freqs[None, :] + phases[None, :]
    return math.sqrt(2) * jnp.cos(angle)


class MPConv(nn.Module):
  """A convolution, or a linear layer, with normalised weights, no bias.

  Attributes:
    features: width of the output.
    kernel: side of the convolution; None for a linear layer.
  """

  features: int
  kernel: int | None = None

  @nn.compact
  def __call__(self, x: jax.Array, gain: jax.Array | float = 1.0) -> jax.Array:
    """X [B,...,C] -> [B,...,features], times `gain`."""
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
  """Magnitude-preserving residual block.

  Attributes:
    channels: of the output.
    encoder: whether it is of the encoder's flavour, which normalises pixels.
    resample: 'keep', 'down' or 'up', first of all.
    heads: of the self-attention; 0 for none.
    dropout: rate, in training.
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
    """X [B,H,W,C], embedding [B,E] -> [B,H',W',channels]."""
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
    qkv = MPConv(3 * self.channels, 1, name='attn_qkv')(x)
    qkv = [normalize(v, -1) for v in layers.split_heads(qkv, self.heads)]
    y = nn.dot_product_attention(*qkv).reshape(x.shape)
    return MPConv(self.channels, 1, name='attn_proj')(y)
