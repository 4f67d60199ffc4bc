"""Heun's second-order sampler of EDM (Karras et al. 2022, Algorithms 1, 2)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.samplers import contract
from ddo_jax.samplers import noise as noise_lib


@dataclasses.dataclass(unsafe_hash=True)
class Heun(contract.DenoiseSampler):
  """Integrates dx/dσ = (x − D(x; σ))/σ from sigma_max to 0.

  EDM and EDM2 share this sampler. Their programs differ in the type of the
  noise levels (float64 and float32) and in whether they also draw noise at
  steps that add none. Here the levels are float64, rounded once to the type of
  x, and the noise of a step does not depend on what other steps drew.

  Attributes:
    num_steps: N, the number of steps; the network is called 2N − 1 times (nfe).
    sigma_min: the smallest noise level before 0.
    sigma_max: the noise level of the start.
    rho: ρ, the exponent of the grid of noise levels.
    churn: S_churn of Algorithm 2; 0 is deterministic.
    churn_min: S_min, the smallest noise level at which noise is added.
    churn_max: S_max, the largest noise level at which noise is added.
    churn_noise: S_noise, the standard deviation of the fresh noise.
  """

  num_steps: int = 18
  sigma_min: float = 0.002
  sigma_max: float = 80.0
  rho: float = 7.0
  churn: float = 0.0
  churn_min: float = 0.0
  churn_max: float = 1e9
  churn_noise: float = 1.0

  def sigmas(self) -> np.ndarray:
    """Returns the noise levels sigma_max … sigma_min, 0 (eq. 5), [N+1] float64.

    Raises:
      errors.UserError: the settings make no grid.
    """
    above_zero = noise_lib.noise_levels(
      self.num_steps, self.sigma_min, self.sigma_max, self.rho
    )
    return np.append(above_zero, 0.0)

  def __call__(
    self,
    denoise: contract.Denoise,
    shape: tuple[int, ...],
    keys: jax.Array,
  ) -> jax.Array:
    """Draws one sample for each key.

    Args:
      denoise: the denoiser, (x [B,...], sigma [B]) -> D [B,...].
      shape: the shape of one sample.
      keys: the rows' keys, [B]; a sample depends on its own key only.

    Returns:
      The samples [B, *shape], in the denoiser's units.

    Raises:
      errors.UserError: the settings make no grid of noise levels.
    """
    start = noise_lib.normal(keys, shape, 'start')

    def noise(step):
      return noise_lib.normal(keys, shape, 'churn', step)

    return self.integrate(denoise, start, noise)

  def integrate(
    self,
    denoise: contract.Denoise,
    start: jax.Array,
    noise: noise_lib.Noise,
  ) -> jax.Array:
    """Integrates from given random numbers, as a pure function of them.

    Args:
      denoise: the denoiser, (x [B,...], sigma [B]) -> D [B,...].
      start: unit normal numbers [B,...]; x starts at sigma_max times these.
      noise: the unit normal numbers [B,...] of a step. It is not called without
        churn. Outside [churn_min, churn_max] its numbers are multiplied by 0.

    Returns:
      The samples x [B,...].
    """
    sigmas = self.sigmas()
    sigma = sigmas[:-1]
    following = sigmas[1:]
    hat = noise_lib.churned(sigma, self.churn, self.churn_min, self.churn_max)
    x = start * float(sigma[0])
    grid = noise_lib.table(
      x.dtype,
      fresh=self.churn_noise * np.sqrt(hat**2 - sigma**2),
      hat=hat,
      following=following,
      change=following - hat,
    )
    grid['step'] = jnp.arange(self.num_steps)

    def add_noise(x, now):
      if not self.churn:
        return x
      return x + now['fresh'] * noise(now['step'])

    def slope(x, sigma):
      return (x - denoise(x, jnp.full(x.shape[:1], sigma))) / sigma

    def heun_step(x, now):
      x = add_noise(x, now)
      d = slope(x, now['hat'])
      euler = x + now['change'] * d
      average = (d + slope(euler, now['following'])) / 2
      return x + now['change'] * average, None

    all_but_last = jax.tree.map(lambda column: column[:-1], grid)
    x, _ = jax.lax.scan(heun_step, x, all_but_last)
    # The last step goes to σ = 0, where Euler's method gives D itself.
    last = jax.tree.map(lambda column: column[-1], grid)
    x = add_noise(x, last)
    return denoise(x, jnp.full(x.shape[:1], last['hat']))
