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
    epsilon: of the group norms.
    skip_scale: multiplies the sum of a block and its skip.
    adaptive_scale: the embedding scales and shifts; else it is added.
    resample_proj: the skip of a resampling block has a convolution.
    taps: of the resampling filter.
    init_scale: of the uniform initial weights, `variance_scaling`'s.
    init_mode: 'fan_avg' with zero biases, or 'fan_in' for biases as well.
    last_gain: factor on the initial weights of each branch's last layer.
    qkv_gain: factor on the initial weights of the queries, keys, values.
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
    """Applies a new nn.Dense, or an nn.Conv of `kernel`², initialised."""
    init = nn.initializers.variance_scaling(
      self.init_scale * gain**2, self.init_mode, 'uniform'
    )
    bias_init = nn.initializers.zeros
    if self.init_mode == 'fan_in':
      limit = gain * math.sqrt(
        3 * self.init_scale / (x.shape[-1] * (kernel or 1) ** 2)
      )
      bias_init = lambda key, shape, dtype: jax.random.uniform(
        key, shape, dtype, -limit, limit
      )
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
    """Applies a new group norm, of at least four channels a group."""
    return nn.GroupNorm(
      min(32, x.shape[-1] // 4),
      epsilon=self.epsilon,
      # The fast variance loses everything where the mean is large.
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
  """Residual block, with self-attention where `heads` is not 0.

  Attributes:
    channels: of the output.
    style: of which family.
    resample: 'keep', 'down' or 'up', before the first convolution.
    heads: of the attention.
    dropout: rate, in training.
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
    """X [B,H,W,C], embedding [B,E] -> [B,H',W',channels]."""
    style, channels = self.style, self.channels
    sampled = lambda v: layers.resample(v, self.resample, style.taps)
    h = nn.silu(style.norm(x, 'norm0'))
    h = style.layer(sampled(h), channels, 'conv0', 3)
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
    x = sampled(x)
    if new_width or (self.resample != 'keep' and style.resample_proj):
      x = style.layer(x, channels, 'skip', 1)
    x = (h + x) * style.skip_scale
    if self.heads:
      x = (self._attention(x) + x) * style.skip_scale
    return x

  def _attention(self, x: jax.Array) -> jax.Array:
    style = self.style
    qkv = style.norm(x, 'norm2')
    qkv = style.layer(qkv, 3 * self.channels, 'qkv', 1, style.qkv_gain)
    a = nn.dot_product_attention(*layers.split_heads(qkv, self.heads))
    return style.layer(
      a.reshape(x.shape), self.channels, 'proj', 1, style.last_gain
    )


class RandomFourier(nn.Module):
  """Cosine and sine of a scalar at frequencies drawn once.

  The frequencies stand among the params because a checkpoint must hold them;
  they have no gradient.

  Attributes:
    features: width of the output, even.
    scale: standard deviation of the frequencies [turns per unit].
  """

  features: int
  scale: float = 16.0

  @nn.compact
  def __call__(self, value: jax.Array) -> jax.Array:
    """Value [B] -> [B, features]."""
    init = nn.initializers.normal(self.scale)
    freqs = self.param('freqs', init, (self.features // 2,))
    freqs = 2 * np.pi * jax.lax.stop_gradient(freqs)
    angle = value[:, None] * freqs[None, :]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def positional(value: jax.Array, features: int, endpoint: bool) -> jax.Array:
  """Cosine and sine of value [B] at frequencies 1 … 1/10000: [B, features].

  `endpoint`: the last frequency is exactly 1/10000.
  """
  ramp = np.arange(features // 2) / (features // 2 - endpoint)
  angle = value[:, None] * jnp.asarray(1e-4**ramp, value.dtype)[None, :]
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
