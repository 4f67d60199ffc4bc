"""The samplers of EDM's ablation study: those of DDPM, VP, VE and iDDPM.

Karras et al. 2022, Table 1 and Algorithm 3. Any solver, grid of noise levels,
schedule σ(t) and scaling s(t) can be combined to integrate the flow

  dx/dt = (σ'/σ + s'/s) x − s σ'/σ D(x/s; σ).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors
from ddo_jax.samplers import contract
from ddo_jax.samplers import noise as noise_lib
from ddo_jax.samplers import schedules


@dataclasses.dataclass(unsafe_hash=True)
class Ablation(contract.DenoiseSampler):
  """Steps from noise level to noise level, sigma_max to 0, in the time of σ(t).

  The defaults are EDM's own sampler, as in `heun.Heun`.

  Attributes:
    num_steps: N, the number of steps; the network is called N times by Euler's
      method and 2N − 1 times by Heun's (nfe).
    solver: 'euler' or 'heun'.
    discretization: whose noise levels: 'vp', 've', 'iddpm' or 'edm'.
    schedule: whose σ(t): 'vp', 've' or 'linear'.
    scaling: whose s(t): 'vp' for 1/√(1 + σ²), or 'none' for 1.
    sigma_min: the smallest noise level before 0; None is the discretization's.
    sigma_max: the noise level of the start; None is the discretization's.
    rho: ρ of the 'edm' discretization.
    alpha: where in the step the second slope of Heun's method is taken, in
      (0, 1]. The end, 1, is Heun's method; 1/2 is the midpoint method.
    epsilon_s: the smallest time t of the 'vp' discretization.
    c_1: a constant of the 'iddpm' discretization, see `schedules.iddpm_sigmas`.
    c_2: another constant of the 'iddpm' discretization.
    iddpm_steps: the number of noise levels of the 'iddpm' discretization.
    churn: S_churn; 0 is deterministic.
    churn_min: S_min, the smallest noise level at which noise is added.
    churn_max: S_max, the largest noise level at which noise is added.
    churn_noise: S_noise, the standard deviation of the fresh noise.
  """

  num_steps: int = 18
  solver: str = 'heun'
  discretization: str = 'edm'
  schedule: str = 'linear'
  scaling: str = 'none'
  sigma_min: float | None = None
  sigma_max: float | None = None
  rho: float = 7.0
  alpha: float = 1.0
  epsilon_s: float = 1e-3
  c_1: float = 0.001
  c_2: float = 0.008
  iddpm_steps: int = 1000
  churn: float = 0.0
  churn_min: float = 0.0
  churn_max: float = 1e9
  churn_noise: float = 1.0

  def check(self) -> None:
    """Raises UserError, naming the field, if a value makes no sense."""
    choices = {
      'solver': ('euler', 'heun'),
      'discretization': ('vp', 've', 'iddpm', 'edm'),
      'schedule': ('vp', 've', 'linear'),
      'scaling': ('vp', 'none'),
    }
    for name, allowed in choices.items():
      errors.require_choice(f'sampler.{name}', getattr(self, name), allowed)
    if not 0 < self.alpha <= 1:
      raise errors.UserError(
        f'config.sampler.alpha is {self.alpha}; it must be in (0, 1]: 1 for'
        " Heun's method"
      )
    low, high = self.sigma_range()
    noise_lib.check(self.num_steps, sigma_min=low, sigma_max=high)

  def sigma_range(self) -> tuple[float, float]:
    """Returns the smallest noise level above 0, and the largest."""
    vp = schedules.VP().sigma(np.array([self.epsilon_s, 1.0]))
    low, high = {
      'vp': (float(vp[0]), float(vp[1])),
      've': (0.02, 100.0),
      'iddpm': (0.002, 81.0),
      'edm': (0.002, 80.0),
    }[self.discretization]
    if self.sigma_min is not None:
      low = self.sigma_min
    if self.sigma_max is not None:
      high = self.sigma_max
    return low, high

  def sigmas(self) -> np.ndarray:
    """Returns the falling noise levels without the last, 0: [N] float64.

    Raises:
      errors.UserError: a setting makes no sense.
    """
    self.check()
    low, high = self.sigma_range()
    ramp = np.arange(self.num_steps) / max(self.num_steps - 1, 1)
    match self.discretization:
      case 'vp':
        curve = schedules.fitted_vp(low, high, self.epsilon_s)
        return curve.sigma(1 + ramp * (self.epsilon_s - 1))
      case 've':
        return high * (low / high) ** ramp
      case 'iddpm':
        u = schedules.iddpm_sigmas(self.iddpm_steps, self.c_1, self.c_2)
        u = u[(low <= u) & (u <= high)]
        if len(u) < self.num_steps:
          raise errors.UserError(
            f'num_steps is {self.num_steps}, but iDDPM has {len(u)} noise'
            f' levels from {low} to {high}: take fewer steps'
          )
        return u[np.rint(ramp * (len(u) - 1)).astype(int)]
      case _:
        return noise_lib.noise_levels(self.num_steps, low, high, self.rho)

  def _curve(self) -> schedules.Schedule:
    """Returns the schedule σ(t)."""
    match self.schedule:
      case 'vp':
        low, high = self.sigma_range()
        return schedules.fitted_vp(low, high, self.epsilon_s)
      case 've':
        return schedules.VE()
      case _:
        return schedules.Linear()

  def _scale(self, sigma: np.ndarray) -> np.ndarray:
    """Returns the scaling s at the noise levels sigma."""
    if self.scaling == 'none':
      return np.ones_like(sigma)
    return 1 / np.sqrt(1 + sigma**2)

  def _slope(
    self, curve: schedules.Schedule, t: np.ndarray, dtype: jnp.dtype
  ) -> dict[str, jax.Array]:
    """Returns the columns of dx/dt = keep x − use D(shrink x; sigma).

    Args:
      curve: the schedule σ(t).
      t: the times, [N].
      dtype: the type of the columns.
    """
    sigma = curve.sigma(t)
    slope = curve.slope(t)
    scale = self._scale(sigma)
    drift = 0
    if self.scaling == 'vp':
      # s'/s of s = 1/√(1 + σ²) is −σσ'/(1 + σ²).
      drift = -sigma * slope * scale**2
    return noise_lib.table(
      dtype,
      sigma=sigma,
      shrink=1 / scale,
      keep=slope / sigma + drift,
      use=slope / sigma * scale,
    )

  def __call__(
    self,
    denoise: contract.Denoise,
    shape: tuple[int, ...],
    keys: jax.Array,
  ) -> jax.Array:
    """Draws one sample for each key; see `heun.Heun.__call__`."""
    start = noise_lib.normal(keys, shape, 'start')

    def noise(step):
      return noise_lib.normal(keys, shape, 'churn', step)

    return self.integrate(denoise, start, noise)

  def steps(self, dtype: jnp.dtype) -> dict:
    """Returns the coefficients of all steps, as columns [N]."""
    sigma = self.sigmas()
    curve = self._curve()
    raised = noise_lib.churned(
      sigma, self.churn, self.churn_min, self.churn_max
    )
    hat = curve.time(raised)
    change = np.append(curve.time(sigma[1:]), 0.0) - hat
    fresh = self.churn_noise * np.sqrt(raised**2 - sigma**2)
    # The last step is Euler's, and the slope at its end, t = 0, is not wanted.
    node = np.append((hat + self.alpha * change)[:-1], hat[-1])
    columns: dict[str, Any] = noise_lib.table(
      dtype,
      rescale=self._scale(raised) / self._scale(sigma),
      fresh=fresh * self._scale(raised),
      change=change,
    )
    columns['step'] = jnp.arange(self.num_steps)
    columns['first'] = self._slope(curve, hat, dtype)
    columns['second'] = self._slope(curve, node, dtype)
    return columns

  def integrate(
    self,
    denoise: contract.Denoise,
    start: jax.Array,
    noise: noise_lib.Noise,
  ) -> jax.Array:
    """Integrates from given random numbers; see `heun.Heun.integrate`."""
    steps = self.steps(start.dtype)

    def add_noise(x, now):
      if not self.churn:
        return x
      return now['rescale'] * x + now['fresh'] * noise(now['step'])

    def slope(x, at):
      sigma = jnp.full(x.shape[:1], at['sigma'])
      return at['keep'] * x - at['use'] * denoise(at['shrink'] * x, sigma)

    def step(x, now, solver):
      x = add_noise(x, now)
      d = slope(x, now['first'])
      if solver == 'heun':
        node = x + self.alpha * now['change'] * d
        late = 1 / (2 * self.alpha)
        d = (1 - late) * d + late * slope(node, now['second'])
      return x + now['change'] * d

    def scanned(x, now):
      return step(x, now, self.solver), None

    sigma = self.sigmas()[0]
    x = start * float(sigma * self._scale(sigma))
    all_but_last = jax.tree.map(lambda column: column[:-1], steps)
    x, _ = jax.lax.scan(scanned, x, all_but_last)
    last = jax.tree.map(lambda column: column[-1], steps)
    return step(x, last, solver='euler')
