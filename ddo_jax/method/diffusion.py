"""Denoisers, whose likelihood has a bound."""

import dataclasses
from typing import Any
from typing import NamedTuple

import chex
from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from ddo_jax import errors
from ddo_jax import precision as precision_lib
from ddo_jax.data import codec as codec_lib
from ddo_jax.method import likelihood
from ddo_jax.method import noise as noise_lib
from ddo_jax.samplers import contract
from ddo_jax.samplers import guidance

Batch = likelihood.Batch
Frozen = likelihood.Frozen
Params = likelihood.Params


def _static(**options: Any) -> Any:
  """A field that is part of what the model is, not traced."""
  return struct.field(pytree_node=False, **options)


class Noisy(NamedTuple):
  """One draw of (σ, n) for each row.

  Attributes:
    z: the noise law's normal numbers, [B].
    sigma: σ, [B].
    noise: n of unit variance, [B,H,W,C].
    x: the noisy rows x₀ + σ n, [B,H,W,C].
    weight: the weight [B] of a squared error of what the network predicts: λ(σ)
      where that is the clean data.
  """

  z: jax.Array
  sigma: jax.Array
  noise: jax.Array
  x: jax.Array
  weight: jax.Array


@struct.dataclass
class Diffusion:
  """A denoiser trained at the noise levels of a law, weighted by λ(σ).

  log p is replaced by the ELBO's integrand at one draw of (σ, n) a row,
  −λ(σ) ‖D(x + n; σ) − x‖²: a plain sum over H, W, C, as the published α and β
  assume (eq. 15).

  Attributes:
    denoiser: a Linen module, (x [B,H,W,C], sigma [B], label [B]) -> D, made of
      a network and a preconditioning (`models.precond`).
    example_shape: (H, W, C).
    num_classes: the number of classes; 0 for an unconditional model.
    weight: λ, a function of σ and the noise law, such as `noise.EdmWeight`.
    codec: between stored rows and model units.
    noise: the law of σ in training; None where the model only samples.
    rules: what may be done to the weights.
    num_bins: the number of noise bins in the diagnostics.
    guide: the guide's module, with the denoiser's signature; None where the
      guide is built as the denoiser is.
    discriminator: a module (x [B,H,W,C], sigma [B], label [B]) -> logit [B],
      see `discriminator.Discriminator`; None where there is none.
    precision: that of the network's products in training, see `precision`. θ
      and θ_ref share it; samples have that of their sampler.
  """

  denoiser: nn.Module = _static()
  example_shape: tuple[int, int, int] = _static()
  num_classes: int = _static()
  weight: Any = _static()
  codec: codec_lib.Codec = _static(default=codec_lib.Pixels())
  noise: noise_lib.NoiseLaw | None = None
  rules: likelihood.WeightRules = _static(default=likelihood.WeightRules())
  num_bins: int = _static(default=8)
  guide: nn.Module | None = _static(default=None)
  discriminator: nn.Module | None = _static(default=None)
  precision: str = _static(default='highest')

  @property
  def offers(self) -> tuple[str, ...]:
    """What a sampler can drive, see `samplers.contract`."""
    return ('denoise',)

  def init(self, key: jax.Array) -> Params:
    """Returns fresh parameters, projected."""
    x = jnp.zeros((1, *self.example_shape))
    label = jnp.zeros([1], jnp.int32)
    variables = self.denoiser.init(key, x, jnp.ones([1]), label)
    return self.rules.project(variables['params'])

  def denoise(
    self, params: Params, x: jax.Array, sigma: jax.Array, label: jax.Array
  ) -> jax.Array:
    """Returns D(x; σ), the posterior mean of the clean image, shaped as x."""
    with precision_lib.of(self.precision):
      return self.denoiser.apply({'params': params}, x, sigma, label)

  def _predict(
    self, params: Params, x: jax.Array, sigma: jax.Array, label: jax.Array
  ) -> jax.Array:
    """Returns what errors are formed on: here D(x; σ), shaped as x."""
    return self.denoise(params, x, sigma, label)

  def _target(self, batch: Batch, drawn: Noisy) -> jax.Array:
    """Returns what `_predict` should be: here the clean data."""
    del drawn
    return batch.x

  def _noisy(self, batch: Batch, keys: jax.Array) -> Noisy:
    """Draws one (σ, n) a row."""
    chex.assert_shape(batch.x, (None, *self.example_shape))
    drawn = noise_lib.draw(self.noise, batch.x, keys)
    return Noisy(*drawn, weight=self.weight(drawn.sigma, self.noise))

  def log_prob(
    self, params: Params, frozen: Frozen, batch: Batch, keys: jax.Array
  ) -> jax.Array:
    """Returns [B] −λ(σ) ‖D(x + n; σ) − x‖² at one draw of (σ, n) a row."""
    del frozen
    drawn = self._noisy(batch, keys)
    output = self._predict(params, drawn.x, drawn.sigma, batch.label)
    error = output - self._target(batch, drawn)
    return -drawn.weight * jnp.sum(error**2, axis=(1, 2, 3))

  def log_ratio(
    self,
    params: Params,
    reference: Params,
    frozen: Frozen,
    batch: Batch,
    keys: jax.Array,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns Δ of eq. 15, [B], and per-row info.

    The difference of squares is formed as a product before the sum,
    (D_θ − D_ref)(D_θ + D_ref − 2x). It is exactly 0 at θ = θ_ref, where the
    difference of two sums of thousands of squares leaves rounding noise.
    """
    del frozen
    drawn = self._noisy(batch, keys)
    ours = self._predict(params, drawn.x, drawn.sigma, batch.label)
    theirs = self._predict(reference, drawn.x, drawn.sigma, batch.label)
    theirs = jax.lax.stop_gradient(theirs)
    target = self._target(batch, drawn)
    product = (ours - theirs) * (ours + theirs - 2 * target)
    squares = jnp.sum((ours - target) ** 2, axis=(1, 2, 3))
    info = {
      'noise_bin': noise_lib.bins(drawn.z, self.num_bins),
      'mle_loss': drawn.weight * squares,
    }
    return -drawn.weight * jnp.sum(product, axis=(1, 2, 3)), info

  def mle_loss(
    self, params: Params, frozen: Frozen, batch: Batch, keys: jax.Array
  ) -> jax.Array:
    """Returns [B] λ(σ) ‖D(x + n; σ) − x‖², the usual training loss."""
    return -self.log_prob(params, frozen, batch, keys)

  def sample(
    self,
    params: Params,
    frozen: Frozen,
    label: jax.Array,
    keys: jax.Array,
    sampler: Any,
  ) -> jax.Array:
    """Returns x [B,H,W,C], guided where the sampler asks for it.

    The guide is `frozen['guide']`, weights of the module `guide`, under the
    same labels: autoguidance, or classifier-free guidance where that network
    ignores them. Without such weights the model itself without labels is the
    guide (classifier-free guidance).

    Where the sampler asks for a discriminator, what its logit (of the weights
    `frozen['discriminator']`) says of real against drawn corrects D, or the
    velocity.

    Raises:
      errors.UserError: guidance is asked for and there is nothing to guide, or
        the sampler's precision has no such name.
    """
    chex.assert_equal_shape([label, keys])
    precision_lib.check('sampler.precision', sampler.precision)
    model = dataclasses.replace(self, precision=sampler.precision)
    denoise = model.driven(params, label, sampler)
    if sampler.guides:
      denoise = guidance.guided(
        denoise,
        model._guide(params, frozen, label, sampler),
        sampler.guidance,
        sampler.guidance_min,
        sampler.guidance_max,
        channels=sampler.guidance_channels,
        level=sampler.level,
      )
    if sampler.discriminator:
      flows = sampler.drives == 'velocity'
      correct = guidance.corrected_velocity if flows else guidance.corrected
      denoise = correct(
        denoise,
        model._logit(frozen, label, sampler),
        sampler.discriminator,
        sampler.discriminator_min,
        sampler.discriminator_max,
      )
    return sampler(denoise, self.example_shape, keys)

  def driven(
    self, params: Params, label: jax.Array, sampler: Any
  ) -> contract.Denoise:
    """Returns what a sampler drives, params and labels bound."""
    del sampler
    return lambda x, sigma: self.denoise(params, x, sigma, label)

  def draw(
    self,
    params: Params,
    frozen: Frozen,
    label: jax.Array,
    keys: jax.Array,
    sampler: Any,
  ) -> jax.Array:
    """Returns the rows of `sample` as they are stored."""
    x = self.sample(params, frozen, label, keys, sampler)
    return self.codec.decode(frozen, x)

  def guided_by(self, guide: Any) -> 'Diffusion':
    """Returns this model with another denoiser as its guide.

    Raises:
      errors.UserError: the guide is no denoiser.
    """
    if 'denoise' not in guide.offers:
      raise errors.UserError(
        'config.guide is of another family than config.model: a denoiser is'
        ' guided by a denoiser'
      )
    return dataclasses.replace(self, guide=guide.denoiser)

  def with_discriminator(self, discriminator: nn.Module) -> 'Diffusion':
    """Returns this model with a module that tells real from drawn rows."""
    return dataclasses.replace(self, discriminator=discriminator)

  def _logit(
    self, frozen: Frozen, label: jax.Array, sampler: Any
  ) -> guidance.Logit:
    """Returns the discriminator's logit, its params and labels bound."""
    if self.discriminator is None or 'discriminator' not in frozen:
      raise errors.UserError(
        f'config.sampler.discriminator is {sampler.discriminator} and no'
        ' discriminator was given: train one with --mode=discriminator and name'
        ' its params with --config.discriminator_from, or set'
        ' config.sampler.discriminator=0'
      )
    params = {'params': frozen['discriminator']}

    def logit(x, sigma):
      with precision_lib.of(self.precision):
        return self.discriminator.apply(params, x, sigma, label)

    return logit

  def _guide(
    self, params: Params, frozen: Frozen, label: jax.Array, sampler: Any
  ) -> contract.Denoise:
    """Returns the weaker denoiser, see `sample`."""
    if 'guide' in frozen:
      module = self.denoiser if self.guide is None else self.guide
      model = dataclasses.replace(self, denoiser=module)
      return model.driven(frozen['guide'], label, sampler)
    if not self.num_classes:
      raise errors.UserError(
        'guidance is not 1, but the model has no labels to leave out and no'
        ' guide was given: set config.sampler.guidance=1'
      )
    none = jnp.full_like(label, self.num_classes)
    return self.driven(params, none, sampler)


@struct.dataclass
class PredictionDiffusion(Diffusion):
  """A denoiser whose errors are formed on what its network predicts.

  With D = c_skip x + c_out F, λ ‖D − x₀‖² is λ c_out² ‖F − F*‖², where F* is
  what F should be. The two agree but for rounding, which D has of x as well,
  and magnifies by c_out: where that is large, as is DDPM's 157, differences of
  two networks drown in it.

  The denoiser is a `models.precond.Precond` that has a `target`.
  """

  def _predict(
    self, params: Params, x: jax.Array, sigma: jax.Array, label: jax.Array
  ) -> jax.Array:
    """Returns F without the channels of a variance, shaped as x."""
    with precision_lib.of(self.precision):
      output = self.denoiser.apply(
        {'params': params}, x, sigma, label, method='predict'
      )
    return output[..., : x.shape[-1]]

  def _target(self, batch: Batch, drawn: Noisy) -> jax.Array:
    """Returns F*."""
    return self.denoiser.target(batch.x, drawn.noise, drawn.sigma)

  def _noisy(self, batch: Batch, keys: jax.Array) -> Noisy:
    """Draws one (σ, n) a row, and weighs errors of F."""
    drawn = super()._noisy(batch, keys)
    c_out = self.denoiser.coefficients(drawn.sigma).c_out
    return drawn._replace(weight=drawn.weight * c_out**2)
