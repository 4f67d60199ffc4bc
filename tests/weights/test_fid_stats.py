"""Statistics files of EDM, EDM2, OpenAI and ADM, and broken ones."""

import pickle

import golden_io
import numpy as np
import pytest

from ddo_jax import errors
from ddo_jax.evaluation.metrics import frechet
from ddo_jax.evaluation.metrics import statistics
from ddo_jax.weights import fid_stats


def table(width, seed=0):
  random = np.random.default_rng(seed)
  root = random.normal(size=(width, 8))
  return {'mu': random.normal(size=width), 'sigma': root @ root.T}


def assert_moments(got, expected):
  np.testing.assert_array_equal(got.mean, expected['mu'])
  np.testing.assert_array_equal(got.covariance, expected['sigma'])


def test_edms_file(tmp_path):
  path = tmp_path / 'cifar10-32x32.npz'
  np.savez(path, **table(2_048))
  stats = fid_stats.read(path)
  assert_moments(stats.of('fid'), table(2_048))
  assert stats.of('fid').n == 0 and not stats.has_images
  assert stats.of('fid').provenance['file'] == path.name
  assert len(stats.of('fid').provenance['sha256']) == 64
  with pytest.raises(errors.UserError, match='of fid, not of fd_dinov2'):
    stats.of('fd_dinov2')
  with pytest.raises(errors.UserError, match='no images in it'):
    stats.images()


@pytest.mark.parametrize('protocol', [2, 4])
def test_edm2s_file(tmp_path, protocol):
  path = tmp_path / 'img64.pkl'
  tree = {
    'num_images': 1_281_167,
    'fid': table(2_048),
    'fd_dinov2': table(1_024, seed=1),
  }
  path.write_bytes(pickle.dumps(tree, protocol))
  stats = fid_stats.read(path)
  assert_moments(stats.of('fid'), tree['fid'])
  assert_moments(stats.of('fd_dinov2'), tree['fd_dinov2'])
  assert stats.of('fid').n == 1_281_167


def test_openais_file(tmp_path):
  path = tmp_path / 'VIRTUAL_imagenet256_labeled.npz'
  spatial = {f'{k}_s': v for k, v in table(2_023, seed=2).items()}
  images = np.arange(5 * 48, dtype=np.uint8).reshape(5, 4, 4, 3)
  np.savez(path, arr_0=images, **table(2_048), **spatial)
  stats = fid_stats.read(path)
  assert_moments(stats.of('fid'), table(2_048))
  assert_moments(stats.of('sfid'), table(2_023, seed=2))
  np.testing.assert_array_equal(stats.images(), images)


def test_our_own_file(tmp_path):
  path = tmp_path / 'own.npz'
  rows = np.random.default_rng(3).normal(size=(40, 1_024))
  sums = frechet.Statistics.of(rows)
  moments = statistics.Moments.of(sums, {'network': 'dinov2'})
  statistics.save(path, moments)
  got = fid_stats.read(path).of('fd_dinov2')
  assert_moments(got, {'mu': sums.mean, 'sigma': sums.covariance})
  assert got.n == 40 and got.provenance['network'] == 'dinov2'
  with np.load(path, allow_pickle=False) as arrays:  # as EDM's fid.py does
    np.testing.assert_array_equal(arrays['mu'], sums.mean)


@pytest.mark.golden
def test_the_small_golden_of_edm():
  golden = golden_io.load('fid_small.npz')
  generated = frechet.Statistics.of(golden['feat_gen'])
  np.testing.assert_allclose(generated.mean, golden['mu'], rtol=1e-12)
  np.testing.assert_allclose(generated.covariance, golden['sigma'], rtol=1e-10)
  stored = statistics.Moments(golden['mu_ref'], golden['sigma_ref'])
  for other in (stored, frechet.Statistics.of(golden['feat_ref'])):
    got = frechet.distance(generated, other)
    assert got == pytest.approx(float(golden['fid']), rel=1e-8)


def test_broken_files_are_refused_in_one_line(tmp_path):
  def refuses(name, said, write):
    path = tmp_path / name
    write(path)
    with pytest.raises(errors.UserError, match=said) as caught:
      fid_stats.read(path)
    assert '\n' not in str(caught.value)

  images = {'arr_0': np.zeros((2, 4, 4, 3), np.uint8)}
  refuses('a.npz', 'a batch of samples', lambda p: np.savez(p, **images))
  refuses('b.npz', 'something else', lambda p: np.savez(p, x=np.zeros(2)))
  refuses('c.npz', '7 features under fid', lambda p: np.savez(p, **table(7)))
  refuses('d.npz', 'cannot read', lambda p: p.write_bytes(b'no'))
  refuses('e.txt', "suffix '.txt'", lambda p: p.write_bytes(b'no'))
  refuses('f.npz', 'cannot read', lambda p: None)

  def dump(tree):
    return lambda p: p.write_bytes(pickle.dumps(tree))

  refuses('g.pkl', 'none of fid', dump({'ema': 1}))
  refuses('h.pkl', 'without a table', dump([1]))
  refuses('i.pkl', "'sigma'", dump({'fid': {'mu': np.zeros(2_048)}}))
  bad = {'mu': np.zeros(2_048), 'sigma': np.full((2_048, 2_048), np.nan)}
  refuses('j.pkl', 'NaN or Inf', dump({'fid': bad}))
