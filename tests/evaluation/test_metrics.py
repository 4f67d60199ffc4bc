"""Fréchet distance, precision and recall, nearest neighbours."""

import golden_io
import numpy as np
import pytest
import scipy.linalg
from scipy.spatial import distance as scipy_distance

from ddo_jax import errors
from ddo_jax.evaluation.metrics import fd_ratio
from ddo_jax.evaluation.metrics import frechet
from ddo_jax.evaluation.metrics import memorisation
from ddo_jax.evaluation.metrics import prdc


def _features(seed, n, width, scale=1.0):
  """Correlated features [n, width] of a mean and scale of their own."""
  random = np.random.default_rng(seed)
  mix = random.normal(size=(width, width)) / width**0.5
  features = random.normal(size=(n, width)) @ mix + random.normal(size=width)
  return (scale * features).astype(np.float32)


# --- Fréchet distance ---------------------------------------------------------


def test_statistics_are_mean_and_unbiased_covariance():
  features = _features(0, 5_000, 6)  # more rows than are widened at once
  statistics = frechet.Statistics.of(features)
  wide = features.astype(np.float64)
  assert statistics.n == 5_000
  np.testing.assert_allclose(statistics.mean, wide.mean(axis=0), rtol=1e-12)
  np.testing.assert_allclose(
    statistics.covariance, np.cov(wide, rowvar=False), rtol=1e-11
  )


@pytest.mark.golden
def test_the_original_frechet_distance():
  """fid_small.npz: features, their moments and the distance by fid.py."""
  golden = golden_io.load('fid_small.npz')
  ours = frechet.Statistics.of(golden['feat_gen'])
  reference = frechet.Statistics.of(golden['feat_ref'])
  for statistics, suffix in ((ours, ''), (reference, '_ref')):
    np.testing.assert_allclose(
      statistics.mean, golden[f'mu{suffix}'], rtol=1e-12, atol=1e-14
    )
    np.testing.assert_allclose(
      statistics.covariance, golden[f'sigma{suffix}'], rtol=1e-11, atol=1e-13
    )
  moments = [golden[name] for name in ('mu', 'sigma', 'mu_ref', 'sigma_ref')]
  for got in (
    frechet.distance(ours, reference),
    frechet.distance_of_moments(*moments),
  ):
    np.testing.assert_allclose(got, golden['fid'], rtol=1e-8)


def test_merged_statistics_equal_those_of_the_whole():
  features = _features(1, 301, 5)
  whole = frechet.Statistics.of(features)
  parts = [frechet.Statistics.of(x) for x in np.split(features, [1, 120])]
  merged = parts[0].merge(parts[1]).merge(parts[2])
  assert merged.n == whole.n
  np.testing.assert_allclose(merged.total, whole.total, rtol=1e-13)
  np.testing.assert_allclose(merged.outer, whole.outer, rtol=1e-13)
  assert abs(frechet.distance(merged, whole)) < 1e-12


def test_distance_of_commuting_gaussians_is_the_closed_form():
  # In one eigenbasis: |Δm|² + Σ (σ_a - σ_b)².
  basis = scipy.linalg.qr(np.random.default_rng(2).normal(size=(4, 4)))[0]
  mean_a = np.array([1.0, 0, -2, 0])
  mean_b = np.array([0.0, 1, 0, 3])
  sd_a = np.array([1.0, 2, 3, 0.5])
  sd_b = np.array([2.0, 2, 1, 4.5])
  a, b = (basis @ np.diag(sd**2) @ basis.T for sd in (sd_a, sd_b))
  expected = 1 + 1 + 4 + 9 + 1 + 0 + 4 + 16
  got = frechet.distance_of_moments(mean_a, a, mean_b, b)
  assert isinstance(got, float)
  assert got == pytest.approx(expected, rel=1e-13)


def test_distance_of_any_two_sets_agrees_with_sqrtm():
  a = frechet.Statistics.of(_features(3, 400, 8))
  b = frechet.Statistics.of(_features(4, 300, 8, scale=2.0))
  product = a.covariance @ b.covariance
  cross = scipy.linalg.sqrtm(product).real
  expected = np.square(a.mean - b.mean).sum()
  expected += np.trace(a.covariance + b.covariance - 2 * cross)
  assert not np.allclose(product, product.T)  # or the case would be easy
  assert frechet.distance(a, b) == pytest.approx(expected, rel=1e-11)
  assert frechet.distance(b, a) == pytest.approx(expected, rel=1e-11)


def test_distance_of_a_set_to_itself_is_zero():
  a = frechet.Statistics.of(_features(5, 500, 32))
  assert abs(frechet.distance(a, a)) < 1e-9


@pytest.mark.parametrize('smallest', [-8, -14])
def test_distance_of_a_wide_spectrum_to_itself_is_zero(smallest):
  # Eigenvalues of Inception features reach from 10 to 1e-6 and below.
  basis = np.linalg.qr(np.random.default_rng(9).normal(size=(200, 200)))[0]
  a = (basis * np.logspace(1, smallest, 200)) @ basis.T
  zero = np.zeros(200)
  assert abs(frechet.distance_of_moments(zero, a, zero, a)) < 1e-11


def test_distance_of_rank_deficient_sets():
  # 12 rows of 30 features. tr (A^½ B A^½)^½ is the sum of singular values of
  # X_a X_bᵀ, which needs no square root of a vanishing eigenvalue.
  a = _features(6, 12, 30)
  b = _features(7, 12, 30)
  wide_a, wide_b = (x.astype(np.float64) for x in (a, b))
  centred_a, centred_b = (x - x.mean(axis=0) for x in (wide_a, wide_b))
  cross = scipy.linalg.svdvals(centred_a @ centred_b.T).sum()
  expected = np.square(wide_a.mean(axis=0) - wide_b.mean(axis=0)).sum()
  traces = np.square(centred_a).sum() + np.square(centred_b).sum()
  expected += (traces - 2 * cross) / 11
  got = frechet.distance(frechet.Statistics.of(a), frechet.Statistics.of(b))
  assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('ridge', [0, 1e-15])
def test_distance_of_a_rank_deficient_set_from_a_full_one(ridge):
  # The ridge is below rounding, but lets Cholesky pass where it should not.
  random = np.random.default_rng(10)
  root_a = random.normal(size=(30, 12))
  root_b = random.normal(size=(30, 40))
  a = root_a @ root_a.T
  b = root_b @ root_b.T
  cross = scipy.linalg.svdvals(root_a.T @ root_b).sum()
  expected = np.trace(a) + np.trace(b) - 2 * cross
  a += ridge * np.linalg.norm(a, 2) * np.eye(30)
  zero = np.zeros(30)
  for moments in ((zero, a, zero, b), (zero, b, zero, a)):
    got = frechet.distance_of_moments(*moments)
    assert got == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_features_that_are_not_finite_raise(value):
  features = _features(8, 50, 3)
  features[17, 1] = value
  with pytest.raises(errors.UserError, match=r'1 of 50 rows \(first: row 17'):
    frechet.Statistics.of(features)
  with pytest.raises(errors.UserError, match='fake has NaN or Inf'):
    prdc.precision_recall(_features(8, 50, 3), features)


def test_mistakes_in_a_frechet_distance_raise():
  of = frechet.Statistics.of
  with pytest.raises(errors.UserError, match=r'shape \(7,\)'):
    of(np.zeros(7))
  with pytest.raises(errors.UserError, match=r'shape \(0, 7\)'):
    of(np.zeros((0, 7)))
  with pytest.raises(errors.UserError, match=r'covariance of 1 row'):
    frechet.distance(of(np.ones((1, 2))), of(np.ones((9, 2))))
  with pytest.raises(errors.UserError, match=r'merge statistics of 2 .* 3'):
    of(np.ones((4, 2))).merge(of(np.ones((4, 3))))
  with pytest.raises(errors.UserError, match='shapes'):
    frechet.distance(of(np.ones((4, 2))), of(np.ones((4, 3))))
  zero = np.zeros(2)
  one = np.eye(2)
  with pytest.raises(errors.UserError, match='first covariance has eigen'):
    frechet.distance_of_moments(zero, np.diag([1.0, -1.0]), zero, one)
  with pytest.raises(errors.UserError, match='second covariance has'):
    frechet.distance_of_moments(zero, one, zero, np.diag([1.0, -1.0]))
  with pytest.raises(errors.UserError, match='NaN or Inf'):
    frechet.distance_of_moments(zero, one, zero, one * np.nan)


# --- Precision and recall -----------------------------------------------------


def _brute_force(real, fake, k):
  """The definition, a pair at a time."""

  def shares(points, centres):
    inside = 0
    radii = []
    for i, centre in enumerate(centres):
      others = np.delete(centres, i, axis=0)
      radii.append(sorted(np.linalg.norm(others - centre, axis=1))[k - 1])
    for point in points:
      norms = np.linalg.norm(centres - point, axis=1)
      inside += any(
        norm <= radius for norm, radius in zip(norms, radii, strict=True)
      )
    return inside / len(points)

  real = real.astype(np.float64)
  fake = fake.astype(np.float64)
  return shares(fake, real), shares(real, fake)


@pytest.mark.parametrize('k', [1, 3])
def test_precision_recall_is_the_definition(k):
  both = _features(0, 200, 4)
  real = both[:70]
  fake = both[70:]
  fake = fake * np.float32([0.5, 1.2, 0.5, 1]) + np.float32(0.2)
  expected = _brute_force(real, fake, k)
  assert 0.1 < expected[0] < 0.95 and 0.1 < expected[1] < 0.95
  assert abs(expected[0] - expected[1]) > 0.05  # tells the two apart
  got = prdc.precision_recall(real, fake, k)
  assert (got.precision, got.recall) == expected
  radii = prdc.radii(real, k)
  assert prdc.precision_recall(real, fake, k, real_radii=radii) == expected
  assert isinstance(got.precision, float) and isinstance(got.recall, float)


@pytest.mark.parametrize('k', [1, 5])
def test_density_and_coverage_are_the_definition(k):
  both = _features(0, 200, 4)
  real = both[:70]
  fake = both[70:] * np.float32([0.5, 1.2, 0.5, 1]) + np.float32(0.2)
  balls = 0  # that hold a fake, each counted for each fake
  covered = 0
  for i, centre in enumerate(real):
    others = np.delete(real, i, axis=0)
    radius = np.sort(np.linalg.norm(others - centre, axis=1))[k - 1]
    held = np.linalg.norm(fake - centre, axis=1) <= radius
    balls += held.sum()
    covered += held.any()
  expected = (balls / (k * len(fake)), covered / len(real))
  assert expected[0] > 0.2 and 0.2 < expected[1] < 1
  assert prdc.density_coverage(real, fake, k) == expected
  assert prdc.density_coverage(real, fake, k, tile=32) == expected
  radii = prdc.radii(real, k)
  got = prdc.density_coverage(real, fake, k, real_radii=radii)
  assert got == expected and isinstance(got.coverage, float)
  if k == 5:
    assert prdc.density_coverage(real, fake) == expected


def test_density_and_coverage_by_their_authors_program():
  """What prdc 0.2 gives for these features, k = 5."""
  both = _features(0, 200, 4)
  fake = both[70:] * np.float32([0.5, 1.2, 0.5, 1]) + np.float32(0.2)
  got = prdc.density_coverage(both[:70], fake)
  assert got == pytest.approx((495 / 650, 48 / 70), rel=1e-12)


def test_density_and_coverage_of_one_distribution():
  random = np.random.default_rng(3)
  found = []
  for _ in range(20):
    both = random.normal(size=(2, 300, 3))
    found.append(prdc.density_coverage(*both))
  density, coverage = np.mean(found, axis=0)
  assert density == pytest.approx(1, abs=0.03)
  assert coverage == pytest.approx(1 - 2**-5, abs=0.01)


def test_an_outlier_makes_samples_precise_but_not_dense():
  """Figure 2 of Naeem et al."""
  random = np.random.default_rng(4)
  real = np.append(random.normal(size=(99, 2)), [[30.0, 0]], axis=0)
  fake = random.normal(size=(100, 2)) + np.array([30, 0])
  assert prdc.precision_recall(real, fake).precision == 1
  got = prdc.density_coverage(real, fake)
  assert got == (0.2, 0.01)
  with pytest.raises(errors.UserError, match='real has 5 rows; the 5-th'):
    prdc.density_coverage(fake[:5], real)


def test_a_ratio_of_distances_is_taken_at_equal_numbers():
  drawn = _features(5, 5_200, 6)
  real = frechet.Statistics.of(drawn[:4_000])
  held_out = drawn[4_000:4_200]
  fake = 1.05 * drawn[4_200:]
  unit = frechet.distance(frechet.Statistics.of(held_out), real)
  order = np.random.RandomState(0).permutation(1_000).reshape(5, 200)
  parts = [frechet.Statistics.of(fake[index]) for index in order]
  wanted = np.mean([frechet.distance(part, real) for part in parts]) / unit
  ratio = fd_ratio.FdRatio(held_out, real)
  got = ratio(fake)
  assert got == pytest.approx(wanted, rel=1e-12)
  whole = frechet.distance(frechet.Statistics.of(fake), real) / unit
  assert got > 1.1 * whole  # for 1,000 images stand better than 200
  assert ratio(held_out) == 1
  few = ratio(fake[:50])  # in a unit of its own, of four parts
  assert few == fd_ratio.FdRatio(held_out, real)(fake[:50])
  assert ratio(fake) == got
  with pytest.raises(errors.UserError, match='they are the same ones'):
    one = np.eye(2, dtype=np.float32)
    fd_ratio.FdRatio(one, frechet.Statistics.of(one))(one)


def test_precision_recall_of_known_cases():
  line = np.arange(10, dtype=np.float32)[:, None]
  assert prdc.precision_recall(line, line) == (1, 1)
  assert prdc.precision_recall(line, line + 100) == (0, 0)
  # A generator that only knows the left half: sound, but it misses modes. The
  # ball of its rightmost point, 4, ends at 1's distance: 7, a tie, is inside.
  assert prdc.precision_recall(line, line[:5]) == (1, 0.8)
  assert prdc.precision_recall(line[:5], line) == (0.8, 1)  # and mirrored
  # One that adds far samples of a second place: complete, half unsound.
  both = np.concatenate([line, line + 100])
  assert prdc.precision_recall(line, both) == (0.5, 1)


def test_one_set_of_copies_covers_itself_alone():
  # Collapse: balls of radius 0 around one real image.
  line = np.arange(10, dtype=np.uint8)[:, None]
  collapsed = np.full((6, 1), 4, np.uint8)
  assert prdc.precision_recall(line, collapsed) == (1, 0.1)


@pytest.mark.parametrize('tile', [3, 64, 10_000])
def test_tiling_does_not_change_the_result(tile):
  real = _features(1, 90, 5)
  fake = _features(1, 131, 5, scale=0.9)
  squared = scipy_distance.cdist(fake, real, 'sqeuclidean')
  np.testing.assert_allclose(
    prdc.kth_distance(fake, real, 4, tile),
    np.sort(squared, axis=1)[:, 3],
    rtol=1e-12,
  )
  expected = _brute_force(real, fake, 3)
  assert prdc.precision_recall(real, fake, tile=tile) == expected


def test_distances_survive_a_large_common_offset():
  # |a|² + |b|² - 2 a·b of float32 sums would lose all digits here.
  offset = np.float32(1_000)
  a, b = (offset + _features(seed, 20, 64) for seed in (2, 3))
  expected = scipy_distance.cdist(a.astype(float), b.astype(float)).min(axis=1)
  got = np.sqrt(prdc.kth_distance(a, b, 1))
  np.testing.assert_allclose(got, expected, rtol=1e-8)


def test_mistakes_in_precision_recall_raise():
  few = np.ones((3, 2))
  many = np.ones((9, 2))
  with pytest.raises(errors.UserError, match='real has 3 rows'):
    prdc.precision_recall(few, many)
  with pytest.raises(errors.UserError, match='fake has 3 rows'):
    prdc.precision_recall(many, few)
  with pytest.raises(errors.UserError, match='of 3 and of 2 numbers'):
    prdc.precision_recall(many, np.ones((9, 3)))
  with pytest.raises(errors.UserError, match='k is 0'):
    prdc.precision_recall(many, many, k=0)
  with pytest.raises(errors.UserError, match='tile is -1'):
    prdc.kth_distance(many, many, 1, tile=-1)


# --- Memorisation -------------------------------------------------------------


def _images(seed, n):
  random = np.random.default_rng(seed)
  return random.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)


def compare(samples, train, held_out):
  held_out_distance = memorisation.nearest_distance(held_out, train)
  return memorisation.compare(
    memorisation.nearest_distance(samples, train),
    memorisation.describe_held_out(held_out_distance),
  )


def test_nearest_distance_is_exact_on_raw_pixels():
  train = _images(0, 40)
  images = _images(1, 30)
  images[11] = train[23]
  flat = [x.reshape(len(x), -1).astype(np.float64) for x in (images, train)]
  expected = scipy_distance.cdist(*flat).min(axis=1)
  got = memorisation.nearest_distance(images, train, tile=16)
  np.testing.assert_array_equal(got, expected)
  assert got[11] == 0


def test_nn_ratio_and_memorised_share_of_known_distances():
  # Training images 100 apart; held-out ones at 1 .. 10 from their nearest.
  train = np.array([[0.0], [100], [200]])
  held_out = np.array([[d + 100.0] for d in range(1, 11)])
  samples = np.array([[0.5], [101], [102], [208], [90], [70]])
  got = compare(samples, train, held_out)
  # The 2 % quantile lies at 1 + 0.02·9 = 1.18: of the samples' distances
  # .5, 1, 2, 8, 10, 30 two are below it; their mean is to be held to 5.5.
  assert got.memorised == 2 / 6
  assert got.nn_ratio == pytest.approx(51.5 / 6 / 5.5, rel=1e-12)
  assert isinstance(got.nn_ratio, float) and isinstance(got.memorised, float)


def test_copies_are_memorised_and_fresh_images_are_not():
  train = _images(2, 200)
  held_out = _images(3, 200)
  copies = compare(train[:50], train, held_out)
  assert copies == (0, 1)
  fresh = compare(_images(4, 200), train, held_out)
  assert fresh.nn_ratio == pytest.approx(1, abs=0.02)
  assert fresh.memorised < 0.06


def test_mistakes_in_memorisation_raise():
  train = _images(5, 20)
  held_out = _images(6, 20)
  scaled = held_out / np.float32(127.5) - 1
  with pytest.raises(errors.UserError, match=r'float32.*uint8'):
    compare(scaled, train, held_out)
  with pytest.raises(errors.UserError, match='one type and shape'):
    compare(held_out[:, :2], train, held_out)
  with pytest.raises(errors.UserError, match='0 images and 20'):
    compare(held_out[:0], train, held_out)
  with pytest.raises(errors.UserError, match='100% of the held-out'):
    compare(held_out, train, train)
