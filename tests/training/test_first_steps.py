"""Settings that are hopeless from their first steps on."""

import pytest

from ddo_jax import config as config_lib
from ddo_jax.training import first_steps


def phase_of(warmup_images):
  return config_lib.Phase(
    images=100 * 8,
    batch_size=8,
    optimizer=config_lib.Optimizer(
      learning_rate=1e-3, warmup_images=warmup_images
    ),
  )


def metrics(saturated, max_abs_logit):
  return {'saturated': saturated, 'max_abs_logit': max_abs_logit}


@pytest.mark.parametrize(
  ('step', 'saturated', 'said'),
  [(0, 1.0, False), (5, 0.8, True), (5, 0.7, False), (60, 1.0, False)],
)
def test_a_round_that_saturates_in_its_first_quarter(step, saturated, said):
  found = first_steps.fault(step, metrics(saturated, 9.0), phase_of(0))
  assert (f'(|βΔ| > 4 on {saturated:.0%} of the rows)' in found) == said


@pytest.mark.parametrize(
  ('step', 'warmup_images', 'logit', 'said'),
  [
    (20, 0, 1e-9, False),  # it is too early to say
    # Half of the way is gone: at its end Δ is four times as large.
    (50, 0, 0.05 / 4 * 0.99, True),
    (50, 0, 0.05 / 4 * 1.01, False),
    # After half of a warm-up a quarter of the way is gone.
    (50, 800, 0.05 / 16 * 0.95, True),
    (50, 800, 0.05 / 16 * 1.05, False),
  ],
)
def test_a_round_whose_logits_will_stay_at_zero(
  step, warmup_images, logit, said
):
  found = first_steps.fault(step, metrics(0.0, logit), phase_of(warmup_images))
  assert found.startswith('the discriminator does nothing') == said


def test_without_a_discriminator_nothing_is_said():
  assert not first_steps.fault(50, {'loss': 1.0}, phase_of(0))
