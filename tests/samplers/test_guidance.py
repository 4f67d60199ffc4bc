"""Guidance by a second network: its interval, its weights, its labels."""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.method import diffusion
from ddo_jax.method import noise
from ddo_jax.samplers import ablation
from ddo_jax.samplers import contract
from ddo_jax.samplers import dpm_solver_v3
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
  guided = dataclasses.replace(sampler, guidance=3.0, guidance_min=0.1)
  assert isinstance(guided, contract.Sampler)
  assert guided.drives == 'denoise'
  assert guided.unguided() == dataclasses.replace(guided, guidance=1.0)
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
