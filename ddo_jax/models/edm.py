"""The networks of EDM (Karras et al. 2022): DDPM++, NCSN++ and ADM, exactly.

Submodules bear the released checkpoints' names, so that `convert.edm_names`
maps one to the other by rule. Channels come last; the rest is as released.
"""

import dataclasses
import math

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.data import augmentation
from ddo_jax.data import codec
from ddo_jax.method import diffusion
from ddo_jax.method import likelihood
from ddo_jax.method import noise as noise_lib
from ddo_jax.models import edm_layers
from ddo_jax.models import layers
from ddo_jax.models import precond


class SongUNet(nn.Module):
  """DDPM++ and NCSN++ (Song et al. 2021) as EDM has them.

  Attributes:
    out_channels: of the output.
    num_classes: 0 for an unconditional network.
    augment_dim: width of the augmentation labels; 0 for none.
    ncsnpp: Fourier features, a residual path of the downsampled input, and
      smoother resampling.
    model_channels: width of the first convolution.
    channel_mult: width of each level, in model_channels.
    num_blocks: of each encoder level.
    attn_resolutions: where the encoder's blocks, and the last of a decoder
      level, have self-attention of one head.
    dropout: rate, in training.
  """

  out_channels: int
  num_classes: int
  augment_dim: int = 0
  ncsnpp: bool = False
  model_channels: int = 128
  channel_mult: tuple[int, ...] = (2, 2, 2)
  num_blocks: int = 4
  attn_resolutions: tuple[int, ...] = (16,)
  dropout: float = 0.13

  @property
  def style(self) -> edm_layers.Style:
    """Of the blocks."""
    return edm_layers.NCSNPP if self.ncsnpp else edm_layers.DDPMPP

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    c_noise: jax.Array,
    label: jax.Array,
    augment: jax.Array | None = None,
    train: bool = False,
  ) -> jax.Array:
    """X [B,H,W,C], c_noise [B], label [B], augment [B,A] -> F [B,H,W,C']."""
    embedding = self._embed(c_noise, label, augment)
    block = lambda x, step, side: edm_layers.UNetBlock(
      step.channels,
      self.style,
      step.resample,
      int(step.attention),
      self.dropout,
      name=f'{side}_{step.name}',
    )(x, embedding, train)
    r = x.shape[1]
    widths = [self.model_channels * mult for mult in self.channel_mult]
    plan = (r, widths, self.num_blocks, self.attn_resolutions)
    style, image = self.style, x
    x = style.layer(x, self.model_channels, f'enc_{r}x{r}_conv', 3)
    skips = [x]
    for step in layers.encoder_steps(*plan):
      x = block(x, step, 'enc')
      if self.ncsnpp and step.resample == 'down':
        x = image = self._residual(image, x, step)
      skips.append(x)
    for step in layers.decoder_steps(*plan, last_only=True):
      if step.joins:
        x = jnp.concatenate([x, skips.pop()], axis=-1)
      x = block(x, step, 'dec')
    x = nn.silu(style.norm(x, f'dec_{r}x{r}_aux_norm'))
    name = f'dec_{r}x{r}_aux_conv'
    return style.layer(x, self.out_channels, name, 3, style.last_gain)

  def _residual(
    self, image: jax.Array, x: jax.Array, step: layers.Step
  ) -> jax.Array:
    """Adds the convolved, downsampled `image` to x.

    The filter is part of the convolution: that reaches beyond the border, and
    the filter needs no zeros of its own.
    """
    taps = self.style.taps
    name = 'enc_' + step.name.replace('down', 'aux_residual')
    pad = 1 + (len(taps) - 1) // 2
    image = self.style.layer(image, x.shape[-1], name, 3, padding=pad)
    return (x + layers.downsample(image, taps, pad=0)) / math.sqrt(2)

  def _embed(
    self, c_noise: jax.Array, label: jax.Array, augment: jax.Array | None
  ) -> jax.Array:
    """Noise level, class and augmentation to [B, 4·model_channels]."""
    style, width = self.style, self.model_channels
    if self.ncsnpp:
      width = 2 * width
      e = edm_layers.RandomFourier(width, name='map_noise')(c_noise)
    else:
      e = edm_layers.positional(c_noise, width, endpoint=True)
    e = jnp.roll(e, width // 2, axis=-1)  # sines first, as DDPM++ has them
    if self.num_classes:
      one_hot = jax.nn.one_hot(label, self.num_classes, dtype=e.dtype)
      one_hot = one_hot * math.sqrt(self.num_classes)
      e = e + style.layer(one_hot, width, 'map_label')
    if self.augment_dim:
      if augment is None:
        augment = jnp.zeros((e.shape[0], self.augment_dim), e.dtype)
      e = e + style.layer(augment, width, 'map_augment', use_bias=False)
    for name in ('map_layer0', 'map_layer1'):
      e = nn.silu(style.layer(e, 4 * self.model_channels, name))
    return e


class DhariwalUNet(nn.Module):
  """ADM (Dhariwal & Nichol 2021) as EDM has it.

  Attributes:
    out_channels: of the output.
    num_classes: 0 for an unconditional network.
    augment_dim: width of the augmentation labels; 0 for none.
    model_channels: unit of width.
    channel_mult: width of each level, in model_channels.
    num_blocks: of each encoder level.
    attn_resolutions: where all blocks have self-attention.
    channels_per_head: of the attention.
    dropout: rate, in training.
  """

  out_channels: int
  num_classes: int
  augment_dim: int = 0
  model_channels: int = 192
  channel_mult: tuple[int, ...] = (1, 2, 3, 4)
  num_blocks: int = 3
  attn_resolutions: tuple[int, ...] = (32, 16, 8)
  channels_per_head: int = 64
  dropout: float = 0.1

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    c_noise: jax.Array,
    label: jax.Array,
    augment: jax.Array | None = None,
    train: bool = False,
  ) -> jax.Array:
    """X [B,H,W,C], c_noise [B], label [B], augment [B,A] -> F [B,H,W,C']."""
    style = edm_layers.ADM
    embedding = self._embed(c_noise, label, augment)
    block = lambda x, step, side: edm_layers.UNetBlock(
      step.channels,
      style,
      step.resample,
      step.channels // self.channels_per_head if step.attention else 0,
      self.dropout,
      name=f'{side}_{step.name}',
    )(x, embedding, train)
    r = x.shape[1]
    widths = [self.model_channels * mult for mult in self.channel_mult]
    plan = (r, widths, self.num_blocks, self.attn_resolutions)
    x = style.layer(x, widths[0], f'enc_{r}x{r}_conv', 3)
    skips = [x]
    for step in layers.encoder_steps(*plan):
      x = block(x, step, 'enc')
      skips.append(x)
    for step in layers.decoder_steps(*plan):
      if step.joins:
        x = jnp.concatenate([x, skips.pop()], axis=-1)
      x = block(x, step, 'dec')
    x = nn.silu(style.norm(x, 'out_norm'))
    return style.layer(x, self.out_channels, 'out_conv', 3, style.last_gain)

  def _embed(
    self, c_noise: jax.Array, label: jax.Array, augment: jax.Array | None
  ) -> jax.Array:
    """Noise level, class and augmentation to [B, width of the widest]."""
    style, width = edm_layers.ADM, self.model_channels
    e = edm_layers.positional(c_noise, width, endpoint=False)
    if self.augment_dim:
      if augment is None:
        augment = jnp.zeros((e.shape[0], self.augment_dim), e.dtype)
      e = e + style.layer(
        augment, width, 'map_augment', gain=0.0, use_bias=False
      )
    e = nn.silu(style.layer(e, 4 * width, 'map_layer0'))
    e = style.layer(e, 4 * width, 'map_layer1')
    if self.num_classes:
      one_hot = jax.nn.one_hot(label, self.num_classes, dtype=e.dtype)
      init = nn.initializers.normal(1.0)
      e = e + nn.Dense(
        4 * width, use_bias=False, kernel_init=init, name='map_label'
      )(one_hot)
    return nn.silu(e)


@dataclasses.dataclass
class EdmConfig(likelihood.ModelConfig):
  """An EDM model; `presets` has the released ones.

  Attributes:
    network: 'ddpmpp', 'ncsnpp' or 'adm'.
    precond: 'edm' (all released models), or a baseline's: 'vp', 've', 'iddpm'.
    image_shape: (H, W, C), H = W.
    num_classes: 0 for an unconditional model.
    model_channels: unit of width.
    channel_mult: width of each level, in model_channels.
    num_blocks: of each encoder level.
    attn_resolutions: where there is self-attention.
    channels_per_head: of ADM's attention; the others have one head.
    dropout: rate in MLE training; DDO has none.
    augment_dim: width of the augmentation labels: 9, or 0 for none.
    augment: probability of each augmentation in MLE training; 0 is off.
    sigma_data: σ_d, the data's standard deviation in [−1, 1] units.
    pixel_values: pixel values are 0 .. pixel_values−1.
  """

  network: str = 'ddpmpp'
  precond: str = 'edm'
  image_shape: tuple[int, int, int] = (32, 32, 3)
  num_classes: int = 0
  model_channels: int = 128
  channel_mult: tuple[int, ...] = (2, 2, 2)
  num_blocks: int = 4
  attn_resolutions: tuple[int, ...] = (16,)
  channels_per_head: int = 64
  dropout: float = 0.13
  augment_dim: int = 9
  augment: float = 0.12
  sigma_data: float = 0.5
  pixel_values: int = 256

  def build(
    self, noise: noise_lib.NoiseLaw | None = None, remat: bool = False
  ) -> 'Edm':
    """Returns the model under its preconditioning and EDM's weight."""
    return Edm(
      denoiser=denoiser(self),
      example_shape=tuple(self.image_shape),
      num_classes=self.num_classes,
      weight=noise_lib.EdmWeight(self.sigma_data),
      codec=codec.Pixels(self.pixel_values),
      noise=noise,
      remat=remat,
      augment=self.augment,
    )


@struct.dataclass
class Edm(diffusion.Diffusion):
  """A denoiser pretrained with dropout and EDM's augmentation.

  Attributes:
    augment: the probability of each augmentation in `mle_loss`.
  """

  augment: float = struct.field(pytree_node=False, default=0.0)

  def mle_loss(
    self,
    params: likelihood.Params,
    frozen: likelihood.Frozen,
    batch: likelihood.Batch,
    keys: jax.Array,
  ) -> jax.Array:
    """Returns [B] λ(σ) ‖D(x + n; σ) − x‖² in training mode."""
    del frozen
    rows = {'label': batch.label}
    if self.augment:
      draws = augmentation.draw(rng.split_rows(keys, 'augment'))
      x, rows['augment'] = augmentation.apply(batch.x, draws, self.augment)
      batch = batch.replace(x=x)
    _, sigma, noisy, weight = self._noisy(batch, keys)
    denoised = layers.apply_training(
      self.denoiser,
      params,
      rng.split_rows(keys, 'dropout'),
      {'x': noisy, 'sigma': sigma, **rows},
      self.remat,
    )
    return weight * jnp.sum((denoised - batch.x) ** 2, axis=(1, 2, 3))


def denoiser(config: EdmConfig) -> layers.Precond:
  """The network of a config under its preconditioning.

  Raises:
    errors.UserError: the config is of no known network, or its levels do not
      fit the image.
  """
  layers.check_levels(config.image_shape, config.channel_mult)
  if config.network not in ('ddpmpp', 'ncsnpp', 'adm'):
    raise errors.UserError(
      f'config.model.network is {config.network!r}; known: ddpmpp, ncsnpp, adm'
    )
  fields = ('num_classes', 'augment_dim', 'model_channels', 'num_blocks')
  options = {name: getattr(config, name) for name in (*fields, 'dropout')}
  options |= {
    name: tuple(getattr(config, name))
    for name in ('channel_mult', 'attn_resolutions')
  }
  # iDDPM's network predicts a variance too.
  options['out_channels'] = config.image_shape[-1] * (
    1 + (config.precond == 'iddpm')
  )
  if config.network == 'adm':
    network = DhariwalUNet(
      channels_per_head=config.channels_per_head, **options
    )
  else:
    network = SongUNet(ncsnpp=config.network == 'ncsnpp', **options)
  return precond.wrap(config.precond, network, config.sigma_data)
