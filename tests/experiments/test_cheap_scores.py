"""The table of cheap scores is made of sets of samples."""

import numpy as np
import pytest

from experiments import cheap_scores


def test_a_row_of_the_table(monkeypatch):
  """A score whose bias, spread and power are known."""
  monkeypatch.setattr(cheap_scores, 'COUNT', 8)
  monkeypatch.setattr(cheap_scores, 'SIZES', (2,))

  def mean(real, fake):
    return float(fake.mean() - real.mean()) + 4 / len(fake)

  monkeypatch.setattr(cheap_scores, 'SCORES', {'mean': mean})
  features = {
    name: np.repeat(values, 2)[:, None] * np.ones(32)
    for name, values in (
      ('real', [0.0]),
      ('reference', [9.0] * 4),
      ('near', [4.0, 5.0, 7.0, 8.0]),
      ('promoted', [3.0, 3.0, 4.0, 4.0]),
    )
  }
  result = cheap_scores.one_seed(features)
  (row,) = cheap_scores.summarize([result, result])
  truth = 3.5 + 0.5
  assert row['name'] == 'mean' and row['size'] == 2
  assert row['score'] == pytest.approx(truth)
  assert row['bias'] == pytest.approx((3.5 + 2) / truth - 1)
  assert row['spread'] == pytest.approx(np.std([3, 3, 4, 4], ddof=1) / truth)
  assert row['z'] == pytest.approx(2.5 / np.std([1, 2, 3, 4], ddof=1))
  assert row['paired'] == pytest.approx(np.std([1, 2, 3, 4], ddof=1) / truth)
  line = cheap_scores.table([row]).splitlines()[-1]
  assert line.startswith('| mean | 2 | 4.000 | +37.5% | 14.4% | 32.3% | 1.9 |')
