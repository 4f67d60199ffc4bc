"""Denoisers, whose likelihood has a bound, as the objective sees them."""

import dataclasses
import math
from typing import Any

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp

from ddo_jax import errors
from ddo_jax.data import codec
from ddo_jax.method import likelihood
from ddo_jax.samplers import contract
from ddo_jax.samplers import guidance

Batch = likelihood.Batch
Frozen = likelihood.Frozen
Params = likelihood.Params


@dataclasses.dataclass(frozen=True)
class Diffusion:
  """A denoiser trained on ln σ ~ N(p_mean, p_std²), as in EDM.

  log p is replaced by the ELBO's integrand at one draw of (σ, n) a row:
  −λ(σ) ‖D(x+n; σ) − x‖², a plain sum over H, W, C (the published α, β assume
  it), λ(σ) = (σ² + σ_d²)/(σ σ_d)² (eq. 15).

  Attributes:
    denoiser: a Linen module, (x [B,H,W,C], sigma [B], label [B]) -> D.
    example_shape: (H, W, C).
    num_classes: 0 for an unconditional model.
    sigma_data: σ_d, the data's standard deviation in model units.
    p_mean: mean of ln σ in training.
    p_std: standard deviation of ln σ in training.
    encoder: between stored rows and model units.
    remat: recompute activations in the backward pass.
    num_levels: bins of σ in the diagnostics.
    guide: the guide's module, of the denoiser's signature; None where it is
      the denoiser's own.
  """

  denoiser: nn.Module
  example_shape: tuple[int, int, int]
  num_classes: int
  sigma_data: float
  p_mean: float
  p_std: float
  encoder: codec.Encoder = codec.Pixels()
  remat: bool = False
  num_levels: int = 8
  guide: nn.Module | None = None

  @property
  def pixel_values(self) -> int:
    """Values of a pixel of the images, 0 .. pixel_values−1."""
    return self.encoder.pixel_values

  def check_source(
    self,
    name: str,
    image_shape: tuple[int, ...],
    num_classes: int,
    pixel_values: int,
  ) -> None:
    """Raises UserError where a data source does not fit the model."""
    got = (tuple(image_shape), pixel_values, num_classes)
    shape = self.encoder.raw_shape(self.example_shape)
    wanted = (shape, self.pixel_values, self.num_classes)
    if not self.num_classes:  # labels, if there are any, go unused
      got = (*got[:2], 0)
    if got != wanted:
      raise errors.UserError(
        f'{name} has (image shape, pixel values, classes) {got}, the model'
        f' takes {wanted}: set config.model to the data'
      )

  def init(self, key: jax.Array) -> Params:
    """Fresh parameters."""
    x = jnp.zeros((1, *self.example_shape))
    label = jnp.zeros([1], jnp.int32)
    return self.denoiser.init(key, x, jnp.ones([1]), label)['params']

  def project(self, params: Params) -> Params:
    """Identity: plain denoisers have no constraint on their weights."""
    return params

  def reduced(self, params: Params) -> Params:
    """Identity: both networks are read in full precision."""
    return params

  def decay_mask(self, params: Params) -> Any:
    """All leaves."""
    return jax.tree.map(lambda _: True, params)

  def denoise(
    self, params: Params, x: jax.Array, sigma: jax.Array, label: jax.Array
  ) -> jax.Array:
    """D(x; σ): the posterior mean of the clean image, shape of x."""

    def apply(params, x, sigma, label):
      return self.denoiser.apply({'params': params}, x, sigma, label)

    if self.remat:
      policy = jax.checkpoint_policies.dots_saveable
      apply = jax.checkpoint(apply, policy=policy)
    # A difference of two nearly equal networks: TF32 or bfloat16 drowns it.
    with jax.default_matmul_precision('highest'):
      return apply(params, x, sigma, label)

  def _noisy(
    self, batch: Batch, keys: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns σ [B], x + n [B,H,W,C] and λ(σ) [B], one draw a row."""
    chex.assert_shape(batch.x, (None, *self.example_shape))

    # One draw a row, split after: compilation grows with the calls.
    size = 1 + math.prod(self.example_shape)
    normal = jax.vmap(lambda key: jax.random.normal(key, (size,)))(keys)
    log_sigma = self.p_mean + self.p_std * normal[:, 0]
    noise = normal[:, 1:].reshape(batch.x.shape)
    sigma = jnp.exp(log_sigma)
    weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
    return sigma, batch.x + sigma[:, None, None, None] * noise, weight

  def log_prob(
    self, params: Params, frozen: Frozen, batch: Batch, keys: jax.Array
  ) -> jax.Array:
    """[B] −λ(σ) ‖D(x+n; σ) − x‖² at one draw of (σ, n) a row."""
    del frozen
    sigma, noisy, weight = self._noisy(batch, keys)
    error = self.denoise(params, noisy, sigma, batch.label) - batch.x
    return -weight * jnp.sum(error**2, axis=(1, 2, 3))

  def log_ratio(
    self,
    params: Params,
    reference: Params,
    frozen: Frozen,
    batch: Batch,
    keys: jax.Array,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Δ of eq. 15, [B], and per-row info for the diagnostics.

    The difference of squares is formed as a product before the sum,
    (D_θ − D_ref)(D_θ + D_ref − 2x): exactly 0 at θ = θ_ref, where the
    difference of two sums of thousands of squares leaves rounding noise.
    """
    del frozen
    sigma, noisy, weight = self._noisy(batch, keys)
    ours = self.denoise(params, noisy, sigma, batch.label)
    theirs = self.denoise(reference, noisy, sigma, batch.label)
    theirs = jax.lax.stop_gradient(theirs)
    product = (ours - theirs) * (ours + theirs - 2 * batch.x)
    # Equal bins of ln σ over ±2 standard deviations; the outer ones are open.
    z = (jnp.log(sigma) - self.p_mean) / self.p_std
    level = jnp.floor((z + 2) / 4 * self.num_levels).astype(jnp.int32)
    info = {
      'level': jnp.clip(level, 0, self.num_levels - 1),
      'mle_loss': weight * jnp.sum((ours - batch.x) ** 2, axis=(1, 2, 3)),
    }
    return -weight * jnp.sum(product, axis=(1, 2, 3)), info

  def mle_loss(
    self, params: Params, frozen: Frozen, batch: Batch, keys: jax.Array
  ) -> jax.Array:
    """[B] EDM's training loss, λ(σ) ‖D(x+n; σ) − x‖²."""
    return -self.log_prob(params, frozen, batch, keys)

  def sample(
    self,
    params: Params,
    frozen: Frozen,
    label: jax.Array,
    keys: jax.Array,
    sampler: Any,
  ) -> jax.Array:
    """X [B,H,W,C]; guided where the sampler asks for it.

    The guide is `frozen['guide']`, weights of the module `guide`, with the
    same labels (autoguidance; classifier-free where it ignores them), or else
    the model itself without labels (classifier-free guidance).

    Raises:
      errors.UserError: guidance is asked for and there is nothing to guide.
    """
    chex.assert_equal_shape([label, keys])
    denoise = lambda x, sigma: self.denoise(params, x, sigma, label)
    if sampler.guidance != 1:
      denoise = guidance.guided(
        denoise,
        self._guide(params, frozen, label),
        sampler.guidance,
        sampler.guidance_min,
        sampler.guidance_max,
      )
    return sampler(denoise, self.example_shape, keys)

  def draw(
    self,
    params: Params,
    frozen: Frozen,
    label: jax.Array,
    keys: jax.Array,
    sampler: Any,
  ) -> jax.Array:
    """Stored rows of `sample`."""
    x = self.sample(params, frozen, label, keys, sampler)
    return self.decode(frozen, x)

  def unguided(self, sampler: Any) -> Any:
    """Guidance 1.

    Raises:
      errors.UserError: the sampler does not go with a denoiser.
    """
    if not hasattr(sampler, 'guidance_max'):
      raise errors.UserError(
        f'config.sampler is {sampler}; this model wants one that follows noise'
        ' levels, such as samplers.heun.Heun'
      )
    return dataclasses.replace(sampler, guidance=1.0)

  def round_trip(
    self, frozen: Frozen, x: jax.Array, keys: jax.Array
  ) -> jax.Array:
    """Through the stored form: rounded to whole pixel values."""
    return self.encode(frozen, self.decode(frozen, x), keys)

  def _guide(
    self, params: Params, frozen: Frozen, label: jax.Array
  ) -> contract.Denoise:
    """The weaker denoiser, see `sample`."""
    if 'guide' in frozen:
      module = self.denoiser if self.guide is None else self.guide
      model = dataclasses.replace(self, denoiser=module)
      weights = frozen['guide']
      return lambda x, sigma: model.denoise(weights, x, sigma, label)
    if not self.num_classes:
      raise errors.UserError(
        'guidance is not 1, but the model has no labels to leave out and no'
        ' guide was given: set config.sampler.guidance=1'
      )
    none = jnp.full_like(label, self.num_classes)
    return lambda x, sigma: self.denoise(params, x, sigma, none)

  def encode(
    self, frozen: Frozen, raw: jax.Array, keys: jax.Array
  ) -> jax.Array:
    """Stored rows to model units, float32."""
    del frozen
    return self.encoder.encode(raw, keys)

  def decode(self, frozen: Frozen, x: jax.Array) -> jax.Array:
    """Model units to rows as the data stores them."""
    del frozen
    return self.encoder.decode(x)

  def render(self, frozen: Frozen, raw: jax.Array) -> jax.Array:
    """Stored rows to uint8 images [B,H,W,C]."""
    return self.encoder.render(frozen, raw)
