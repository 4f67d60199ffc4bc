"""DPM-Solver-v3 on Gaussian data, where everything is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.samplers import dpm_solver_v3

S = 0.5  # standard deviation of the data
SHAPE = (2, 2, 1)


def denoise(x, sigma):
  """The posterior mean where the data is N(0, S²)."""
  variance = (sigma**2)[:, None, None, None]
  return x * S**2 / (S**2 + variance)


START = np.random.default_rng(0).normal(size=(3, *SHAPE))


def keys(count):
  return rng.per_example(rng.stream(0), jnp.arange(count, dtype=jnp.uint32))


def test_it_is_of_second_order():
  def error(num_steps):
    # A grid so fine that snapping to it and its trapezoids do not show.
    sampler = dpm_solver_v3.DPMSolverV3(
      num_steps, sigma_min=0.1, sigma_max=10.0, grid_size=200_000
    )
    # dx/dσ = xσ/(S² + σ²): x shrinks as √(S² + σ²).
    shrink = np.sqrt((S**2 + 0.1**2) / (S**2 + 10**2))
    x, _ = sampler.integrate(denoise, jnp.asarray(START))
    return float(jnp.abs(x - 10 * START * shrink).max())

  with jax.enable_x64(True):
    gaps = np.array([error(n) for n in (100, 200, 400)])
  np.testing.assert_allclose(gaps[:-1] / gaps[1:], 4, rtol=0.12)


def test_a_constant_denoiser_is_integrated_exactly():
  """Then x goes straight to D, from every node, at order 1 and 2 alike."""
  sampler = dpm_solver_v3.DPMSolverV3(12, grid_size=100_000)
  goal = 0.7
  with jax.enable_x64(True):
    x, states = sampler.integrate(
      lambda x, s: jnp.full_like(x, goal), jnp.asarray(START)
    )
  share = np.append(sampler.steps().sigma, sampler.sigma_min) / 80
  share = share[:, None, None, None, None]
  expected = share * 80 * START + (1 - share) * goal
  # What is left is the trapezoid's h²/12 = 9e-10, relative to e^(λ_0 − λ_T).
  np.testing.assert_allclose(states, expected[:-1], rtol=0, atol=1e-8)
  np.testing.assert_allclose(x, expected[-1], rtol=0, atol=1e-8)


def test_the_grid_and_its_nodes():
  sampler = dpm_solver_v3.DPMSolverV3(6)
  grid, nodes = sampler.grid()
  assert (nodes[0], nodes[-1]) == (0, 250)
  np.testing.assert_allclose(np.diff(grid, 2), 0, atol=1e-12)
  np.testing.assert_allclose(np.exp(-grid[[0, -1]]), [80, 0.002], rtol=1e-12)
  # It ends at sigma_min without asking for D there.
  sigma = sampler.steps().sigma
  np.testing.assert_allclose(sigma, np.exp(-grid[nodes[:-1]]), rtol=1e-12)


@pytest.mark.parametrize('num_steps', [1, 2, 3])
def test_few_steps_are_of_lower_order(num_steps):
  steps = dpm_solver_v3.DPMSolverV3(num_steps).steps()
  assert np.count_nonzero(steps.predict) == max(num_steps - 2, 0)
  assert np.count_nonzero(steps.correct) == max(num_steps - 2, 0)
  x, _ = dpm_solver_v3.DPMSolverV3(num_steps).integrate(
    denoise, jnp.asarray(START)
  )
  assert np.isfinite(x).all()


def test_a_sample_depends_on_its_own_key_alone():
  sampler, rows = dpm_solver_v3.DPMSolverV3(6), keys(8)
  draw = jax.jit(lambda rows: sampler(denoise, SHAPE, rows))
  x, halves = draw(rows), [draw(half) for half in (rows[:4], rows[4:])]
  np.testing.assert_allclose(np.concatenate(halves), x, rtol=1e-5)
  assert len({float(row.ravel()[0]) for row in np.asarray(x)}) == 8


def test_as_many_steps_as_the_grid_can_tell_apart():
  dpm_solver_v3.DPMSolverV3(139).grid()
  with pytest.raises(errors.UserError, match='num_steps is 140'):
    dpm_solver_v3.DPMSolverV3(140).grid()
