"""What a round says of itself; test_resume.py and test_main.py play rounds."""

import pytest

from ddo_jax import selfplay


@pytest.mark.parametrize(
  ('accuracy', 'saturated', 'wanted'),
  [
    (0.7, 0.6, 'saturates (|βΔ| > 4 on 60% of the rows)'),
    (0.501, 0.0, 'at chance (accuracy 0.501)'),
    (0.51, 0.49, None),
  ],
)
def test_warnings_tell_of_the_second_half(accuracy, saturated, wanted):
  late = {'kind': 'train', 'accuracy': accuracy, 'saturated': saturated}
  early = {'kind': 'train', 'accuracy': 0.5, 'saturated': 1.0}
  other = [{'kind': 'eval'}, {'kind': 'train', 'loss': 1.0}]
  found = selfplay.warnings([early, early, *other, late, late])
  assert len(found) == (wanted is not None)
  assert all(wanted in line for line in found)
  assert not selfplay.warnings(other)
