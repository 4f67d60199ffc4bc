"""DiT, a transformer over the patches of an image (Peebles & Xie 2023).

The network is also SiT's; see `sit`. Submodules have the released names. The
params of all blocks are stacked, [depth, ...], and scanned over, so that
compiling takes as long as for one block.
"""

import dataclasses
import functools
import math
from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors
from ddo_jax import precision as precision_lib
from ddo_jax import settings
from ddo_jax.data import codec as codec_lib
from ddo_jax.method import diffusion
from ddo_jax.method import likelihood
from ddo_jax.method import noise as noise_lib
from ddo_jax.models import dit_layers
from ddo_jax.models import layers
from ddo_jax.models import precond
from ddo_jax.models import vae
from ddo_jax.samplers import contract
from ddo_jax.samplers import ddpm
from ddo_jax.samplers import schedules

LATENT_SCALE = 0.18215  # published for Stable Diffusion's autoencoder


class Transformer(nn.Module):
  """The network.

  Attributes:
    out_channels: the number of channels of the output.
    num_classes: the number of classes; the label of this number means "no
      label". 0 for an unconditional network.
    patch: the side of a patch.
    width: D, the width of the transformer.
    depth: the number of blocks.
    heads: the number of attention heads.
    mlp_ratio: the hidden width of the feed-forward layers, in units of D.
    remat: which activations of each block are recomputed in the backward pass,
      see `layers.remat_policy`; False for none.
  """

  out_channels: int
  num_classes: int
  patch: int
  width: int
  depth: int
  heads: int
  mlp_ratio: float = 4.0
  remat: bool | str = False

  @nn.compact
  def __call__(
    self, x: jax.Array, c_noise: jax.Array, label: jax.Array
  ) -> jax.Array:
    """Applies the network.

    Args:
      x: the noisy image or latent, [B,H,W,C].
      c_noise: the time that the preconditioning tells, [B].
      label: the classes, [B] int.

    Returns:
      F, [B,H,W,out_channels].
    """
    batch = x.shape[0]
    rows = x.shape[1] // self.patch
    columns = x.shape[2] // self.patch
    tokens = dit_layers.PatchEmbedding(
      self.patch, self.width, name='x_embedder'
    )(x)
    # As it is stored in the released files.
    table = dit_layers.positions(rows, columns, self.width).astype(np.float32)
    tokens = tokens + jnp.asarray(table, tokens.dtype)[None]
    condition = dit_layers.TimeEmbedding(self.width, name='t_embedder')(c_noise)
    if self.num_classes:
      condition = condition + dit_layers.LabelEmbedding(
        self.num_classes, self.width, name='y_embedder'
      )(label)
    condition = nn.silu(condition)
    tokens, _ = self._stack()(tokens, condition)
    out = dit_layers.FinalLayer(
      self.patch**2 * self.out_channels, name='final_layer'
    )(tokens, condition)
    out = out.reshape(
      batch, rows, columns, self.patch, self.patch, self.out_channels
    )
    return jnp.swapaxes(out, 2, 3).reshape(*x.shape[:3], self.out_channels)

  def _stack(self) -> nn.Module:
    """Returns a module that applies all blocks, one after the other."""
    scanned = layers.stacked(
      dit_layers.Block,
      depth=self.depth,
      in_axes=nn.broadcast,
      remat=self.remat,
    )
    hidden = round(self.mlp_ratio * self.width)
    return scanned(self.heads, hidden, name='blocks')


@functools.lru_cache
def _levels() -> np.ndarray:
  """Returns the noise levels of DiT's schedule, rising, [1000] float64."""
  return schedules.ddpm_sigmas()


class DitPrecond(precond.EpsilonPrecond):
  """ε-prediction at the noise levels of DiT's schedule, and between them.

  The network is told t, the number of the noise level in 0 … 999. Between two
  levels t is interpolated in ln σ: the network never saw fractions, but takes
  them smoothly, D(x; σ) is continuous, and samplers and noise laws of other
  levels may be used. On the levels t is whole, and beyond them it stays.
  """

  @property
  def sigma_range(self) -> tuple[float, float]:
    """The smallest and the largest noise level of the schedule."""
    levels = _levels()
    return float(levels[0]), float(levels[-1])

  def time(self, sigma: jax.Array) -> jax.Array:
    """Returns t [B], whole or not, of noise levels sigma [B]."""
    levels = jnp.asarray(_levels(), sigma.dtype)
    below = jnp.searchsorted(levels, sigma, side='right') - 1
    below = jnp.clip(below, 0, levels.size - 2)
    low = levels[below]
    # The ratio of two near numbers keeps its digits where a difference of
    # logarithms does not: t is whole on a level, whatever the type of σ.
    fraction = jnp.log(sigma / low) / jnp.log(levels[below + 1] / low)
    return below + jnp.clip(fraction, 0, 1)

  def nearest(self, sigma: jax.Array) -> jax.Array:
    """Returns the number of the level nearest to each sigma [B], [B] int."""
    levels = jnp.asarray(_levels(), sigma.dtype)
    return jnp.argmin(jnp.abs(sigma[:, None] - levels[None, :]), axis=1)

  def coefficients(self, sigma: jax.Array) -> precond.Coefficients:
    """Returns the coefficients at the noise levels sigma [B]."""
    plain = super().coefficients(sigma)
    return plain._replace(c_noise=self.time(sigma))

  def with_variance(
    self, x: jax.Array, sigma: jax.Array, label: jax.Array
  ) -> jax.Array:
    """Returns D(x; σ) and v, the place of the log-variance, [B,...,2C]."""
    output = self.predict(x, sigma, label)
    channels = x.shape[-1]
    scale = sigma.reshape(-1, *[1] * (x.ndim - 1))
    denoised = x - scale * output[..., :channels]
    return jnp.concatenate([denoised, output[..., channels:]], axis=-1)


@dataclasses.dataclass
class TransformerConfig(likelihood.ModelConfig):
  """What DiT's and SiT's settings have in common.

  Attributes:
    image_shape: the shape (H, W, C) of an image or latent.
    num_classes: the number of classes; 0 for an unconditional model.
    patch: the side of a patch.
    width: the width of the transformer.
    depth: the number of blocks.
    heads: the number of attention heads.
    mlp_ratio: the hidden width of the feed-forward layers, in widths.
    learn_sigma: whether the network has twice the channels. The second half is
      DiT's learned variance; in SiT it is a leftover of the released files.
    latents: whether the data are the latents of an autoencoder and not pixels.
      A stored row then has twice the channels, the mean and the deviation of a
      latent.
    pixel_values: the number of values of a pixel, 0 … pixel_values−1.
    precision: that of the network's products in training, 'highest', 'high' or
      'default'; see `precision`.
  """

  image_shape: tuple[int, int, int] = settings.at_most(4096, (32, 32, 4))
  num_classes: int = 1000
  patch: int = settings.at_most(64, 2)
  width: int = settings.at_most(2**16, 1152)
  depth: int = settings.at_most(1024, 28)
  heads: int = 16
  mlp_ratio: float = settings.at_most(64, 4.0)
  learn_sigma: bool = True
  latents: bool = False
  pixel_values: int = 256
  precision: str = 'highest'

  @property
  def grid(self) -> tuple[int, int]:
    """The number of rows and of columns of an image's patches."""
    height, width, _ = self.image_shape
    return height // self.patch, width // self.patch

  def network(self, remat: bool | str) -> Transformer:
    """Returns the network.

    Raises:
      errors.UserError: sizes do not go together.
    """
    precision_lib.check('model.precision', self.precision)
    height, width, channels = self.image_shape
    errors.require(
      self.patch > 0 and height % self.patch == 0 and width % self.patch == 0,
      'model.image_shape',
      tuple(self.image_shape),
      f'of sides that are multiples of config.model.patch={self.patch}',
    )
    errors.require(
      self.heads > 0 and self.width % self.heads == 0 and self.width % 4 == 0,
      'model.width',
      self.width,
      f'a multiple of 4, and of config.model.heads={self.heads}',
    )
    return Transformer(
      out_channels=channels * (1 + self.learn_sigma),
      num_classes=self.num_classes,
      patch=self.patch,
      width=self.width,
      depth=self.depth,
      heads=self.heads,
      mlp_ratio=self.mlp_ratio,
      remat=remat,
    )

  def codec(self) -> codec_lib.Codec:
    """Returns the codec of pixels, or of latents times 0.18215.

    Raises:
      errors.UserError: latents of another number of channels.
    """
    if not self.latents:
      return codec_lib.Pixels(self.pixel_values)
    autoencoder = vae.AutoencoderKL()
    channels = autoencoder.latent_channels
    errors.require(
      self.image_shape[-1] == channels,
      'model.image_shape',
      tuple(self.image_shape),
      f'of {channels} channels, as config.model.latents=True',
    )
    return codec_lib.Latents(
      autoencoder,
      mean=(0.0,) * channels,
      std=(1 / LATENT_SCALE,) * channels,
      sigma_data=1.0,
      nearest=True,
      signed=True,
    )


@dataclasses.dataclass
class DitConfig(TransformerConfig):
  """DiT; `dit_presets` has the published sizes. See `TransformerConfig`."""

  def build(
    self, noise: noise_lib.NoiseLaw | None = None, remat: bool | str = False
  ) -> 'Dit':
    """Returns the model under ε-prediction and the weight of ε's error.

    Raises:
      errors.UserError: sizes do not go together.
    """
    return Dit(
      denoiser=DitPrecond(self.network(remat)),
      example_shape=self.image_shape,
      num_classes=self.num_classes,
      weight=noise_lib.EpsilonWeight(),
      codec=self.codec(),
      noise=noise,
      precision=self.precision,
      learn_sigma=self.learn_sigma,
    )


@struct.dataclass
class Dit(diffusion.PredictionDiffusion):
  """A denoiser that predicts ε, and perhaps the variance of DDPM's steps.

  Only ε is part of the likelihood's surrogate: the outputs of the variance get
  no gradient from DDO.

  Attributes:
    learn_sigma: whether it predicts the variance.
  """

  learn_sigma: bool = struct.field(pytree_node=False, default=True)

  @property
  def offers(self) -> tuple[str, ...]:
    """What a sampler can drive."""
    return ('denoise', 'variance') if self.learn_sigma else ('denoise',)

  def driven(
    self, params: likelihood.Params, label: jax.Array, sampler: Any
  ) -> contract.Denoise:
    """Returns D, or D and v where the sampler drives both.

    Of a guide that predicts no variance it returns D, which is what guides.
    """
    has_variance = isinstance(self.denoiser, DitPrecond)
    if sampler.drives != 'variance' or not has_variance:
      return super().driven(params, label, sampler)

    def denoise(x, sigma):
      with precision_lib.of(self.precision):
        return self.denoiser.apply(
          {'params': params}, x, sigma, label, method='with_variance'
        )

    return denoise

  def mle_loss(
    self,
    params: likelihood.Params,
    frozen: likelihood.Frozen,
    batch: likelihood.Batch,
    keys: jax.Array,
  ) -> jax.Array:
    """Returns [B] Σ_HWC of λ' (ε̂ − n)² + vb, DiT's loss times H·W·C.

    λ' is the weight in units of ε, 1 by default. vb is the term of the
    variational bound at the level nearest to σ, in bits: the divergence of the
    learned step back from the true one, or at t = 0 how ill it explains a pixel
    of 256. It trains the variance only, for there ε̂ is kept constant. It wants
    the noise law of the schedule, `noise.LinearBetas`.
    """
    del frozen
    drawn = self._noisy(batch, keys)
    with precision_lib.of(self.precision):
      output = self.denoiser.apply(
        {'params': params},
        drawn.x,
        drawn.sigma,
        batch.label,
        method='predict',
      )
    channels = batch.x.shape[-1]
    squares = (output[..., :channels] - drawn.noise) ** 2
    loss = drawn.weight * jnp.sum(squares, axis=(1, 2, 3))
    if not self.learn_sigma:
      return loss
    epsilon = jax.lax.stop_gradient(output[..., :channels])
    terms = self._bound(batch, drawn, epsilon, output[..., channels:])
    return loss + jnp.sum(terms, axis=(1, 2, 3))

  def _bound(
    self,
    batch: likelihood.Batch,
    drawn: diffusion.Noisy,
    epsilon: jax.Array,
    share: jax.Array,
  ) -> jax.Array:
    """Returns the terms [B,H,W,C] of the variational bound, in bits."""
    index = self.denoiser.nearest(drawn.sigma)
    table = ddpm.columns(schedules.ddpm_alpha_bar())
    now = {
      name: jnp.asarray(column, epsilon.dtype)[index][:, None, None, None]
      for name, column in table.items()
    }
    x = drawn.x / now['grow']
    x0 = drawn.x - drawn.sigma[:, None, None, None] * epsilon
    ours = ddpm.back(x, x0, share, now)
    true_mean = now['from_x0'] * batch.x + now['from_x'] * x
    divergence = _divergence(
      true_mean, now['log_posterior'], ours.mean, ours.log_variance
    )
    surprise = _surprise(batch.x, ours.mean, ours.log_variance)
    at_end = (index == 0)[:, None, None, None]
    return jnp.where(at_end, surprise, divergence) / math.log(2)


def _divergence(
  mean: jax.Array,
  log_variance: jax.Array,
  other_mean: jax.Array,
  other_log_variance: jax.Array,
) -> jax.Array:
  """Returns KL(N(mean) ‖ N(other_mean)) of each element, in nats."""
  spread = log_variance - other_log_variance
  squares = (mean - other_mean) ** 2 * jnp.exp(-other_log_variance)
  return (jnp.exp(spread) - 1 - spread + squares) / 2


def _surprise(
  x: jax.Array, mean: jax.Array, log_variance: jax.Array
) -> jax.Array:
  """Returns −ln of the mass within half a pixel of x in [−1, 1], in nats.

  The normal distribution function is approximated by a tanh, as published; the
  lowest and the highest of the 256 values take the tails.
  """

  def below(edge):
    z = (edge - mean) * jnp.exp(-log_variance / 2)
    return (1 + jnp.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2

  above = below(x + 1 / 255)
  under = below(x - 1 / 255)
  mass = jnp.where(x > 0.999, 1 - under, above - under)
  mass = jnp.where(x < -0.999, above, mass)
  return -jnp.log(jnp.maximum(mass, 1e-12))
