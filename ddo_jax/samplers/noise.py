"""What the samplers share: noise levels, churn and the draws of noise."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors
from ddo_jax import rng

# A step's index -> unit normal numbers of the shape of x.
Noise = Callable[[jax.Array], jax.Array]


def levels(
  num_steps: int, sigma_min: float, sigma_max: float, rho: float
) -> np.ndarray:
  """[num_steps] float64, equal steps of σ^(1/ρ) (Karras et al. 2022, eq. 5).

  Args:
    num_steps: number of levels.
    sigma_min: the last level.
    sigma_max: the first level.
    rho: ρ; the larger it is, the denser the small levels.

  Raises:
    errors.UserError: these settings make no descending grid above 0.
  """
  check(num_steps, sigma_min, sigma_max)
  ramp = np.arange(num_steps) / max(num_steps - 1, 1)
  first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
  return (first + ramp * (last - first)) ** rho


def check(num_steps: int, sigma_min: float, sigma_max: float) -> None:
  """Raises UserError where no grid goes down from sigma_max to sigma_min."""
  if num_steps < 1 or not 0 < sigma_min < sigma_max:
    raise errors.UserError(
      f'the sampler has num_steps {num_steps}, sigma_min {sigma_min},'
      f' sigma_max {sigma_max}; it needs a step or more and'
      ' 0 < sigma_min < sigma_max: set config.sampler'
    )


def churned(
  sigmas: np.ndarray, churn: float, low: float, high: float
) -> np.ndarray:
  """[N] levels σ̂ that fresh noise raises σ to (Algorithm 2).

  Args:
    sigmas: [N] levels above 0, one a step.
    churn: S_churn.
    low: S_min; smaller levels stay.
    high: S_max; larger levels stay.
  """
  gamma = min(churn / len(sigmas), np.sqrt(2) - 1)
  return sigmas + sigmas * gamma * ((low <= sigmas) & (sigmas <= high))


def table(dtype: jnp.dtype, **columns: np.ndarray) -> dict[str, jax.Array]:
  """Coefficients [N] for `lax.scan`: float64 up to here, rounded once.

  The original programs step in float64. Differences of neighbouring levels
  would lose digits in float32; as constants they cost nothing.
  """
  return {name: jnp.asarray(c, dtype) for name, c in columns.items()}


def normal(
  keys: jax.Array, shape: tuple[int, ...], *names: str | int | jax.Array
) -> jax.Array:
  """[B, *shape] unit normal numbers, each row from its own key of keys [B]."""
  draw = jax.vmap(lambda key: jax.random.normal(key, shape))
  return draw(rng.split_rows(keys, *names))
