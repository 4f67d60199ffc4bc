"""Noise schedules of EDM's baselines: σ(t), its slope and its inverse.

Every schedule has three methods, which take and return float64 arrays:
`sigma(t)` is the noise level σ(t) at time t, `slope(t)` its derivative σ'(t),
and `time(sigma)` the time at which the noise level is σ.
"""

from typing import NamedTuple

import numpy as np


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
