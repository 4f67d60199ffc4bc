"""Noise schedules of the baselines: σ(t), its slope σ'(t) and its inverse.

Each has `sigma(t)`, `slope(t)` and `time(sigma)`, float64 arrays in and out.
"""

from typing import NamedTuple

import numpy as np


class VP(NamedTuple):
  """σ(t)² = exp(β_d t²/2 + β_min t) − 1, t in [ε_s, 1] (Song et al. 2021)."""

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
  """σ(t) = √t (Song et al. 2021)."""

  def sigma(self, t: np.ndarray) -> np.ndarray:
    return np.sqrt(t)

  def slope(self, t: np.ndarray) -> np.ndarray:
    return 0.5 / np.sqrt(t)

  def time(self, sigma: np.ndarray) -> np.ndarray:
    return sigma**2


class Linear(NamedTuple):
  """σ(t) = t (DDIM, EDM)."""

  def sigma(self, t: np.ndarray) -> np.ndarray:
    return t

  def slope(self, t: np.ndarray) -> np.ndarray:
    return np.ones_like(t)

  def time(self, sigma: np.ndarray) -> np.ndarray:
    return sigma


Schedule = VP | VE | Linear


def fitted_vp(sigma_min: float, sigma_max: float, epsilon_s: float) -> VP:
  """The VP schedule with σ(ε_s) = sigma_min and σ(1) = sigma_max."""
  low, high = np.log1p(sigma_min**2), np.log1p(sigma_max**2)
  beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
  return VP(beta_d, high - beta_d / 2)


def iddpm_levels(steps: int, c_1: float, c_2: float) -> np.ndarray:
  """[steps] float64, iDDPM's noise levels u_0 > … > u_{steps−1} > 0.

  u_{j−1}² = (u_j² + 1) / max(ᾱ_{j−1}/ᾱ_j, c_1) − 1 from u_steps = 0, with
  ᾱ_j = sin²(π j / (2 steps (1 + c_2))) (Nichol & Dhariwal 2021).
  """
  # ᾱ in float32 as in the original: near ᾱ = 1 its rounding is 5e-4 of u.
  j = np.arange(steps + 1, dtype=np.float32)
  angle = np.float32(np.pi / 2) * j / np.float32(steps) / np.float32(1 + c_2)
  # numpy's float32 sine is an ulp off here and there; this one is not.
  alpha_bar = np.sin(angle.astype(np.float64)).astype(np.float32) ** 2
  ratio = np.maximum(alpha_bar[:-1] / alpha_bar[1:], np.float32(c_1))
  u = np.zeros(steps + 1)
  for j in range(steps, 0, -1):
    u[j - 1] = np.sqrt((u[j] ** 2 + 1) / ratio[j - 1].astype(float) - 1)
  return u[:-1]
