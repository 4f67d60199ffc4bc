"""The convolutional encoder and decoder of VAR's tokenizer.

They are of the LDM and VQGAN family (Esser et al. 2021): residual blocks level
by level, with self-attention at the lowest resolution. Submodules have the
released names, with '_' for the dots within a level.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

GROUPS = 32  # the number of groups of every group norm


def _norm(name: str) -> nn.GroupNorm:
  """Returns a new group norm of the calling module."""
  return nn.GroupNorm(GROUPS, epsilon=1e-6, use_fast_variance=False, name=name)


def _conv3(features: int, name: str) -> nn.Conv:
  """Returns a new 3×3 convolution of the calling module."""
  return nn.Conv(features, (3, 3), padding=1, name=name)


class ResBlock(nn.Module):
  """A residual block: x + conv(SiLU(GN(conv(SiLU(GN(x)))))).

  If the width changes, x passes a 1×1 convolution before the sum.

  Attributes:
    features: the width of the output.
  """

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B,H,W,C] to [B,H,W,features]."""
    h = nn.silu(_norm('norm1')(x))
    h = _conv3(self.features, 'conv1')(h)
    h = nn.silu(_norm('norm2')(h))
    h = _conv3(self.features, 'conv2')(h)
    if x.shape[-1] != self.features:
      x = nn.Conv(self.features, (1, 1), name='nin_shortcut')(x)
    return x + h


class AttnBlock(nn.Module):
  """Self-attention over all pixels, with one head, added to its input."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns an array of the shape of x [B,H,W,C]."""
    batch, height, width, channels = x.shape
    h = _norm('norm')(x)
    qkv = nn.Conv(3 * channels, (1, 1), name='qkv')(h)
    qkv = qkv.reshape(batch, height * width, 3, channels)
    q = qkv[:, :, 0]
    k = qkv[:, :, 1]
    v = qkv[:, :, 2]
    logits = jnp.einsum('bqc,bkc->bqk', q, k) * channels**-0.5
    y = jnp.einsum('bqk,bkc->bqc', jax.nn.softmax(logits), v)
    return x + nn.Conv(channels, (1, 1), name='proj_out')(y.reshape(x.shape))


def _middle(x: jax.Array) -> jax.Array:
  """Adds the blocks between levels and latents to the calling module."""
  width = x.shape[-1]
  x = ResBlock(width, name='mid_block_1')(x)
  x = AttnBlock(name='mid_attn_1')(x)
  return ResBlock(width, name='mid_block_2')(x)


def _level(
  x: jax.Array, name: str, width: int, blocks: int, attend: bool
) -> jax.Array:
  """Adds the blocks of one level to the calling module and applies them.

  Args:
    x: the activations, [B,H,W,C].
    name: the first part of the blocks' names.
    width: the width of the blocks.
    blocks: the number of residual blocks.
    attend: whether self-attention follows each of them.

  Returns:
    The activations, [B,H,W,width].
  """
  for i in range(blocks):
    x = ResBlock(width, name=f'{name}_block_{i}')(x)
    if attend:
      x = AttnBlock(name=f'{name}_attn_{i}')(x)
  return x


class Encoder(nn.Module):
  """Turns images into features, whose side is smaller by 2 ** (levels − 1).

  Attributes:
    features: the number of channels of the output.
    base: the unit of width.
    mult: the width of each level, in units of `base`.
    blocks: the number of residual blocks in a level.
  """

  features: int
  base: int
  mult: tuple[int, ...]
  blocks: int = 2

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps images [B,H,W,C] in [−1, 1] to [B,h,w,features]."""
    last = len(self.mult) - 1
    x = _conv3(self.base, 'conv_in')(x)
    for level, mult in enumerate(self.mult):
      width = self.base * mult
      x = _level(x, f'down_{level}', width, self.blocks, level == last)
      if level != last:
        # The padding is at the right and at the bottom only.
        x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        name = f'down_{level}_downsample_conv'
        x = nn.Conv(width, (3, 3), 2, padding='VALID', name=name)(x)
    x = nn.silu(_norm('norm_out')(_middle(x)))
    return _conv3(self.features, 'conv_out')(x)


class Decoder(nn.Module):
  """Turns features into images, whose side is larger by 2 ** (levels − 1).

  Attributes:
    channels: the number of channels of an image.
    base: the unit of width.
    mult: the width of each level of the encoder, in units of `base`.
    blocks: the number of residual blocks in a level.
  """

  channels: int
  base: int
  mult: tuple[int, ...]
  blocks: int = 3

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps features [B,h,w,C] to images [B,H,W,channels], not clamped."""
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
