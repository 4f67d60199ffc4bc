"""DDIM on DiT's schedule of noise levels (Song et al. 2021)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors
from ddo_jax.samplers import contract
from ddo_jax.samplers import noise as noise_lib
from ddo_jax.samplers import schedules


@dataclasses.dataclass(unsafe_hash=True)
class DDIM(contract.DenoiseSampler):
  """Steps from level to level of DiT's schedule, with more noise or less.

  The network is called once a step (nfe).

  Attributes:
    spacing: which of the 1000 levels, see `schedules.respaced`.
    eta: η, the share of DDPM's noise: 0 is deterministic, and 1 DDPM's with the
      smallest variance.
  """

  spacing: str = 'ddim50'
  eta: float = 0.0

  def __call__(
    self, denoise: contract.Denoise, shape: tuple[int, ...], keys: jax.Array
  ) -> jax.Array:
    """Draws one sample [B, *shape] for each key [B].

    Raises:
      errors.UserError: there is no such spacing, or η is not in [0, 1].
    """
    errors.require(0 <= self.eta <= 1, 'sampler.eta', self.eta, 'in [0, 1]')
    start = noise_lib.normal(keys, shape, 'start')
    noise = noise_lib.of_steps(keys, shape)
    return self.integrate(denoise, start, noise)[0]

  def steps(self) -> dict[str, np.ndarray]:
    """Returns what each step needs, columns [N] float64, much noise first."""
    alpha_bar = schedules.ddpm_alpha_bar()
    alpha_bar = alpha_bar[schedules.respaced(self.spacing, len(alpha_bar))]
    before = np.append(1.0, alpha_bar[:-1])
    ratio = (1 - before) / (1 - alpha_bar)
    fresh = self.eta * np.sqrt(ratio * (1 - alpha_bar / before))
    kept = np.sqrt(np.maximum(1 - before - fresh**2, 0))
    table = {
      'sigma': np.sqrt((1 - alpha_bar) / alpha_bar),
      'grow': 1 / np.sqrt(alpha_bar),
      'shrink': np.sqrt(before),
      'kept': kept,
      'fresh': fresh,
    }
    return {name: column[::-1] for name, column in table.items()}

  def integrate(
    self,
    denoise: contract.Denoise,
    start: jax.Array,
    noise: noise_lib.Noise,
  ) -> tuple[jax.Array, jax.Array]:
    """Steps from given random numbers, as a pure function of them.

    Args:
      denoise: the denoiser, (x [B,...], sigma [B]) -> D [B,...].
      start: unit normal numbers [B,...], where x starts.
      noise: the unit normal numbers [B,...] of a step, counted from 0; it is
        not called where η is 0.

    Returns:
      The samples x [B,...], and x after each step, [N,B,...].
    """
    table = self.steps()
    steps = noise_lib.table(start.dtype, **table)
    steps['step'] = jnp.arange(len(table['sigma']))

    def step(x, now):
      noisy = now['grow'] * x
      x0 = denoise(noisy, jnp.full(x.shape[:1], now['sigma']))
      x = now['shrink'] * x0 + now['kept'] * (noisy - x0) / now['sigma']
      if self.eta:
        x = x + now['fresh'] * noise(now['step'])
      return x, x

    return jax.lax.scan(step, start, steps)
