"""SiT: DiT's transformer under flow matching (Ma et al. 2024)."""

import dataclasses
from typing import Any

from flax import struct
import jax

from ddo_jax import errors
from ddo_jax import precision as precision_lib
from ddo_jax.method import diffusion
from ddo_jax.method import likelihood
from ddo_jax.method import noise as noise_lib
from ddo_jax.models import dit
from ddo_jax.models import interpolants
from ddo_jax.samplers import contract


@dataclasses.dataclass
class SitConfig(dit.TransformerConfig):
  """SiT; `dit_presets` has the published sizes. See `dit.TransformerConfig`.

  Attributes:
    path: the way from noise to data, see `interpolants`: 'linear', 'gvp' or
      'vp'. The released weights are of the first.
    predicts: 'velocity', 'noise' or 'score'; the released weights predict the
      velocity.
    weighting: what the loss weighs errors of noise and score by: 'none',
      'velocity' or 'likelihood'.
  """

  path: str = 'linear'
  predicts: str = 'velocity'
  weighting: str = 'none'

  def build(
    self, noise: noise_lib.NoiseLaw | None = None, remat: bool | str = False
  ) -> 'Sit':
    """Returns the model under its interpolant and the weight of its loss.

    Raises:
      errors.UserError: sizes do not go together, or there is no such path,
        prediction or weighting.
    """
    choices = {
      'path': interpolants.PATHS,
      'predicts': interpolants.PREDICTIONS,
      'weighting': interpolants.WEIGHTINGS,
    }
    for name, known in choices.items():
      errors.require_choice(f'model.{name}', getattr(self, name), known)
    errors.require(
      self.weighting == 'none' or self.predicts != 'velocity',
      'model.weighting',
      self.weighting,
      "'none' for config.model.predicts='velocity'",
    )
    path = interpolants.PATHS[self.path]
    return Sit(
      denoiser=interpolants.InterpolantPrecond(
        self.network(remat), path, self.predicts
      ),
      example_shape=self.image_shape,
      num_classes=self.num_classes,
      weight=interpolants.InterpolantWeight(
        path, self.predicts, self.weighting
      ),
      codec=self.codec(),
      noise=noise,
      precision=self.precision,
    )


@struct.dataclass
class Sit(diffusion.PredictionDiffusion):
  """A denoiser made of a network of velocities, or of another prediction."""

  @property
  def offers(self) -> tuple[str, ...]:
    """What a sampler can drive: a velocity on the straight path, too."""
    precond = self.denoiser
    straight = isinstance(precond.path, interpolants.Linear)
    if straight and precond.predicts == 'velocity':
      return ('denoise', 'velocity')
    return ('denoise',)

  def driven(
    self, params: likelihood.Params, label: jax.Array, sampler: Any
  ) -> contract.Denoise:
    """Returns D, or the velocity where the sampler drives that.

    Raises:
      errors.UserError: the guide has no velocity.
    """
    if sampler.drives != 'velocity':
      return super().driven(params, label, sampler)
    if not isinstance(self.denoiser, interpolants.InterpolantPrecond):
      raise errors.UserError(
        f'config.sampler is {sampler}, which drives a velocity, and the guide'
        ' has none: set config.sampler to one that follows noise levels, such'
        ' as samplers.heun.Heun'
      )

    def velocity(x, t):
      with precision_lib.of(self.precision):
        return self.denoiser.apply(
          {'params': params}, x, t, label, method='at_time'
        )

    return velocity
