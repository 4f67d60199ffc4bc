"""The autoencoder behind latent diffusion: Stable Diffusion's AutoencoderKL.

It is the model of Rombach et al. 2022 (arXiv 2112.10752). Submodules have the
names of the public weights `stabilityai/sd-vae-ft-mse` (83,653,863 numbers),
with an underscore for each dot that comes before a number.
"""

from collections.abc import Sequence
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp


def _norm(x: jax.Array, groups: int, name: str) -> jax.Array:
  """Adds a group norm to the calling module and applies it."""
  # The fast variance loses all its digits where the mean is large.
  norm = nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, name=name)
  return norm(x)


def _conv(x: jax.Array, features: int, name: str, size: int = 3) -> jax.Array:
  """Adds a convolution of side `size` to the calling module and applies it."""
  return nn.Conv(features, (size, size), name=name)(x)


class Resnet(nn.Module):
  """A residual block of two convolutions.

  Attributes:
    features: the width of the output.
    groups: the number of groups of the norms.
  """

  features: int
  groups: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B,H,W,C] to [B,H,W,features]."""
    h = nn.silu(_norm(x, self.groups, 'norm1'))
    h = _conv(h, self.features, 'conv1')
    h = nn.silu(_norm(h, self.groups, 'norm2'))
    h = _conv(h, self.features, 'conv2')
    if x.shape[-1] != self.features:
      x = _conv(x, self.features, 'conv_shortcut', 1)
    return x + h


class Attention(nn.Module):
  """Self-attention over all pixels, with one head, added to its input.

  Attributes:
    groups: the number of groups of the norm.
  """

  groups: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns an array of the shape of x [B,H,W,C]."""
    channels = x.shape[-1]
    h = _norm(x, self.groups, 'group_norm').reshape(len(x), -1, channels)
    q = nn.Dense(channels, name='to_q')(h)
    k = nn.Dense(channels, name='to_k')(h)
    v = nn.Dense(channels, name='to_v')(h)
    logits = jnp.einsum('bqc,bkc->bqk', q, k) / math.sqrt(channels)
    h = jnp.einsum('bqk,bkc->bqc', nn.softmax(logits), v)
    return x + nn.Dense(channels, name='to_out_0')(h).reshape(x.shape)


class Downsample(nn.Module):
  """Halves H and W by a convolution, padded at the right and bottom only."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B,H,W,C] to [B,H/2,W/2,C]."""
    pad = ((0, 1), (0, 1))
    return nn.Conv(x.shape[-1], (3, 3), 2, padding=pad, name='conv')(x)


class Upsample(nn.Module):
  """Doubles H and W by repeating pixels, and convolves the result."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B,H,W,C] to [B,2H,2W,C]."""
    x = x.repeat(2, axis=1).repeat(2, axis=2)
    return _conv(x, x.shape[-1], 'conv')


class Level(nn.Module):
  """The blocks of one resolution, and the resampling to the next one.

  Attributes:
    features: the width of the blocks.
    blocks: the number of blocks.
    groups: the number of groups of the norms.
    resample: 'down', 'up', or '' at the last level.
  """

  features: int
  blocks: int
  groups: int
  resample: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B,H,W,C] to [B,H',W',features]."""
    for i in range(self.blocks):
      x = Resnet(self.features, self.groups, name=f'resnets_{i}')(x)
    if self.resample == 'down':
      x = Downsample(name='downsamplers_0')(x)
    elif self.resample == 'up':
      x = Upsample(name='upsamplers_0')(x)
    return x


class Middle(nn.Module):
  """Two blocks at the lowest resolution with attention between them.

  Attributes:
    groups: the number of groups of the norms.
  """

  groups: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns an array of the shape of x [B,H,W,C]."""
    x = Resnet(x.shape[-1], self.groups, name='resnets_0')(x)
    x = Attention(self.groups, name='attentions_0')(x)
    return Resnet(x.shape[-1], self.groups, name='resnets_1')(x)


class Coder(nn.Module):
  """The encoder, or the decoder if `up` is set.

  Attributes:
    widths: the widths of the levels, in the order in which x passes them.
    blocks: the number of blocks in each level.
    groups: the number of groups of the norms.
    channels: the number of channels of the output.
    up: whether the middle comes before the levels, and H and W are doubled
      between levels; if not, it comes after them, and they are halved.
  """

  widths: Sequence[int]
  blocks: int
  groups: int
  channels: int
  up: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B,H,W,C] to [B,H',W',channels]."""
    way = 'up' if self.up else 'down'
    middle = Middle(self.groups, name='mid_block')
    x = _conv(x, self.widths[0], 'conv_in')
    if self.up:
      x = middle(x)
    for i, width in enumerate(self.widths):
      resample = way if i + 1 < len(self.widths) else ''
      name = f'{way}_blocks_{i}'
      x = Level(width, self.blocks, self.groups, resample, name=name)(x)
    if not self.up:
      x = middle(x)
    x = nn.silu(_norm(x, self.groups, 'conv_norm_out'))
    return _conv(x, self.channels, 'conv_out')


class AutoencoderKL(nn.Module):
  """Encodes images as latents whose side is 8 times smaller, and decodes them.

  The units depend on who uses the weights. EDM2 has images in [0, 1] on both
  sides and does not scale the latents; Stable Diffusion has images in [−1, 1].

  Attributes:
    widths: the widths of the encoder's levels. Each level but the last halves H
      and W.
    blocks: the number of blocks in a level of the encoder; a level of the
      decoder has one more.
    latent_channels: the number of channels of a latent.
    groups: the number of groups of the norms; it must divide every width.
  """

  widths: Sequence[int] = (128, 256, 512, 512)
  blocks: int = 2
  latent_channels: int = 4
  groups: int = 32

  def setup(self):
    moments = 2 * self.latent_channels
    self.encoder = Coder(
      widths=self.widths,
      blocks=self.blocks,
      groups=self.groups,
      channels=moments,
      up=False,
    )
    self.decoder = Coder(
      widths=tuple(self.widths)[::-1],
      blocks=self.blocks + 1,
      groups=self.groups,
      channels=3,
      up=True,
    )
    self.quant_conv = nn.Conv(moments, (1, 1))
    self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1))

  def encode_moments(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encodes images as distributions of latents.

    Args:
      images: the images, [B,H,W,3].

    Returns:
      The mean and the standard deviation, each [B,h,w,latent_channels].
    """
    moments = self.quant_conv(self.encoder(images))
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.exp(jnp.clip(log_variance, -30, 20) / 2)

  def decode(self, latents: jax.Array) -> jax.Array:
    """Decodes latents [B,h,w,latent_channels] as unclipped images [B,H,W,3]."""
    return self.decoder(self.post_quant_conv(latents))

  def __call__(self, images: jax.Array) -> jax.Array:
    """Encodes images and decodes their mean latents.

    It touches every param, so that `init` makes all of them.
    """
    mean, _ = self.encode_moments(images)
    return self.decode(mean)


@functools.cache
def param_shapes(network: AutoencoderKL | None = None) -> Any:
  """Returns an autoencoder's params as a tree of `jax.ShapeDtypeStruct`.

  Args:
    network: None means the one of stabilityai/sd-vae-ft-mse.
  """
  network = network or AutoencoderKL()
  side = 2 ** len(network.widths)
  images = jnp.zeros((1, side, side, 3))
  return jax.eval_shape(network.init, jax.random.key(0), images)['params']
