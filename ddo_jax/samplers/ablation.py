"""The samplers of EDM's ablation study: what DDPM, VP, VE and iDDPM stepped.

Karras et al. 2022, Table 1 and Algorithm 3: any solver, grid of noise levels,
schedule σ(t) and scaling s(t) together, of the flow

  dx/dt = (σ'/σ + s'/s) x − s σ'/σ D(x/s; σ).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors
from ddo_jax.samplers import guidance as guidance_lib
from ddo_jax.samplers import noise as noise_lib
from ddo_jax.samplers import schedules


# Mutable only so that `--config.sampler.x=v` can write it; hashed once built.
@dataclasses.dataclass(unsafe_hash=True)
class Ablation:
  """One step a noise level, from sigma_max to 0, in the time t of σ(t).

  The defaults are EDM's own sampler, as in `heun.Heun`.

  Attributes:
    num_steps: N; the network is called N times by Euler's method, 2N − 1
      times by Heun's (nfe).
    solver: 'euler' | 'heun'.
    discretization: the noise levels: 'vp' | 've' | 'iddpm' | 'edm'.
    schedule: σ(t): 'vp' | 've' | 'linear'.
    scaling: s(t): 'vp', 1/√(1 + σ²) | 'none', 1.
    sigma_min: smallest noise level before 0; None is the discretization's.
    sigma_max: noise level of the start; None is the discretization's.
    rho: ρ of the 'edm' discretization.
    alpha: in (0, 1], where in the step Heun's second slope is taken: 1 is
      Heun's method, 1/2 the midpoint's.
    epsilon_s: smallest t of the 'vp' discretization.
    c_1: of the 'iddpm' discretization, see `schedules.iddpm_levels`.
    c_2: of the same.
    iddpm_steps: M of the same.
    churn: S_churn; 0 is deterministic.
    churn_min: S_min, smallest σ that is churned.
    churn_max: S_max, largest σ that is churned.
    churn_noise: S_noise, standard deviation of the fresh noise.
    guidance: weight of guidance, see `guidance.guided`; 1 is none.
    guidance_min: guides only where σ is larger than this.
    guidance_max: largest σ that is guided.
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
  guidance: float = 1.0
  guidance_min: float = 0.0
  guidance_max: float = 1e9

  reads = 'denoise'

  def unguided(self) -> 'Ablation':
    """Without guidance."""
    return dataclasses.replace(self, guidance=1.0)

  def check(self) -> None:
    """Raises UserError, naming the field, where a value makes no sense."""
    choices = {
      'solver': ('euler', 'heun'),
      'discretization': ('vp', 've', 'iddpm', 'edm'),
      'schedule': ('vp', 've', 'linear'),
      'scaling': ('vp', 'none'),
    }
    for name, allowed in choices.items():
      if getattr(self, name) not in allowed:
        raise errors.UserError(
          f'config.sampler.{name} is {getattr(self, name)!r}; it must be one'
          f' of {allowed}'
        )
    if not 0 < self.alpha <= 1:
      raise errors.UserError(
        f'config.sampler.alpha is {self.alpha}; it must be in (0, 1]: 1 for'
        " Heun's method"
      )
    noise_lib.check(self.num_steps, *self.sigma_range())

  def sigma_range(self) -> tuple[float, float]:
    """Smallest and largest noise level, by default the discretization's."""
    vp = schedules.VP().sigma(np.array([self.epsilon_s, 1.0]))
    low, high = {
      'vp': (float(vp[0]), float(vp[1])),
      've': (0.02, 100.0),
      'iddpm': (0.002, 81.0),
      'edm': (0.002, 80.0),
    }[self.discretization]
    low = low if self.sigma_min is None else self.sigma_min
    return low, high if self.sigma_max is None else self.sigma_max

  def sigmas(self) -> np.ndarray:
    """[N] float64 noise levels from the largest to the smallest, no 0.

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
        u = schedules.iddpm_levels(self.iddpm_steps, self.c_1, self.c_2)
        u = u[(low <= u) & (u <= high)]
        if len(u) < self.num_steps:
          raise errors.UserError(
            f'num_steps is {self.num_steps}, but iDDPM has {len(u)} levels'
            f' from {low} to {high}: take fewer steps'
          )
        return u[np.rint(ramp * (len(u) - 1)).astype(int)]
      case _:
        return noise_lib.levels(self.num_steps, low, high, self.rho)

  def _curve(self) -> schedules.Schedule:
    match self.schedule:
      case 'vp':
        return schedules.fitted_vp(*self.sigma_range(), self.epsilon_s)
      case 've':
        return schedules.VE()
      case _:
        return schedules.Linear()

  def _scale(self, sigma: np.ndarray) -> np.ndarray:
    """The scaling s at σ."""
    if self.scaling == 'none':
      return np.ones_like(sigma)
    return 1 / np.sqrt(1 + sigma**2)

  def _slope(self, curve: schedules.Schedule, t: np.ndarray, dtype) -> dict:
    """At times t [N]: dx/dt = keep x − use D(shrink x; sigma)."""
    sigma, slope = curve.sigma(t), curve.slope(t)
    scale = self._scale(sigma)
    # s'/s of 1/√(1 + σ²) is −σσ'/(1 + σ²).
    drift = 0 if self.scaling == 'none' else -sigma * slope * scale**2
    return noise_lib.table(
      dtype,
      sigma=sigma,
      shrink=1 / scale,
      keep=slope / sigma + drift,
      use=slope / sigma * scale,
    )

  def __call__(
    self,
    denoise: guidance_lib.Denoise,
    shape: tuple[int, ...],
    keys: jax.Array,
  ) -> jax.Array:
    """Draws one sample a key, as `heun.Heun` does."""
    start = noise_lib.normal(keys, shape, 'start')
    noise = lambda step: noise_lib.normal(keys, shape, 'churn', step)
    return self.integrate(denoise, start, noise)

  def steps(self, dtype: jnp.dtype) -> dict:
    """Columns [N] of what each step multiplies by, for `integrate`."""
    sigma, curve = self.sigmas(), self._curve()
    raised = noise_lib.churned(
      sigma, self.churn, self.churn_min, self.churn_max
    )
    hat = curve.time(raised)
    change = np.append(curve.time(sigma[1:]), 0.0) - hat
    fresh = self.churn_noise * np.sqrt(raised**2 - sigma**2)
    # The last step, of Euler, ends at t = 0, where no slope is wanted.
    node = np.append((hat + self.alpha * change)[:-1], hat[-1])
    return noise_lib.table(
      dtype,
      rescale=self._scale(raised) / self._scale(sigma),
      fresh=fresh * self._scale(raised),
      change=change,
    ) | {
      'step': jnp.arange(self.num_steps),
      'first': self._slope(curve, hat, dtype),
      'second': self._slope(curve, node, dtype),
    }

  def integrate(
    self,
    denoise: guidance_lib.Denoise,
    start: jax.Array,
    noise: noise_lib.Noise,
  ) -> jax.Array:
    """The integrator alone; arguments and result as `heun.Heun.integrate`."""
    steps = self.steps(start.dtype)

    def churned(x, now):
      if not self.churn:
        return x
      return now['rescale'] * x + now['fresh'] * noise(now['step'])

    def slope(x, at):
      sigma = jnp.full(x.shape[:1], at['sigma'])
      return at['keep'] * x - at['use'] * denoise(at['shrink'] * x, sigma)

    def step(x, now, solver):
      x = churned(x, now)
      d = slope(x, now['first'])
      if solver == 'heun':
        node = x + self.alpha * now['change'] * d
        late = 1 / (2 * self.alpha)
        d = (1 - late) * d + late * slope(node, now['second'])
      return x + now['change'] * d

    sigma = self.sigmas()[0]
    x = start * float(sigma * self._scale(sigma))
    x, _ = jax.lax.scan(
      lambda x, now: (step(x, now, self.solver), None),
      x,
      jax.tree.map(lambda c: c[:-1], steps),
    )
    return step(x, jax.tree.map(lambda c: c[-1], steps), 'euler')
