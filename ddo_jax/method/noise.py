"""Noise laws and weights: which noise levels a denoiser is trained at.

A noise law maps one unit normal number a row to that row's noise level σ. A
weight λ(σ) says how much a squared error counts there. Both are objects of
their own, so that an ε-, v- or flow-matching network is a preconditioning
(`models.precond`), a law and a weight, never a new family.
"""

import dataclasses
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy import stats
import numpy as np

from ddo_jax import errors
from ddo_jax import settings
from ddo_jax.samplers import schedules


class NoiseLaw:
  """The distribution of σ in training.

  A law is a pytree dataclass. Its numbers are leaves: in a config they are
  tuples with one entry a round, in the step they are traced scalars, so that a
  round with another law compiles nothing anew.
  """

  def sigma(self, z: jax.Array) -> jax.Array:
    """Returns the noise levels [B] of unit normal numbers z [B]."""
    raise NotImplementedError

  def log_density(self, sigma: jax.Array) -> jax.Array:
    """Returns the log-density [B] of ln σ; only `ElboWeight` asks for it.

    Raises:
      errors.UserError: the law has none.
    """
    raise errors.UserError(
      f'{type(self).__name__} has no density of ln σ, and ElboWeight asks for'
      ' one: set config.pretrain.noise and config.ddo.noise to LogNormal() or'
      ' UniformTime(), or give the model another weight'
    )

  def check(self, name: str) -> None:
    """Raises UserError, naming the field, where a value makes no sense."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(unsafe_hash=True)
class LogNormal(NoiseLaw):
  """ln σ ~ N(p_mean, p_std²), the law of EDM and EDM2.

  It serves flow matching too: at σ = t/(1 − t), ln σ is the logit of t, so this
  is also the logit-normal law of t.

  Attributes:
    p_mean: the mean of ln σ, one value a round.
    p_std: the standard deviation of ln σ, one value a round.
  """

  p_mean: settings.PerRound = (-1.2,)
  p_std: settings.PerRound = (1.2,)

  def sigma(self, z: jax.Array) -> jax.Array:
    """Returns exp(p_mean + p_std z)."""
    return jnp.exp(self.p_mean + self.p_std * z)

  def log_density(self, sigma: jax.Array) -> jax.Array:
    """Returns the normal log-density of ln σ."""
    return stats.norm.logpdf(jnp.log(sigma), self.p_mean, self.p_std)

  def check(self, name: str) -> None:
    """Raises UserError unless there are numbers, and p_std is positive."""
    errors.require_numbers(f'{name}.p_mean', self.p_mean)
    errors.require_positive(f'{name}.p_std', self.p_std)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(unsafe_hash=True)
class LogUniform(NoiseLaw):
  """ln σ uniform between two noise levels: every scale of an image alike.

  Attributes:
    lowest: the smallest σ, one value a round.
    highest: the largest σ, one value a round.
  """

  lowest: settings.PerRound = (0.05,)
  highest: settings.PerRound = (80.0,)

  def _width(self) -> jax.Array:
    """Returns ln(highest/lowest), []."""
    return jnp.log(self.highest) - jnp.log(self.lowest)

  def sigma(self, z: jax.Array) -> jax.Array:
    """Returns lowest (highest/lowest)^Φ(z)."""
    sigma = self.lowest * jnp.exp(self._width() * stats.norm.cdf(z))
    # Rounded above, it would have no density, and an infinite weight.
    return jnp.minimum(sigma, self.highest)

  def log_density(self, sigma: jax.Array) -> jax.Array:
    """Returns the constant log-density of ln σ, −∞ outside."""
    inside = (self.lowest <= sigma) & (sigma <= self.highest)
    return jnp.where(inside, -jnp.log(self._width()), -jnp.inf)

  def check(self, name: str) -> None:
    """Raises UserError unless both are positive, the highest above."""
    errors.require_positive(f'{name}.lowest', self.lowest)
    errors.require_positive(f'{name}.highest', self.highest)
    errors.require(
      np.max(self.lowest) < np.min(self.highest),
      f'{name}.highest',
      self.highest,
      f'above {name}.lowest, {self.lowest}',
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(unsafe_hash=True)
class UniformTime(NoiseLaw):
  """t uniform on (0, 1) with σ = t/(1 − t): plain flow matching."""

  def sigma(self, z: jax.Array) -> jax.Array:
    """Returns Φ(z)/Φ(−z), which keeps its digits at both ends."""
    return stats.norm.cdf(z) / stats.norm.cdf(-z)

  def log_density(self, sigma: jax.Array) -> jax.Array:
    """Returns the logistic log-density of ln σ = logit(t)."""
    return jnp.log(sigma) - 2 * jnp.log1p(sigma)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(unsafe_hash=True)
class Discrete(NoiseLaw):
  """One of a schedule's noise levels, all equally likely.

  Attributes:
    sigmas: the levels, ascending; e.g. √((1 − ᾱ)/ᾱ) of a DDPM schedule.
  """

  sigmas: tuple[float, ...] = dataclasses.field(
    default=(), metadata={'static': True}
  )

  def sigma(self, z: jax.Array) -> jax.Array:
    """Returns the level whose share of the normal quantiles z falls into."""
    return _pick(z, self.sigmas)

  def check(self, name: str) -> None:
    """Raises UserError unless the levels are positive and ascend."""
    errors.require_positive(f'{name}.sigmas', self.sigmas)
    rising = bool(np.all(np.diff(self.sigmas) > 0))
    errors.require(rising, f'{name}.sigmas', self.sigmas, 'ascending')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(unsafe_hash=True)
class LinearBetas(NoiseLaw):
  """One of the 1000 noise levels of DDPM's schedule, all equally likely.

  DiT was trained under it. The levels are √((1 − ᾱ)/ᾱ), from 0.01 to 157.
  """

  def sigma(self, z: jax.Array) -> jax.Array:
    """Returns the level whose share of the normal quantiles z falls into."""
    return _pick(z, schedules.ddpm_sigmas())


class Drawn(NamedTuple):
  """One draw of (σ, n) for each row.

  Attributes:
    z: the noise law's normal numbers, [B].
    sigma: σ, [B].
    noise: n of unit variance, [B,H,W,C].
    x: the noisy rows x₀ + σ n, [B,H,W,C].
  """

  z: jax.Array
  sigma: jax.Array
  noise: jax.Array
  x: jax.Array


def draw(law: NoiseLaw, x: jax.Array, keys: jax.Array) -> Drawn:
  """Draws one (σ, n) for each row of clean data.

  Args:
    law: the law of σ.
    x: the clean rows x₀, [B,H,W,C].
    keys: [B], the rows' keys.
  """
  # One draw a row, split after: compile time grows with the number of calls.
  size = 1 + math.prod(x.shape[1:])
  normal = jax.vmap(lambda key: jax.random.normal(key, (size,)))(keys)
  z = normal[:, 0]
  noise = normal[:, 1:].reshape(x.shape)
  sigma = law.sigma(z)
  return Drawn(z, sigma, noise, x + sigma[:, None, None, None] * noise)


def bins(z: jax.Array, count: int) -> jax.Array:
  """Returns the noise bins [B] int32, from 0 to count − 1, of numbers z [B].

  They are equal over two standard deviations of z; the outer ones are open.
  """
  found = jnp.floor((z + 2) / 4 * count).astype(jnp.int32)
  return jnp.clip(found, 0, count - 1)


def _pick(z: jax.Array, sigmas: Any) -> jax.Array:
  """Returns which of some levels [N] the normal numbers z [B] stand for."""
  count = len(sigmas)
  index = jnp.floor(stats.norm.cdf(z) * count).astype(jnp.int32)
  return jnp.asarray(sigmas, z.dtype)[jnp.clip(index, 0, count - 1)]


@dataclasses.dataclass(frozen=True)
class EpsilonWeight:
  """λ(σ) = σ⁻²: the error of the noise, ‖ε − n‖² = ‖D − x‖²/σ²."""

  def __call__(self, sigma: jax.Array, noise: Any) -> jax.Array:
    """Returns λ [B] at σ [B]; the law is not asked."""
    del noise
    return sigma**-2


@dataclasses.dataclass(frozen=True)
class EdmWeight:
  """λ(σ) = (σ² + σ_d²)/(σ σ_d)², EDM's (eq. 15 of the paper).

  Attributes:
    sigma_data: σ_d, the standard deviation of the data in model units.
  """

  sigma_data: float

  def __call__(self, sigma: jax.Array, noise: Any) -> jax.Array:
    """Returns λ [B] at σ [B]; the law is not asked."""
    del noise
    return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


@dataclasses.dataclass(frozen=True)
class VelocityWeight:
  """λ(σ) = ((1 + σ)/σ)²: the error of the velocity n − x at σ = t/(1 − t).

  The denoiser of a velocity is D = x_t − t v, so ‖v − v*‖² = ‖D − x‖²/t².
  """

  def __call__(self, sigma: jax.Array, noise: Any) -> jax.Array:
    """Returns λ [B] at σ [B]; the law is not asked."""
    del noise
    return ((1 + sigma) / sigma) ** 2


@dataclasses.dataclass(frozen=True)
class ElboWeight:
  """The weight that makes one draw of σ an unbiased draw of the ELBO.

  log p(x) = −∫ ‖D(x + n; σ) − x‖² σ⁻³ dσ + terms without θ (Kingma et al.
  2021), so λ(σ) = σ⁻² / p(ln σ), with p the law's density of ln σ. Log-ratios
  are then in nats, as far as the law covers the noise levels that matter.
  """

  def __call__(self, sigma: jax.Array, noise: NoiseLaw) -> jax.Array:
    """Returns λ [B] at σ [B] drawn from the law `noise`."""
    return jnp.exp(-2 * jnp.log(sigma) - noise.log_density(sigma))
