"""The f-divergences: their law, their optimum, their first gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from ddo_jax import errors
from ddo_jax.method import ddo
from ddo_jax.method import objective
from ddo_jax.method import siblings

KINDS = ('js', 'brier', 'reverse_kl', 'hellinger', 'kl', 'pearson')
ORDERS = (0.25, 0.75, 1.5)
ALL = [siblings.FDivergence(1.0, 1.0, kind, cap=50.0) for kind in KINDS]
ALL += [siblings.FDivergence(1.0, 1.0, 'order', a, 50.0) for a in ORDERS]
NAMES = [f'{f.kind}-{f.order}' for f in ALL]
PLAIN = objective.Rows.plain(9)
each = pytest.mark.parametrize('f', ALL, ids=NAMES)


def slope(function, z):
  return jax.vmap(jax.grad(function))(z)


@each
def test_the_law_of_a_conjugate_pair(f):
  """F'(z) = e^z T'(z): from it the optimum of every f follows."""
  with jax.enable_x64(True):
    z = jnp.linspace(-3, 3, 13)
    wanted = -jnp.exp(z) * slope(f.real_term, z)
    np.testing.assert_allclose(slope(f.fake_term, z), wanted, rtol=1e-9)


def test_the_generators_are_those_of_their_names():
  """T = f'(u) and F = u f'(u) − f(u) at u = e^z, scaled to f''(1) = 1/2."""
  generators = {
    'kl': lambda u: u * jnp.log(u) / 2,
    'reverse_kl': lambda u: -jnp.log(u) / 2,
    'hellinger': lambda u: (jnp.sqrt(u) - 1) ** 2,
    'pearson': lambda u: (u - 1) ** 2 / 4,
    'js': lambda u: u * jnp.log(u) - (1 + u) * jnp.log(1 + u),
  }
  with jax.enable_x64(True):
    z = jnp.linspace(-2, 2, 9)
    u = jnp.exp(z)
    for f in ALL[:6]:
      if f.kind not in generators:
        continue
      generator = generators[f.kind]
      t = slope(generator, u)
      for got, wanted in (
        (-f.real_term(z), t),
        (f.fake_term(z), u * t - generator(u)),
      ):
        constant = (got - wanted)[4]  # no loss depends on it
        np.testing.assert_allclose(got - constant, wanted, atol=1e-9)


@each
def test_law_2_the_first_gradient_is_that_of_ddo(f):
  def gradient(loss):
    def mean(real, fake):
      terms = loss.loss(real, fake, PLAIN)
      return sum(jnp.mean(term) for term in terms)

    return jax.grad(mean, (0, 1))(jnp.zeros(9), jnp.zeros(9))

  wanted = gradient(ddo.DDO(alpha=1.0, beta=1.0))
  for got, expected in zip(gradient(f), wanted, strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@each
@pytest.mark.parametrize('beta', [1.0, 0.5])
def test_law_8_the_population_optimum(f, beta):
  """Free log-ratios on a grid reach p_data, and overshoot it at β < 1."""
  draw = np.random.default_rng(0).dirichlet
  reference, data = draw(np.full(9, 3.0), 2)
  _, alpha = ddo.optimal_density(reference, data, beta)
  with jax.enable_x64(True):
    # r and not p: so the optimum is r = log(p_data / (α p_ref)) / β.
    loss = siblings.FDivergence(float(alpha), beta, f.kind, f.order, 50.0)

    @jax.jit
    @jax.value_and_grad
    def population(r):
      real, fake = loss.loss(r, r, PLAIN)
      return jnp.sum(data * real + reference * fake)

    found = optimize.minimize(
      lambda r: [np.asarray(x) for x in population(r)],
      np.zeros(9),
      jac=True,
      method='BFGS',
      options={'gtol': 1e-10},
    )
    density = reference * np.exp(found.x)
  optimum, _ = ddo.optimal_density(reference, data, beta)
  np.testing.assert_allclose(density, optimum, atol=1e-5)
  if beta == 1:
    np.testing.assert_allclose(density, data, atol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_law_2_loss_and_gradient_are_finite_for_any_logit(kind):
  f = siblings.FDivergence(2.0, 1.0, kind)

  def total(r):
    real, fake = f.loss(r, r, PLAIN)
    return jnp.sum(real + fake)

  r = jnp.array([-1e4, -1e2, -10, -5, 0, 5, 10, 1e2, 1e4])
  value, grad = jax.value_and_grad(total)(r)
  assert np.isfinite(value) and np.all(np.isfinite(grad))


def test_the_straight_line_begins_where_it_should():
  f = siblings.FDivergence(1.0, 1.0, 'kl', cap=2.0)
  z = jnp.array([1.9, 2.1, 3.0])
  wanted = [
    np.expm1(1.9),
    np.expm1(2) + 0.1 * np.exp(2),
    np.expm1(2) + np.exp(2),
  ]
  np.testing.assert_allclose(f.fake_term(z), np.array(wanted) / 2, rtol=1e-6)


def test_js_is_ddo():
  numbers = np.random.default_rng(0).normal(size=(2, 9)) * 3
  f = siblings.FDivergence(2.5, 0.3, 'js', normalize=True)
  same = ddo.DDO(2.5, 0.3, normalize=True)
  rows = objective.Rows(
    jnp.arange(9) % 3 == 0, PLAIN.label, PLAIN.other_label, 0.3
  )
  for got, wanted in zip(
    f.loss(*numbers, rows), same.loss(*numbers, rows), strict=True
  ):
    np.testing.assert_array_equal(got, wanted)


def test_an_unknown_kind_is_refused():
  with pytest.raises(errors.UserError, match=r"kind is 'tv'; .* 'hellinger'"):
    siblings.FDivergence(kind='tv').check('ddo.objective')
