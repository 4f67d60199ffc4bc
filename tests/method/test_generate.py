"""How many images a call of the sampler draws."""

import pytest

from ddo_jax.method import generate


@pytest.mark.parametrize(
  ('count', 'batch', 'devices', 'wanted'),
  [
    (4, 1_000, 1, 4),
    (5, 1_000, 1, 8),
    (1, 1_000, 8, 8),
    (17, 1_000, 8, 32),
    (600, 1_000, 1, 1_000),
    (512, 1_000, 1, 512),
    (1_000, 1_000, 1, 1_000),
    (10_500, 1_000, 1, 1_000),
    (80, 64, 1, 64),
    (3, 2, 8, 2),
  ],
)
def test_a_small_set_costs_a_small_call(count, batch, devices, wanted):
  assert generate.call_size(count, batch, devices) == wanted
