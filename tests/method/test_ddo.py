"""The objective, on log-ratios given by hand."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from ddo_jax.method import ddo
from ddo_jax.method import objective

R = np.random.default_rng(0)
REAL, FAKE = R.normal(size=(2, 32)).astype(np.float32) * 8
ALPHA, BETA = jnp.float32(2.5), jnp.float32(0.3)
DDO = ddo.DDO(alpha=ALPHA, beta=BETA)
PLAIN = objective.Rows.plain(32)


def rows(dropped):
  label = jnp.zeros(32, jnp.int32)
  return objective.Rows(jnp.asarray(dropped), label, label)


def loss(real, fake, rows=PLAIN, objective=DDO):
  first, second = objective.loss(real, fake, rows)
  return jnp.mean(first) + jnp.mean(second)


def test_the_loss_is_equation_13():
  terms = DDO.loss(REAL, FAKE, PLAIN)
  # log σ by scipy, in float64.
  real = -special.log_expit(0.3 * REAL.astype(np.float64))
  fake = -2.5 * special.log_expit(-0.3 * FAKE.astype(np.float64))
  chex.assert_trees_all_close(terms, (real, fake), rtol=1e-5)


def test_chance_is_the_loss_at_the_reference():
  dropped = R.random(32) < 0.3
  zero = jnp.zeros(32)
  d = dropped.mean()
  expected = math.log(2) * (d * 2.5 + (1 - d) * (1 + 2.5))
  got = loss(zero, zero, rows(dropped))
  assert float(got) == pytest.approx(expected)
  chance = sum(jnp.mean(term) for term in DDO.chance(rows(dropped)))
  assert float(chance) == pytest.approx(expected)


def test_its_slope_at_the_reference_is_half_beta_times_the_weights():
  dropped = R.random(32) < 0.3
  weights = ddo.row_weights(dropped, ALPHA)
  zero = jnp.zeros(32)
  real, fake = jax.grad(loss, (0, 1))(zero, zero, rows(dropped))
  chex.assert_trees_all_close(real, -BETA / 2 * weights[0] / 32, rtol=1e-6)
  chex.assert_trees_all_close(fake, BETA / 2 * weights[1] / 32, rtol=1e-6)


@pytest.mark.parametrize('size', [1.0, 1e2, 1e4])
@pytest.mark.parametrize('sign', [-1, 1])
def test_loss_and_gradient_are_finite_for_any_logit(size, sign):
  r = jnp.full(32, sign * size / 0.3)
  even = ddo.DDO(alpha=jnp.float32(1), beta=BETA)
  value_and_grad = jax.value_and_grad(loss, (0, 1, 3))
  value, grads = value_and_grad(r, -r, PLAIN, even)
  chex.assert_tree_all_finite((value, grads))
  expected = 2 * -special.log_expit(np.float64(sign * size))
  assert float(value) == pytest.approx(expected, rel=1e-5)
  # A row that is far wrong keeps its whole slope: it is not cut off.
  slope = -0.3 / 32 * special.expit(-sign * size)
  np.testing.assert_allclose(grads[0], slope, rtol=1e-5, atol=1e-30)


def test_rows_without_label_get_no_negative_signal():
  dropped = np.array([True, False])
  real, fake = ddo.row_weights(dropped, jnp.float32(2.5))
  np.testing.assert_array_equal(real, [2.5, 1])
  np.testing.assert_array_equal(fake, [0, 2.5])
  real, fake = ddo.row_weights(dropped, jnp.float32(0.5))
  np.testing.assert_array_equal(real, [1, 1])
  np.testing.assert_array_equal(fake, [0, 0.5])


@pytest.mark.parametrize(('alpha', 'divisor'), [(0.5, 1), (1, 1), (50, 50)])
def test_the_normaliser(alpha, divisor):
  plain = ddo.DDO(alpha=jnp.float32(alpha), beta=BETA)
  divided = ddo.DDO(alpha=jnp.float32(alpha), beta=BETA, normalize=True)
  expected = loss(REAL, FAKE, objective=plain) / divisor
  got = loss(REAL, FAKE, objective=divided)
  assert float(got) == pytest.approx(float(expected), rel=1e-6)


def test_shapes_must_agree():
  with pytest.raises(AssertionError):
    DDO.loss(REAL, FAKE[:1], PLAIN)


@pytest.mark.parametrize('beta', [0.5, 1.0, 2.0])
def test_the_optimum_of_theorem_3_3_is_stationary(beta):
  reference, data = R.dirichlet(np.ones(6), 2)
  with jax.enable_x64(True):
    optimum, alpha = ddo.optimal_density(reference, data, beta)
    assert float(optimum.sum()) == pytest.approx(1)

    def population(log_p):
      r = jax.nn.log_softmax(log_p) - jnp.log(reference)
      one = ddo.DDO(alpha=1.0, beta=beta)
      real, fake = one.loss(r, r, objective.Rows.plain(6))
      return jnp.sum(data * real + alpha * reference * fake)

    slope = jax.grad(population)(jnp.log(optimum))
    np.testing.assert_allclose(slope, 0, atol=1e-12)
  if beta == 1:
    np.testing.assert_allclose(optimum, data, rtol=1e-6)
    assert float(alpha) == pytest.approx(1)


def diagnose(real, fake, noise_bin=None, objective=DDO):
  if noise_bin is None:
    noise_bin = jnp.zeros(len(real), jnp.int32)
  return ddo.diagnostics(
    jnp.array(real), jnp.array(fake), noise_bin, 4, objective.logit
  )


def test_ties_count_half():
  assert diagnose([0.0, 0.0], [0.0, 0.0])['accuracy'] == 0.5
  assert diagnose([0.0, 3.0], [-1.0, 2.0])['accuracy'] == 0.625
  assert diagnose([1.0, 2.0], [-1.0, -2.0])['accuracy'] == 1


def test_diagnostics_are_those_of_numpy():
  got = diagnose(REAL, FAKE)
  logits = 0.3 * np.stack([REAL, -FAKE])
  expected = {
    'accuracy': np.mean(logits > 0),
    'saturated': np.mean(np.abs(logits) > 4),
    'max_abs_logit': np.max(np.abs(logits)),
    'margin': REAL.mean() - FAKE.mean(),
    'log_ratio_real_mean': REAL.mean(),
    'log_ratio_fake_std': FAKE.std(),
    'log_ratio_real_p5': np.percentile(REAL, 5),
    'log_ratio_fake_p95': np.percentile(FAKE, 95),
  }
  for name, value in expected.items():
    assert float(got[name]) == pytest.approx(value, rel=1e-4), name


def test_the_histogram_counts_every_row():
  r = np.array([-100.0, -0.1, 0.1, 0.2, 100.0, 100.0], np.float32)
  one = ddo.DDO(alpha=ALPHA, beta=jnp.float32(1))
  counts = diagnose(r, -r, objective=one)['logit_real_histogram']
  assert counts.shape == (ddo.HISTOGRAM_EDGES.size + 1,)
  assert int(counts.sum()) == 6
  assert (int(counts[0]), int(counts[-1])) == (1, 2)
  assert (int(counts[25]), int(counts[26])) == (2, 1)  # 0 is mid-bin


def test_means_by_noise_level_leave_empty_bins_undefined():
  noise_bin = jnp.array([0, 2, 2, 3])
  means = diagnose([1.0, 2.0, 4.0, 5.0], [0.0] * 4, noise_bin)
  np.testing.assert_array_equal(
    means['log_ratio_real_by_noise_level'], [1, np.nan, 3, 5]
  )
