"""Preconditionings against the original's numbers."""

from collections.abc import Callable

from flax import linen as nn
import golden_io
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.models import precond


@pytest.fixture(name='golden')
def fixture_golden():
  return golden_io.load('edm_precond.npz')


@pytest.mark.golden
@pytest.mark.parametrize('name', ['edm', 'vp', 've'])
def test_coefficients(golden, name):
  """edm_precond.npz: edm, vp, ve."""
  with golden_io.precision('f64'):
    law = precond.wrap(name, None, 0.5)
    got = np.stack(law.coefficients(jnp.asarray(golden['sigma'])))
  np.testing.assert_allclose(got, golden[name], rtol=1e-12)


@pytest.mark.golden
def test_schedule_of_vp(golden):
  """edm_precond.npz: vp_sigma_of_t, and its inverse."""
  law = precond.VPPrecond(None)
  with golden_io.precision('f64'):
    sigma = law.sigma(jnp.asarray(golden['vp_t']))
    np.testing.assert_allclose(sigma, golden['vp_sigma_of_t'], rtol=1e-10)
    np.testing.assert_allclose(law.time(sigma), golden['vp_t'], rtol=1e-9)


@pytest.mark.golden
@pytest.mark.parametrize('name', ['vp', 've', 'iddpm'])
def test_sigma_range(golden, name):
  """edm_precond.npz: *_sigma_min_max, float32 artefacts and all."""
  got = precond.wrap(name, None, 0.5).sigma_range
  rtol = 1e-5 if name == 'iddpm' else 1e-12
  wanted = golden[f'{name}_sigma_min_max']
  np.testing.assert_allclose(got, wanted, rtol=rtol)


@pytest.mark.golden
def test_levels_of_iddpm(golden):
  """edm_precond.npz: iddpm_u, iddpm_round_*, iddpm_c_noise."""
  law = precond.IDDPMPrecond(None)
  u, wanted = precond.iddpm_sigmas(), golden['iddpm_u']
  assert u.dtype == np.float32
  # One unit in the last place of 1 + u² is 1.3e-5 of such small levels: there
  # it shows which way the sine's last bit was rounded.
  close = np.isclose(u, wanted, rtol=1e-5, atol=0)
  assert set(np.flatnonzero(~close)) <= {958, 964}
  np.testing.assert_allclose(u, wanted, rtol=1.4e-5)
  sigma = jnp.asarray(golden['sigma'], jnp.float32)
  np.testing.assert_array_equal(law.index(sigma), golden['iddpm_round_index'])
  rounded = law.round_sigma(sigma)
  np.testing.assert_allclose(rounded, golden['iddpm_round_sigma'], rtol=1e-5)
  c_noise = law.coefficients(sigma).c_noise
  np.testing.assert_array_equal(c_noise, golden['iddpm_c_noise'])


class _Channels(nn.Module):
  """A network whose output's channels are 1, 2, … times its arguments."""

  channels: int

  def __call__(self, x, c_noise, label, offset=0.0):
    scale = (c_noise * (1 + label))[:, None, None, None]
    channels = jnp.arange(1.0, self.channels + 1)[None, None, None, :]
    return x[..., :1] * scale * channels + offset


def test_composition():
  """D = c_skip x + c_out F(c_in x, c_noise, label); a variance is dropped."""
  x = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 2, 2, 3)
  sigma, label = np.float32([0.3, 5.0]), np.int32([0, 2])
  for channels in (3, 6):
    denoiser = precond.EdmPrecond(_Channels(channels), 0.5)
    got = denoiser.apply({}, x, sigma, label, offset=0.25)
    s = sigma[:, None, None, None]
    f = x[..., :1] / np.sqrt(s**2 + 0.25) * np.log(s) / 4
    f = f * (1 + label[:, None, None, None]) * np.arange(1, 4) + 0.25
    wanted = 0.25 / (s**2 + 0.25) * x + 0.5 * s / np.sqrt(s**2 + 0.25) * f
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


class _Target(nn.Module):
  """A network that answers with a function of its input and c_noise."""

  target: Callable

  def __call__(self, z, c_noise, label):
    return self.target(z, c_noise[:, None, None, None])


# Law 6 of the preconditionings: for Gaussian data x₀ ~ N(MEAN, SPREAD²) the
# best F is the conditional expectation of its regression target, given what
# the network sees. Each is written here from its own paper's definition: the
# noise level is read off c_noise, and no coefficient of D is used.
MEAN, SPREAD = 0.3, 0.7


def _expected(z, data, noise, target_data, target_noise):
  """E[target | z] where z and the target are mixtures of x₀ and n.

  Args:
    z: what the network sees, data·x₀ + noise·n.
    data: the weight of x₀ in z.
    noise: the weight of n in z.
    target_data: the weight of x₀ in the target.
    target_noise: the weight of n in the target.
  """
  covariance = target_data * data * SPREAD**2 + target_noise * noise
  variance = data**2 * SPREAD**2 + noise**2
  return target_data * MEAN + covariance / variance * (z - data * MEAN)


def _angle(c_noise, sigma_data=1.0):
  """The data's and the noise's weight on the circle, from ln σ / 4."""
  angle = jnp.arctan(jnp.exp(4 * c_noise) / sigma_data)
  return jnp.cos(angle), jnp.sin(angle)


def _edm(z, c_noise):
  # EDM's F is minus the velocity of data in units of σ_d.
  data, noise = _angle(c_noise, 0.5)
  return _expected(z, data / 0.5, noise, noise / 0.5, -data)


def _vp(z, c_noise):
  t = c_noise / 999
  kept = jnp.exp(-19.9 * t**2 / 4 - 0.1 * t / 2)  # √ᾱ(t)
  return _expected(z, kept, jnp.sqrt(1 - kept**2), 0, 1)


def _ve(z, c_noise):
  return _expected(z, 1, 2 * jnp.exp(c_noise), 0, -1)


def _iddpm(z, c_noise):
  sigma = jnp.asarray(precond.iddpm_sigmas())[999 - c_noise.astype(int)]
  angle = jnp.arctan(sigma.astype(z.dtype))
  mean = _expected(z, jnp.cos(angle), jnp.sin(angle), 0, 1)
  return jnp.concatenate([mean, jnp.full_like(mean, 9.0)], axis=-1)


def _x(z, c_noise):
  return _expected(z, *_angle(c_noise), 1, 0)


def _epsilon(z, c_noise):
  return _expected(z, *_angle(c_noise), 0, 1)


def _velocity(z, c_noise):
  data, noise = _angle(c_noise)
  return _expected(z, data, noise, -noise, data)


def _flow(z, c_noise):
  return _expected(z, 1 - c_noise, c_noise, -1, 1)


@pytest.mark.parametrize(
  ('name', 'target'),
  [
    ('edm', _edm),
    ('vp', _vp),
    ('ve', _ve),
    ('iddpm', _iddpm),
    ('x', _x),
    ('epsilon', _epsilon),
    ('velocity', _velocity),
    ('flow', _flow),
  ],
)
def test_every_preconditioning_gives_the_posterior_mean(name, target):
  """Law 6: D* = (s² x + σ² μ)/(s² + σ²), whatever the network predicts."""
  # iDDPM knows no noise levels but its own.
  sigma = np.float64(precond.iddpm_sigmas())[[997, 900, 500, 300, 100]]
  assert sigma[0] < 0.02 < 5 < sigma[-1]
  x = np.random.default_rng(0).normal(size=(5, 2, 2, 3))
  x = MEAN + x * np.sqrt(SPREAD**2 + sigma**2)[:, None, None, None]
  s = sigma[:, None, None, None]
  with golden_io.precision('f64'):
    denoiser = precond.wrap(name, _Target(target), 0.5)
    got = denoiser.apply({}, jnp.asarray(x), jnp.asarray(sigma), np.zeros(5))
  wanted = (SPREAD**2 * x + s**2 * MEAN) / (SPREAD**2 + s**2)
  np.testing.assert_allclose(got, wanted, rtol=1e-7, atol=1e-9)
