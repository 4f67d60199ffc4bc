"""Fréchet distances in units of what real images have.

Distances in the features of two networks have no common scale. FDr (Yang et
al. 2026, arXiv 2604.28190) divides that of the samples to the training images
by that of held-out real images to them, and takes the mean over k networks,
FDr^k: held-out images have 1 by construction, and a good model less than many.

Its authors take six networks, as many held-out images as samples, and
ImageNet. Here it is over the networks at hand, which a score's notes name.
"""

import numpy as np

from ddo_jax import errors
from ddo_jax.evaluation.metrics import frechet

_SEED = 0  # of the order in which a set is cut into parts
_ROUNDING = 1e-9  # of the features' variance: what a set has to itself


def _mean_distance(
  features: np.ndarray, size: int, real: frechet.HasMoments
) -> float:
  """Returns the mean distance to `real` of disjoint parts of `size` rows."""
  # Files are often sorted by class; a part is to have all of them.
  order = np.random.RandomState(_SEED).permutation(len(features))
  parts = len(features) // size
  distances = [
    frechet.distance(frechet.Statistics.of(features[index]), real)
    for index in np.split(order[: parts * size], parts)
  ]
  return float(np.mean(distances))


class FdRatio:
  """FD(samples, real) / FD(held-out images, real) at equal numbers of images.

  A Fréchet distance is the larger the fewer images there are. So the larger set
  is cut into disjoint parts of the smaller one's size, whose distances are
  averaged. 1 is as good as held-out images.
  """

  def __init__(self, held_out: np.ndarray, real: frechet.HasMoments):
    """Keeps the features; the distances of held-out images are found when due.

    Args:
      held_out: [M, D] features of real images that `real` is not made of.
      real: the moments of the training images' features.
    """
    self._held_out = held_out
    self._real = real
    self._units: dict[int, float] = {}  # by the number of images

  def __call__(self, fake: np.ndarray) -> float:
    """Returns the ratio of samples' features [N, D].

    Raises:
      UserError: a set has fewer than two rows, or the held-out images are at no
        distance, so that they are those that `real` is made of.
    """
    size = min(len(fake), len(self._held_out))
    unit = self._unit(size)
    return _mean_distance(fake, size, self._real) / unit

  def _unit(self, size: int) -> float:
    """Returns the distance of held-out images, `size` at a time."""
    if size not in self._units:
      unit = _mean_distance(self._held_out, size, self._real)
      if unit <= _ROUNDING * np.trace(self._real.covariance):
        raise errors.UserError(
          f'the held-out images are at a Fréchet distance of {unit:.3g} from'
          ' the training images: they are the same ones; name others with'
          ' --config.data.test_source, or cut them with'
          ' --config.data.holdout=0.1'
        )
      self._units[size] = unit
    return self._units[size]
