"""DPM-Solver-v3 (Zheng et al. 2023) without model statistics, as DDO uses it.

The statistics of the model are replaced by the constants l = 1, s = b = 0,
which makes it a solver for data prediction. With λ = −ln σ, the solution of the
flow d(x/σ)/dλ = D/σ from node i to node j is

  x_j = σ_j/σ_i (x_i + ∫₀ʰ eᵘ D(λ_i + u) du),  h = λ_j − λ_i.

D is taken as constant in u (order 1) or as linear in u (order 2). The integrals
of eᵘ and u eᵘ are trapezoid sums over a fixed fine grid of λ. This grid is part
of the published sampler: exact integrals would move images by about 1e-3.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors
from ddo_jax.samplers import contract
from ddo_jax.samplers import noise as noise_lib


@dataclasses.dataclass(frozen=True)
class Coefficients:
  """The coefficients of every step, columns [N] float64.

  Step k goes from node k to node k + 1.

  Attributes:
    sigma: the noise level of node k.
    keep: the weight of x_k in x_{k+1}.
    use: the weight in x_{k+1} of D_k, taken as constant over the step.
    predict: the weight in x_{k+1} of D_k − D_{k−1}, the predictor's slope; 0 in
      a step of order 1.
    correct: the weight of D_k − D_{k−1} in the corrected x_k; 0 if x_k is not
      corrected.
  """

  sigma: np.ndarray
  keep: np.ndarray
  use: np.ndarray
  predict: np.ndarray
  correct: np.ndarray


def coefficients(lambdas: np.ndarray, nodes: np.ndarray) -> Coefficients:
  """Computes the coefficients of every step.

  Step k has order min(k + 1, 2, N − k), so the first and the last step have
  order 1. A node that was predicted at order 2 is corrected with the D found
  there, which costs no further evaluation.

  Args:
    lambdas: the fine grid of λ, rising, [M+1].
    nodes: the indices of the nodes in the grid, rising from 0 to M, [N+1].
  """
  count = len(nodes) - 1
  at = lambdas[nodes]
  h = np.diff(at)
  constant = np.empty(count)
  linear = np.empty(count)
  for k, (i, j) in enumerate(itertools.pairwise(nodes)):
    u = lambdas[i : j + 1] - lambdas[i]
    constant[k] = np.trapezoid(np.exp(u), u)
    linear[k] = np.trapezoid(u * np.exp(u), u)
  keep = np.exp(-h)
  predict = np.zeros(count)
  correct = np.zeros(count)
  for k in range(1, count - 1):  # the steps of order 2
    predict[k] = keep[k] * linear[k] / h[k - 1]
    correct[k + 1] = keep[k] * linear[k] / h[k]
  return Coefficients(
    sigma=np.exp(-at[:-1]),
    keep=keep,
    use=keep * constant,
    predict=predict,
    correct=correct,
  )


@dataclasses.dataclass(unsafe_hash=True)
class DPMSolverV3(contract.DenoiseSampler):
  """A deterministic multistep predictor and corrector of order 2.

  It ends at sigma_min; no step to 0 follows. The DDO authors offer it for
  ImageNet-512, see `configs/imagenet512_edm2_l.py`.

  Attributes:
    num_steps: N, the number of steps; the network is called N times (nfe).
    sigma_min: the noise level of the end.
    sigma_max: the noise level of the start.
    rho: ρ, the exponent of the nodes' noise levels, which are then rounded to
      the fine grid.
    grid_size: M, the number of intervals of the fine grid, uniform in λ.
  """

  num_steps: int = 25
  sigma_min: float = 0.002
  sigma_max: float = 80.0
  rho: float = 7.0
  grid_size: int = 250

  def grid(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns the fine grid and where the nodes are in it.

    Returns:
      λ of the fine grid, [M+1] float64, and the indices of the nodes, [N+1].

    Raises:
      errors.UserError: two nodes are rounded to one point of the grid.
    """
    sigmas = noise_lib.noise_levels(
      self.num_steps + 1, self.sigma_min, self.sigma_max, self.rho
    )
    first = -np.log(self.sigma_max)
    last = -np.log(self.sigma_min)
    share = (-np.log(sigmas) - first) / (last - first)
    nodes = np.rint(share * self.grid_size).astype(int)
    if not np.diff(nodes).all():
      raise errors.UserError(
        f'num_steps is {self.num_steps}: two steps fall on one point of the'
        f' grid of {self.grid_size}; take fewer steps'
      )
    return np.linspace(first, last, self.grid_size + 1), nodes

  def steps(self) -> Coefficients:
    """Returns the coefficients of every step; raises what `grid` raises."""
    lambdas, nodes = self.grid()
    return coefficients(lambdas, nodes)

  def __call__(
    self,
    denoise: contract.Denoise,
    shape: tuple[int, ...],
    keys: jax.Array,
  ) -> jax.Array:
    """Draws one sample for each key; see `heun.Heun.__call__`."""
    start = noise_lib.normal(keys, shape, 'start')
    return self.integrate(denoise, start)[0]

  def integrate(
    self, denoise: contract.Denoise, start: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Integrates from given random numbers, as a pure function of them.

    Args:
      denoise: the denoiser, (x [B,...], sigma [B]) -> D [B,...].
      start: unit normal numbers [B,...]; x starts at sigma_max times these.

    Returns:
      The samples x [B,...], and the corrected x of every node but the last,
      [N,B,...]. If the caller drops the latter under jit, it costs nothing.
    """
    steps = noise_lib.table(start.dtype, **dataclasses.asdict(self.steps()))

    def step(carry, now):
      # x is the prediction for this node, and base its part of order 1.
      x, base, previous = carry
      d = denoise(x, jnp.full(x.shape[:1], now['sigma']))
      x = base + now['correct'] * (d - previous)
      base = now['keep'] * x + now['use'] * d
      return (base + now['predict'] * (d - previous), base, d), x

    x = start * float(self.sigma_max)
    # At the first node both weights of d − previous are 0.
    (x, _, _), corrected = jax.lax.scan(step, (x, x, jnp.zeros_like(x)), steps)
    return x, corrected
