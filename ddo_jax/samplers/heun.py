"""Heun's second-order sampler of EDM (Karras et al. 2022, Algorithms 1, 2)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.samplers import guidance as guidance_lib
from ddo_jax.samplers import noise as noise_lib


# Mutable only so that `--config.sampler.x=v` can write it; hashed once built.
@dataclasses.dataclass(unsafe_hash=True)
class Heun:
  """Integrates dx/dσ = (x − D(x; σ))/σ from sigma_max to 0.

  One sampler for EDM and EDM2. Their programs differ in the type of the grid
  (float64; float32) and in whether noise is also drawn where none is added.
  Here the grid is float64, rounded once to the type of x, and a step's noise
  does not depend on what other steps drew.

  Attributes:
    num_steps: N; the network is called 2N − 1 times (nfe).
    sigma_min: smallest noise level before 0.
    sigma_max: noise level of the start.
    rho: exponent of the time grid.
    churn: S_churn of Algorithm 2; 0 is deterministic.
    churn_min: S_min, smallest σ that is churned.
    churn_max: S_max, largest σ that is churned.
    churn_noise: S_noise, standard deviation of the fresh noise.
    guidance: weight of guidance, see `guidance.guided`; 1 is none.
    guidance_min: guides only where σ is larger than this.
    guidance_max: largest σ that is guided.
  """

  num_steps: int = 18
  sigma_min: float = 0.002
  sigma_max: float = 80.0
  rho: float = 7.0
  churn: float = 0.0
  churn_min: float = 0.0
  churn_max: float = 1e9
  churn_noise: float = 1.0
  guidance: float = 1.0
  guidance_min: float = 0.0
  guidance_max: float = 1e9

  reads = 'denoise'

  def unguided(self) -> 'Heun':
    """Without guidance."""
    return dataclasses.replace(self, guidance=1.0)

  def sigmas(self) -> np.ndarray:
    """[N+1] float64 noise levels, sigma_max … sigma_min, 0 (eq. 5)."""
    levels = noise_lib.levels(
      self.num_steps, self.sigma_min, self.sigma_max, self.rho
    )
    return np.append(levels, 0.0)

  def __call__(
    self,
    denoise: guidance_lib.Denoise,
    shape: tuple[int, ...],
    keys: jax.Array,
  ) -> jax.Array:
    """Draws one sample a key.

    Args:
      denoise: (x [B,...], sigma [B]) -> D [B,...].
      shape: of one sample.
      keys: [B] a row's own key: its sample depends on nothing else.

    Returns:
      x [B, *shape], in the denoiser's units.

    Raises:
      errors.UserError: the settings make no grid.
    """
    start = noise_lib.normal(keys, shape, 'start')
    noise = lambda step: noise_lib.normal(keys, shape, 'churn', step)
    return self.integrate(denoise, start, noise)

  def integrate(
    self,
    denoise: guidance_lib.Denoise,
    start: jax.Array,
    noise: noise_lib.Noise,
  ) -> jax.Array:
    """The integrator alone, a pure function of the random numbers given.

    Args:
      denoise: (x [B,...], sigma [B]) -> D [B,...].
      start: [B,...] unit normal; x starts at sigma_max times it.
      noise: step -> [B,...] unit normal; unused without churn, and times 0
        where σ is outside of [churn_min, churn_max].

    Returns:
      x [B,...].
    """
    sigmas = self.sigmas()
    sigma, following = sigmas[:-1], sigmas[1:]
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

    def churned(x, now):
      return x + now['fresh'] * noise(now['step']) if self.churn else x

    def slope(x, sigma):
      return (x - denoise(x, jnp.full(x.shape[:1], sigma))) / sigma

    def heun_step(x, now):
      x = churned(x, now)
      d = slope(x, now['hat'])
      euler = x + now['change'] * d
      average = (d + slope(euler, now['following'])) / 2
      return x + now['change'] * average, None

    x, _ = jax.lax.scan(heun_step, x, jax.tree.map(lambda c: c[:-1], grid))
    # The last step lands on σ = 0, where Euler gives D itself.
    last = jax.tree.map(lambda c: c[-1], grid)
    return denoise(churned(x, last), jnp.full(x.shape[:1], last['hat']))
