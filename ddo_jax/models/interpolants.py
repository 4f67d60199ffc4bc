"""Interpolants between noise and data, and denoisers of their networks.

An interpolant (Albergo et al. 2023; Ma et al. 2024) is a path x_t = a(t) x₀ +
b(t) n from unit noise n at t = 0 to data x₀ at t = 1. Divided by a it is x₀ +
σ n with σ = b/a, so that a network on the path is a denoiser D(x; σ) by a
preconditioning. Where a network sees x_t and predicts

  velocity  a' x₀ + b' n    D = (b v − b' x_t)/(a' b − a b')
  noise     n               D = (x_t − b n)/a
  score     −n/b            D = (x_t + b² s)/a
"""

from collections.abc import Mapping
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.models import precond


class Path:
  """A path between noise and data; times are arrays of any shape."""

  def time(self, sigma: jax.Array) -> jax.Array:
    """Returns the time t in [0, 1] at which b/a is σ."""
    raise NotImplementedError

  def a(self, t: jax.Array) -> jax.Array:
    """Returns the weight of the data."""
    raise NotImplementedError

  def b(self, t: jax.Array) -> jax.Array:
    """Returns the weight of the noise."""
    raise NotImplementedError

  def slope_a(self, t: jax.Array) -> jax.Array:
    """Returns a'."""
    raise NotImplementedError

  def slope_b(self, t: jax.Array) -> jax.Array:
    """Returns b'."""
    raise NotImplementedError

  def diffusion(self, t: jax.Array) -> jax.Array:
    """Returns g = (a'/a) b² − b b', half the rate at which noise is added."""
    a = self.a(t)
    b = self.b(t)
    return self.slope_a(t) / a * b**2 - b * self.slope_b(t)


@dataclasses.dataclass(frozen=True)
class Linear(Path):
  """The straight path of flow matching: a = t, b = 1 − t."""

  def time(self, sigma: jax.Array) -> jax.Array:
    """Returns the time t in [0, 1] at which b/a is σ."""
    return 1 / (1 + sigma)

  def a(self, t: jax.Array) -> jax.Array:
    """Returns the weight of the data."""
    return t

  def b(self, t: jax.Array) -> jax.Array:
    """Returns the weight of the noise."""
    return 1 - t

  def slope_a(self, t: jax.Array) -> jax.Array:
    """Returns a'."""
    return jnp.ones_like(t)

  def slope_b(self, t: jax.Array) -> jax.Array:
    """Returns b'."""
    return -jnp.ones_like(t)


@dataclasses.dataclass(frozen=True)
class GVP(Path):
  """A quarter of a circle: a = sin(π t/2), b = cos(π t/2)."""

  def time(self, sigma: jax.Array) -> jax.Array:
    """Returns the time t in [0, 1] at which b/a is σ."""
    return 2 / np.pi * jnp.arctan2(jnp.ones_like(sigma), sigma)

  def a(self, t: jax.Array) -> jax.Array:
    """Returns the weight of the data."""
    return jnp.sin(np.pi / 2 * t)

  def b(self, t: jax.Array) -> jax.Array:
    """Returns the weight of the noise."""
    return jnp.cos(np.pi / 2 * t)

  def slope_a(self, t: jax.Array) -> jax.Array:
    """Returns a'."""
    return np.pi / 2 * self.b(t)

  def slope_b(self, t: jax.Array) -> jax.Array:
    """Returns b'."""
    return -np.pi / 2 * self.a(t)


@dataclasses.dataclass(frozen=True)
class VP(Path):
  """The variance-preserving diffusion of Song et al. 2021, backwards in time.

  a = exp(−(1−t)² β_d/4 − (1−t) β_min/2), b = √(1 − a²).

  Attributes:
    beta_d: β_d, the slope of the rate at which noise is added.
    beta_min: β_min, that rate at t = 1.
  """

  beta_d: float = 19.9
  beta_min: float = 0.1

  def time(self, sigma: jax.Array) -> jax.Array:
    """Returns the time t in [0, 1] at which b/a is σ."""
    root = self.beta_min**2 + 2 * self.beta_d * jnp.log1p(sigma**2)
    return 1 - (jnp.sqrt(root) - self.beta_min) / self.beta_d

  def a(self, t: jax.Array) -> jax.Array:
    """Returns the weight of the data."""
    s = 1 - t
    return jnp.exp(-(s**2) * self.beta_d / 4 - s * self.beta_min / 2)

  def b(self, t: jax.Array) -> jax.Array:
    """Returns the weight of the noise."""
    s = 1 - t
    return jnp.sqrt(-jnp.expm1(-(s**2) * self.beta_d / 2 - s * self.beta_min))

  def slope_a(self, t: jax.Array) -> jax.Array:
    """Returns a'."""
    return self.a(t) * self.diffusion(t)

  def slope_b(self, t: jax.Array) -> jax.Array:
    """Returns b'."""
    return -self.a(t) * self.slope_a(t) / self.b(t)

  def diffusion(self, t: jax.Array) -> jax.Array:
    """Returns half the rate at which noise is added, (β_min + β_d (1−t))/2."""
    return (self.beta_min + self.beta_d * (1 - t)) / 2


PATHS: Mapping[str, Path] = {'linear': Linear(), 'gvp': GVP(), 'vp': VP()}
PREDICTIONS = ('velocity', 'noise', 'score')
WEIGHTINGS = ('none', 'velocity', 'likelihood')


class InterpolantPrecond(precond.Precond):
  """The denoiser of a network on a path; the network is told t.

  Attributes:
    path: the path.
    predicts: 'velocity', 'noise' or 'score'.
  """

  path: Path = Linear()
  predicts: str = 'velocity'

  def coefficients(self, sigma: jax.Array) -> precond.Coefficients:
    """Returns the coefficients at the noise levels sigma [B]."""
    t = self.path.time(sigma)
    a = self.path.a(t)
    b = self.path.b(t)
    c_skip = jnp.ones_like(t)
    if self.predicts == 'velocity':
      slope_b = self.path.slope_b(t)
      turn = self.path.slope_a(t) * b - a * slope_b
      c_skip = -slope_b * a / turn
      c_out = b / turn
    elif self.predicts == 'noise':
      c_out = -sigma
    else:
      c_out = sigma * b
    return precond.Coefficients(c_skip=c_skip, c_out=c_out, c_in=a, c_noise=t)

  def target(
    self, x0: jax.Array, noise: jax.Array, sigma: jax.Array
  ) -> jax.Array:
    """Returns what F should be for clean data x0 and unit noise [B,...,C]."""
    if self.predicts == 'noise':
      return noise
    t = self.path.time(sigma).reshape(-1, *[1] * (x0.ndim - 1))
    if self.predicts == 'score':
      return -noise / self.path.b(t)
    return self.path.slope_a(t) * x0 + self.path.slope_b(t) * noise

  def at_time(self, x: jax.Array, t: jax.Array, label: jax.Array) -> jax.Array:
    """Returns F [B,...,C] at x [B,...,C] on the path at times t [B]."""
    return self.network(x, t, label)[..., : x.shape[-1]]


@dataclasses.dataclass(frozen=True)
class InterpolantWeight:
  """λ(σ) such that λ ‖D − x₀‖² is SiT's loss, a sum over H, W, C.

  The loss is the squared error of the velocity; or that of the noise, that a
  score multiplied by b stands for as well, times 1, or (g/b)² for 'velocity',
  or g/b² for 'likelihood', with g of `Path.diffusion`.

  Attributes:
    path: the path.
    predicts: 'velocity', 'noise' or 'score'.
    weighting: 'none', 'velocity' or 'likelihood'.
  """

  path: Path = Linear()
  predicts: str = 'velocity'
  weighting: str = 'none'

  def __call__(self, sigma: jax.Array, noise: object) -> jax.Array:
    """Returns λ [B] at σ [B]; the law is not asked."""
    del noise
    t = self.path.time(sigma)
    if self.predicts == 'velocity':
      a = self.path.a(t)
      b = self.path.b(t)
      turn = self.path.slope_a(t) * b - a * self.path.slope_b(t)
      return (turn / b) ** 2
    weight = jnp.ones_like(t)
    if self.weighting == 'velocity':
      weight = (self.path.diffusion(t) / self.path.b(t)) ** 2
    elif self.weighting == 'likelihood':
      weight = self.path.diffusion(t) / self.path.b(t) ** 2
    return weight / sigma**2
