"""EDM2's magnitude-preserving U-Net (Karras et al. 2024), exactly.

Activations keep unit magnitude because the weights do: the forward pass
normalises every weight, and training puts the stored weights back on the sphere
after every step (`SphereRules`). Submodules have the names of the released
checkpoints.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from ddo_jax import errors
from ddo_jax import precision as precision_lib
from ddo_jax import rng
from ddo_jax import settings
from ddo_jax.data import codec as codec_lib
from ddo_jax.method import diffusion
from ddo_jax.method import likelihood
from ddo_jax.method import noise as noise_lib
from ddo_jax.models import edm2_layers
from ddo_jax.models import layers
from ddo_jax.models import precond
from ddo_jax.models import vae


class UNet(nn.Module):
  """EDM2's network, configuration G.

  Attributes:
    num_classes: the number of classes; 0 for an unconditional network.
    model_channels: the unit of width.
    channel_mult: the width of each level, in units of model_channels.
    num_blocks: the number of blocks in a level of the encoder.
    attn_resolutions: the resolutions at which all blocks have self-attention.
    channels_per_head: the width of a head of the attention.
    dropout: the dropout rate in training.
    remat: which activations inside each block are recomputed in the backward
      pass, see `layers.remat_policy`; False for none.
  """

  num_classes: int
  model_channels: int = 192
  channel_mult: tuple[int, ...] = (1, 2, 3, 4)
  num_blocks: int = settings.at_most(16, 3)
  attn_resolutions: tuple[int, ...] = (16, 8)
  channels_per_head: int = 64
  dropout: float = 0.0
  remat: bool | str = False

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    c_noise: jax.Array,
    label: jax.Array,
    train: bool = False,
  ) -> jax.Array:
    """Applies the network.

    Args:
      x: the noisy image, [B,H,W,C].
      c_noise: what the preconditioning tells of the noise level, [B].
      label: the classes, [B] int; num_classes means "no label".
      train: whether there is dropout.

    Returns:
      F, [B,H,W,C].
    """
    widths = [self.model_channels * mult for mult in self.channel_mult]
    embedding = self._embed(c_noise, label, widths)

    def apply_block(x, step, side, skip=None):
      heads = 0
      if step.attention:
        heads = step.channels // self.channels_per_head
      block = edm2_layers.MPBlock(
        channels=step.channels,
        encoder=side == 'enc',
        resample=step.resample,
        heads=heads,
        dropout=self.dropout,
        name=f'{side}_{step.name}',
      )

      def apply(block, x, skip):
        if step.joins:
          x = edm2_layers.mp_cat(x, skip)
        return block(x, embedding, train)

      return layers.checkpointed(apply, self.remat)(block, x, skip)

    r = x.shape[1]
    channels = x.shape[-1]
    encoder = layers.encoder_steps(
      r, widths, self.num_blocks, self.attn_resolutions
    )
    decoder = layers.decoder_steps(
      r, widths, self.num_blocks, self.attn_resolutions
    )
    # The network has no biases; a channel of ones takes their place.
    x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
    x = edm2_layers.MPConv(widths[0], 3, name=f'enc_{r}x{r}_conv')(x)
    skips = [x]
    for step in encoder:
      x = apply_block(x, step, 'enc')
      skips.append(x)
    for step in decoder:
      x = apply_block(x, step, 'dec', skips.pop() if step.joins else None)
    gain = self.param('out_gain', nn.initializers.zeros, ())
    return edm2_layers.MPConv(channels, 3, name='out_conv')(x, gain)

  def _embed(
    self, c_noise: jax.Array, label: jax.Array, widths: Sequence[int]
  ) -> jax.Array:
    """Embeds noise level and class, [B, width of the widest level]."""
    e = edm2_layers.MPFourier(widths[0], name='emb_fourier')(c_noise)
    e = edm2_layers.MPConv(max(widths), name='emb_noise')(e)
    if self.num_classes:
      one_hot = jax.nn.one_hot(label, self.num_classes, dtype=e.dtype)
      one_hot = one_hot * math.sqrt(self.num_classes)
      label_embedding = edm2_layers.MPConv(max(widths), name='emb_label')
      # Without a label the sum still scales e, so that a conditional network
      # without labels differs from an unconditional one.
      e = edm2_layers.mp_sum(e, label_embedding(one_hot), 0.5)
    return edm2_layers.mp_silu(e)


class Edm2Precond(precond.EdmPrecond):
  """EDM's preconditioning, with the learned log-variance of the loss.

  Attributes:
    logvar_channels: the number of Fourier features for the log-variance.
  """

  logvar_channels: int = 128

  def setup(self):
    self.logvar_fourier = edm2_layers.MPFourier(self.logvar_channels)
    self.logvar_linear = edm2_layers.MPConv(1)

  def log_variance(self, sigma: jax.Array) -> jax.Array:
    """Returns u(σ) [B] at sigma [B]; the loss is weighted by e^{−u}."""
    c_noise = self.coefficients(sigma).c_noise
    return self.logvar_linear(self.logvar_fourier(c_noise))[:, 0]

  def __call__(
    self, x: jax.Array, sigma: jax.Array, label: jax.Array, **options: Any
  ) -> jax.Array:
    """Predicts the clean data; see `precond.Precond`."""
    if self.is_initializing():
      self.log_variance(sigma)
    return super().__call__(x, sigma, label, **options)


@dataclasses.dataclass
class Edm2Config(likelihood.ModelConfig):
  """An EDM2 model; `presets` has the released ones.

  Attributes:
    image_shape: the shape (H, W, C) of an image or latent, with H = W.
    num_classes: the number of classes; 0 for an unconditional model.
    model_channels: the unit of width.
    channel_mult: the width of each level, in units of model_channels.
    num_blocks: the number of blocks in a level of the encoder.
    attn_resolutions: the resolutions with self-attention.
    channels_per_head: the width of a head of the attention.
    dropout: the dropout rate in MLE training; DDO has no dropout.
    logvar_channels: the number of Fourier features for the log-variance of the
      loss.
    sigma_data: σ_d, the standard deviation of the data in model units.
    latents: whether the data are latents and not pixels. A stored row then has
      twice the channels, the mean and the deviation of a latent.
    precision: that of the network's products in training, 'highest', 'high' or
      'default'; see `precision`.
  """

  image_shape: tuple[int, int, int] = settings.at_most(4096, (64, 64, 3))
  num_classes: int = 1000
  model_channels: int = 192
  channel_mult: tuple[int, ...] = (1, 2, 3, 4)
  num_blocks: int = settings.at_most(16, 3)
  attn_resolutions: tuple[int, ...] = (16, 8)
  channels_per_head: int = 64
  dropout: float = settings.at_most(1, 0.0)
  logvar_channels: int = 128
  sigma_data: float = 0.5
  latents: bool = False
  precision: str = 'highest'

  def codec(self) -> codec_lib.Codec:
    """Returns the codec of pixels, or of Stable Diffusion's latents.

    Raises:
      errors.UserError: latents of another number of channels.
    """
    if not self.latents:
      return codec_lib.Pixels()
    autoencoder = vae.AutoencoderKL()
    if self.image_shape[-1] != autoencoder.latent_channels:
      raise errors.UserError(
        f'config.model.image_shape is {tuple(self.image_shape)}; wanted'
        f' {autoencoder.latent_channels} channels for config.model.latents=True'
      )
    return codec_lib.Latents(autoencoder, sigma_data=self.sigma_data)

  def build(
    self, noise: noise_lib.NoiseLaw | None = None, remat: bool | str = False
  ) -> 'Edm2':
    """Returns the model under its preconditioning and EDM's weight."""
    precision_lib.check('model.precision', self.precision)
    layers.check_levels(self.image_shape, self.channel_mult)
    network = UNet(
      num_classes=self.num_classes,
      model_channels=self.model_channels,
      channel_mult=tuple(self.channel_mult),
      num_blocks=self.num_blocks,
      attn_resolutions=tuple(self.attn_resolutions),
      channels_per_head=self.channels_per_head,
      dropout=self.dropout,
      remat=remat,
    )
    return Edm2(
      denoiser=Edm2Precond(network, self.sigma_data, self.logvar_channels),
      example_shape=self.image_shape,
      num_classes=self.num_classes,
      weight=noise_lib.EdmWeight(self.sigma_data),
      codec=self.codec(),
      noise=noise,
      precision=self.precision,
      rules=SphereRules(),
    )


@dataclasses.dataclass(frozen=True)
class SphereRules(likelihood.WeightRules):
  """Forced weight normalisation (eq. 66 of EDM2)."""

  def project(self, params: likelihood.Params) -> likelihood.Params:
    """Scales the weights of each output to an RMS of 1.

    Gains, frequencies and phases are free. The forward pass normalises once
    more, so that gradients are tangent to the sphere. A second projection
    changes a weight by 1e-4 of it at most: project θ and the reference alike.
    """

    def normalize(path, leaf):
      if path[-1].key == 'kernel':
        return edm2_layers.normalize_kernel(leaf)
      return leaf

    return jax.tree_util.tree_map_with_path(normalize, params)


@struct.dataclass
class Edm2(diffusion.Diffusion):
  """EDM2: weights on the sphere, and a loss with learned uncertainty."""

  def mle_loss(
    self,
    params: likelihood.Params,
    frozen: likelihood.Frozen,
    batch: likelihood.Batch,
    keys: jax.Array,
  ) -> jax.Array:
    """Returns [B] Σ_HWC (λ(σ) e^{−u} (D(x + n; σ) − x)² + u), u(σ) learned."""
    del frozen
    drawn = self._noisy(batch, keys)
    denoised = layers.apply_training(
      self.denoiser,
      params,
      rng.split_rows(keys, 'dropout'),
      {'x': drawn.x, 'sigma': drawn.sigma, 'label': batch.label},
      self.precision,
    )
    logvar = self.denoiser.apply(
      {'params': params}, drawn.sigma, method='log_variance'
    )
    squares = jnp.sum((denoised - batch.x) ** 2, axis=(1, 2, 3))
    size = math.prod(self.example_shape)
    return drawn.weight * jnp.exp(-logvar) * squares + size * logvar
