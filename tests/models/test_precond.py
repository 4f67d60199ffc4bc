"""Preconditionings against the original's numbers."""

from flax import linen as nn
import golden_io
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.models import layers
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
    denoiser = layers.EdmPrecond(_Channels(channels), 0.5)
    got = denoiser.apply({}, x, sigma, label, offset=0.25)
    s = sigma[:, None, None, None]
    f = x[..., :1] / np.sqrt(s**2 + 0.25) * np.log(s) / 4
    f = f * (1 + label[:, None, None, None]) * np.arange(1, 4) + 0.25
    wanted = 0.25 / (s**2 + 0.25) * x + 0.5 * s / np.sqrt(s**2 + 0.25) * f
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
