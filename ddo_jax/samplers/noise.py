"""What the diffusion samplers share: noise levels, churn, draws of noise."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors
from ddo_jax import rng

# The number of a step -> unit normal numbers of the shape of x.
Noise = Callable[[jax.Array], jax.Array]


def noise_levels(
  num_steps: int, sigma_min: float, sigma_max: float, rho: float
) -> np.ndarray:
  """Returns noise levels in equal steps of σ^(1/ρ) (Karras et al. 2022, eq. 5).

  Args:
    num_steps: the number of noise levels.
    sigma_min: the last noise level.
    sigma_max: the first noise level.
    rho: ρ; the larger it is, the denser the small noise levels.

  Returns:
    The noise levels [num_steps] float64, falling.

  Raises:
    errors.UserError: these settings make no grid that falls and stays above 0.
  """
  check(num_steps, sigma_min, sigma_max)
  ramp = np.arange(num_steps) / max(num_steps - 1, 1)
  first = sigma_max ** (1 / rho)
  last = sigma_min ** (1 / rho)
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
  """Returns the noise levels σ̂ that fresh noise raises σ to (Algorithm 2).

  Args:
    sigmas: the noise levels above 0 at which a step starts, [N].
    churn: S_churn.
    low: S_min; smaller noise levels stay as they are.
    high: S_max; larger noise levels stay as they are.

  Returns:
    The raised noise levels, [N].
  """
  gamma = min(churn / len(sigmas), np.sqrt(2) - 1)
  return sigmas + sigmas * gamma * ((low <= sigmas) & (sigmas <= high))


def table(dtype: jnp.dtype, **columns: np.ndarray) -> dict[str, jax.Array]:
  """Returns the coefficients [N] of all steps, for `lax.scan`.

  The original programs step in float64. Here the coefficients are computed in
  float64 and rounded once, to the type of x: the differences of neighbouring
  noise levels would lose digits in float32.
  """
  return {name: jnp.asarray(c, dtype) for name, c in columns.items()}


def of_steps(keys: jax.Array, shape: tuple[int, ...]) -> Noise:
  """Returns what draws the noise [B, *shape] of each step; see `normal`."""

  def noise(step):
    return normal(keys, shape, 'step', step)

  return noise


def normal(
  keys: jax.Array, shape: tuple[int, ...], *names: str | int | jax.Array
) -> jax.Array:
  """Draws unit normal numbers, each row from its own key.

  Args:
    keys: the rows' keys, [B].
    shape: the shape of one row.
    *names: what the numbers are for, see `rng.split_rows`.

  Returns:
    The numbers, [B, *shape].
  """
  draw = jax.vmap(lambda key: jax.random.normal(key, shape))
  return draw(rng.split_rows(keys, *names))
