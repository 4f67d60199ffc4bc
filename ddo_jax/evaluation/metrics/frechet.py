"""The Fréchet distance between two sets of features, in float64.

FID (Heusel et al. 2017, arXiv 1706.08500, eq. 6) is this distance between
Inception features; the digits use the features of `networks.classifier`.
"""

import dataclasses
from typing import Protocol

import numpy as np

from ddo_jax import errors

_ROWS = 4_096  # rows that are widened to float64 at once, to bound memory


def check_features(name: str, features: np.ndarray) -> np.ndarray:
  """Returns features as an array.

  Args:
    name: what an error calls them.
    features: [N, D] with N, D > 0, finite, of any real type.

  Raises:
    UserError: they have another shape, or hold NaN or Inf.
  """
  features = np.asarray(features)
  if features.ndim != 2 or 0 in features.shape:
    raise errors.UserError(
      f'{name} has shape {features.shape}; it must be [N, D] with N, D > 0: '
      'one row of features an image'
    )
  bad = ~np.isfinite(features).all(axis=1)
  if bad.any():
    raise errors.UserError(
      f'{name} has NaN or Inf in {bad.sum()} of {len(bad)} rows (first: row '
      f'{bad.argmax()}); look for a diverged model or sampler'
    )
  return features


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
  """Sums of features, from which mean and covariance follow.

  The sums are raw, not centred, so that the sums of two sets are merged by
  addition. For this the covariance loses about log10(mean²/variance) of
  float64's 16 digits, which is nothing for features of order one.

  Attributes:
    n: the number of rows.
    total: [D] float64, Σ x.
    outer: [D, D] float64, Σ x xᵀ.
  """

  n: int
  total: np.ndarray
  outer: np.ndarray

  @classmethod
  def of(cls, features: np.ndarray) -> 'Statistics':
    """Sums features [N, D] of any real type, in the order of their rows.

    Raises:
      UserError: `features` is not [N, D], or holds NaN or Inf.
    """
    features = check_features('features', features)
    width = features.shape[1]
    total = np.zeros(width)
    outer = np.zeros((width, width))
    for start in range(0, len(features), _ROWS):
      rows = features[start : start + _ROWS].astype(np.float64)
      total += rows.sum(axis=0)
      outer += rows.T @ rows
    return cls(len(features), total, outer)

  def merge(self, other: 'Statistics') -> 'Statistics':
    """Returns the statistics of both sets of rows together.

    Raises:
      UserError: the two have different numbers of features.
    """
    if self.total.shape != other.total.shape:
      raise errors.UserError(
        f'cannot merge statistics of {len(self.total)} and of '
        f'{len(other.total)} features; use one feature network for both'
      )
    return Statistics(
      self.n + other.n, self.total + other.total, self.outer + other.outer
    )

  @property
  def mean(self) -> np.ndarray:
    """The mean of the rows, [D]."""
    return self.total / self.n

  @property
  def covariance(self) -> np.ndarray:
    """The unbiased covariance of the rows, [D, D]: divided by n − 1.

    Raises:
      UserError: there are fewer than two rows.
    """
    if self.n < 2:
      raise errors.UserError(
        f'a covariance of {self.n} row(s) of features; it needs 2 or more'
      )
    mean = self.mean
    return (self.outer - self.n * np.outer(mean, mean)) / (self.n - 1)


def _root(name: str, matrix: np.ndarray) -> np.ndarray:
  """Returns R with R Rᵀ = `matrix`.

  Args:
    name: what an error calls the matrix.
    matrix: [D, D], symmetric.

  Raises:
    UserError: the matrix is no covariance.
  """
  noise = len(matrix) * np.finfo(np.float64).eps
  try:
    root = np.linalg.cholesky(matrix)
    if np.square(np.diag(root)).min() > noise * np.trace(matrix):
      return root
  except np.linalg.LinAlgError:
    pass
  # The matrix is singular, or nearly. This takes ten times as long, but it can
  # tell zeros from noise.
  values, vectors = np.linalg.eigh(matrix)
  # Covariances that were rounded to float32, as in some files, have eigenvalues
  # of about −1e-7 of the largest.
  if values.min() < -1e-5 * max(values.max(), 0.0):
    raise errors.UserError(
      f'{name} has eigenvalues from {values.min():.3g} to '
      f'{values.max():.3g}; a covariance has none below 0: use the features '
      'of float64 sums, of order one'
    )
  # What eigh leaves of a missing rank is rounding error, and its root would be
  # 1e-8.
  values = np.where(values > noise * values.max(), values, 0.0)
  return vectors * np.sqrt(values)[None, :]


def distance_of_moments(
  mean_a: np.ndarray,
  covariance_a: np.ndarray,
  mean_b: np.ndarray,
  covariance_b: np.ndarray,
) -> float:
  """Returns the squared Fréchet (2-Wasserstein) distance of two Gaussians.

  It is |m_a − m_b|² + tr A + tr B − 2 tr (A^½ B A^½)^½ (Dowson & Landau 1982).
  With A = R Rᵀ and B = S Sᵀ, the last trace is the sum of the singular values
  of Rᵀ S. This takes no matrix square root, no complex numbers, and no root of
  a product's tiny eigenvalues, each of which would leave an error of 1e-8.

  Args:
    mean_a: [D].
    covariance_a: [D, D], symmetric, positive semidefinite, singular or not.
    mean_b: [D].
    covariance_b: [D, D], likewise.

  Returns:
    The distance in squared units of the features. Its rounding error is about
    1e-13 of the traces, also for singular matrices, so that it may lie that far
    below 0.

  Raises:
    UserError: shapes disagree, a number is NaN or Inf, or a matrix has clearly
      negative eigenvalues.
  """
  moments = [mean_a, covariance_a, mean_b, covariance_b]
  moments = [np.asarray(x, dtype=np.float64) for x in moments]
  shapes = [x.shape for x in moments]
  width = moments[0].size
  if shapes != [(width,), (width, width)] * 2:
    raise errors.UserError(
      f'means and covariances have shapes {shapes}; they must be [D] and '
      '[D, D] with one D: compare features of one network'
    )
  if not all(np.isfinite(x).all() for x in moments):
    raise errors.UserError(
      'a mean or covariance holds NaN or Inf; compute the statistics anew'
    )
  mean_a, a, mean_b, b = moments
  root_a = _root('the first covariance', a)
  root_b = _root('the second covariance', b)
  cross = np.linalg.svd(root_a.T @ root_b, compute_uv=False).sum()
  shift = np.square(mean_a - mean_b).sum()
  return float(shift + np.trace(a) + np.trace(b) - 2 * cross)


class HasMoments(Protocol):
  """The moments of a set: `Statistics`, or `statistics.Moments` of a file."""

  @property
  def mean(self) -> np.ndarray:
    """The mean of the features [D]."""

  @property
  def covariance(self) -> np.ndarray:
    """Their covariance [D, D]."""


def distance(a: HasMoments, b: HasMoments) -> float:
  """Returns the Fréchet distance of two sets of features.

  See `distance_of_moments`.

  Raises:
    UserError: the numbers of features differ, or a set has fewer than two rows.
  """
  return distance_of_moments(a.mean, a.covariance, b.mean, b.covariance)
