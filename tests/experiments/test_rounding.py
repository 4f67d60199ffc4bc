"""Products rounded by hand, and the benchmark that is made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from strangers import tiny

from experiments import rounding
from experiments.bench import precision


def network(x, w):
  """A dot in a scan, a convolution and a call, and a gradient of all."""

  def loss(w):
    def body(h, _):
      return jax.nn.silu(h @ w), None

    h, _ = jax.lax.scan(body, x, length=2)
    h = jax.lax.conv(h[None, None], w[None, None], (1, 1), 'SAME')
    return jnp.sum(h**2)

  return jax.grad(jax.checkpoint(loss))(w)


def test_the_products_of_a_gradient_are_rounded():
  numbers = np.random.default_rng(0)
  x, w = numbers.standard_normal((2, 8, 8), np.float32)
  exact = network(x, w)
  errors = {}
  for name, rule in rounding.KINDS.items():
    found = jax.jit(rounding.rounded(network, rule))(x, w)
    errors[name] = float(
      jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)
    )
  assert 1e-3 < errors['bf16'] < 3e-2
  assert 1e-4 < errors['tf32'] < 3e-3
  assert 1e-6 < errors['bf16x3'] < 1e-4
  assert errors['tf32x3'] < 3e-6
  (left, right), cut = (x[0], w[0]), rounding.Rounding(7)
  got = rounding.rounded(jnp.dot, cut)(left, right)
  bf16 = [
    np.asarray(jnp.asarray(v, jnp.bfloat16), float) for v in (left, right)
  ]
  assert float(got) == pytest.approx(np.dot(*bf16), rel=1e-6)


def test_the_benchmark_runs(monkeypatch):
  monkeypatch.delitem(precision.KINDS, 'high')
  monkeypatch.delitem(precision.KINDS, 'default')
  config = tiny.get_config()
  config.model.blocks = 1
  found = precision.compare(config, rows=2, calls=1)
  assert found['highest']['gradient_error'] == 0
  # A CPU heeds no name, and does what is done by hand.
  assert 0 < found['tf32x3']['gradient_error'] < 1e-4
  assert found['tf32x3']['gradient_error'] < found['bf16x3']['gradient_error']
