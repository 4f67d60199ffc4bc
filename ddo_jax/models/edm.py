"""The networks of EDM (Karras et al. 2022): DDPM++, NCSN++ and ADM, exactly.

Submodules have the names of the released checkpoints, so that
`weights.edm_names` maps one to the other by rule. Images have their channels
last; everything else is as released.
"""

import dataclasses
import math

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from ddo_jax import errors
from ddo_jax import precision as precision_lib
from ddo_jax import rng
from ddo_jax import settings
from ddo_jax.data import augmentation
from ddo_jax.data import codec
from ddo_jax.method import diffusion
from ddo_jax.method import likelihood
from ddo_jax.method import noise as noise_lib
from ddo_jax.models import edm_layers
from ddo_jax.models import layers
from ddo_jax.models import precond


class SongUNet(nn.Module):
  """DDPM++ and NCSN++ (Song et al. 2021) as they are in EDM.

  Attributes:
    out_channels: the number of channels of the output.
    num_classes: the number of classes; 0 for an unconditional network.
    augment_dim: the width of the augmentation labels; 0 for none.
    ncsnpp: whether the network is NCSN++, which differs from DDPM++ by Fourier
      features of the noise level, a residual path of the downsampled input and
      a smoother resampling filter.
    model_channels: the width of the first convolution.
    channel_mult: the width of each level, in units of model_channels.
    num_blocks: the number of blocks in a level of the encoder.
    attn_resolutions: the resolutions with self-attention of one head, in every
      block of the encoder and in a decoder level's last block.
    dropout: the dropout rate in training.
    remat: which activations inside each block are recomputed in the backward
      pass, see `layers.remat_policy`; False for none.
  """

  out_channels: int
  num_classes: int
  augment_dim: int = 0
  ncsnpp: bool = False
  model_channels: int = 128
  channel_mult: tuple[int, ...] = (2, 2, 2)
  num_blocks: int = settings.at_most(16, 4)
  attn_resolutions: tuple[int, ...] = (16,)
  dropout: float = 0.13
  remat: bool | str = False

  @property
  def style(self) -> edm_layers.Style:
    """The style of the network's blocks."""
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
    """Applies the network.

    Args:
      x: the noisy image, [B,H,W,C].
      c_noise: what the preconditioning tells of the noise level, [B].
      label: the classes, [B] int; num_classes means "no label".
      augment: the augmentation labels, [B,A]; None for no augmentation.
      train: whether there is dropout.

    Returns:
      F, [B,H,W,out_channels].
    """
    embedding = self._embed(c_noise, label, augment)

    def apply_block(x, step, side, skip=None):
      block = edm_layers.UNetBlock(
        channels=step.channels,
        style=self.style,
        resample=step.resample,
        heads=int(step.attention),
        dropout=self.dropout,
        name=f'{side}_{step.name}',
      )

      def apply(block, x, skip):
        if step.joins:
          x = jnp.concatenate([x, skip], axis=-1)
        return block(x, embedding, train)

      return layers.checkpointed(apply, self.remat)(block, x, skip)

    r = x.shape[1]
    widths = [self.model_channels * mult for mult in self.channel_mult]
    encoder = layers.encoder_steps(
      r, widths, self.num_blocks, self.attn_resolutions
    )
    decoder = layers.decoder_steps(
      r, widths, self.num_blocks, self.attn_resolutions, last_only=True
    )
    style = self.style
    image = x
    x = style.layer(x, self.model_channels, f'enc_{r}x{r}_conv', 3)
    skips = [x]
    for step in encoder:
      x = apply_block(x, step, 'enc')
      if self.ncsnpp and step.resample == 'down':
        image = self._residual(image, x, step)
        x = image
      skips.append(x)
    for step in decoder:
      x = apply_block(x, step, 'dec', skips.pop() if step.joins else None)
    x = nn.silu(style.norm(x, f'dec_{r}x{r}_aux_norm'))
    name = f'dec_{r}x{r}_aux_conv'
    return style.layer(x, self.out_channels, name, 3, style.last_gain)

  def _residual(
    self, image: jax.Array, x: jax.Array, step: layers.Step
  ) -> jax.Array:
    """Convolves and downsamples `image`, and adds it to x.

    As released, the filter follows the convolution without padding of its own:
    the convolution is computed beyond the border by as much as the filter
    needs.
    """
    taps = self.style.taps
    name = 'enc_' + step.name.replace('down', 'aux_residual')
    pad = 1 + (len(taps) - 1) // 2
    image = self.style.layer(image, x.shape[-1], name, 3, padding=pad)
    return (x + layers.downsample(image, taps, pad=0)) / math.sqrt(2)

  def _embed(
    self, c_noise: jax.Array, label: jax.Array, augment: jax.Array | None
  ) -> jax.Array:
    """Embeds noise level, class and augmentation, [B, 4·model_channels]."""
    style = self.style
    width = self.model_channels
    if self.ncsnpp:
      width = 2 * width
      e = edm_layers.RandomFourier(width, name='map_noise')(c_noise)
    else:
      e = edm_layers.positional(c_noise, width, endpoint=True)
    e = jnp.roll(e, width // 2, axis=-1)  # The sines come first, as released.
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
  """ADM (Dhariwal & Nichol 2021) as it is in EDM.

  Attributes:
    out_channels: the number of channels of the output.
    num_classes: the number of classes; 0 for an unconditional network.
    augment_dim: the width of the augmentation labels; 0 for none.
    model_channels: the unit of width.
    channel_mult: the width of each level, in units of model_channels.
    num_blocks: the number of blocks in a level of the encoder.
    attn_resolutions: the resolutions at which all blocks have self-attention.
    channels_per_head: the width of a head of the attention.
    dropout: the dropout rate in training.
    remat: which activations inside each block are recomputed in the backward
      pass, see `layers.remat_policy`; False for none.
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
  remat: bool | str = False

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    c_noise: jax.Array,
    label: jax.Array,
    augment: jax.Array | None = None,
    train: bool = False,
  ) -> jax.Array:
    """Applies the network; see `SongUNet.__call__`."""
    style = edm_layers.ADM
    embedding = self._embed(c_noise, label, augment)

    def apply_block(x, step, side, skip=None):
      heads = 0
      if step.attention:
        heads = step.channels // self.channels_per_head
      block = edm_layers.UNetBlock(
        channels=step.channels,
        style=style,
        resample=step.resample,
        heads=heads,
        dropout=self.dropout,
        name=f'{side}_{step.name}',
      )

      def apply(block, x, skip):
        if step.joins:
          x = jnp.concatenate([x, skip], axis=-1)
        return block(x, embedding, train)

      return layers.checkpointed(apply, self.remat)(block, x, skip)

    r = x.shape[1]
    widths = [self.model_channels * mult for mult in self.channel_mult]
    encoder = layers.encoder_steps(
      r, widths, self.num_blocks, self.attn_resolutions
    )
    decoder = layers.decoder_steps(
      r, widths, self.num_blocks, self.attn_resolutions
    )
    x = style.layer(x, widths[0], f'enc_{r}x{r}_conv', 3)
    skips = [x]
    for step in encoder:
      x = apply_block(x, step, 'enc')
      skips.append(x)
    for step in decoder:
      x = apply_block(x, step, 'dec', skips.pop() if step.joins else None)
    x = nn.silu(style.norm(x, 'out_norm'))
    return style.layer(x, self.out_channels, 'out_conv', 3, style.last_gain)

  def _embed(
    self, c_noise: jax.Array, label: jax.Array, augment: jax.Array | None
  ) -> jax.Array:
    """Embeds noise level, class and augmentation, [B, 4·model_channels]."""
    style = edm_layers.ADM
    width = self.model_channels
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
    precond: the preconditioning, see the table in `precond`. All released
      models have 'edm'; the baselines of EDM's study have 'vp', 've' or
      'iddpm'.
    image_shape: the shape (H, W, C) of an image, with H = W.
    num_classes: the number of classes; 0 for an unconditional model.
    model_channels: the unit of width.
    channel_mult: the width of each level, in units of model_channels.
    num_blocks: the number of blocks in a level of the encoder.
    attn_resolutions: the resolutions with self-attention.
    channels_per_head: the width of a head of ADM's attention; the other
      networks have a single head.
    dropout: the dropout rate in MLE training; DDO has no dropout.
    augment_dim: the width of the augmentation labels: 9, or 0 for none.
    augment: the probability of each augmentation in MLE training; 0 is off.
    sigma_data: σ_d, the standard deviation of the data in [−1, 1] units.
    pixel_values: the number of values of a pixel, 0 … pixel_values−1.
    precision: that of the network's products in training, 'highest', 'high' or
      'default'; see `precision`.
  """

  network: str = 'ddpmpp'
  precond: str = 'edm'
  image_shape: tuple[int, int, int] = settings.at_most(4096, (32, 32, 3))
  num_classes: int = 0
  model_channels: int = 128
  channel_mult: tuple[int, ...] = (2, 2, 2)
  num_blocks: int = settings.at_most(16, 4)
  attn_resolutions: tuple[int, ...] = (16,)
  channels_per_head: int = 64
  dropout: float = settings.at_most(1, 0.13)
  augment_dim: int = 9
  augment: float = settings.at_most(1, 0.12)
  sigma_data: float = 0.5
  pixel_values: int = 256
  precision: str = 'highest'

  def build(
    self, noise: noise_lib.NoiseLaw | None = None, remat: bool | str = False
  ) -> 'Edm':
    """Returns the model under its preconditioning and EDM's weight."""
    precision_lib.check('model.precision', self.precision)
    return Edm(
      denoiser=denoiser(self, remat),
      example_shape=self.image_shape,
      num_classes=self.num_classes,
      weight=noise_lib.EdmWeight(self.sigma_data),
      codec=codec.Pixels(self.pixel_values),
      noise=noise,
      precision=self.precision,
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
      batch = dataclasses.replace(batch, x=x)
    drawn = self._noisy(batch, keys)
    denoised = layers.apply_training(
      self.denoiser,
      params,
      rng.split_rows(keys, 'dropout'),
      {'x': drawn.x, 'sigma': drawn.sigma, **rows},
      self.precision,
    )
    squares = jnp.sum((denoised - batch.x) ** 2, axis=(1, 2, 3))
    return drawn.weight * squares


def denoiser(config: EdmConfig, remat: bool | str = False) -> precond.Precond:
  """Returns the network of a config under its preconditioning.

  Args:
    config: the config.
    remat: see `SongUNet`.

  Raises:
    errors.UserError: there is no network or no preconditioning of that name, or
      the image cannot be halved at every level.
  """
  layers.check_levels(config.image_shape, config.channel_mult)
  known = ('ddpmpp', 'ncsnpp', 'adm')
  errors.require_choice('model.network', config.network, known)
  out_channels = config.image_shape[-1]
  if config.precond == 'iddpm':
    out_channels *= 2  # iDDPM's network also predicts a variance.
  options = {
    'out_channels': out_channels,
    'num_classes': config.num_classes,
    'augment_dim': config.augment_dim,
    'model_channels': config.model_channels,
    'channel_mult': tuple(config.channel_mult),
    'num_blocks': config.num_blocks,
    'attn_resolutions': tuple(config.attn_resolutions),
    'dropout': config.dropout,
    'remat': remat,
  }
  if config.network == 'adm':
    network = DhariwalUNet(
      channels_per_head=config.channels_per_head, **options
    )
  else:
    network = SongUNet(ncsnpp=config.network == 'ncsnpp', **options)
  return precond.wrap(config.precond, network, config.sigma_data)
