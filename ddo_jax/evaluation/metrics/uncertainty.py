"""How far a score can be trusted: seeds, an interval, the limit of many images.

All three take features cut into disjoint groups of seeds as mergeable sums, so
that no image is looked at twice. They answer different questions; the label of
each result says which.
"""

from collections.abc import Callable
from collections.abc import Sequence
import math
from typing import NamedTuple

import numpy as np
from scipy import stats

from ddo_jax import errors
from ddo_jax.evaluation.metrics import frechet

Metric = Callable[[frechet.Statistics], float]

_LEVEL = 0.95


class Interval(NamedTuple):
  """A score with its sampling error.

  Attributes:
    value: of all images.
    low: end of the interval.
    high: its other end.
    standard_error: of `value`, from sampling alone; the bias of a finite
      number of images (FID's is positive) is not in it.
    label: what this is.
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
    slope: of the score against 1/N.
    sizes: [K] images, ascending.
    scores: [K] mean score of disjoint sets of that size.
    label: what this is.
  """

  value: float
  slope: float
  sizes: np.ndarray
  scores: np.ndarray
  label: str


def _total(
  groups: Sequence[frechet.Statistics], fewest: int
) -> frechet.Statistics:
  """All groups as one; UserError unless enough, of equal numbers of rows."""
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
  """A 95 % interval by leaving out one group at a time.

  The standard error is √((G-1)/G Σ (θ₋ᵢ - mean θ₋)²) (Efron & Stein 1981), the
  interval that of Student's t of G - 1 degrees of freedom.

  Args:
    groups: G ≥ 5 disjoint groups of equally many images; 10 to 20 are usual.
    metric: such as `lambda s: frechet.distance(s, reference)`; called G + 1
      times.

  Raises:
    UserError: too few groups, or of different sizes.
  """
  total = _total(groups, 5)
  value = metric(total)
  without = [
    frechet.Statistics(
      total.n - group.n, total.total - group.total, total.outer - group.outer
    )
    for group in groups
  ]
  left = np.array([metric(rest) for rest in without])
  count = len(groups)
  error = math.sqrt((count - 1) / count * np.square(left - left.mean()).sum())
  reach = error * float(stats.t.ppf((1 + _LEVEL) / 2, count - 1))
  label = f'{_LEVEL:.0%} interval, jackknife over {count} groups of seeds'
  return Interval(value, value - reach, value + reach, error, label)


def extrapolate(groups: Sequence[frechet.Statistics], metric: Metric) -> Limit:
  """The score at N → ∞, from a line in 1/N (Chong & Forsyth 2020).

  Sets of s = 1, 2, 4, ... groups and of all G are scored, disjoint ones of one
  size averaged, and score = value + slope/N is fitted by least squares, each
  size weighted by its number of sets (arXiv 1911.07023 draws random subsets).

  Args:
    groups: G ≥ 4 disjoint groups of equally many images, each of more images
      than features: the law holds from there on.
    metric: as in `jackknife`; called about 2·G times.

  Raises:
    UserError: too few groups, of different sizes, or too small.
  """
  total = _total(groups, 4)
  each, width = groups[0].n, len(total.total)
  if each <= width:
    raise errors.UserError(
      f'groups of {each} images for {width} features; a limit needs more '
      'images than features in each: use fewer groups or more images'
    )
  count = len(groups)
  steps = [2**i for i in range(count.bit_length()) if 2**i < count] + [count]
  scores, weights = [], []
  for step in steps:
    sets = [groups[i : i + step] for i in range(0, count - step + 1, step)]
    scores.append(np.mean([metric(_total(s, 1)) for s in sets]))
    weights.append(len(sets))
  sizes = each * np.array(steps)
  # polyfit takes the square root of least squares' weights.
  slope, value = np.polyfit(1 / sizes, scores, 1, w=np.sqrt(weights))
  label = f'extrapolated to infinitely many images from {each} to {total.n}'
  return Limit(float(value), float(slope), sizes, np.array(scores), label)
