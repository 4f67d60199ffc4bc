"""The autoencoder behind latent diffusion: Stable Diffusion's AutoencoderKL.

Rombach et al. 2022 (arXiv 2112.10752), with the names of the public weights
`stabilityai/sd-vae-ft-mse` (83,653,863 numbers): a dot before a number there
is an underscore here.
"""

from collections.abc import Sequence
import math

from flax import linen as nn
import jax
import jax.numpy as jnp


def _norm(x: jax.Array, groups: int, name: str) -> jax.Array:
  # The fast variance loses everything where the mean is large.
  return nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, name=name)(
    x
  )


def _conv(x: jax.Array, features: int, name: str, size: int = 3) -> jax.Array:
  return nn.Conv(features, (size, size), name=name)(x)


class Resnet(nn.Module):
  """Two convolutions and a shortcut; C becomes `features`."""

  features: int
  groups: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """X [B,H,W,C] -> [B,H,W,features]."""
    h = nn.silu(_norm(x, self.groups, 'norm1'))
    h = _conv(h, self.features, 'conv1')
    h = nn.silu(_norm(h, self.groups, 'norm2'))
    h = _conv(h, self.features, 'conv2')
    if x.shape[-1] != self.features:
      x = _conv(x, self.features, 'conv_shortcut', 1)
    return x + h


class Attention(nn.Module):
  """Self-attention over all positions, one head, and a skip."""

  groups: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """X [B,H,W,C] -> the same shape."""
    channels = x.shape[-1]
    h = _norm(x, self.groups, 'group_norm').reshape(len(x), -1, channels)
    q, k, v = (nn.Dense(channels, name=f'to_{part}')(h) for part in 'qkv')
    logits = jnp.einsum('bqc,bkc->bqk', q, k) / math.sqrt(channels)
    h = jnp.einsum('bqk,bkc->bqc', nn.softmax(logits), v)
    return x + nn.Dense(channels, name='to_out_0')(h).reshape(x.shape)


class Downsample(nn.Module):
  """Halves H and W; the zeros beyond the border are right and below only."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """X [B,H,W,C] -> [B,H/2,W/2,C]."""
    pad = ((0, 1), (0, 1))
    return nn.Conv(x.shape[-1], (3, 3), 2, padding=pad, name='conv')(x)


class Upsample(nn.Module):
  """Doubles H and W: repeats pixels, then a convolution."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """X [B,H,W,C] -> [B,2H,2W,C]."""
    x = x.repeat(2, axis=1).repeat(2, axis=2)
    return _conv(x, x.shape[-1], 'conv')


class Level(nn.Module):
  """The blocks of one resolution, and the way to the next one.

  Attributes:
    features: width.
    blocks: number of them.
    groups: of the norms.
    resample: 'down', 'up', or '' at the last level.
  """

  features: int
  blocks: int
  groups: int
  resample: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """X [B,H,W,C] -> [B,H',W',features]."""
    for i in range(self.blocks):
      x = Resnet(self.features, self.groups, name=f'resnets_{i}')(x)
    if self.resample == 'down':
      x = Downsample(name='downsamplers_0')(x)
    elif self.resample == 'up':
      x = Upsample(name='upsamplers_0')(x)
    return x


class Middle(nn.Module):
  """Two blocks at the lowest resolution, attention between them."""

  groups: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """X [B,H,W,C] -> the same shape."""
    x = Resnet(x.shape[-1], self.groups, name='resnets_0')(x)
    x = Attention(self.groups, name='attentions_0')(x)
    return Resnet(x.shape[-1], self.groups, name='resnets_1')(x)


class Coder(nn.Module):
  """The encoder, or with `up` the decoder.

  Attributes:
    widths: of the levels, in the order in which they are passed.
    blocks: of each level.
    groups: of the norms.
    channels: of the output.
    up: the middle comes first, and H, W are doubled between levels.
  """

  widths: Sequence[int]
  blocks: int
  groups: int
  channels: int
  up: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """X [B,H,W,C] -> [B,H',W',channels]."""
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
  """Images to the moments of latents 8 times smaller, and latents to images.

  Units are those of the weights' user: EDM2 has images in [0, 1] on both sides
  and latents unscaled, Stable Diffusion has them in [−1, 1].

  Attributes:
    widths: of the encoder's levels; each but the last halves H and W.
    blocks: of an encoder level; the decoder's have one more.
    latent_channels: of a latent.
    groups: of the norms; must divide every width.
  """

  widths: Sequence[int] = (128, 256, 512, 512)
  blocks: int = 2
  latent_channels: int = 4
  groups: int = 32

  def setup(self):
    size, up = 2 * self.latent_channels, tuple(self.widths)[::-1]
    self.encoder = Coder(self.widths, self.blocks, self.groups, size, False)
    self.decoder = Coder(up, self.blocks + 1, self.groups, 3, True)
    self.quant_conv = nn.Conv(size, (1, 1))
    self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1))

  def encode_moments(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images [B,H,W,3] -> mean and standard deviation [B,h,w,latent]."""
    moments = self.quant_conv(self.encoder(images))
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.exp(jnp.clip(log_variance, -30, 20) / 2)

  def decode(self, latents: jax.Array) -> jax.Array:
    """Latents [B,h,w,latent] -> images [B,H,W,3], unclipped."""
    return self.decoder(self.post_quant_conv(latents))

  def __call__(self, images: jax.Array) -> jax.Array:
    """Images to their mean latents and back; `init` makes all params."""
    return self.decode(self.encode_moments(images)[0])
