"""Guidance: by a second network, and by a discriminator."""

import dataclasses
import types

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.method import diffusion
from ddo_jax.method import noise
from ddo_jax.models import discriminator as discriminator_lib
from ddo_jax.models import sit
from ddo_jax.models import toy
from ddo_jax.samplers import ablation
from ddo_jax.samplers import contract
from ddo_jax.samplers import dpm_solver_v3
from ddo_jax.samplers import flow_ode
from ddo_jax.samplers import guidance
from ddo_jax.samplers import heun

SHAPE = (2, 2, 1)
SAMPLERS = [
  heun.Heun(4),
  ablation.Ablation(4),
  dpm_solver_v3.DPMSolverV3(4),
]


def keys(count):
  return rng.per_example(rng.stream(0), jnp.arange(count, dtype=jnp.uint32))


def model(x, sigma):
  return 0.5 * x + sigma[:, None, None, None]


def guide(x, sigma):
  return 0.1 * x + 1


def test_rows_are_guided_for_sigma_in_the_interval():
  sigma = jnp.array([0.5, 0.50001, 1.0, 2.0, 2.00001])
  x = jnp.arange(20.0).reshape(5, *SHAPE)
  got = guidance.guided(model, guide, 1.7, 0.5, 2.0)(x, sigma)
  strong, weak = model(x, sigma), guide(x, sigma)
  np.testing.assert_array_equal(got[jnp.array([0, 4])], strong[::4])
  expected = weak + 1.7 * (strong - weak)
  np.testing.assert_allclose(got[1:4], expected[1:4], rtol=1e-6)
  assert float(jnp.abs(expected - strong)[1:4].max()) > 0.1


@pytest.mark.parametrize('sampler', SAMPLERS, ids=lambda s: type(s).__name__)
def test_the_guide_is_not_evaluated_elsewhere(sampler):
  asked, guided = [], []

  def watched(denoise, calls):
    def call(x, sigma):
      def keep(s):
        return calls.append(float(s))

      jax.debug.callback(keep, sigma[0], ordered=True)
      return denoise(x, sigma)

    return call

  denoise = guidance.guided(
    watched(model, asked), watched(guide, guided), 2.0, 0.01, 20.0
  )
  sampler(denoise, SHAPE, keys(2))  # the steps are one compiled scan
  jax.effects_barrier()
  assert guided == [s for s in asked if 0.01 < s <= 20]
  assert 0 < len(guided) < len(asked)


@pytest.mark.parametrize('sampler', SAMPLERS, ids=lambda s: type(s).__name__)
def test_the_contract(sampler):
  plain = dataclasses.replace(sampler, guidance_min=0.1)
  guided = dataclasses.replace(plain, guidance=3.0, discriminator=2.0)
  assert isinstance(guided, contract.Sampler)
  assert guided.drives == 'denoise'
  assert guided.unguided() == plain
  assert hash(guided.unguided()) != hash(guided)


def test_an_empty_interval_is_a_mistake():
  with pytest.raises(errors.UserError, match='guidance_min is 3'):
    guidance.guided(model, guide, 2.0, 3.0, 2.0)


class Constant(nn.Module):
  """A denoiser that answers with its weight of the label."""

  width: int

  @nn.compact
  def __call__(self, x, sigma, label):
    values = self.param('values', nn.initializers.normal(), (self.width,))
    return jnp.broadcast_to(values[label][:, None, None, None], x.shape)


class Unconditional(nn.Module):
  """A denoiser of other weights, that knows no labels."""

  @nn.compact
  def __call__(self, x, sigma, label):
    bias = self.param('bias', nn.initializers.normal(), ())
    return jnp.full_like(x, bias)


def guided_model(num_classes=2, guide=None):
  return diffusion.Diffusion(
    denoiser=Constant(num_classes + 1),
    example_shape=SHAPE,
    num_classes=num_classes,
    weight=noise.EdmWeight(0.5),
    guide=guide,
  )


PARAMS = {'values': jnp.array([1.0, 2.0, 5.0])}


def draw(model, frozen, sampler):
  x = model.sample(PARAMS, frozen, jnp.array([0, 1]), keys(2), sampler)
  return np.asarray(x)[:, 0, 0, 0]


@pytest.mark.parametrize(
  'guide, weights, expected',
  [
    # Classifier-free: towards the label's answer from that without label, 5.
    (None, None, [5 + 3 * (1 - 5), 5 + 3 * (2 - 5)]),
    # Autoguidance by weights of the same network: the guide's own labels.
    (None, {'values': jnp.array([0.0, 3.0, 9.0])}, [3.0, 3 + 3 * (2 - 3)]),
    # Another network, with other weights.
    (Unconditional(), {'bias': jnp.array(4.0)}, [4 - 9.0, 4 - 6.0]),
  ],
)
def test_which_guide_it_is(guide, weights, expected):
  frozen = {} if weights is None else {'guide': weights}
  sampler = heun.Heun(4, guidance=3.0)
  # A constant D is where Heun's method ends.
  x = draw(guided_model(guide=guide), frozen, sampler)
  np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('kind', [heun.Heun, ablation.Ablation])
def test_the_interval_comes_from_the_sampler(kind):
  # The last call, at σ = 0.002, decides where a constant D ends.
  for interval, expected in (
    ((0.001, 0.003), [-7, -4]),
    ((0.003, 80.0), [1, 2]),
    ((0.0, 0.001), [1, 2]),
  ):
    low, high = interval
    sampler = kind(4, guidance=3.0, guidance_min=low, guidance_max=high)
    x = draw(guided_model(), {}, sampler)
    np.testing.assert_allclose(x, expected, rtol=1e-3)


def test_dpm_solver_v3_takes_the_interval_too():
  wide = dpm_solver_v3.DPMSolverV3(8, guidance=3.0)
  never = dpm_solver_v3.DPMSolverV3(8, guidance=3.0, guidance_min=80.0)
  plain = dpm_solver_v3.DPMSolverV3(8)
  x = draw(guided_model(), {}, plain)
  np.testing.assert_allclose(draw(guided_model(), {}, never), x, rtol=1e-6)
  np.testing.assert_allclose(
    draw(guided_model(), {}, wide), [-7, -4], rtol=0.02
  )


def test_a_model_without_labels_needs_a_guide():
  params = {'values': jnp.array([1.0])}
  labels, sampler = jnp.zeros(2, jnp.int32), heun.Heun(4, guidance=3.0)
  sample = guided_model(num_classes=0).sample
  with pytest.raises(errors.UserError, match='no guide was given'):
    sample(params, {}, labels, keys(2), sampler)


# --- By a discriminator -------------------------------------------------------

# The mean and the standard deviation of two Gaussians.
DATA = (0.7, 0.5)
MODEL = (-0.4, 0.9)


def gaussian_denoiser(of):
  mean, deviation = of

  def denoise(x, sigma):
    variance = sigma[:, None, None, None] ** 2
    return (deviation**2 * x + variance * mean) / (deviation**2 + variance)

  return denoise


def gaussian_velocity(of):
  """Returns E[x₀ − n] given t x₀ + (1 − t) n."""
  mean, deviation = of

  def velocity(x, t):
    t = t[:, None, None, None]
    variance = (t * deviation) ** 2 + (1 - t) ** 2
    slope = (t * deviation**2 - (1 - t)) / variance
    return mean + slope * (x - t * mean)

  return velocity


def best_logit(x, sigma):
  """Returns the log-ratio of the two at noise levels."""

  def log_density(of):
    mean, deviation = of
    spread = jnp.sqrt(deviation**2 + sigma**2)[:, None, None, None]
    density = jax.scipy.stats.norm.logpdf(x, mean, spread)
    return jnp.sum(density, axis=(1, 2, 3))

  return log_density(DATA) - log_density(MODEL)


def test_the_best_discriminator_gives_the_denoiser_of_the_data():
  with jax.enable_x64(True):
    sigma = jnp.geomspace(0.06, 80, 5)
    x = jnp.linspace(-2, 2, 20).reshape(5, *SHAPE) * (
      1 + sigma[:, None, None, None]
    )
    got = guidance.corrected(
      gaussian_denoiser(MODEL), best_logit, 1.0, 0.05, 80.0
    )(x, sigma)
    wanted = gaussian_denoiser(DATA)(x, sigma)
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)
    apart = gaussian_denoiser(MODEL)(x, sigma) - wanted
    assert jnp.abs(apart).min(axis=(1, 2, 3)).min() > 1e-3


def test_the_best_discriminator_gives_the_velocity_of_the_data():
  with jax.enable_x64(True):
    t = jnp.array([0.02, 0.2, 0.5, 0.9, 0.95])
    x = jnp.linspace(-2, 2, 20).reshape(5, *SHAPE)
    got = guidance.corrected_velocity(
      gaussian_velocity(MODEL), best_logit, 1.0, 0.05, 80.0
    )(x, t)
    wanted = gaussian_velocity(DATA)(x, t)
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)
    apart = gaussian_velocity(MODEL)(x, t) - wanted
    assert jnp.abs(apart).min(axis=(1, 2, 3)).min() > 1e-3


CORRECTED = [
  (heun.Heun(32), guidance.corrected, gaussian_denoiser),
  (flow_ode.FlowODE(64), guidance.corrected_velocity, gaussian_velocity),
]


@pytest.mark.parametrize(
  'sampler, correct, model_of', CORRECTED, ids=['Heun', 'FlowODE']
)
def test_its_samples_are_of_the_data(sampler, correct, model_of):
  corrected = correct(model_of(MODEL), best_logit, 1.0, 0.0, 80.0)
  drawn = np.asarray(sampler(corrected, SHAPE, keys(2_000)), np.float64)
  # Five standard errors of 8,000 numbers.
  mean, deviation = DATA
  assert abs(drawn.mean() - mean) < 5 * deviation / 8_000**0.5
  assert abs(drawn.std() / deviation - 1) < 5 / 16_000**0.5


def test_rows_are_corrected_for_sigma_in_the_interval():
  sigma = jnp.array([0.5, 0.50001, 1.0, 2.0, 2.00001])
  x = jnp.arange(20.0).reshape(5, *SHAPE)
  got = guidance.corrected(model, best_logit, 1.7, 0.5, 2.0)(x, sigma)
  plain = model(x, sigma)
  np.testing.assert_array_equal(got[jnp.array([0, 4])], plain[::4])
  slope = jax.vmap(jax.grad(lambda x, s: best_logit(x[None], s[None])[0]))
  wanted = plain + 1.7 * sigma[:, None, None, None] ** 2 * slope(x, sigma)
  np.testing.assert_allclose(got[1:4], wanted[1:4], rtol=1e-5)
  assert float(jnp.abs(wanted - plain)[1:4].min()) > 0.01
  with pytest.raises(errors.UserError, match='discriminator_min is 2'):
    guidance.corrected(model, best_logit, 1.0, 2.0, 2.0)


def test_velocities_are_corrected_for_sigma_in_the_interval():
  def slope(sigma):
    return jnp.log((2.2 - sigma) * (sigma - 0.45))  # NaN outside

  def logit(x, sigma):
    return jnp.sum(x, axis=(1, 2, 3)) * slope(sigma)

  # At these times σ is none, 2.3, 1.5, 0.7, 0.4 and 0.
  t = jnp.array([0.0, 0.3, 0.4, 0.6, 0.7, 1.0])
  x = jnp.arange(24.0).reshape(6, *SHAPE)
  velocity = gaussian_velocity(MODEL)
  got = guidance.corrected_velocity(velocity, logit, 1.7, 0.5, 2.0)(x, t)
  plain = velocity(x, t)
  outside = jnp.array([0, 1, 4, 5])
  np.testing.assert_array_equal(got[outside], plain[outside])
  now = t[2:4, None, None, None]
  moved = 1.7 * (1 - now) / now**2 * slope((1 - now) / now)
  np.testing.assert_allclose(got[2:4], plain[2:4] + moved, rtol=1e-5)
  assert float(jnp.abs(moved).min()) > 0.01


@pytest.mark.parametrize('sampler', SAMPLERS, ids=lambda s: type(s).__name__)
def test_the_discriminator_is_not_asked_elsewhere(sampler):
  asked, judged = [], []

  def keep(into, s):
    return into.append(float(s))

  def denoise(x, sigma):
    jax.debug.callback(lambda s: keep(asked, s), sigma[0], ordered=True)
    return model(x, sigma)

  def logit(x, sigma):
    jax.debug.callback(lambda s: keep(judged, s), sigma[0], ordered=True)
    return best_logit(x, sigma)

  sampler(guidance.corrected(denoise, logit, 2.0, 0.01, 20.0), SHAPE, keys(2))
  jax.effects_barrier()
  assert judged == [s for s in asked if 0.01 < s <= 20]
  assert 0 < len(judged) < len(asked)


def test_a_learned_variance_is_left_as_it_is():
  def with_variance(x, sigma):
    return jnp.concatenate([model(x, sigma), x + 9], axis=-1)

  x, sigma = jnp.ones((2, *SHAPE)), jnp.array([1.0, 2.0])
  got = guidance.corrected(with_variance, best_logit, 1.0, 0.0, 80.0)(x, sigma)
  wanted = guidance.corrected(model, best_logit, 1.0, 0.0, 80.0)(x, sigma)
  np.testing.assert_allclose(got[..., :1], wanted, rtol=1e-6)
  np.testing.assert_array_equal(got[..., 1:], x + 9)


KINDS = {
  'mlp': discriminator_lib.VectorNetwork,
  'unet': discriminator_lib.ImageNetwork,
}


@pytest.mark.parametrize('network', KINDS)
def test_a_fresh_discriminator_changes_no_bit(network):
  plain = toy.ToyConfig(network, 8, 1, (4, 4, 1), 3).build()
  settings = discriminator_lib.DiscriminatorConfig(hidden=8, blocks=1)
  fresh = settings.beside(plain)
  assert isinstance(fresh.network, KINDS[network])
  numbers = np.random.default_rng(0)

  def normal(leaf):
    return 0.3 * numbers.standard_normal(leaf.shape, np.float32)

  weights = jax.jit(fresh.init)(rng.stream(1))
  moved = jax.tree.map(lambda leaf: leaf + normal(leaf), weights)
  labels = jnp.arange(4) % 3
  x, sigma = normal(jnp.zeros((4, 4, 4, 1))), jnp.geomspace(0.1, 10, 4)

  @jax.jit
  def denoise(x, sigma):
    return model(x, 1 / sigma)

  @jax.jit
  def corrected(weights):
    def logit(x, sigma):
      return fresh.logit(weights, x, sigma, labels)

    return guidance.corrected(denoise, logit, 2.0, 0.0, 80.0)(x, sigma)

  unguided = denoise(x, sigma)
  np.testing.assert_array_equal(corrected(weights), unguided)
  assert jnp.abs(corrected(moved) - unguided).max() > 1e-3


class Sum(nn.Module):
  """A discriminator that likes brightness."""

  def __call__(self, x, sigma, label):
    return jnp.sum(x, axis=(1, 2, 3))


def test_what_the_sampler_asks_for():
  corrected = guided_model().with_discriminator(Sum())
  frozen = {'discriminator': {}}
  # A constant D is where Heun's method ends; the last call is at σ = 0.002.
  for weight, interval, moved in (
    (5e4, (0.001, 80.0), 0.2),
    (5e4, (0.001, 0.0019), 0.0),
  ):
    low, high = interval
    sampler = heun.Heun(
      4,
      discriminator=weight,
      discriminator_min=low,
      discriminator_max=high,
    )
    x = draw(corrected, frozen, sampler)
    np.testing.assert_allclose(x, [1 + moved, 2 + moved], rtol=1e-4)
  # Without a weight nobody asks the discriminator, nor misses its params.
  np.testing.assert_allclose(draw(corrected, {}, heun.Heun(4)), [1, 2])


def test_a_discriminator_that_is_not_there_is_a_mistake():
  sampler = heun.Heun(4, discriminator=1.0)
  with pytest.raises(errors.UserError, match='no discriminator was given'):
    draw(guided_model(), {}, sampler)


def test_the_velocity_of_a_model_is_corrected():
  config = sit.SitConfig(
    image_shape=(4, 4, 1), patch=2, width=8, depth=1, heads=1, num_classes=3
  )
  model = config.build()
  # The last layer of a fresh network is zero.
  params = jax.jit(model.init)(rng.stream(0))
  params = jax.tree.map(lambda leaf: leaf + 0.1, params)

  def draw(network, weights, weight):
    return model.with_discriminator(network).sample(
      params,
      {'discriminator': weights},
      jnp.zeros(2, jnp.int32),
      keys(2),
      flow_ode.FlowODE(2, 'euler', discriminator=weight),
    )

  plain = draw(None, {}, 0.0)
  # Of the steps from t = 0 and t = ½ the second is longer by ½ w (1 − t)/t².
  np.testing.assert_allclose(draw(Sum(), {}, 3.0), plain + 3, atol=1e-5)
  settings = discriminator_lib.DiscriminatorConfig('mlp', 8, 0)
  fresh = settings.beside(model)
  weights = jax.jit(fresh.init)(rng.stream(0))
  got = draw(fresh.network, weights, 3.0)
  np.testing.assert_allclose(got, plain, atol=1e-6)


def test_tokens_have_none():
  tokens = types.SimpleNamespace(offers=('stages',))
  with pytest.raises(errors.UserError, match='draws tokens: take'):
    discriminator_lib.DiscriminatorConfig().beside(tokens)
