"""Noise laws and weights, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate
from scipy import stats

from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.method import diffusion
from ddo_jax.method import likelihood
from ddo_jax.method import noise

Z = np.random.default_rng(0).normal(size=20_000).astype(np.float32)


def test_log_normal():
  sigma = noise.LogNormal(-0.8, 1.6).sigma(Z)
  np.testing.assert_allclose(np.log(sigma), -0.8 + 1.6 * Z, atol=1e-5)


def test_the_log_normal_law_is_the_logit_normal_one_of_flow_matching():
  sigma = noise.LogNormal(0.3, 1.2).sigma(Z)
  t = sigma / (1 + sigma)
  np.testing.assert_allclose(np.log(t / (1 - t)), 0.3 + 1.2 * Z, atol=2e-4)


def test_uniform_time():
  sigma = np.asarray(noise.UniformTime().sigma(Z), np.float64)
  t = sigma / (1 + sigma)
  assert stats.kstest(t, 'uniform').pvalue > 0.01
  ends = noise.UniformTime().sigma(jnp.array([-5.0, 5.0]))
  np.testing.assert_allclose(ends[0] * ends[1], 1, rtol=1e-3)


def test_log_uniform():
  law = noise.LogUniform(0.05, 80.0)
  share = np.log(law.sigma(Z) / 0.05) / np.log(80 / 0.05)
  assert stats.kstest(share, 'uniform').pvalue > 0.01
  ends = law.sigma(jnp.array([-40.0, 40.0]))
  np.testing.assert_allclose(ends, [0.05, 80.0], rtol=1e-5)
  assert np.isfinite(law.log_density(ends)).all()
  outside = law.log_density(jnp.array([0.04, 81.0]))
  np.testing.assert_array_equal(outside, -np.inf)
  with pytest.raises(errors.UserError, match='above discriminator'):
    noise.LogUniform((2.0,), (1.0,)).check('discriminator.noise')


def test_a_discrete_law_has_its_levels_equally_often():
  levels = (0.1, 0.5, 2.0, 9.0)
  sigma = np.asarray(noise.Discrete(levels).sigma(Z))
  counts = [np.mean(np.isclose(sigma, level)) for level in levels]
  np.testing.assert_allclose(counts, 0.25, atol=0.02)
  extreme = noise.Discrete(levels).sigma(jnp.array([-40.0, 40.0]))
  np.testing.assert_allclose(extreme, [0.1, 9.0])
  with pytest.raises(errors.UserError, match='ascending'):
    noise.Discrete((2.0, 1.0)).check('ddo.noise')
  with pytest.raises(errors.UserError, match='positive'):
    noise.Discrete().check('ddo.noise')


@pytest.mark.parametrize(
  'law',
  [
    noise.LogNormal(-0.4, 1.3),
    noise.LogUniform(0.05, 80.0),
    noise.UniformTime(),
  ],
)
def test_the_density_is_that_of_the_draws(law):
  """Of ln σ, as the change of variables from z has it."""
  with jax.enable_x64(True):
    z = jnp.linspace(-2, 2, 9)
    log_slope = jnp.log(jax.vmap(jax.grad(lambda z: jnp.log(law.sigma(z))))(z))
    wanted = stats.norm.logpdf(z) - log_slope
    np.testing.assert_allclose(law.log_density(law.sigma(z)), wanted, atol=1e-9)


def test_the_velocity_weight_is_that_of_the_velocitys_error():
  sigma = jnp.array([0.2, 1.0, 5.0])
  t = sigma / (1 + sigma)
  weight = noise.VelocityWeight()(sigma, None)
  np.testing.assert_allclose(weight, 1 / t**2, rtol=1e-6)


class Gaussian:
  """The posterior mean of N(params, 1) under noise; hashable."""

  def apply(self, variables, x, sigma, label):
    del label
    variance = (sigma**2)[:, None, None, None]
    return (x + variance * variables['params']) / (1 + variance)


def test_the_elbos_weight_gives_log_ratios_in_nats():
  """Of two Gaussians: E Δ is the difference of their log-likelihoods.

  The integral over all noise is done on a grid of the law's normal number.
  """
  law = noise.LogNormal(0.0, 2.0)
  weight = noise.ElboWeight()
  theirs = 0.3

  def integrand(z, x, mean):
    """E over the noise of λ ‖D − x‖² at one level."""
    sigma = law.sigma(z)
    # D − x = (σ n + σ² (μ − x)) / (1 + σ²) in one dimension.
    square = (sigma**2 + sigma**4 * (mean - x) ** 2) / (1 + sigma**2) ** 2
    return weight(sigma, law) * square

  with jax.enable_x64(True):
    z = jnp.linspace(-6, 6, 2001)
    for x in (-0.7, 0.4):
      gap = integrand(z, x, 0.0) - integrand(z, x, theirs)
      got = integrate.trapezoid(stats.norm.pdf(z) * gap, z)
      wanted = stats.norm.logpdf(x, theirs) - stats.norm.logpdf(x, 0)
      assert got == pytest.approx(wanted, rel=1e-3)
  # And the model draws that integrand: its mean over many rows.
  model = diffusion.Diffusion(
    denoiser=Gaussian(),
    example_shape=(1, 1, 1),
    num_classes=0,
    weight=weight,
    noise=law,
  )
  rows = 60_000
  batch = likelihood.Batch(
    jnp.full((rows, 1, 1, 1), 0.4), jnp.zeros(rows, int), jnp.arange(rows)
  )
  keys = jax.random.split(rng.stream(0), rows)
  ratio, _ = jax.jit(model.log_ratio)(theirs, 0.0, {}, batch, keys)
  wanted = stats.norm.logpdf(0.4, theirs) - stats.norm.logpdf(0.4, 0)
  error = float(np.std(ratio)) / np.sqrt(rows)
  assert abs(float(np.mean(ratio)) - wanted) < 4 * error
