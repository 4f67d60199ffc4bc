"""The convolutional encoder and decoder of VAR's tokenizer.

The LDM / VQGAN family (Esser et al. 2021): residual blocks level by level,
self-attention on the lowest one. Submodules bear the released names, with '_'
for the dots within a level.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

GROUPS = 32  # of every GroupNorm


def _norm(name: str) -> nn.GroupNorm:
  return nn.GroupNorm(GROUPS, epsilon=1e-6, use_fast_variance=False, name=name)


def _conv3(features: int, name: str) -> nn.Conv:
  return nn.Conv(features, (3, 3), padding=1, name=name)


class ResBlock(nn.Module):
  """x + conv(SiLU(GN(conv(SiLU(GN(x)))))), 1×1 shortcut where widths differ.

  Attributes:
    features: width of the output.
  """

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """X [B,H,W,C] -> [B,H,W,features]."""
    h = _conv3(self.features, 'conv1')(nn.silu(_norm('norm1')(x)))
    h = _conv3(self.features, 'conv2')(nn.silu(_norm('norm2')(h)))
    if x.shape[-1] != self.features:
      x = nn.Conv(self.features, (1, 1), name='nin_shortcut')(x)
    return x + h


class AttnBlock(nn.Module):
  """Single-head self-attention over all pixels, added to its input."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """X [B,H,W,C] -> the same."""
    batch, height, width, channels = x.shape
    qkv = nn.Conv(3 * channels, (1, 1), name='qkv')(_norm('norm')(x))
    qkv = qkv.reshape(batch, height * width, 3, channels)
    q, k, v = (qkv[:, :, i] for i in range(3))
    logits = jnp.einsum('bqc,bkc->bqk', q, k) * channels**-0.5
    y = jnp.einsum('bqk,bkc->bqc', jax.nn.softmax(logits), v)
    return x + nn.Conv(channels, (1, 1), name='proj_out')(y.reshape(x.shape))


def _middle(x: jax.Array) -> jax.Array:
  """The blocks between the levels and the latents; call inside a module."""
  width = x.shape[-1]
  x = AttnBlock(name='mid_attn_1')(ResBlock(width, name='mid_block_1')(x))
  return ResBlock(width, name='mid_block_2')(x)


def _level(x: jax.Array, name: str, width: int, blocks: int, attend: bool):
  """The residual blocks of one level; call inside a module."""
  for i in range(blocks):
    x = ResBlock(width, name=f'{name}_block_{i}')(x)
    if attend:
      x = AttnBlock(name=f'{name}_attn_{i}')(x)
  return x


class Encoder(nn.Module):
  """Images to features, smaller by 2 ** (levels − 1).

  Attributes:
    features: channels of the output.
    base: unit of width.
    mult: width of each level, in units.
    blocks: residual blocks a level.
  """

  features: int
  base: int
  mult: tuple[int, ...]
  blocks: int = 2

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """X [B,H,W,3] in [−1, 1] -> [B,h,w,features]."""
    last = len(self.mult) - 1
    x = _conv3(self.base, 'conv_in')(x)
    for level, mult in enumerate(self.mult):
      width = self.base * mult
      x = _level(x, f'down_{level}', width, self.blocks, level == last)
      if level != last:
        # Padded at the right and at the bottom alone.
        x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        name = f'down_{level}_downsample_conv'
        x = nn.Conv(width, (3, 3), 2, padding='VALID', name=name)(x)
    x = nn.silu(_norm('norm_out')(_middle(x)))
    return _conv3(self.features, 'conv_out')(x)


class Decoder(nn.Module):
  """Features to images, larger by 2 ** (levels − 1).

  Attributes:
    channels: of the image.
    base: unit of width.
    mult: width of each level of the encoder, in units.
    blocks: residual blocks a level.
  """

  channels: int
  base: int
  mult: tuple[int, ...]
  blocks: int = 3

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """X [B,h,w,C] -> [B,H,W,channels], not clamped."""
    last = len(self.mult) - 1
    x = _middle(_conv3(self.base * self.mult[-1], 'conv_in')(x))
    for level in range(last, -1, -1):
      width = self.base * self.mult[level]
      x = _level(x, f'up_{level}', width, self.blocks, level == last)
      if level:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = _conv3(width, f'up_{level}_upsample_conv')(x)
    x = nn.silu(_norm('norm_out')(x))
    return _conv3(self.channels, 'conv_out')(x)
