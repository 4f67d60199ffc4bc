"""The blocks of EDM's networks: DDPM++, NCSN++ and ADM."""

import dataclasses
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.models import layers


@dataclasses.dataclass(frozen=True)
class Style:
  """What sets the blocks of SongUNet and DhariwalUNet apart.

  Attributes:
    epsilon: ε of the group norms.
    skip_scale: the factor on the sum of a block and its skip.
    adaptive_scale: whether the embedding scales and shifts the activations; if
      not, it is added to them.
    resample_proj: whether the skip of a resampling block has a convolution even
      if the width stays the same.
    taps: the resampling filter.
    init_scale: the scale of the uniform initial weights, as in
      `variance_scaling`.
    init_mode: 'fan_avg' for zero biases, or 'fan_in' for uniform biases.
    last_gain: the factor on the initial weights of each branch's last layer.
    qkv_gain: the factor on the initial weights of queries, keys and values.
  """

  epsilon: float
  skip_scale: float
  adaptive_scale: bool
  resample_proj: bool
  taps: tuple[float, ...]
  init_scale: float
  init_mode: str
  last_gain: float
  qkv_gain: float

  def layer(
    self,
    x: jax.Array,
    features: int,
    name: str,
    kernel: int | None = None,
    gain: float = 1.0,
    use_bias: bool = True,
    padding: int | str = 'SAME',
  ) -> jax.Array:
    """Adds a linear layer or a convolution to the calling module.

    Args:
      x: the input, [B,...,C].
      features: the width of the output.
      name: the layer's name.
      kernel: the side of the convolution; None for a linear layer.
      gain: the factor on the initial weights.
      use_bias: whether there is a bias.
      padding: the convolution's padding, see `nn.Conv`.

    Returns:
      The layer's output, [B,...,features].
    """
    init = nn.initializers.variance_scaling(
      self.init_scale * gain**2, self.init_mode, 'uniform'
    )
    bias_init = nn.initializers.zeros
    if self.init_mode == 'fan_in':
      fan_in = x.shape[-1] * (kernel or 1) ** 2
      limit = gain * math.sqrt(3 * self.init_scale / fan_in)

      def bias_init(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    options = {
      'kernel_init': init,
      'bias_init': bias_init,
      'use_bias': use_bias,
      'name': name,
    }
    if kernel is None:
      return nn.Dense(features, **options)(x)
    shape = (kernel, kernel)
    return nn.Conv(features, shape, padding=padding, **options)(x)

  def norm(self, x: jax.Array, name: str) -> jax.Array:
    """Adds a group norm to the calling module and applies it to x.

    A group has at least four channels.
    """
    return nn.GroupNorm(
      min(32, x.shape[-1] // 4),
      epsilon=self.epsilon,
      # The fast variance loses all its digits where the mean is large.
      use_fast_variance=False,
      name=name,
    )(x)


DDPMPP = Style(
  epsilon=1e-6,
  skip_scale=math.sqrt(0.5),
  adaptive_scale=False,
  resample_proj=True,
  taps=(1, 1),
  init_scale=1.0,
  init_mode='fan_avg',
  last_gain=1e-5,
  qkv_gain=math.sqrt(0.2),
)
NCSNPP = dataclasses.replace(DDPMPP, taps=(1, 3, 3, 1))
ADM = Style(
  epsilon=1e-5,
  skip_scale=1.0,
  adaptive_scale=True,
  resample_proj=False,
  taps=(1, 1),
  init_scale=1 / 3,
  init_mode='fan_in',
  last_gain=0.0,
  qkv_gain=1.0,
)


class UNetBlock(nn.Module):
  """A residual block, followed by self-attention if `heads` is not 0.

  Attributes:
    channels: the width of the output.
    style: the network's style.
    resample: 'keep', 'down' or 'up'; it comes before the first convolution.
    heads: the number of attention heads.
    dropout: the dropout rate in training.
  """

  channels: int
  style: Style
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
      embedding: the embedding of noise level, class and augmentation, [B,E].
      train: whether there is dropout.

    Returns:
      The activations of the block's resolution, [B,H',W',channels].
    """
    style = self.style
    channels = self.channels
    h = nn.silu(style.norm(x, 'norm0'))
    h = layers.resample(h, self.resample, style.taps)
    h = style.layer(h, channels, 'conv0', 3)
    width = 2 * channels if style.adaptive_scale else channels
    shift = style.layer(embedding, width, 'affine')[:, None, None, :]
    if style.adaptive_scale:
      scale, shift = jnp.split(shift, 2, axis=-1)
      h = nn.silu(shift + style.norm(h, 'norm1') * (scale + 1))
    else:
      h = nn.silu(style.norm(h + shift, 'norm1'))
    h = nn.Dropout(self.dropout, deterministic=not train)(h)
    h = style.layer(h, channels, 'conv1', 3, style.last_gain)
    new_width = x.shape[-1] != channels
    x = layers.resample(x, self.resample, style.taps)
    if new_width or (self.resample != 'keep' and style.resample_proj):
      x = style.layer(x, channels, 'skip', 1)
    x = (h + x) * style.skip_scale
    if self.heads:
      x = (self._attention(x) + x) * style.skip_scale
    return x

  def _attention(self, x: jax.Array) -> jax.Array:
    """Returns the output of self-attention, without the skip."""
    style = self.style
    qkv = style.norm(x, 'norm2')
    qkv = style.layer(qkv, 3 * self.channels, 'qkv', 1, style.qkv_gain)
    q, k, v = layers.split_heads(qkv, self.heads)
    y = nn.dot_product_attention(q, k, v).reshape(x.shape)
    return style.layer(y, self.channels, 'proj', 1, style.last_gain)


class RandomFourier(nn.Module):
  """The cosine and sine of a scalar at random frequencies.

  The frequencies are drawn once. They are among the params because a checkpoint
  must hold them, but they have no gradient.

  Attributes:
    features: the width of the output, even.
    scale: the standard deviation of the frequencies, in turns per unit of the
      scalar.
  """

  features: int
  scale: float = 16.0

  @nn.compact
  def __call__(self, value: jax.Array) -> jax.Array:
    """Embeds value [B] as [B, features]."""
    init = nn.initializers.normal(self.scale)
    freqs = self.param('freqs', init, (self.features // 2,))
    freqs = 2 * np.pi * jax.lax.stop_gradient(freqs)
    angle = value[:, None] * freqs[None, :]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def positional(value: jax.Array, features: int, endpoint: bool) -> jax.Array:
  """Returns the cosine and sine of a scalar at frequencies 1 … 1/10000.

  Args:
    value: the scalars, [B].
    features: the width of the output, even.
    endpoint: whether the last frequency is exactly 1/10000; if not, it is the
      one before.

  Returns:
    The embedding, [B, features].
  """
  ramp = np.arange(features // 2) / (features // 2 - endpoint)
  angle = value[:, None] * jnp.asarray(1e-4**ramp, value.dtype)[None, :]
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
