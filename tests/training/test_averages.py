"""Averages of the weights against EDM2's numbers."""

import golden_io
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.method import likelihood
from ddo_jax.training import averages
from ddo_jax.training import state as state_lib


@pytest.fixture(name='golden')
def fixture_golden():
  return golden_io.load('phema.npz')


def _follow(golden, weight):
  """[96, 2]: the average by `weight`(images after the step)."""
  batch, average = int(golden['batch_size']), golden['init']
  steps = []
  for step, params in enumerate(golden['seq']):
    average = averages.update(average, params, weight((step + 1) * batch))
    steps.append(average)
  return np.stack(steps)


@pytest.mark.golden
def test_widths_and_exponents(golden):
  """phema.npz: std_table, exp_table, exp_in, exp_to_std."""
  exponents = averages.exponent(golden['std_table'])
  np.testing.assert_allclose(exponents, golden['exp_table'], rtol=1e-9)
  back = averages.relative_width(exponents)
  np.testing.assert_allclose(back, golden['std_roundtrip'], rtol=1e-12)
  widths = averages.relative_width(golden['exp_in'])
  np.testing.assert_allclose(widths, golden['exp_to_std'], rtol=1e-12)


def test_no_such_width():
  for width in (0.3, 0.0, -0.1):
    with pytest.raises(ValueError, match='must be in'):
      averages.exponent(width)


@pytest.mark.golden
def test_power_function_tracking(golden):
  """phema.npz: betas, ema, ema_target over 96 steps."""
  batch = int(golden['batch_size'])
  with golden_io.precision('f64'):
    for widths, wanted in (('stds', 'ema'), ('target_stds', 'ema_target')):
      for i, width in enumerate(golden[widths]):
        got = _follow(
          golden, lambda n, w=width: averages.power_weight(w, batch, n)
        )
        np.testing.assert_allclose(got, golden[wanted][:, i], rtol=1e-12)
    seen = batch * np.arange(1.0, 97)
    for i, width in enumerate(golden['stds']):
      betas = 1 - averages.power_weight(width, batch, seen)
      np.testing.assert_allclose(betas, golden['betas'][:, i], atol=1e-12)


@pytest.mark.golden
def test_halflife_tracking(golden):
  """phema.npz: trad_ema, whose half-life grows with the images seen."""
  half = float(golden['trad_halflife_Mimg']) * 1e6
  batch, rampup = int(golden['batch_size']), float(golden['trad_rampup'])
  with golden_io.precision('f64'):
    got = _follow(
      golden, lambda n: averages.halflife_weight(half, batch, n, rampup)
    )
  np.testing.assert_allclose(got, golden['trad_ema'], rtol=1e-12)


@pytest.mark.golden
@pytest.mark.parametrize(
  ('name', 'rampup'), [('edm_ema_beta_ramp', 0.05), ('edm_ema_beta_noramp', 0)]
)
def test_halflife_of_edm(name, rampup):
  """lr_schedule.npz: EDM's decay by the images seen before the step."""
  golden = golden_io.load('lr_schedule.npz')
  with golden_io.precision('f64'):
    seen = jnp.asarray(golden['cur_nimg'], float)
    decay = 1 - averages.halflife_weight(500e3, 512, seen, rampup)
  np.testing.assert_allclose(decay, golden[name], rtol=1e-12, atol=1e-15)


def test_long_averages_in_float32():
  """At a billion images float32 keeps the weight of the new params."""
  weight = averages.power_weight(0.05, 2048, jnp.float32(2**30))
  exact = -np.expm1((averages.exponent(0.05) + 1) * np.log1p(-(2.0**-19)))
  np.testing.assert_allclose(weight, exact, rtol=1e-6)
  weight = averages.halflife_weight(50e6, 128, jnp.float32(0), 0.0)
  np.testing.assert_allclose(weight, 1 - 0.5 ** (128 / 50e6), rtol=1e-6)


@pytest.mark.golden
def test_profiles(golden):
  """phema.npz: response_len64_ofs60, corr."""
  for width, wanted in zip(
    golden['stds'], golden['response_len64_ofs60'], strict=True
  ):
    got = averages.profile(np.arange(64), 60, width)
    np.testing.assert_allclose(got / got.sum(), wanted, rtol=1e-9)
  got = averages.correlation(
    golden['corr_a_ofs'],
    [0.05, 0.1, 0.2],
    golden['corr_b_ofs'],
    [0.1, 0.03, 0.05],
  )
  np.testing.assert_allclose(got, golden['corr'], rtol=1e-9)


def test_correlation_is_an_integral():
  t = (np.arange(100_000) + 0.5) / 100_000 * 30
  product = averages.profile(t, 30.0, 0.05) * averages.profile(t, 25.0, 0.1)
  got = averages.correlation([30.0], [0.05], [25.0], [0.1])
  np.testing.assert_allclose(got, product.mean() * 30, rtol=1e-4)


@pytest.mark.golden
def test_posthoc(golden):
  """phema.npz: posthoc_coefs, posthoc_reconstructed, real_coefs."""
  coefficients = averages.posthoc_coefficients(
    golden['posthoc_in_ofs'],
    golden['posthoc_in_std'],
    float(golden['posthoc_out_ofs']),
    golden['posthoc_out_std'],
  )
  np.testing.assert_allclose(coefficients, golden['posthoc_coefs'], atol=1e-9)
  snapshots = [
    {'weight': value, 'freqs': np.float32([0.1, 7.3])}
    for value in golden['posthoc_in_values']
  ]
  for i, wanted in enumerate(golden['posthoc_reconstructed']):
    got = averages.reconstruct(iter(snapshots), coefficients[:, i])
    np.testing.assert_allclose(got['weight'], wanted, rtol=1e-9)
    # Constants come out as they are, in their own dtype.
    assert got['freqs'].dtype == np.float32
    np.testing.assert_array_equal(got['freqs'], snapshots[0]['freqs'])
  coefficients = averages.posthoc_coefficients(
    golden['real_in_ofs'],
    golden['real_in_std'],
    float(golden['nimg'][-1]),
    golden['real_out_std'],
  )
  np.testing.assert_allclose(coefficients, golden['real_coefs'], atol=1e-9)


def test_posthoc_finds_the_average_itself():
  """The width that was tracked is reconstructed from its own snapshot."""
  got = averages.posthoc_coefficients(
    [10, 20, 20], [0.1, 0.05, 0.1], 20, [0.05]
  )
  np.testing.assert_allclose(got[:, 0], [0, 1, 0], atol=1e-12)


def test_constants_do_not_drift():
  """Bit for bit, where a weighted sum of equals would round."""
  values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
  average = values
  for step in range(20):
    average = averages.update(average, values, jnp.float32(0.1 / (step + 1)))
  np.testing.assert_array_equal(average, values)


def test_profiles_of_a_phase():
  """The train state follows every profile of its phase, from the start."""
  profiles = state_lib.Averages(
    halflife=(1000.0,), rampup=0.05, width=(0.05, 0.1)
  )
  rules = likelihood.WeightRules()
  transform = state_lib.Optimizer(0.1).transform(rules, 64, 1000)
  state = state_lib.create({'w': jnp.ones(3)}, transform, profiles)
  assert list(state.ema) == ['halflife_1000', 'power_0.050', 'power_0.100']
  wanted = {name: np.ones(3) for name in state.ema}
  step = jax.jit(
    lambda state, grads: state_lib.apply_gradients(
      state, grads, transform, profiles, rules, batch_size=64
    )
  )
  for i in range(4):
    grads = {'w': jnp.asarray([1.0, -2.0, 0.1 * i + 0.1])}
    state = step(state, grads)
    half = min(1000.0, max(64 * i * 0.05, 1e-8))
    decay = [0.5 ** (64 / half)]
    for width in profiles.width:
      decay.append((i / (i + 1)) ** (averages.exponent(width) + 1))
    for (name, old), d in zip(list(wanted.items()), decay, strict=True):
      wanted[name] = d * old + (1 - d) * np.asarray(state.params['w'])
      np.testing.assert_allclose(state.ema[name]['w'], wanted[name], rtol=1e-5)
