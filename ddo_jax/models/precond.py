"""The preconditionings of EDM's baselines: VP, VE and iDDPM.

EDM's own, which every released model but the baselines has, is
`layers.EdmPrecond`. All are in Table 1 of Karras et al. 2022.
"""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors
from ddo_jax.models import layers


class VPPrecond(layers.Precond):
  """Variance preserving, DDPM++ (Song et al. 2021).

  σ(t)² = e^{β_d t²/2 + β_min t} − 1.

  Attributes:
    beta_d: β_d, slope of the noise's rate.
    beta_min: β_min, its start.
    steps: M, of the discrete time that the network sees.
    epsilon_t: smallest t in training.
  """

  beta_d: float = 19.9
  beta_min: float = 0.1
  steps: int = 1000
  epsilon_t: float = 1e-5

  def sigma(self, t: jax.Array) -> jax.Array:
    """σ(t) of t in [0, 1]."""
    return jnp.sqrt(jnp.expm1(self.beta_d * t**2 / 2 + self.beta_min * t))

  def time(self, sigma: jax.Array) -> jax.Array:
    """Time t of σ, the inverse of `sigma`."""
    # As released; log1p would differ by 3e-11 at σ = 0.002, even in float64.
    root = self.beta_min**2 + 2 * self.beta_d * jnp.log(1 + sigma**2)
    return (jnp.sqrt(root) - self.beta_min) / self.beta_d

  @property
  def sigma_range(self) -> tuple[float, float]:
    """Of t in [epsilon_t, 1], in float32 as released: cancellation and all."""
    t = np.array([self.epsilon_t, 1])
    grown = np.exp(self.beta_d * t**2 / 2 + self.beta_min * t)
    low, high = np.sqrt(grown.astype(np.float32) - 1)
    return float(low), float(high)

  def coefficients(self, sigma: jax.Array) -> layers.Coefficients:
    """The network sees x of unit variance and predicts the noise."""
    return layers.Coefficients(
      c_skip=jnp.ones_like(sigma),
      c_out=-sigma,
      c_in=1 / jnp.sqrt(sigma**2 + 1),
      c_noise=(self.steps - 1) * self.time(sigma),
    )


class VEPrecond(layers.Precond):
  """Variance exploding, NCSN++ (Song et al. 2021).

  Attributes:
    sigma_min: smallest noise level in training.
    sigma_max: largest noise level in training.
  """

  sigma_min: float = 0.02
  sigma_max: float = 100.0

  @property
  def sigma_range(self) -> tuple[float, float]:
    """From sigma_min to sigma_max."""
    return self.sigma_min, self.sigma_max

  def coefficients(self, sigma: jax.Array) -> layers.Coefficients:
    """The network sees x as it is and predicts the noise, negated."""
    return layers.Coefficients(
      c_skip=jnp.ones_like(sigma),
      c_out=sigma,
      c_in=jnp.ones_like(sigma),
      c_noise=jnp.log(sigma / 2),
    )


@functools.lru_cache
def iddpm_sigmas(
  steps: int = 1000, c_1: float = 0.001, c_2: float = 0.008
) -> np.ndarray:
  """[steps+1] float32, iDDPM's noise levels u_0 > … > u_steps = 0.

  u_{j−1}² = (u_j² + 1) / max(ᾱ_{j−1}/ᾱ_j, c_1) − 1, ᾱ_j = sin²(π j/(2M (1 +
  c_2))), in float32 as the models were trained.

  Args:
    steps: M.
    c_1: smallest ratio of successive ᾱ.
    c_2: offset of the cosine schedule.
  """
  j = np.arange(steps + 1, dtype=np.float32)
  alpha_bar = np.sin(np.float32(np.pi / 2) * j / steps / (1 + c_2)) ** 2
  u = np.zeros(steps + 1, np.float32)
  for j in range(steps, 0, -1):
    ratio = max(alpha_bar[j - 1] / alpha_bar[j], np.float32(c_1))
    u[j - 1] = np.sqrt((u[j] ** 2 + 1) / ratio - 1)
  return u


class IDDPMPrecond(layers.Precond):
  """Improved DDPM (Nichol & Dhariwal 2021); σ must be one of its levels."""

  @property
  def sigma_range(self) -> tuple[float, float]:
    """Its smallest level above 0, and the largest."""
    u = iddpm_sigmas()
    return float(u[-2]), float(u[0])

  def index(self, sigma: jax.Array) -> jax.Array:
    """[B] int, the nearest of `iddpm_sigmas` to sigma [B]."""
    u = jnp.asarray(iddpm_sigmas(), sigma.dtype)
    return jnp.argmin(jnp.abs(sigma[:, None] - u[None, :]), axis=1)

  def round_sigma(self, sigma: jax.Array) -> jax.Array:
    """The nearest level of sigma [B]; samplers must step on these."""
    return jnp.asarray(iddpm_sigmas(), sigma.dtype)[self.index(sigma)]

  def coefficients(self, sigma: jax.Array) -> layers.Coefficients:
    """The network sees x of unit variance and predicts the noise."""
    last = iddpm_sigmas().size - 2
    return layers.Coefficients(
      c_skip=jnp.ones_like(sigma),
      c_out=-sigma,
      c_in=1 / jnp.sqrt(sigma**2 + 1),
      c_noise=(last - self.index(sigma)).astype(sigma.dtype),
    )


def wrap(name: str, network: nn.Module, sigma_data: float) -> layers.Precond:
  """A network under the preconditioning of that name.

  Raises:
    errors.UserError: no such name.
  """
  match name:
    case 'edm':
      return layers.EdmPrecond(network, sigma_data)
    case 'vp':
      return VPPrecond(network)
    case 've':
      return VEPrecond(network)
    case 'iddpm':
      return IDDPMPrecond(network)
  raise errors.UserError(
    f'config.model.precond is {name!r}; known: edm, vp, ve, iddpm'
  )
