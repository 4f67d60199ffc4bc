"""Moments of features, the lines about them, and their files."""

import numpy as np
import pytest

from ddo_jax import errors
from ddo_jax.evaluation.metrics import frechet
from ddo_jax.evaluation.metrics import statistics


def test_a_covariance_of_too_few_rows_is_named():
  line = statistics.rank_note('fake', 24, 24)
  assert line.startswith('fake: the covariance of 24 rows of 24 features')
  assert '(rank 23 at most)' in line
  assert statistics.rank_note('fake', 25, 24) == ''


def test_a_file_holds_what_was_written(tmp_path):
  rows = np.random.default_rng(0).normal(size=(40, 5))
  moments = statistics.Moments.of(frechet.Statistics.of(rows), {'data': 'x'})
  path = tmp_path / 'a' / 'fid.npz'
  statistics.save(path, moments)
  assert list(path.parent.iterdir()) == [path]
  arrays, names = statistics.read_npz(path, ('mu', 'n', 'other'))
  assert arrays.keys() == {'mu', 'n'}
  assert names == ['mu', 'sigma', 'n', 'provenance']
  np.testing.assert_array_equal(arrays['mu'], moments.mean)
  assert int(arrays['n']) == 40
  with pytest.raises(errors.UserError, match='cannot write'):
    statistics.save(path / 'fid.npz', moments)


def test_broken_files_raise(tmp_path):
  path = tmp_path / 'x.npz'
  with pytest.raises(errors.UserError, match='cannot read'):
    statistics.read_npz(path, ('kind',))
  path.write_bytes(b'PK\3\4 nothing')
  with pytest.raises(errors.UserError, match='cannot read'):
    statistics.read_npz(path, ('kind',))
  np.savez(path, kind=np.array([{}], dtype=object))
  with pytest.raises(errors.UserError, match='an array of objects'):
    statistics.read_npz(path, ('kind',))


def test_senseless_moments_raise():
  mean = np.zeros(3)
  covariance = np.eye(3)
  with pytest.raises(errors.UserError, match=r'wanted \[D\] and \[D, D\]'):
    statistics.Moments(mean, np.eye(2))
  with pytest.raises(errors.UserError, match='NaN or Inf'):
    statistics.Moments(mean, covariance * np.nan)
  covariance[0, 1] = 0.5
  with pytest.raises(errors.UserError, match='not symmetric'):
    statistics.Moments(mean, covariance)
