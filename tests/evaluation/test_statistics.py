"""Feature statistics that do not depend on how the work was cut up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl

from ddo_jax import errors
from ddo_jax.evaluation.metrics import frechet
from ddo_jax.evaluation.metrics import statistics
from ddo_jax.evaluation.networks import extract

WIDTH = 24
BLOCK = statistics.BLOCK


def features(n, seed=0):
  random = np.random.default_rng(seed)
  mix = random.normal(size=(WIDTH, WIDTH)) / 3
  mix[:, ::3] *= 1e-4  # sums with more binary places than the fine grid has
  return np.float32(np.abs(random.normal(size=(n, WIDTH)) @ mix))


def accumulate(rows, ids=None, batch=100):
  ids = np.arange(len(rows)) if ids is None else ids
  sums = statistics.Accumulator(rows.shape[1])
  for start in range(0, len(ids), batch):
    mine = ids[start : start + batch]
    sums.add(mine, rows[mine])
  return sums


def assert_equal(a, b):
  a, b = a.statistics(), b.statistics()
  assert a.n == b.n
  np.testing.assert_array_equal(a.total, b.total)
  np.testing.assert_array_equal(a.outer, b.outer)


def test_sums_are_those_of_all_rows():
  rows = features(5_000)
  got = accumulate(rows).statistics()
  whole = frechet.Statistics.of(rows)
  assert got.n == 5_000
  np.testing.assert_allclose(got.mean, whole.mean, rtol=1e-14)
  np.testing.assert_allclose(got.outer, whole.outer, rtol=1e-14, atol=5e-15)
  wide = np.cov(rows.astype(np.float64), rowvar=False)
  np.testing.assert_allclose(got.covariance, wide, rtol=1e-10, atol=1e-17)
  assert abs(frechet.distance(got, got)) < 1e-9


@pytest.mark.parametrize('batch', [3, 7, 512, 9_000])
def test_batch_size_and_order_change_no_bit(batch):
  rows = features(5_000)
  ids = np.random.default_rng(1).permutation(5_000)
  assert_equal(accumulate(rows, ids, batch), accumulate(rows))


def test_plain_sums_would_change():
  # Or the tests here could not tell.
  rows = features(4_000)
  parts = [frechet.Statistics.of(x) for x in np.split(rows, 8)]
  forward, backward = parts[0], parts[-1]
  for i in range(1, 8):
    forward, backward = forward.merge(parts[i]), backward.merge(parts[-1 - i])
  assert not np.array_equal(forward.outer, backward.outer)


@pytest.mark.parametrize('processes', [2, 3])
@pytest.mark.parametrize('contiguous', [True, False])
def test_processes_change_no_bit(processes, contiguous):
  rows = features(9_000)
  ids = np.arange(9_000)
  cut = np.array_split(ids, processes)
  if not contiguous:
    cut = [ids[p::processes] for p in range(processes)]
  parts = [accumulate(rows, mine) for mine in cut]
  for order in (parts, parts[::-1]):
    merged = statistics.Accumulator(WIDTH)
    for part in order:
      merged.merge(part)
    assert_equal(merged, accumulate(rows))


def test_a_kill_and_a_resume_change_no_bit(tmp_path):
  rows = features(6_500)
  order = np.random.default_rng(2).permutation(6_500)
  path = tmp_path / 'a' / 'sums.npz'
  accumulate(rows, order[:4_321]).save(path, {'network': 'x'})
  sums, provenance = statistics.Accumulator.load(path)
  assert provenance == {'network': 'x'} and sums.n == 4_321
  owed = sums.missing(6_500)
  np.testing.assert_array_equal(owed, np.sort(order[4_321:]))
  sums.add(owed, rows[owed])
  assert sums.missing(6_500).size == 0
  assert_equal(sums, accumulate(rows))
  assert list(path.parent.iterdir()) == [path]


def test_threads_of_blas_change_no_bit():
  rows = np.concatenate(
    [features(BLOCK + 99, seed) for seed in range(9)], axis=1
  )
  with threadpoolctl.threadpool_limits(1):
    one = accumulate(rows)
  assert_equal(one, accumulate(rows))


def test_the_network_gives_equal_bits_on_any_number_of_devices():
  random = np.random.default_rng(3)
  kernel = np.float32(random.normal(size=(3, 3, 3, WIDTH)))
  images = random.integers(0, 256, (150, 8, 8, 3), dtype=np.uint8)

  @jax.jit
  def network(kernel, x):
    x = jax.lax.conv_general_dilated(
      x.astype(jnp.float32) / 255,
      kernel,
      (1, 1),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    return jax.nn.relu(x).mean(axis=(1, 2))

  def run(count, ids):
    out = np.full((150, WIDTH), np.nan, np.float32)
    blocks = extract.by_blocks(
      network, kernel, images.__getitem__, ids, jax.devices()[:count], rows=16
    )
    for mine, rows in blocks:
      out[mine] = rows
    return out

  ids = np.arange(150)
  whole = run(1, ids)
  assert np.isfinite(whole).all()
  np.testing.assert_array_equal(run(3, ids), whole)
  np.testing.assert_array_equal(run(8, ids[::-1]), whole)
  some = random.permutation(150)[:61]
  part = run(2, some)
  np.testing.assert_array_equal(part[some], whole[some])
  assert np.isfinite(part).all(axis=1).sum() == 61
  expected = np.asarray(network(kernel, images))
  np.testing.assert_allclose(whole, expected, rtol=1e-5)


def test_a_covariance_of_too_few_rows_is_named():
  line = statistics.rank_note('fake', 24, 24)
  assert line.startswith('fake: the covariance of 24 rows of 24 features')
  assert '(rank 23 at most)' in line
  assert statistics.rank_note('fake', 25, 24) == ''


def test_mistakes_raise():
  sums = accumulate(features(BLOCK + 88))
  rows = features(3)
  with pytest.raises(errors.UserError, match='image 5 comes twice'):
    sums.add(np.array([5]), rows[:1])
  with pytest.raises(errors.UserError, match=f'image {BLOCK + 87} comes twice'):
    sums.add(np.array([BLOCK + 87]), rows[:1])
  with pytest.raises(
    errors.UserError, match=f'image {BLOCK + 700} comes twice'
  ):
    sums.add(np.array([BLOCK + 700] * 2), rows[:2])
  with pytest.raises(errors.UserError, match=r'wanted \[B, 24\]'):
    sums.add(np.array([700]), rows[:1, :3])
  with pytest.raises(errors.UserError, match='whole numbers'):
    sums.add(np.array([700.0]), rows[:1])
  with pytest.raises(errors.UserError, match='ids from -1'):
    sums.add(np.array([-1]), rows[:1])
  with pytest.raises(errors.UserError, match='NaN or Inf'):
    sums.add(np.array([700]), rows[:1] * np.nan)
  with pytest.raises(errors.UserError, match='sums of features reach'):
    accumulate(np.full((BLOCK, 2), 1e6, np.float32)).statistics()
  with pytest.raises(errors.UserError, match='statistics of no images'):
    statistics.Accumulator(3).statistics()
  with pytest.raises(errors.UserError, match='0 features'):
    statistics.Accumulator(0)
  with pytest.raises(errors.UserError, match='merge sums of 24 and of 3'):
    sums.merge(statistics.Accumulator(3))
  before = sums.statistics()
  for others in ([3], [BLOCK + 87], np.arange(BLOCK)):
    other = statistics.Accumulator(WIDTH)
    other.add(np.asarray(others), features(len(others)))
    with pytest.raises(errors.UserError, match='both sums hold images'):
      sums.merge(other)
  np.testing.assert_array_equal(sums.statistics().outer, before.outer)


def test_broken_files_raise(tmp_path):
  path = tmp_path / 'x.npz'
  with pytest.raises(errors.UserError, match='cannot read'):
    statistics.Accumulator.load(path)
  path.write_bytes(b'PK\3\4 nothing')
  with pytest.raises(errors.UserError, match='cannot read'):
    statistics.Accumulator.load(path)
  np.savez(path, kind=np.array([{}], dtype=object))
  with pytest.raises(errors.UserError, match='allow_pickle'):
    statistics.Accumulator.load(path)
  np.savez(path, mu=np.zeros(3))
  with pytest.raises(errors.UserError, match='no feature sums'):
    statistics.Accumulator.load(path)
  mean, covariance = np.zeros(3), np.eye(3)
  with pytest.raises(errors.UserError, match=r'wanted \[D\] and \[D, D\]'):
    statistics.Moments(mean, np.eye(2))
  with pytest.raises(errors.UserError, match='NaN or Inf'):
    statistics.Moments(mean, covariance * np.nan)
  covariance[0, 1] = 0.5
  with pytest.raises(errors.UserError, match='not symmetric'):
    statistics.Moments(mean, covariance)
