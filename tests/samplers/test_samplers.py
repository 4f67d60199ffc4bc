"""Heun's method on Gaussian data, where everything is known; guidance."""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax import rng
from ddo_jax.method import diffusion
from ddo_jax.method import noise
from ddo_jax.samplers import guidance
from ddo_jax.samplers import heun

S = 0.5  # standard deviation of the data
SHAPE = (2, 2, 1)


def denoise(x, sigma):
  """The posterior mean where the data is N(0, S²)."""
  variance = (sigma**2)[:, None, None, None]
  return x * S**2 / (S**2 + variance)


def keys(count):
  return rng.per_example(rng.stream(0), jnp.arange(count, dtype=jnp.uint32))


def sample(sampler, rows):
  return jax.jit(lambda rows: sampler(denoise, SHAPE, rows))(rows)


def start(rows):
  """The unit normal numbers that a sampler starts from."""
  draw = jax.vmap(lambda key: jax.random.normal(key, SHAPE))
  return draw(rng.split_rows(rows, 'start'))


def test_heun_is_of_second_order():
  def error(num_steps):
    # So small a sigma_min that the last step, an Euler step, is exact.
    sampler = heun.Heun(num_steps, sigma_min=1e-6, sigma_max=10.0, rho=3.0)
    rows = keys(4)
    # dx/dσ = xσ/(S² + σ²): x shrinks as √(S² + σ²).
    exact = 10 * start(rows) * S / np.sqrt(S**2 + 10**2)
    return float(jnp.abs(sample(sampler, rows) - exact).max())

  with jax.enable_x64(True):
    errors = np.array([error(n) for n in (32, 64, 128)])
  ratios = errors[:-1] / errors[1:]
  np.testing.assert_allclose(ratios, 4, rtol=0.1)
  assert errors[-1] < 1e-3


def test_the_grid_of_noise_levels():
  sigmas = heun.Heun(18, 0.002, 80.0, 7.0).sigmas()
  assert sigmas.shape == (19,)
  np.testing.assert_allclose(sigmas[[0, 17, 18]], [80, 0.002, 0], rtol=1e-12)
  # Equal steps of σ^(1/ρ).
  np.testing.assert_allclose(np.diff(sigmas[:18] ** (1 / 7), 2), 0, atol=1e-12)


def test_nfe():
  calls, num_steps = [], 4

  def counted(x, sigma):
    calls.append(float(sigma[0]))
    return denoise(x, sigma)

  sampler = heun.Heun(num_steps)
  rows = keys(1)
  with jax.disable_jit():
    sampler(counted, SHAPE, rows)
  assert len(calls) == 2 * num_steps - 1
  # Each noise level twice, as an end and as a start, but the first.
  levels = np.repeat(sampler.sigmas()[:-1], 2)[1:]
  np.testing.assert_allclose(calls, levels, rtol=1e-5)


@pytest.mark.parametrize('churn', [0.0, 10.0, 1e9])
def test_samples_keep_the_deviation_of_the_data(churn):
  sampler = heun.Heun(80, 0.002, 20.0, 7.0, churn=churn)
  x = sample(sampler, keys(4096))
  # 16,384 numbers: their deviation is known to 0.6 %.
  assert float(x.std()) == pytest.approx(S, rel=0.025)
  assert float(x.mean()) == pytest.approx(0, abs=0.02)


def test_churn_stays_between_its_limits():
  rows = keys(8)
  plain = heun.Heun(6)
  outside = dataclasses.replace(plain, churn=20.0, churn_min=81.0)
  inside = dataclasses.replace(plain, churn=20.0, churn_min=0.05, churn_max=50)
  x = sample(plain, rows)
  # Another program may round otherwise; noise would show.
  np.testing.assert_allclose(sample(outside, rows), x, rtol=1e-5)
  assert float(jnp.abs(sample(inside, rows) - x).max()) > 0.1


def test_a_sample_depends_on_its_own_key_alone():
  sampler, rows = heun.Heun(6, churn=20.0), keys(8)
  x = sample(sampler, rows)
  halves = [sample(sampler, half) for half in (rows[:4], rows[4:])]
  np.testing.assert_allclose(np.concatenate(halves), x, rtol=1e-5)
  assert len({float(row.ravel()[0]) for row in np.asarray(x)}) == 8


def test_guidance_extrapolates_from_the_guide():
  x, sigma = start(keys(3)), jnp.ones(3)
  model, guide = denoise, lambda x, sigma: 0.1 * x + 1
  strong, weak = model(x, sigma), guide(x, sigma)
  for scale, expected in (
    (0.0, weak),
    (1.0, strong),
    (1.7, 1.7 * strong - 0.7 * weak),
  ):
    got = guidance.guided(model, guide, scale)(x, sigma)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


class Shift(nn.Module):
  """A denoiser that shows which weights and labels it was given."""

  @nn.compact
  def __call__(self, x, sigma, label):
    shift = nn.Embed(4, 1, embedding_init=nn.initializers.normal(0.3))(label)
    return denoise(x, sigma) + shift[:, None, None, :]


MODEL = diffusion.Diffusion(
  denoiser=Shift(),
  example_shape=SHAPE,
  num_classes=3,
  weight=noise.EdmWeight(S),
)
PARAMS, GUIDE = (MODEL.init(rng.stream(seed)) for seed in range(2))
LABELS, NONE = [0, 1, 2, 0], [3, 3, 3, 3]


def draw(scale, labels, frozen, params=PARAMS):
  sampler = heun.Heun(3, 0.02, 5.0, guidance=scale)
  return MODEL.sample(params, frozen, jnp.array(labels), keys(4), sampler)


def test_a_guidance_of_one_is_the_model_itself():
  x = draw(1.0, LABELS, {})
  np.testing.assert_array_equal(draw(1.0, LABELS, {'guide': GUIDE}), x)
  # The same weights with the same labels as a guide move nothing either.
  same = draw(2.0, LABELS, {'guide': PARAMS})
  np.testing.assert_allclose(same, x, rtol=1e-4, atol=1e-5)


# This model is affine in its shift, and so is what it draws.


def test_the_guide_is_the_model_without_labels():
  x, weak = draw(1.0, LABELS, {}), draw(1.0, NONE, {})
  guided = draw(3.0, LABELS, {})
  np.testing.assert_allclose(guided, weak + 3 * (x - weak), rtol=1e-3)
  assert float(jnp.abs(x - weak).max()) > 0.1


def test_a_guide_of_its_own_comes_before_that():
  x, weak = draw(1.0, LABELS, {}), draw(1.0, LABELS, {}, GUIDE)
  guided = draw(3.0, LABELS, {'guide': GUIDE})
  np.testing.assert_allclose(guided, weak + 3 * (x - weak), rtol=1e-3)
  assert float(jnp.abs(x - weak).max()) > 0.1
