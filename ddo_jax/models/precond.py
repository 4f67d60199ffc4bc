"""Preconditionings: how a denoiser D(x; σ) is made of a network F.

The denoiser takes x = x₀ + σ n, clean data x₀ plus σ times unit normal noise
n, and predicts x₀. Every preconditioning has the form of Karras et al. 2022,
eq. 7,

  D(x; σ) = c_skip x + c_out F(c_in x, c_noise),

and differs in its four functions of σ only, and so in what F is asked for.
With t = σ/(1+σ), and σ_d the standard deviation of the data:

  name      c_skip          c_out            c_in          F predicts
  edm       σ_d²/(σ²+σ_d²)  σ σ_d/√(σ²+σ_d²) 1/√(σ²+σ_d²)  what c_skip x misses
  vp        1               −σ               1/√(σ²+1)     n
  ve        1               σ                1             −n
  iddpm     1               −σ               1/√(σ²+1)     n
  x         0               1                1/√(σ²+1)     x₀
  epsilon   1               −σ               1/√(σ²+1)     n
  velocity  1/(σ²+1)        −σ/√(σ²+1)       1/√(σ²+1)     (n − σ x₀)/√(σ²+1)
  flow      1−t             −t               1−t           n − x₀

The first four are the models of Karras et al. 2022, Table 1. The other four
tell the network the noise level as ln σ / 4, as EDM does, except that flow
tells it t. A network that was trained on another c_noise needs a subclass that
overrides `coefficients`.
"""

import functools
from typing import Any
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors


class Coefficients(NamedTuple):
  """The four functions of a preconditioning at the noise levels of a batch.

  Attributes:
    c_skip: the weight [B] of the noisy data in D.
    c_out: the factor [B] of the network's output.
    c_in: the factor [B] of the network's input.
    c_noise: what the network is told of the noise level, [B].
  """

  c_skip: jax.Array
  c_out: jax.Array
  c_in: jax.Array
  c_noise: jax.Array


class Precond(nn.Module):
  """A denoiser made of a network; subclasses supply the coefficients.

  A network may predict a variance as well, in channels after those of the
  image. These are dropped.

  Attributes:
    network: the network F, (x [B,...,C], c_noise [B], label [B]) -> [B,...,≥C].
  """

  network: nn.Module

  def coefficients(self, sigma: jax.Array) -> Coefficients:
    """Returns the coefficients at the noise levels sigma [B]."""
    raise NotImplementedError

  @property
  def sigma_range(self) -> tuple[float, float]:
    """The smallest and the largest noise level that D is good for."""
    return 0.0, np.inf

  def __call__(
    self, x: jax.Array, sigma: jax.Array, label: jax.Array, **options: Any
  ) -> jax.Array:
    """Predicts the clean data.

    Args:
      x: the noisy data, [B,...,C].
      sigma: the noise levels, [B].
      label: the classes, [B] int; num_classes means "no label".
      **options: further arguments of the network.

    Returns:
      D(x; σ), [B,...,C].
    """
    c_skip, c_out, _, _ = self.coefficients(sigma)
    output = self.predict(x, sigma, label, **options)
    output = output[..., : x.shape[-1]]
    return _like(c_skip, x) * x + _like(c_out, x) * output

  def predict(
    self, x: jax.Array, sigma: jax.Array, label: jax.Array, **options: Any
  ) -> jax.Array:
    """Returns the network's own output F(c_in x, c_noise), [B,...,≥C]."""
    _, _, c_in, c_noise = self.coefficients(sigma)
    return self.network(_like(c_in, x) * x, c_noise, label, **options)

  def target(
    self, x0: jax.Array, noise: jax.Array, sigma: jax.Array
  ) -> jax.Array:
    """Returns what F should be for clean data x0 and unit noise [B,...,C]."""
    raise NotImplementedError


def _like(values: jax.Array, x: jax.Array) -> jax.Array:
  """Reshapes values [B] so that they multiply the rows of x [B,...]."""
  return values.reshape(-1, *[1] * (x.ndim - 1))


class EdmPrecond(Precond):
  """EDM's own preconditioning, which all models of EDM and EDM2 have.

  The input and the target of the network have unit variance at every σ.

  Attributes:
    sigma_data: σ_d, the standard deviation of the data.
  """

  sigma_data: float = 0.5

  def coefficients(self, sigma: jax.Array) -> Coefficients:
    """Returns the coefficients at the noise levels sigma [B]."""
    total = sigma**2 + self.sigma_data**2
    return Coefficients(
      c_skip=self.sigma_data**2 / total,
      c_out=sigma * self.sigma_data / jnp.sqrt(total),
      c_in=1 / jnp.sqrt(total),
      c_noise=jnp.log(sigma) / 4,
    )


class VPPrecond(Precond):
  """The variance-preserving model, DDPM++ (Song et al. 2021).

  Its noise level at time t in [0, 1] is σ(t)² = e^{β_d t²/2 + β_min t} − 1.

  Attributes:
    beta_d: β_d, the slope of the rate at which noise is added.
    beta_min: β_min, that rate at t = 0.
    steps: M, the number of discrete times; the network is told (M − 1) t.
    epsilon_t: the smallest time t in training.
  """

  beta_d: float = 19.9
  beta_min: float = 0.1
  steps: int = 1000
  epsilon_t: float = 1e-5

  def sigma(self, t: jax.Array) -> jax.Array:
    """Returns the noise level σ(t)."""
    return jnp.sqrt(jnp.expm1(self.beta_d * t**2 / 2 + self.beta_min * t))

  def time(self, sigma: jax.Array) -> jax.Array:
    """Returns the time t of a noise level; the inverse of `sigma`."""
    # Not log1p: the released code has log(1 + σ²), and the two differ by 3e-11
    # at σ = 0.002 even in float64.
    root = self.beta_min**2 + 2 * self.beta_d * jnp.log(1 + sigma**2)
    return (jnp.sqrt(root) - self.beta_min) / self.beta_d

  @property
  def sigma_range(self) -> tuple[float, float]:
    """The noise levels at times epsilon_t and 1.

    They are computed in float32, as the released code does; its cancellation
    error at epsilon_t is part of the published value.
    """
    t = np.array([self.epsilon_t, 1])
    grown = np.exp(self.beta_d * t**2 / 2 + self.beta_min * t)
    low, high = np.sqrt(grown.astype(np.float32) - 1)
    return float(low), float(high)

  def coefficients(self, sigma: jax.Array) -> Coefficients:
    """Returns the coefficients at the noise levels sigma [B]."""
    return Coefficients(
      c_skip=jnp.ones_like(sigma),
      c_out=-sigma,
      c_in=1 / jnp.sqrt(sigma**2 + 1),
      c_noise=(self.steps - 1) * self.time(sigma),
    )


class VEPrecond(Precond):
  """The variance-exploding model, NCSN++ (Song et al. 2021).

  Attributes:
    sigma_min: the smallest noise level in training.
    sigma_max: the largest noise level in training.
  """

  sigma_min: float = 0.02
  sigma_max: float = 100.0

  @property
  def sigma_range(self) -> tuple[float, float]:
    """The range of noise levels in training."""
    return self.sigma_min, self.sigma_max

  def coefficients(self, sigma: jax.Array) -> Coefficients:
    """Returns the coefficients at the noise levels sigma [B]."""
    return Coefficients(
      c_skip=jnp.ones_like(sigma),
      c_out=sigma,
      c_in=jnp.ones_like(sigma),
      c_noise=jnp.log(sigma / 2),
    )


@functools.lru_cache
def iddpm_sigmas(
  steps: int = 1000, c_1: float = 0.001, c_2: float = 0.008
) -> np.ndarray:
  """Returns iDDPM's noise levels u_0 > … > u_steps = 0, [steps+1] float32.

  They follow u_{j−1}² = (u_j² + 1) / max(ᾱ_{j−1}/ᾱ_j, c_1) − 1 with
  ᾱ_j = sin²(π j / (2 M (1 + c_2))), in float32 as the models were trained.

  Args:
    steps: M, the number of noise levels above 0.
    c_1: the smallest ratio of successive ᾱ.
    c_2: the offset of the cosine schedule.
  """
  j = np.arange(steps + 1, dtype=np.float32)
  alpha_bar = np.sin(np.float32(np.pi / 2) * j / steps / (1 + c_2)) ** 2
  u = np.zeros(steps + 1, np.float32)
  for i in range(steps, 0, -1):
    ratio = max(alpha_bar[i - 1] / alpha_bar[i], np.float32(c_1))
    u[i - 1] = np.sqrt((u[i] ** 2 + 1) / ratio - 1)
  return u


class IDDPMPrecond(Precond):
  """Improved DDPM (Nichol & Dhariwal 2021).

  The network knows only the discrete noise levels of `iddpm_sigmas`. It is told
  the number of the level nearest to σ, so σ should be one of them.
  """

  @property
  def sigma_range(self) -> tuple[float, float]:
    """The smallest noise level above 0, and the largest."""
    u = iddpm_sigmas()
    return float(u[-2]), float(u[0])

  def index(self, sigma: jax.Array) -> jax.Array:
    """Returns which of `iddpm_sigmas` is nearest to each sigma [B], [B] int."""
    u = jnp.asarray(iddpm_sigmas(), sigma.dtype)
    return jnp.argmin(jnp.abs(sigma[:, None] - u[None, :]), axis=1)

  def round_sigma(self, sigma: jax.Array) -> jax.Array:
    """Returns the nearest of `iddpm_sigmas` to each sigma [B]."""
    return jnp.asarray(iddpm_sigmas(), sigma.dtype)[self.index(sigma)]

  def coefficients(self, sigma: jax.Array) -> Coefficients:
    """Returns the coefficients at the noise levels sigma [B]."""
    last = iddpm_sigmas().size - 2
    return Coefficients(
      c_skip=jnp.ones_like(sigma),
      c_out=-sigma,
      c_in=1 / jnp.sqrt(sigma**2 + 1),
      c_noise=(last - self.index(sigma)).astype(sigma.dtype),
    )


class XPrecond(Precond):
  """x-prediction: the network predicts the clean data itself.

  Its input x/√(1+σ²) has unit variance if the data has.
  """

  def coefficients(self, sigma: jax.Array) -> Coefficients:
    """Returns the coefficients at the noise levels sigma [B]."""
    return Coefficients(
      c_skip=jnp.zeros_like(sigma),
      c_out=jnp.ones_like(sigma),
      c_in=1 / jnp.sqrt(sigma**2 + 1),
      c_noise=jnp.log(sigma) / 4,
    )


class EpsilonPrecond(Precond):
  """ε-prediction: the network predicts the noise n (Ho et al. 2020).

  Its input x/√(1+σ²) has unit variance if the data has. D magnifies whatever
  error the network makes by σ, rounding included.
  """

  def target(
    self, x0: jax.Array, noise: jax.Array, sigma: jax.Array
  ) -> jax.Array:
    """Returns the noise."""
    del x0, sigma
    return noise

  def coefficients(self, sigma: jax.Array) -> Coefficients:
    """Returns the coefficients at the noise levels sigma [B]."""
    return Coefficients(
      c_skip=jnp.ones_like(sigma),
      c_out=-sigma,
      c_in=1 / jnp.sqrt(sigma**2 + 1),
      c_noise=jnp.log(sigma) / 4,
    )


class VelocityPrecond(Precond):
  """v-prediction (Salimans & Ho 2022), for data of unit variance.

  With a = 1/√(1+σ²) and b = σ/√(1+σ²) the network sees z = a x₀ + b n and
  predicts v = a n − b x₀, so that x₀ = a z − b v.
  """

  def coefficients(self, sigma: jax.Array) -> Coefficients:
    """Returns the coefficients at the noise levels sigma [B]."""
    total = sigma**2 + 1
    return Coefficients(
      c_skip=1 / total,
      c_out=-sigma / jnp.sqrt(total),
      c_in=1 / jnp.sqrt(total),
      c_noise=jnp.log(sigma) / 4,
    )


class FlowPrecond(Precond):
  """Flow matching on the straight path from data to noise (Liu et al. 2023).

  At time t = σ/(1+σ) the network sees z = (1−t) x₀ + t n, which is x/(1+σ),
  and predicts the velocity v = n − x₀, so that x₀ = z − t v. It is told t.
  """

  def target(
    self, x0: jax.Array, noise: jax.Array, sigma: jax.Array
  ) -> jax.Array:
    """Returns the velocity n − x₀."""
    del sigma
    return noise - x0

  def coefficients(self, sigma: jax.Array) -> Coefficients:
    """Returns the coefficients at the noise levels sigma [B]."""
    t = sigma / (1 + sigma)
    return Coefficients(
      c_skip=1 / (1 + sigma),
      c_out=-t,
      c_in=1 / (1 + sigma),
      c_noise=t,
    )


_KINDS = {
  'edm': EdmPrecond,
  'vp': VPPrecond,
  've': VEPrecond,
  'iddpm': IDDPMPrecond,
  'x': XPrecond,
  'epsilon': EpsilonPrecond,
  'velocity': VelocityPrecond,
  'flow': FlowPrecond,
}


def wrap(name: str, network: nn.Module, sigma_data: float) -> Precond:
  """Returns the denoiser of a network under a preconditioning.

  Args:
    name: the preconditioning, see the table at the top of this file.
    network: the network F.
    sigma_data: σ_d, the standard deviation of the data; only 'edm' uses it.

  Raises:
    errors.UserError: there is no preconditioning of that name.
  """
  errors.require_choice('model.precond', name, _KINDS)
  if name == 'edm':
    return EdmPrecond(network, sigma_data)
  return _KINDS[name](network)
