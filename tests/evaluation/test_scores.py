"""Inception Score, KID, golden precision and recall, uncertainty."""

import json

import golden_io
import numpy as np
import pytest
import scipy.linalg

from ddo_jax import errors
from ddo_jax.evaluation.metrics import frechet
from ddo_jax.evaluation.metrics import inception_score
from ddo_jax.evaluation.metrics import kid
from ddo_jax.evaluation.metrics import mind
from ddo_jax.evaluation.metrics import prdc
from ddo_jax.evaluation.metrics import uncertainty

GOLDEN = golden_io.load('metrics.npz')

# --- Fréchet distance ---------------------------------------------------------


@pytest.mark.golden
def test_the_frechet_distance_of_four_programs():
  real, fake = (frechet.Statistics.of(GOLDEN[k]) for k in ('real', 'fake'))
  for sums, name in ((real, 'real'), (fake, 'fake')):
    np.testing.assert_allclose(sums.mean, GOLDEN[f'mu_{name}'], atol=1e-12)
    wanted = GOLDEN[f'sigma_{name}']
    np.testing.assert_allclose(sums.covariance, wanted, atol=1e-12)
  got = frechet.distance(fake, real)
  rows = int(GOLDEN['lowrank_n'])
  few = [frechet.Statistics.of(GOLDEN[k][:rows]) for k in ('fake', 'real')]
  low = frechet.distance(*few)
  for program in ('pytorch_fid', 'torch_fidelity', 'edm', 'eigh'):
    assert got == pytest.approx(float(GOLDEN[f'fid_{program}']), abs=1e-8)
    # The programs leave 1e-7 for the missing ranks; they differ by 2e-7.
    wanted = float(GOLDEN[f'fid_lowrank_{program}'])
    assert low == pytest.approx(wanted, abs=1e-6)
  centred = [GOLDEN[k][:rows].astype(np.float64) for k in ('fake', 'real')]
  centred = [x - x.mean(axis=0) for x in centred]
  traces = sum(np.square(x).sum() for x in centred)
  cross = scipy.linalg.svdvals(centred[0] @ centred[1].T).sum()
  exact = np.square(few[0].mean - few[1].mean).sum()
  exact += (traces - 2 * cross) / (rows - 1)
  assert low == pytest.approx(exact, rel=1e-12)
  assert abs(frechet.distance(real, real)) < 1e-9


# --- Inception Score ----------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize(
  ('splits', 'shuffle'), [(10, True), (10, False), (1, False)]
)
def test_torch_fidelitys_inception_score(splits, shuffle):
  name = f'is_tf_splits{splits}_shuffle{int(shuffle)}'
  got = inception_score.torch_fidelity(GOLDEN['is_logits'], splits, shuffle)
  np.testing.assert_allclose(got, GOLDEN[name], rtol=0, atol=1e-9)


@pytest.mark.golden
@pytest.mark.parametrize('chunk', [200, 5_000])
def test_openais_inception_score(chunk):
  got = inception_score.openai(GOLDEN['is_logits'], chunk)
  wanted = float(GOLDEN[f'is_openai_split{chunk}'])
  assert got.mean == pytest.approx(wanted, abs=1e-9)


def test_inception_scores_of_known_cases():
  sure = np.where(np.eye(8), 1e4, 0)[np.arange(80) % 8]
  for got in (
    inception_score.torch_fidelity(sure, splits=1),
    inception_score.torch_fidelity(sure, splits=10, shuffle=False),
    inception_score.openai(sure, chunk=16),
  ):
    np.testing.assert_allclose(got, (8, 0), atol=1e-9)
  for score in (inception_score.torch_fidelity, inception_score.openai):
    np.testing.assert_allclose(score(sure * 0), (1, 0), atol=1e-12)


def test_an_order_that_is_not_of_chance():
  random = np.random.default_rng(0)
  is_shuffled = inception_score.is_shuffled
  for classes in (10, 300):
    drawn = random.integers(0, classes, 12_000)
    in_turn = np.arange(12_000) % classes
    # As a network predicts them, that is wrong on a quarter.
    seen = np.where(random.random(12_000) < 0.25, drawn, in_turn)
    for chunk in (1_000, 5_000):
      assert is_shuffled(drawn, chunk)
      assert is_shuffled(random.permutation(seen), chunk)
      assert not is_shuffled(np.sort(seen), chunk)
      assert is_shuffled(np.zeros(12_000, int), chunk)
    # Where a chunk holds many of each class, turns matter little.
    assert is_shuffled(seen, 1_000) == (classes == 10)
    assert is_shuffled(np.sort(seen)[:5_000])  # one chunk
  flags = [is_shuffled(random.integers(0, 3, 2_000), 500) for _ in range(300)]
  assert all(flags)


def test_classes_in_turn_score_too_high():
  """A chunk that has each class equally often, against a shuffled file's."""
  random = np.random.default_rng(0)
  logits = 9 * np.eye(100)[np.arange(3_000) % 100] + random.normal(size=100)
  in_turn = inception_score.openai(logits, chunk=300).mean
  order = inception_score.permutation(3_000)
  fixed = inception_score.openai(logits[order], chunk=300).mean
  some = [
    inception_score.openai(random.permutation(logits), chunk=300).mean
    for _ in range(4)
  ]
  assert in_turn > 1.1 * max(some)
  assert fixed == pytest.approx(np.mean(some), rel=0.02)
  np.testing.assert_array_equal(np.sort(order), np.arange(3_000))


def test_mistakes_in_an_inception_score_raise():
  logits = np.zeros((5, 3))
  with pytest.raises(errors.UserError, match='6 splits of 5'):
    inception_score.torch_fidelity(logits, splits=6)
  with pytest.raises(errors.UserError, match='chunk is 0'):
    inception_score.openai(logits, chunk=0)
  with pytest.raises(errors.UserError, match='NaN or Inf'):
    inception_score.openai(logits + np.inf)


# --- KID ----------------------------------------------------------------------


@pytest.mark.golden
def test_kid():
  real = GOLDEN['real']
  fake = GOLDEN['fake']
  got = kid.kid(real, fake, subsets=10, size=100)
  np.testing.assert_allclose(got, GOLDEN['kid_f64'], rtol=0, atol=1e-10)
  np.testing.assert_allclose(got, GOLDEN['kid_f32'], rtol=0, atol=1e-5)
  pairs = zip(
    GOLDEN['kid_subset_idx'], GOLDEN['kid_subset_values'], strict=True
  )
  for (fakes, reals), wanted in pairs:
    value = kid.mmd2(real[reals], fake[fakes])
    assert value == pytest.approx(wanted, abs=1e-10)
  full = float(GOLDEN['kid_full_unbiased'])
  for tile in (64, 2_048):
    assert kid.mmd2(real, fake, tile) == pytest.approx(full, abs=1e-10)


def test_kid_is_unbiased():
  random = np.random.default_rng(1)

  def draw():
    return np.float32(random.normal(size=(10, 4)))

  values = [kid.mmd2(draw(), draw()) for _ in range(400)]
  assert abs(np.mean(values)) < 4 * np.std(values) / 20
  assert min(values) < 0


def test_mistakes_in_kid_raise():
  rows = np.zeros((9, 2))
  with pytest.raises(errors.UserError, match='3 fake features'):
    kid.kid(rows, np.zeros((9, 3)))
  with pytest.raises(errors.UserError, match='1 fake rows'):
    kid.mmd2(rows, rows[:1])
  with pytest.raises(errors.UserError, match='100 subsets of 1000'):
    kid.kid(rows, rows)


# --- Precision and recall -----------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize('tile', [99, 1_024])
def test_precision_and_recall(tile):
  real = GOLDEN['real']
  fake = GOLDEN['fake']
  for rows, name in ((real, 'real'), (fake, 'fake')):
    got = prdc.radii(rows, 3, tile)
    np.testing.assert_allclose(got, GOLDEN[f'pr_radii_{name}'], rtol=1e-6)
    slow = prdc.kth_distance(rows, rows, 4, tile)
    np.testing.assert_allclose(got, slow, rtol=1e-12)
  got = prdc.precision_recall(real, fake, tile=tile)
  assert got == (float(GOLDEN['precision']), float(GOLDEN['recall']))


# --- Uncertainty --------------------------------------------------------------


def groups_of(rows, count):
  return [frechet.Statistics.of(x) for x in np.split(rows, count)]


def test_the_jackknife_of_a_mean_is_its_standard_error():
  rows = np.random.default_rng(2).normal(size=(200, 3)) + 5
  got = uncertainty.jackknife(groups_of(rows, 20), lambda s: float(s.mean[1]))
  means = rows[:, 1].reshape(20, 10).mean(axis=1)
  error = means.std(ddof=1) / np.sqrt(20)
  assert got.value == pytest.approx(rows[:, 1].mean(), rel=1e-12)
  assert got.standard_error == pytest.approx(error, rel=1e-9)
  assert got.high - got.value == pytest.approx(2.093024 * error, rel=1e-6)
  assert got.value - got.low == pytest.approx(got.high - got.value, rel=1e-9)
  assert 'jackknife over 20' in got.label


def test_the_interval_holds_the_spread_of_frechet_distances():
  random = np.random.default_rng(3)
  real = frechet.Statistics.of(random.normal(size=(20_000, 4)) + 0.5)

  def metric(sums):
    return frechet.distance(sums, real)

  draws = [groups_of(random.normal(size=(500, 4)), 10) for _ in range(30)]
  intervals = [uncertainty.jackknife(groups, metric) for groups in draws]
  spread = np.std([x.value for x in intervals])
  deviations = np.mean([x.standard_error for x in intervals])
  assert 0.7 < deviations / spread < 1.4


def test_the_limit_of_many_images():
  rows = np.random.default_rng(4).normal(size=(4_000, 8))
  groups = groups_of(rows, 10)
  exact = uncertainty.extrapolate(groups, lambda s: 3 + 70 / s.n)
  assert exact.value == pytest.approx(3, rel=1e-9)
  assert exact.slope == pytest.approx(70, rel=1e-9)
  np.testing.assert_array_equal(exact.sizes, [400, 800, 1_600, 3_200, 4_000])
  # Sizes of which there are more sets weigh more: 10, 5, 2, 1 and 1.
  noisy = uncertainty.extrapolate(groups, lambda s: float(s.mean[0]))
  roots = np.sqrt([10, 5, 2, 1, 1])
  design = np.stack([np.ones(5), 1 / noisy.sizes], axis=1)
  fit = np.linalg.lstsq(design * roots[:, None], noisy.scores * roots)[0]
  np.testing.assert_allclose([noisy.value, noisy.slope], fit, rtol=1e-6)
  # The true distance is 0; that of N images is not.
  rows = np.random.default_rng(4).normal(size=(8_000, 24))
  many = 10**9
  truth = frechet.Statistics(many, np.zeros(24), np.eye(24) * (many - 1.0))

  def metric(sums):
    return frechet.distance(sums, truth)

  got = uncertainty.extrapolate(groups_of(rows, 10), metric)
  assert got.scores[-1] > 0.015 and got.slope > 100
  assert abs(got.value) < 0.2 * got.scores[-1]
  assert 'infinitely many' in got.label


def test_estimates_of_a_distance_need_enough_images():
  random = np.random.default_rng(6)
  real = frechet.Statistics.of(random.normal(size=(500, 8)))
  rows = random.normal(size=(103, 8))
  found = uncertainty.of_distance(rows, real)
  # Ten groups of ten, four of 25; what does not divide evenly is left out.
  wanted = frechet.distance(frechet.Statistics.of(rows[:100]), real)
  assert found['jackknife']['value'] == pytest.approx(wanted, rel=1e-9)
  assert found['limit']['sizes'] == [25, 50, 100]
  assert json.loads(json.dumps(found)) == found
  assert uncertainty.of_distance(rows[:80], real).keys() == {'limit'}
  assert uncertainty.of_distance(rows[:32], real) == {}


def test_the_limit_takes_as_many_groups_as_there_are_images_for():
  """Four, or as few as two of just more images than features."""
  random = np.random.default_rng(7)
  real = frechet.Statistics.of(random.normal(size=(500, 8)))
  for count, sizes in (
    (200, [50, 100, 200]),
    (35, [11, 22, 33]),
    (27, [9, 18, 27]),
    (18, [9, 18]),
  ):
    rows = random.normal(size=(count, 8))
    limit = uncertainty.limit_of_distance(rows, real)
    assert limit.sizes.tolist() == sizes
  # Of two sizes the line goes through both.
  half, whole = limit.scores
  assert limit.value == pytest.approx(2 * whole - half)
  assert uncertainty.least_images(8) == 18
  with pytest.raises(errors.UserError, match='18 or more'):
    uncertainty.limit_of_distance(rows[:17], real)


# --- Monge Inception Distance -------------------------------------------------


def test_mind_is_the_mean_of_distances_along_lines():
  """Against its definition: sorted points, coupled in their order.

  Sets of two sizes are coupled as if each point were there as often as makes
  them equally many.
  """
  random = np.random.default_rng(8)
  real = random.normal(size=(60, 5)).astype(np.float32)
  fake = (2 + random.normal(size=(40, 5))).astype(np.float32)
  lines = mind.directions(5, 30)
  np.testing.assert_allclose(np.linalg.norm(lines, axis=0), 1, rtol=1e-6)
  wanted = []
  for line in lines.T.astype(np.float64):
    a = np.repeat(np.sort(real @ line), 2)
    b = np.repeat(np.sort(fake @ line), 3)
    wanted.append(np.mean((a - b) ** 2))
  got = mind.mind(real, fake, 30)
  assert got == pytest.approx(3 * 5 * np.mean(wanted), rel=1e-5)
  assert mind.mind(fake, real, 30) == pytest.approx(got, rel=1e-5)
  assert mind.mind(real, real[::-1], 30) == 0
  # Where nothing but the mean moves, it is three times the shift's square.
  got = mind.mind(real, real + np.float32([1, 0, 0, -2, 0]), 4_000)
  assert got == pytest.approx(3 * 5, rel=0.05)
  # Far from 0 no digits are lost, of numbers that float32 holds there.
  real = np.round(64 * real) / 64
  near = mind.mind(real, real + 1 / 64, 30)
  far = mind.mind(4_096 + real, 4_096 + real + 1 / 64, 30)
  assert far == pytest.approx(near, rel=1e-5)


def test_mistakes_in_mind_raise():
  rows = np.ones((4, 3), np.float32)
  with pytest.raises(errors.UserError, match='3 real and 2 fake features'):
    mind.mind(rows, rows[:, :2])
  with pytest.raises(errors.UserError, match='on 0 lines'):
    mind.mind(rows, rows, 0)
  with pytest.raises(errors.UserError, match='fake has NaN'):
    mind.mind(rows, np.full((4, 3), np.nan))


def test_mistakes_in_uncertainty_raise():
  rows = np.random.default_rng(5).normal(size=(40, 3))

  def metric(sums):
    return float(sums.n)

  with pytest.raises(errors.UserError, match='4 groups of'):
    uncertainty.jackknife(groups_of(rows, 4), metric)
  uneven = [*groups_of(rows, 5), frechet.Statistics.of(rows[:3])]
  with pytest.raises(errors.UserError, match=r'of \[3, 8\] images'):
    uncertainty.jackknife(uneven, metric)
  with pytest.raises(errors.UserError, match='1 groups'):
    uncertainty.extrapolate(groups_of(rows, 1), metric)
  with pytest.raises(errors.UserError, match='2 images for 3 features'):
    uncertainty.extrapolate(groups_of(rows, 20), metric)
