"""Precision, recall, density and coverage by nearest neighbours.

Kynkäänniemi et al. 2019 (arXiv 1904.06991) approximate each set of features by
the union of the balls around its points that reach to their k-th neighbour.
Precision is the share of fakes inside the real manifold, and recall the share
of reals inside the fake manifold.

One real outlier has a ball so large that it makes many fakes precise, and one
fake outlier covers many reals. Naeem et al. 2020 (arXiv 2002.09797) count the
real balls that a fake lies in (density), and take coverage by the real balls
alone.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ddo_jax import errors
from ddo_jax.evaluation.metrics import frechet

# Rows in a tile, whose distances take 8 MiB, which is near to what caches hold.
# With 50,000 rows of 2,048 features BLAS is as busy as with larger tiles.
TILE = 1_024
COVERED_BY = 5  # the k of density and coverage, as Naeem et al. have it


class PrecisionRecall(NamedTuple):
  """Shares in [0, 1]: `precision` of the fakes and `recall` of the reals."""

  precision: float
  recall: float


class DensityCoverage(NamedTuple):
  """`density`, 0 or more, of the fakes and `coverage`, in [0, 1], of the reals.

  For two samples of one distribution the expected density is 1, whatever it is,
  and the expected coverage of many equally many points 1 − 2⁻ᵏ.
  """

  density: float
  coverage: float


def _tiles(
  a: np.ndarray, b: np.ndarray, tile: int, half: bool = False
) -> Iterator[tuple[slice, slice, np.ndarray]]:
  """Yields (rows, columns, float64 |a_i − b_j|² of that tile of pairs).

  They are formed as |a|² + |b|² − 2 a·b in float64, which is exact for integers
  (raw pixels), and right to about 1e-16 (|a|² + |b|²) for float32 features,
  where float32 sums would lose near neighbours to cancellation.

  Args:
    a: [N, D].
    b: [M, D].
    tile: the number of rows of `a` and of `b` in a tile.
    half: whether only tiles on and right of the diagonal are wanted.
  """
  for i in range(0, len(a), tile):
    rows = slice(i, i + tile)
    x = a[rows].astype(np.float64)
    x_norm = np.square(x).sum(axis=1)
    for j in range(i if half else 0, len(b), tile):
      columns = slice(j, j + tile)
      y = b[columns].astype(np.float64)
      squared = x @ (-2 * y.T)
      squared += x_norm[:, None]
      squared += np.square(y).sum(axis=1)[None, :]
      yield rows, columns, np.maximum(squared, 0, out=squared)


def _check_pair(a: np.ndarray, b: np.ndarray, k: int, tile: int) -> None:
  """Raises UserError if the k-th of `b` to a row of `a` makes no sense."""
  if a.shape[1] != b.shape[1]:
    raise errors.UserError(
      f'rows of {a.shape[1]} and of {b.shape[1]} numbers have no distance; '
      'compare features of one network, images of one size'
    )
  if not 1 <= k <= len(b):
    raise errors.UserError(
      f'k is {k}; it must be from 1 to the {len(b)} neighbours there are: '
      'use more images or a smaller k'
    )
  if tile < 1:
    raise errors.UserError(f'tile is {tile}; it must be 1 or more rows')


def kth_distance(
  a: np.ndarray, b: np.ndarray, k: int, tile: int = TILE
) -> np.ndarray:
  """Returns the squared distance of each row of `a` to its k-th nearest of `b`.

  Args:
    a: [N, D], of any real type.
    b: [M, D].
    k: the neighbour's number; 1 is the nearest. Among a set's own rows each is
      its own nearest, so that its k-th neighbour has the number k + 1 there.
    tile: the number of rows of `a` and of `b` that are compared at once; memory
      is a small multiple of 8·tile² bytes. The result depends on it by rounding
      only.

  Returns:
    [N] float64, squared Euclidean.

  Raises:
    UserError: an array is not [N, D] or not finite, D differs, or k > M.
  """
  a = frechet.check_features('a', a)
  b = frechet.check_features('b', b)
  _check_pair(a, b, k, tile)
  nearest = np.full((len(a), k), np.inf)
  for rows, _, squared in _tiles(a, b, tile):
    _keep_nearest(nearest[rows], squared)
  return nearest.max(axis=1)


def _keep_nearest(nearest: np.ndarray, squared: np.ndarray) -> None:
  """Keeps the k smallest of each row of both arrays in `nearest`.

  Args:
    nearest: [n, k] the smallest so far; changed in place.
    squared: [n, m] new candidates.
  """
  k = nearest.shape[1]
  candidates = np.concatenate([nearest, squared], axis=1)
  candidates.partition(k - 1, axis=1)
  nearest[:] = candidates[:, :k]


def radii(rows: np.ndarray, k: int = 3, tile: int = TILE) -> np.ndarray:
  """Returns the squared distance of each row to its k-th neighbour in the set.

  These are the numbers of `kth_distance(rows, rows, k + 1)` at half the cost,
  since distances are symmetric.

  Args:
    rows: [N, D], N > k, of any real type.
    k: the neighbour's number; the row itself is not counted.
    tile: the number of rows compared at once; see `kth_distance`.

  Returns:
    [N] float64, squared Euclidean: the radii of the balls of
    `precision_recall`.

  Raises:
    UserError: `rows` is not [N, D] or not finite, or N ≤ k.
  """
  rows = frechet.check_features('rows', rows)
  _check_pair(rows, rows, k, tile)
  _check_neighbours('rows', rows, k)
  nearest = np.full((len(rows), k + 1), np.inf)
  for here, there, squared in _tiles(rows, rows, tile, half=True):
    _keep_nearest(nearest[here], squared)
    if here != there:
      _keep_nearest(nearest[there], squared.T)
  return nearest.max(axis=1)


def _check_neighbours(name: str, rows: np.ndarray, k: int) -> None:
  """Raises UserError unless every row has a k-th neighbour."""
  if len(rows) <= k:
    raise errors.UserError(
      f'{name} has {len(rows)} rows; the {k}-th neighbour of a row needs '
      f'more than {k}: use more images or a smaller k'
    )


def precision_recall(
  real: np.ndarray,
  fake: np.ndarray,
  k: int = 3,
  tile: int = TILE,
  real_radii: np.ndarray | None = None,
) -> PrecisionRecall:
  """Returns improved precision and recall (arXiv 1904.06991, eq. 1-2).

  A point at exactly a ball's radius is inside. Distances are compared to
  float64 rounding of the squared norms.

  Args:
    real: [N, D] features of real images, N > k.
    fake: [M, D] features of samples, M > k. Both shares depend on N and M, so
      compare only numbers from sets of equal sizes.
    k: the number of the neighbour that a ball reaches to; the point itself is
      not counted.
    tile: the number of rows compared at once; see `kth_distance`.
    real_radii: [N] what `radii(real, k)` returned, for many sets of samples
      that are measured against the same real images; None computes it.

  Returns:
    (precision, recall), Python floats in [0, 1].

  Raises:
    UserError: a set is not [N, D], holds NaN or Inf, or has k rows or fewer, or
      the two have different D.
  """
  real = frechet.check_features('real', real)
  fake = frechet.check_features('fake', fake)
  _check_pair(fake, real, k, tile)
  _check_neighbours('real', real, k)
  _check_neighbours('fake', fake, k)
  real_radius = radii(real, k, tile) if real_radii is None else real_radii
  fake_radius = radii(fake, k, tile)
  fake_inside = np.zeros(len(fake), bool)
  real_inside = np.zeros(len(real), bool)
  for rows, columns, squared in _tiles(fake, real, tile):
    in_real_ball = squared <= real_radius[None, columns]
    in_fake_ball = squared <= fake_radius[rows, None]
    fake_inside[rows] |= in_real_ball.any(axis=1)
    real_inside[columns] |= in_fake_ball.any(axis=0)
  return PrecisionRecall(float(fake_inside.mean()), float(real_inside.mean()))


def density_coverage(
  real: np.ndarray,
  fake: np.ndarray,
  k: int = COVERED_BY,
  tile: int = TILE,
  real_radii: np.ndarray | None = None,
) -> DensityCoverage:
  """Returns density and coverage (arXiv 2002.09797).

  density = 1/(k M) Σ_j Σ_i 1[fake_j ∈ B_i] and coverage =
  1/N Σ_i 1[∃ j: fake_j ∈ B_i], where B_i is the ball around real_i that reaches
  to its k-th neighbour among the reals. As in `precision_recall`, a point at
  exactly the radius is inside.

  Args:
    real: [N, D] features of real images, N > k.
    fake: [M, D] features of samples. Coverage depends on N and M, so compare
      only numbers from sets of equal sizes.
    k: the number of the neighbour that a ball reaches to; the point itself is
      not counted.
    tile: the number of rows compared at once; see `kth_distance`.
    real_radii: [N] what `radii(real, k)` returned; None computes it.

  Returns:
    (density, coverage), Python floats.

  Raises:
    UserError: a set is not [N, D], holds NaN or Inf, the real one has k rows or
      fewer, or the two have different D.
  """
  real = frechet.check_features('real', real)
  fake = frechet.check_features('fake', fake)
  _check_pair(fake, real, k, tile)
  _check_neighbours('real', real, k)
  real_radius = radii(real, k, tile) if real_radii is None else real_radii
  inside = 0
  covered = np.zeros(len(real), bool)
  for _, columns, squared in _tiles(fake, real, tile):
    in_real_ball = squared <= real_radius[None, columns]
    inside += int(in_real_ball.sum())
    covered[columns] |= in_real_ball.any(axis=0)
  return DensityCoverage(inside / (k * len(fake)), float(covered.mean()))
