"""How far a score can be trusted: an interval, and the limit of many images.

Both estimates take features cut into disjoint groups of seeds, as sums that
can be merged, so that no image is looked at twice. They answer different
questions; the label of each result says which.
"""

from collections.abc import Callable
from collections.abc import Sequence
import math
from typing import Any
from typing import NamedTuple

import numpy as np
from scipy import stats

from ddo_jax import errors
from ddo_jax.evaluation.metrics import frechet
from ddo_jax.evaluation.metrics import statistics

# Returns the score of a set of images from the sums of its features.
Metric = Callable[[frechet.Statistics], float]

_LEVEL = 0.95  # of the interval
_JACKKNIFE_GROUPS = 10
_LIMIT_GROUPS = 4


class Interval(NamedTuple):
  """A score with its sampling error.

  Attributes:
    value: the score of all images.
    low: the lower end of the interval.
    high: its upper end.
    standard_error: the error of `value` from sampling alone; the bias of a
      finite number of images (FID's is positive) is not in it.
    label: says what this is.
  """

  value: float
  low: float
  high: float
  standard_error: float
  label: str


class Limit(NamedTuple):
  """A score extrapolated to infinitely many images.

  Attributes:
    value: the intercept; not to be compared with scores of N images.
    slope: the slope of the score against 1/N.
    sizes: [K] numbers of images, ascending.
    scores: [K] the mean score of disjoint sets of that size.
    label: says what this is.
  """

  value: float
  slope: float
  sizes: np.ndarray
  scores: np.ndarray
  label: str


def _total(
  groups: Sequence[frechet.Statistics], fewest: int
) -> frechet.Statistics:
  """Merges all groups.

  Raises:
    UserError: there are fewer groups than `fewest`, or they differ in size.
  """
  sizes = sorted({group.n for group in groups})
  if len(groups) < fewest or len(sizes) != 1:
    raise errors.UserError(
      f'{len(groups)} groups of {sizes} images; wanted {fewest} or more of one '
      'size: cut the seeds evenly'
    )
  total = groups[0]
  for group in groups[1:]:
    total = total.merge(group)
  return total


def jackknife(groups: Sequence[frechet.Statistics], metric: Metric) -> Interval:
  """Estimates a 95 % interval by leaving out one group at a time.

  The standard error is √((G−1)/G Σ (θ₋ᵢ − mean θ₋)²) (Efron & Stein 1981); the
  interval is that of Student's t with G − 1 degrees of freedom.

  Args:
    groups: G ≥ 5 disjoint groups of equally many images; 10 to 20 are usual.
    metric: the score; it is called G + 1 times.

  Raises:
    UserError: there are too few groups, or they differ in size.
  """
  total = _total(groups, 5)
  value = metric(total)
  scores = []
  for group in groups:
    rest = frechet.Statistics(
      n=total.n - group.n,
      total=total.total - group.total,
      outer=total.outer - group.outer,
    )
    scores.append(metric(rest))
  left = np.array(scores)
  count = len(groups)
  error = math.sqrt((count - 1) / count * np.square(left - left.mean()).sum())
  reach = error * float(stats.t.ppf((1 + _LEVEL) / 2, count - 1))
  label = f'{_LEVEL:.0%} interval, jackknife over {count} groups of seeds'
  return Interval(value, value - reach, value + reach, error, label)


def extrapolate(groups: Sequence[frechet.Statistics], metric: Metric) -> Limit:
  """Estimates the score at N → ∞ from a line in 1/N (Chong & Forsyth 2020).

  Sets of 1, 2, 4, ... groups and of all G are scored, and disjoint sets of one
  size are averaged. score = value + slope/N is fitted by least squares, each
  size weighted by its number of sets. (arXiv 1911.07023 draws random subsets.)

  Args:
    groups: G ≥ 2 disjoint groups of equally many images, each of more images
      than features: the law holds from there on.
    metric: the score; it is called about 2·G times.

  Raises:
    UserError: there are too few groups, or they differ in size or are too
      small.
  """
  total = _total(groups, 2)
  each = groups[0].n
  width = len(total.total)
  if each <= width:
    raise errors.UserError(
      f'groups of {each} images for {width} features; a limit needs more '
      'images than features in each: use fewer groups or more images'
    )
  count = len(groups)
  steps = [2**i for i in range(count.bit_length()) if 2**i < count]
  steps.append(count)
  scores = []
  weights = []
  for step in steps:
    starts = range(0, count - step + 1, step)
    sets = [_total(groups[start : start + step], 1) for start in starts]
    scores.append(np.mean([metric(one) for one in sets]))
    weights.append(len(sets))
  sizes = each * np.array(steps)
  # polyfit takes the square root of least squares' weights.
  slope, value = np.polyfit(1 / sizes, scores, 1, w=np.sqrt(weights))
  label = f'extrapolated to infinitely many images from {each} to {total.n}'
  return Limit(float(value), float(slope), sizes, np.array(scores), label)


def _groups(features: np.ndarray, count: int) -> list[frechet.Statistics]:
  """Cuts features [N, D] into groups; what does not divide evenly is left."""
  even = features[: len(features) - len(features) % count]
  return [frechet.Statistics.of(part) for part in np.split(even, count)]


def least_images(width: int) -> int:
  """Returns the fewest images of which `limit_of_distance` makes a limit."""
  return 2 * (width + 1)


def limit_of_distance(features: np.ndarray, real: frechet.HasMoments) -> Limit:
  """Estimates the Fréchet distance of infinitely many images.

  Of N images the distance is too large by about a constant over N, which
  depends on the model; see `extrapolate`. The images are cut into four groups,
  or into as many as have more images than features. The estimate is unbiased to
  first order, and scatters more than the distance itself.

  Args:
    features: [N, D] of the samples, in the order of their seeds.
    real: what they are compared with, as it is: its own number of images is not
      extrapolated.

  Raises:
    UserError: N is less than 2·(D + 1).
  """

  def metric(sums: frechet.Statistics) -> float:
    return frechet.distance(sums, real)

  count, width = features.shape
  most = min(_LIMIT_GROUPS, count // (width + 1))
  if most < 2:
    raise errors.UserError(
      f'{count} images for {width} features; a limit needs'
      f' {least_images(width)} or more: raise'
      ' --config.evaluation.selection_samples or samples'
    )
  return extrapolate(_groups(features, most), metric)


def of_distance(
  features: np.ndarray, real: frechet.Statistics | statistics.Moments
) -> dict[str, dict[str, Any]]:
  """Estimates how far a Fréchet distance can be trusted.

  Args:
    features: [N, D] of the samples, in the order of their seeds.
    real: what they are compared with.

  Returns:
    {'jackknife': ..., 'limit': ...}, the fields of `Interval` and `Limit` as
    JSON values. An estimate is missing where its groups would have no more
    images than features: their singular covariances say nothing.
  """

  def metric(sums: frechet.Statistics) -> float:
    return frechet.distance(sums, real)

  count, width = features.shape
  found = {}
  if count // _JACKKNIFE_GROUPS > width:
    interval = jackknife(_groups(features, _JACKKNIFE_GROUPS), metric)
    found['jackknife'] = interval._asdict()
  if count // _LIMIT_GROUPS > width:
    limit = limit_of_distance(features, real)
    found['limit'] = limit._asdict() | {
      'sizes': limit.sizes.tolist(),
      'scores': limit.scores.tolist(),
    }
  return found
