"""Heun's second-order sampler of EDM (Karras et al. 2022, Algorithms 1, 2)."""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import rng


# Mutable only so that `--config.sampler.x=v` can write it; hashed once built.
@dataclasses.dataclass(unsafe_hash=True)
class Heun:
  """Integrates dx/dσ = (x − D(x; σ))/σ from sigma_max to 0.

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

  def sigmas(self) -> np.ndarray:
    """[N+1] float64 noise levels, sigma_max … sigma_min, 0 (eq. 5)."""
    ramp = np.arange(self.num_steps) / max(self.num_steps - 1, 1)
    high, low = (
      self.sigma_max ** (1 / self.rho),
      self.sigma_min ** (1 / self.rho),
    )
    return np.append((high + ramp * (low - high)) ** self.rho, 0.0)

  def __call__(
    self,
    denoise: Callable[[jax.Array, jax.Array], jax.Array],
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
    """
    sigmas = self.sigmas()
    normal = jax.vmap(lambda key: jax.random.normal(key, shape))
    batch = keys.shape[0]

    def slope(x, sigma):
      return (x - denoise(x, jnp.full([batch], sigma, x.dtype))) / sigma

    def churned(x, extra, step):
      if not self.churn:
        return x
      fresh = normal(rng.split_rows(keys, 'churn', step))
      return x + extra * self.churn_noise * fresh

    def heun_step(x, now):
      hat, extra, following, step = now
      x = churned(x, extra, step)
      d = slope(x, hat)
      euler = x + (following - hat) * d
      average = (d + slope(euler, following)) / 2
      return x + (following - hat) * average, None

    inside = (self.churn_min <= sigmas) & (sigmas <= self.churn_max)
    gamma = min(self.churn / self.num_steps, np.sqrt(2) - 1)
    hats = sigmas * (1 + gamma * inside)
    x = normal(rng.split_rows(keys, 'start')) * sigmas[0].astype(np.float32)
    steps = np.arange(self.num_steps)
    # In float64: fused multiply-adds would leave √ε where nothing is churned.
    extras = np.sqrt(hats**2 - sigmas**2)
    grid = (hats[:-1], extras[:-1], sigmas[1:])
    grid = (*(jnp.asarray(g, x.dtype) for g in grid), jnp.asarray(steps))
    x, _ = jax.lax.scan(heun_step, x, jax.tree.map(lambda g: g[:-1], grid))
    # The last step lands on σ = 0, where Euler gives D itself.
    hat, extra, _, step = jax.tree.map(lambda g: g[-1], grid)
    x = churned(x, extra, step)
    return denoise(x, jnp.full([batch], hat, x.dtype))
