"""The ablation sampler on Gaussian data, where everything is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.samplers import ablation
from ddo_jax.samplers import heun
from ddo_jax.samplers import schedules

S = 0.5  # standard deviation of the data
SHAPE = (2, 2, 1)


def denoise(x, sigma):
  """The posterior mean where the data is N(0, S²)."""
  variance = (sigma**2)[:, None, None, None]
  return x * S**2 / (S**2 + variance)


START = np.random.default_rng(0).normal(size=(3, *SHAPE))


def keys(count):
  return rng.per_example(rng.stream(0), jnp.arange(count, dtype=jnp.uint32))


def no_noise(step):
  raise AssertionError(f'a deterministic sampler drew noise at step {step}')


# From so little noise that the last step, of Euler, is exact.
VP = {'discretization': 'vp', 'schedule': 'vp', 'scaling': 'vp'}
VP |= {'epsilon_s': 1e-5}
VE = {'discretization': 've', 'schedule': 've'}
VE |= {'sigma_min': 0.01, 'sigma_max': 10.0}
EDM = {'sigma_min': 1e-6, 'sigma_max': 10.0, 'rho': 3.0}


@pytest.mark.parametrize(
  'order, solver, options',
  [
    (1, 'euler', EDM),
    (1, 'euler', VP),
    (1, 'euler', VE),
    (2, 'heun', EDM),
    (2, 'heun', EDM | {'alpha': 0.75}),
    (2, 'heun', EDM | {'schedule': 've'}),
    (2, 'heun', EDM | {'scaling': 'vp'}),
    (2, 'heun', VP),
    (2, 'heun', VE),
  ],
)
def test_the_order_of_the_solvers(order, solver, options):
  def error(num_steps):
    sampler = ablation.Ablation(num_steps, solver, **options)
    _, high = sampler.sigma_range()
    # dx/dσ = xσ/(S² + σ²): x shrinks as √(S² + σ²).
    exact = high * START * S / np.sqrt(S**2 + high**2)
    x = sampler.integrate(denoise, jnp.asarray(START), no_noise)
    return float(jnp.abs(x - exact).max())

  with jax.enable_x64(True):
    gaps = np.array([error(n) for n in (64, 128, 256)])
  np.testing.assert_allclose(gaps[:-1] / gaps[1:], 2**order, rtol=0.12)


def test_its_defaults_are_the_sampler_of_edm():
  fresh = np.random.default_rng(1).normal(size=(6, *START.shape))

  def noise(step):
    return jnp.asarray(fresh)[step]

  with jax.enable_x64(True):
    for churn in (0.0, 20.0):
      options = {'num_steps': 6, 'churn': churn, 'churn_max': 50.0}
      start = jnp.asarray(START)
      x = ablation.Ablation(**options).integrate(denoise, start, noise)
      edm = heun.Heun(**options).integrate(denoise, start, noise)
      np.testing.assert_allclose(x, edm, rtol=1e-12)


def test_samples_of_keys():
  """Each depends on its own alone; together they are as wide as the data."""
  sampler = ablation.Ablation(60, 'euler', churn=10.0, **VP)
  draw = jax.jit(lambda rows: sampler(denoise, SHAPE, rows))
  rows = keys(4096)
  x, halves = draw(rows), [draw(rows[:2048]), draw(rows[2048:])]
  np.testing.assert_allclose(np.concatenate(halves), x, rtol=1e-4, atol=1e-5)
  # 16,384 numbers: their deviation is known to 0.6 %, Euler's is 1 % off.
  assert float(x.std()) == pytest.approx(S, rel=0.03)


@pytest.mark.parametrize(
  'curve', [schedules.VP(), schedules.VE(), schedules.Linear()]
)
def test_a_schedule_knows_its_slope_and_its_inverse(curve):
  t = np.linspace(0.05, 1, 7)
  np.testing.assert_allclose(curve.time(curve.sigma(t)), t, rtol=1e-10)
  h = 1e-6
  slope = (curve.sigma(t + h) - curve.sigma(t - h)) / (2 * h)
  np.testing.assert_allclose(curve.slope(t), slope, rtol=1e-6)


def test_the_fitted_schedule_ends_where_it_is_asked_to():
  curve = schedules.fitted_vp(0.002, 80.0, 1e-3)
  ends = curve.sigma(np.array([1e-3, 1.0]))
  np.testing.assert_allclose(ends, [0.002, 80], rtol=1e-9)


@pytest.mark.parametrize(
  'options, words',
  [
    ({'solver': 'rk4'}, 'solver'),
    ({'discretization': 'ddim'}, 'discretization'),
    ({'schedule': 'cosine'}, 'schedule'),
    ({'scaling': 've'}, 'scaling'),
    ({'alpha': 0.0}, 'alpha'),
    ({'sigma_min': 90.0}, 'sigma_min'),
    ({'sigma_min': 0.0}, 'sigma_min'),
    ({'num_steps': 0}, 'num_steps'),
    ({'num_steps': 2000, 'discretization': 'iddpm'}, 'num_steps'),
  ],
)
def test_a_setting_that_makes_no_sense_is_named(options, words):
  sampler = dataclasses.replace(ablation.Ablation(), **options)
  with pytest.raises(errors.UserError, match=words):
    sampler.integrate(denoise, jnp.asarray(START), no_noise)


def test_a_grid_must_go_down():
  sampler = heun.Heun(sigma_min=3.0, sigma_max=2.0)
  with pytest.raises(errors.UserError, match='sigma_min 3'):
    sampler.integrate(denoise, jnp.asarray(START), no_noise)
