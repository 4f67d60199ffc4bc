"""DPM-Solver-v3 (Zheng et al. 2023) without statistics, as DDO samples.

The empirical model statistics are their constants l = 1, s = b = 0: data
prediction. With λ = −ln σ, the flow d(x/σ)/dλ = D/σ from node i to j is

  x_j = σ_j/σ_i (x_i + ∫₀ʰ eᵘ D(λ_i + u) du),  h = λ_j − λ_i.

D is taken as constant (order 1) or linear in u (order 2); the integrals of eᵘ
and u eᵘ are sums by the trapezoid rule over a fixed fine grid of λ. That grid
is part of the published sampler: exact integrals move images by about 1e-3.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors
from ddo_jax.samplers import guidance as guidance_lib
from ddo_jax.samplers import noise as noise_lib


@dataclasses.dataclass(frozen=True)
class Coefficients:
  """Of every step, [N] float64; step k goes from node k to node k + 1.

  Attributes:
    sigma: noise level of node k.
    keep: weight of x_k in x_{k+1}.
    use: weight of D_k, taken as constant over the step.
    predict: weight of D_k − D_{k−1}, the predictor's slope; 0 at order 1.
    correct: weight of D_k − D_{k−1} in the corrected x_k; 0 where x_k stays.
  """

  sigma: np.ndarray
  keep: np.ndarray
  use: np.ndarray
  predict: np.ndarray
  correct: np.ndarray


def coefficients(lambdas: np.ndarray, nodes: np.ndarray) -> Coefficients:
  """Works out the steps.

  Orders are min(k + 1, 2, N − k): the first and the last step are of order 1.
  A node that was predicted at order 2 is corrected by the D found there,
  which costs no further evaluation.

  Args:
    lambdas: [M+1] the fine grid, rising.
    nodes: [N+1] indices of the nodes in it, rising from 0 to M.
  """
  count = len(nodes) - 1
  at = lambdas[nodes]
  h = np.diff(at)
  constant, linear = np.empty(count), np.empty(count)
  for k, (i, j) in enumerate(itertools.pairwise(nodes)):
    u = lambdas[i : j + 1] - lambdas[i]
    constant[k] = np.trapezoid(np.exp(u), u)
    linear[k] = np.trapezoid(u * np.exp(u), u)
  keep = np.exp(-h)
  predict, correct = np.zeros(count), np.zeros(count)
  for k in range(1, count - 1):  # the steps of order 2
    predict[k] = keep[k] * linear[k] / h[k - 1]
    correct[k + 1] = keep[k] * linear[k] / h[k]
  return Coefficients(np.exp(-at[:-1]), keep, keep * constant, predict, correct)


# Mutable only so that `--config.sampler.x=v` can write it; hashed once built.
@dataclasses.dataclass(unsafe_hash=True)
class DPMSolverV3:
  """Multistep predictor and corrector of order 2, deterministic.

  It ends at sigma_min: no step to 0 follows.

  Attributes:
    num_steps: N; the network is called N times (nfe).
    sigma_min: noise level of the end.
    sigma_max: noise level of the start.
    rho: exponent of the nodes before they snap to the grid.
    grid_size: M, intervals of the fine grid, uniform in λ.
    guidance: weight of guidance, see `guidance.guided`; 1 is none.
    guidance_min: guides only where σ is larger than this.
    guidance_max: largest σ that is guided.
  """

  num_steps: int = 25
  sigma_min: float = 0.002
  sigma_max: float = 80.0
  rho: float = 7.0
  grid_size: int = 250
  guidance: float = 1.0
  guidance_min: float = 0.0
  guidance_max: float = 1e9

  reads = 'denoise'

  def unguided(self) -> 'DPMSolverV3':
    """Without guidance."""
    return dataclasses.replace(self, guidance=1.0)

  def grid(self) -> tuple[np.ndarray, np.ndarray]:
    """λ of the fine grid, [M+1] float64, and the nodes' indices in it, [N+1].

    Raises:
      errors.UserError: two nodes snap to one point of the grid.
    """
    levels = noise_lib.levels(
      self.num_steps + 1, self.sigma_min, self.sigma_max, self.rho
    )
    first, last = -np.log(self.sigma_max), -np.log(self.sigma_min)
    share = (-np.log(levels) - first) / (last - first)
    nodes = np.rint(share * self.grid_size).astype(int)
    if not np.diff(nodes).all():
      raise errors.UserError(
        f'num_steps is {self.num_steps}: two steps fall on one point of the'
        f' grid of {self.grid_size}; take fewer steps'
      )
    return np.linspace(first, last, self.grid_size + 1), nodes

  def steps(self) -> Coefficients:
    """What each step multiplies by; raises as `grid` does."""
    return coefficients(*self.grid())

  def __call__(
    self,
    denoise: guidance_lib.Denoise,
    shape: tuple[int, ...],
    keys: jax.Array,
  ) -> jax.Array:
    """Draws one sample a key, as `heun.Heun` does."""
    start = noise_lib.normal(keys, shape, 'start')
    return self.integrate(denoise, start)[0]

  def integrate(
    self, denoise: guidance_lib.Denoise, start: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """The integrator alone, a pure function of the start.

    Args:
      denoise: (x [B,...], sigma [B]) -> D [B,...].
      start: [B,...] unit normal; x starts at sigma_max times it.

    Returns:
      x [B,...], and the corrected x of every node but the last [N,B,...];
      dropped under jit, that costs nothing.
    """
    steps = noise_lib.table(start.dtype, **dataclasses.asdict(self.steps()))

    def step(carry, now):
      # x is predicted at this node, base is its part of order 1.
      x, base, previous = carry
      d = denoise(x, jnp.full(x.shape[:1], now['sigma']))
      x = base + now['correct'] * (d - previous)
      base = now['keep'] * x + now['use'] * d
      return (base + now['predict'] * (d - previous), base, d), x

    x = start * float(self.sigma_max)
    # At the first node both weights of d − previous are 0.
    (x, _, _), corrected = jax.lax.scan(step, (x, x, jnp.zeros_like(x)), steps)
    return x, corrected
