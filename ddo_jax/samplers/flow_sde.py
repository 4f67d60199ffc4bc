"""SiT's stochastic sampler: the flow, with noise added and taken away."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors
from ddo_jax.samplers import contract
from ddo_jax.samplers import noise as noise_lib

METHODS = ('euler', 'heun')
DIFFUSIONS = ('sigma', 'decreasing', 'increasing_decreasing')
LAST_STEPS = ('mean', 'tweedie', 'euler')


def score(x: jax.Array, t: jax.Array, velocity: jax.Array) -> jax.Array:
  """Returns ∇ log p_t(x) of a velocity on the straight path, shaped as x.

  Args:
    x: where the velocity is, [B,...].
    t: the times, below 1, a number or an array that multiplies x.
    velocity: v(x, t), [B,...].
  """
  return (t * velocity - x) / (1 - t)


def diffusion(t: np.ndarray, form: str, norm: float) -> np.ndarray:
  """Returns w(t), half the rate at which noise is added.

  Args:
    t: the times, [N].
    form: 'sigma' for c (1 − t), 'decreasing' for ¼ (c cos π t + 1)², or
      'increasing_decreasing' for c sin² π t.
    norm: c.
  """
  return {
    'sigma': norm * (1 - t),
    'decreasing': (norm * np.cos(np.pi * t) + 1) ** 2 / 4,
    'increasing_decreasing': norm * np.sin(np.pi * t) ** 2,
  }[form]


@dataclasses.dataclass(unsafe_hash=True)
class FlowSDE(contract.VelocitySampler):
  """Integrates dx = (v + w ∇ log p_t) dt + √(2 w) dW to t = 1 − last_step.

  From there one longer step without noise leads to t = 1. w is twice that of
  the paper's equation, which has ½ w.

  Attributes:
    num_steps: N, the last step counted. The network is called N times by
      'euler', and 2N − 1 times by 'heun' (nfe).
    method: the solver, 'euler' (Euler-Maruyama) or 'heun'.
    diffusion: the form of w(t), see `diffusion`.
    diffusion_norm: its factor c.
    last: how x comes to t = 1: by the drift ('mean'), by Tweedie's formula, or
      by the velocity alone ('euler').
    last_step: the length of the last step.
  """

  num_steps: int = 250
  method: str = 'euler'
  diffusion: str = 'sigma'
  diffusion_norm: float = 1.0
  last: str = 'mean'
  last_step: float = 0.04

  def check(self) -> None:
    """Raises UserError, naming the field, if a value makes no sense."""
    errors.require_integer('sampler.num_steps', self.num_steps, 2)
    errors.require_choice('sampler.method', self.method, METHODS)
    errors.require_choice('sampler.diffusion', self.diffusion, DIFFUSIONS)
    errors.require_choice('sampler.last', self.last, LAST_STEPS)
    norm = self.diffusion_norm
    errors.require(norm >= 0, 'sampler.diffusion_norm', norm, '0 or more')
    last = self.last_step
    errors.require(0 < last < 1, 'sampler.last_step', last, 'in (0, 1)')

  def __call__(
    self, denoise: contract.Velocity, shape: tuple[int, ...], keys: jax.Array
  ) -> jax.Array:
    """Draws one sample [B, *shape] for each key [B].

    Raises:
      errors.UserError: a setting makes no sense.
    """
    self.check()
    start = noise_lib.normal(keys, shape, 'start')
    noise = noise_lib.of_steps(keys, shape)
    return self.integrate(denoise, start, noise)[0]

  def integrate(
    self,
    velocity: contract.Velocity,
    start: jax.Array,
    noise: noise_lib.Noise,
  ) -> tuple[jax.Array, jax.Array]:
    """Integrates from given random numbers, as a pure function of them.

    Args:
      velocity: (x [B,...], t [B]) -> dx/dt [B,...].
      start: unit normal numbers [B,...], x at t = 0.
      noise: the unit normal numbers [B,...] of a step, counted from 0; the last
        step draws none.

    Returns:
      The samples x [B,...], and x after each step but the last, [N−1,B,...].
    """
    times = np.linspace(0.0, 1 - self.last_step, self.num_steps)
    rates = diffusion(times, self.diffusion, self.diffusion_norm)
    change = times[1] - times[0]
    steps = noise_lib.table(
      start.dtype,
      t=times[:-1],
      rate=rates[:-1],
      end=times[1:],
      end_rate=rates[1:],
      fresh=np.sqrt(2 * rates[:-1] * change),
    )
    steps['step'] = jnp.arange(self.num_steps - 1)

    def drift(x, t, rate):
      v = velocity(x, jnp.full(x.shape[:1], t))
      return v + rate * score(x, t, v)

    def step(x, now):
      fresh = now['fresh'] * noise(now['step'])
      if self.method == 'euler':
        x = x + change * drift(x, now['t'], now['rate']) + fresh
        return x, x
      x = x + fresh
      slope = drift(x, now['t'], now['rate'])
      end = drift(x + change * slope, now['end'], now['end_rate'])
      x = x + change / 2 * (slope + end)
      return x, x

    x, states = jax.lax.scan(step, start, steps)
    t = jnp.asarray(times[-1], x.dtype)
    v = velocity(x, jnp.full(x.shape[:1], t))
    gradient = score(x, t, v)
    if self.last == 'mean':
      x = x + self.last_step * (v + float(rates[-1]) * gradient)
    elif self.last == 'tweedie':
      x = x / t + (1 - t) ** 2 / t * gradient
    else:
      x = x + self.last_step * v
    return x, states
