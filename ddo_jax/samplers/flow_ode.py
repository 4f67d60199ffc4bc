"""Solvers of the flow of a velocity field, dx/dt = v(x, t), in fixed steps."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors
from ddo_jax.samplers import contract
from ddo_jax.samplers import noise as noise_lib


class Tableau(NamedTuple):
  """An explicit Runge-Kutta method.

  Attributes:
    nodes: where in the step each slope is taken, from 0 to 1.
    stages: for each slope, the weights of the slopes before it, which lead to
      where it is taken.
    weights: the weight of each slope in the step.
  """

  nodes: tuple[float, ...]
  stages: tuple[tuple[float, ...], ...]
  weights: tuple[float, ...]


METHODS = {
  'euler': Tableau((0.0,), ((),), (1.0,)),
  'midpoint': Tableau((0.0, 1 / 2), ((), (1 / 2,)), (0.0, 1.0)),
  'heun': Tableau((0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2)),
  # Kutta's 3/8 rule.
  'rk4': Tableau(
    (0.0, 1 / 3, 2 / 3, 1.0),
    ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    (1 / 8, 3 / 8, 3 / 8, 1 / 8),
  ),
}


@dataclasses.dataclass(unsafe_hash=True)
class FlowODE(contract.VelocitySampler):
  """Integrates dx/dt = v(x, t) from noise at t = 0 to data at t = 1.

  The adaptive dopri5 of SiT's program is not offered: its steps depend on all
  rows of a batch together, and it asks the network for times beyond 1.

  Attributes:
    num_steps: the number of equal steps. The network is called once a step by
      'euler', twice by 'midpoint' and 'heun', four times by 'rk4' (nfe).
    method: the solver, one of these.
  """

  num_steps: int = 125
  method: str = 'heun'

  def check(self) -> None:
    """Raises UserError, naming the field, if a value makes no sense."""
    errors.require_integer('sampler.num_steps', self.num_steps, 1)
    errors.require_choice('sampler.method', self.method, METHODS)

  def __call__(
    self, denoise: contract.Velocity, shape: tuple[int, ...], keys: jax.Array
  ) -> jax.Array:
    """Draws one sample [B, *shape] for each key [B].

    Raises:
      errors.UserError: a setting makes no sense.
    """
    self.check()
    start = noise_lib.normal(keys, shape, 'start')
    return self.integrate(denoise, start)[0]

  def integrate(
    self,
    velocity: contract.Velocity,
    start: jax.Array,
    backwards: bool = False,
  ) -> tuple[jax.Array, jax.Array]:
    """Integrates from a given start, as a pure function of it.

    Args:
      velocity: (x [B,...], t [B]) -> dx/dt [B,...].
      start: x at t = 0, [B,...].
      backwards: whether the start is at t = 1 and the end at t = 0.

    Returns:
      x at the end [B,...], and x after each step, [N,B,...].
    """
    method = METHODS[self.method]
    times = np.linspace(0.0, 1.0, self.num_steps + 1)
    if backwards:
      times = times[::-1]
    steps = noise_lib.table(start.dtype, t=times[:-1], change=np.diff(times))

    def step(x, now):
      slopes: list[jax.Array] = []
      for node, stage in zip(method.nodes, method.stages, strict=True):
        y = x + now['change'] * _weighted(stage, slopes)
        t = now['t'] + node * now['change']
        slopes.append(velocity(y, jnp.full(x.shape[:1], t)))
      x = x + now['change'] * _weighted(method.weights, slopes)
      return x, x

    return jax.lax.scan(step, start, steps)


def _weighted(
  weights: tuple[float, ...], slopes: list[jax.Array]
) -> jax.Array | float:
  """Returns the weighted sum of slopes; 0 of none."""
  total: jax.Array | float = 0.0
  for weight, slope in zip(weights, slopes, strict=True):
    if weight:
      total = total + weight * slope
  return total
