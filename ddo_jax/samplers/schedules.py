"""Noise schedules of EDM's baselines and of DDPM.

Every schedule in a continuous time has three methods, which take and return
float64 arrays: `sigma(t)` is the noise level σ(t) at time t, `slope(t)` its
derivative σ'(t), and `time(sigma)` the time at which the noise level is σ.
"""

import functools
from typing import NamedTuple

import numpy as np

from ddo_jax import errors


class VP(NamedTuple):
  """Variance preserving (Song et al. 2021), for t from ε_s to 1.

  σ(t)² = exp(β_d t²/2 + β_min t) − 1.

  Attributes:
    beta_d: β_d, the slope of the rate at which noise is added.
    beta_min: β_min, that rate at t = 0.
  """

  beta_d: float = 19.9
  beta_min: float = 0.1

  def sigma(self, t: np.ndarray) -> np.ndarray:
    return np.sqrt(np.expm1(self.beta_d * t**2 / 2 + self.beta_min * t))

  def slope(self, t: np.ndarray) -> np.ndarray:
    sigma = self.sigma(t)
    return (self.beta_d * t + self.beta_min) * (sigma + 1 / sigma) / 2

  def time(self, sigma: np.ndarray) -> np.ndarray:
    root = self.beta_min**2 + 2 * self.beta_d * np.log1p(sigma**2)
    return (np.sqrt(root) - self.beta_min) / self.beta_d


class VE(NamedTuple):
  """Variance exploding (Song et al. 2021): σ(t) = √t."""

  def sigma(self, t: np.ndarray) -> np.ndarray:
    return np.sqrt(t)

  def slope(self, t: np.ndarray) -> np.ndarray:
    return 0.5 / np.sqrt(t)

  def time(self, sigma: np.ndarray) -> np.ndarray:
    return sigma**2


class Linear(NamedTuple):
  """The schedule of DDIM and EDM: σ(t) = t."""

  def sigma(self, t: np.ndarray) -> np.ndarray:
    return t

  def slope(self, t: np.ndarray) -> np.ndarray:
    return np.ones_like(t)

  def time(self, sigma: np.ndarray) -> np.ndarray:
    return sigma


Schedule = VP | VE | Linear


def fitted_vp(sigma_min: float, sigma_max: float, epsilon_s: float) -> VP:
  """Returns the VP schedule with σ(ε_s) = sigma_min and σ(1) = sigma_max."""
  low = np.log1p(sigma_min**2)
  high = np.log1p(sigma_max**2)
  beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
  return VP(beta_d, high - beta_d / 2)


def iddpm_sigmas(steps: int, c_1: float, c_2: float) -> np.ndarray:
  """Returns iDDPM's noise levels u_0 > … > u_{steps−1} > 0, [steps] float64.

  They follow u_{j−1}² = (u_j² + 1) / max(ᾱ_{j−1}/ᾱ_j, c_1) − 1 from
  u_steps = 0, with ᾱ_j = sin²(π j / (2 steps (1 + c_2))) (Nichol & Dhariwal
  2021).

  Args:
    steps: the number of noise levels.
    c_1: the smallest ratio of successive ᾱ.
    c_2: the offset of the cosine schedule.
  """
  # ᾱ is float32, as in the original: where it is near 1, that rounding changes
  # u by 5e-4 of its value.
  j = np.arange(steps + 1, dtype=np.float32)
  angle = np.float32(np.pi / 2) * j / np.float32(steps) / np.float32(1 + c_2)
  # The sine is taken in float64 and then rounded, because the last bit of
  # NumPy's float32 sine is wrong here and there.
  alpha_bar = np.sin(angle.astype(np.float64)).astype(np.float32) ** 2
  ratio = np.maximum(alpha_bar[:-1] / alpha_bar[1:], np.float32(c_1))
  u = np.zeros(steps + 1)
  for i in range(steps, 0, -1):
    u[i - 1] = np.sqrt((u[i] ** 2 + 1) / ratio[i - 1].astype(float) - 1)
  return u[:-1]


@functools.lru_cache
def ddpm_alpha_bar(
  steps: int = 1000, first: float = 1e-4, last: float = 0.02
) -> np.ndarray:
  """Returns ᾱ of DDPM's linear schedule (Ho et al. 2020), [steps] float64.

  ᾱ_t is the product of 1 − β up to t, with β in equal steps from first to last.
  It falls, and the noise level is √((1 − ᾱ)/ᾱ).
  """
  return np.cumprod(1 - np.linspace(first, last, steps))


def ddpm_sigmas() -> np.ndarray:
  """Returns the noise levels of `ddpm_alpha_bar`, rising, [1000] float64."""
  alpha_bar = ddpm_alpha_bar()
  return np.sqrt((1 - alpha_bar) / alpha_bar)


def respaced(spacing: str, steps: int) -> np.ndarray:
  """Returns which steps of a process are kept (Nichol & Dhariwal 2021).

  Args:
    spacing: '250' for so many, evenly from the first to the last; '10,10,5' for
      so many of each of equal sections; 'ddim50' for so many in equal whole
      steps from the first.
    steps: the number of steps of the process.

  Returns:
    Their numbers, rising, [N] int.

  Raises:
    errors.UserError: there are none of that spacing.
  """
  fault = errors.UserError(
    f'config.sampler.spacing is {spacing!r}; wanted a number of steps of the'
    f' {steps}, such as 250; several, such as 10,10,5; or ddim50, of a number'
    ' that whole steps give'
  )
  try:
    counts = [int(part) for part in spacing.removeprefix('ddim').split(',')]
  except ValueError as error:
    raise fault from error
  if spacing.startswith('ddim'):
    for stride in range(1, steps):
      regular = np.arange(0, steps, stride)
      if [len(regular)] == counts:
        return regular
    raise fault
  size, longer = divmod(steps, len(counts))
  kept: list[int] = []
  begin = 0
  for section, count in enumerate(counts):
    length = size + (section < longer)
    if not 1 <= count <= length:
      raise fault
    step = (length - 1) / max(count - 1, 1)
    kept += [begin + round(i * step) for i in range(count)]
    begin += length
  return np.array(kept)
