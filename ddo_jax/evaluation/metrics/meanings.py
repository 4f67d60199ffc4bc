"""What each score measures, and which way is better.

The evaluators produce scores by name; a report judges them by this table.
"""

from collections.abc import Callable
import dataclasses


@dataclasses.dataclass(frozen=True)
class Meaning:
  """The meaning of a score.

  Attributes:
    measures: what the number is, as the beginning of a sentence.
    wish: what a good value is, as the end of that sentence.
    cost: maps the score to a number of which less is better.
  """

  measures: str
  wish: str
  cost: Callable[[float], float]


def _as_it_is(value: float) -> float:
  return value


def _low(measures: str) -> Meaning:
  return Meaning(measures, 'lower is better', _as_it_is)


def _high(measures: str) -> Meaning:
  def cost(value: float) -> float:
    return -value

  return Meaning(measures, 'higher is better', cost)


def _distance_from_one(value: float) -> float:
  return abs(value - 1)


def _excess_memorised(value: float) -> float:
  # By definition 0.02 of the held-out images are: to have fewer is no merit.
  return max(value - 0.02, 0)


_INFINITE = 'Fréchet distance of infinitely many images, extrapolated: '

MEANINGS = {
  'fd_train': _low('Fréchet distance of samples to the training images'),
  'fd_test': _low('Fréchet distance of samples to held-out images'),
  'fid': _low('Fréchet distance in Inception features'),
  'sfid': _low('Fréchet distance in spatial Inception features'),
  'fd_dinov2': _low('Fréchet distance in DINOv2 features'),
  'fd_train_inf': _low(f'{_INFINITE}to the training images'),
  'fd_test_inf': _low(f'{_INFINITE}to held-out images'),
  'fid_inf': _low(f'{_INFINITE}in Inception features'),
  'sfid_inf': _low(f'{_INFINITE}in spatial Inception features'),
  'fd_dinov2_inf': _low(f'{_INFINITE}in DINOv2 features'),
  'fd_ratio': Meaning(
    'Fréchet distance of samples to the training images, over that of held-out'
    ' real images; the mean over networks',
    'lower is better, and 1 is as held-out images',
    _as_it_is,
  ),
  'mind': _low('Sliced Wasserstein distance of features to real images'),
  'kid': _low('Kernel distance in Inception features'),
  'inception_score': _high('Inception Score: sharp and varied classes'),
  'accuracy': _high('Share of samples classified as the class asked for'),
  'precision': _high('Share of samples that lie among the real images'),
  'recall': _high('Share of real images that lie among the samples'),
  'density': Meaning(
    'Real balls, to the 5th neighbour, that a sample lies in, over 5',
    'near 1 is better: below, off the data; above, where it is densest',
    _distance_from_one,
  ),
  'coverage': _high(
    'Share of real balls, to the 5th neighbour, with a sample in them'
  ),
  'nn_ratio': Meaning(
    'Distance to the nearest training image, over that of held-out images',
    'near 1 is better: below, samples are copies; above, off the data',
    _distance_from_one,
  ),
  'memorised': Meaning(
    'Share of samples nearer to a training image than 98 % of held-out images',
    'up to 0.02 is good',
    _excess_memorised,
  ),
}
