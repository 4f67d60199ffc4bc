"""The Monge Inception Distance (Berthet et al. 2026, arXiv 2605.06797).

It is the squared sliced 2-Wasserstein distance of two sets of features, times
three times their number. Along a line the distance needs sorting alone, and no
covariance is estimated: its authors find that 5,000 samples rank models as FID
does with 50,000. The factor brings it to the size of FID.
"""

import functools
from typing import NamedTuple

import numpy as np

from ddo_jax import errors
from ddo_jax.evaluation.metrics import frechet

DIRECTIONS = 1_000  # the authors' number of lines
_SEED = 2026  # of the lines
_LINES = 50  # that are sorted at once: tens of megabytes for 50,000 rows


class _Coupling(NamedTuple):
  """The monotone coupling of N and M equally heavy points on a line, sorted.

  Attributes:
    first: [K] which of the N each piece of mass belongs to.
    second: [K] which of the M.
    mass: [K] how much it is; the sum is 1.
  """

  first: np.ndarray
  second: np.ndarray
  mass: np.ndarray


@functools.lru_cache(maxsize=8)
def _coupling(n: int, m: int) -> _Coupling:
  """Cuts the mass 0 .. 1 wherever one of both sets comes to its next point."""
  ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
  starts = np.concatenate([[0], ends[:-1]])
  return _Coupling(starts // m, starts // n, (ends - starts) / (n * m))


def directions(width: int, count: int = DIRECTIONS) -> np.ndarray:
  """Returns the lines [width, count] float32 that features are projected on.

  They are uniform on the sphere, and always the same for a number of features,
  so that two sets of samples are compared along the same lines.
  """
  lines = np.random.RandomState(_SEED).standard_normal((count, width))
  lines /= np.linalg.norm(lines, axis=1, keepdims=True)
  return lines.T.astype(np.float32)


def mind(real: np.ndarray, fake: np.ndarray, count: int = DIRECTIONS) -> float:
  """Returns 3·D times the mean squared 2-Wasserstein distance over lines.

  The sets may differ in size: then the distance of the two empirical
  distributions is taken, where the paper takes as many of either. It is
  positive for two samples of one distribution, the more so the fewer there are;
  numbers of equally large sets are compared.

  Args:
    real: [N, D] features.
    fake: [M, D] features.
    count: the number of lines.

  Raises:
    UserError: a set holds NaN or Inf, or the sets have different D.
  """
  real = frechet.check_features('real', real)
  fake = frechet.check_features('fake', fake)
  width = real.shape[1]
  if fake.shape[1] != width or count < 1:
    raise errors.UserError(
      f'{width} real and {fake.shape[1]} fake features on {count} lines; wanted'
      ' features of one network, and 1 line or more'
    )
  lines = directions(width, count)
  pieces = _coupling(len(real), len(fake))
  # Float32 keeps seven digits of a coordinate; those of a distance between sets
  # that lie far from 0 are kept by taking their centre out.
  centre = real.mean(axis=0, dtype=np.float64).astype(real.dtype)
  total = 0.0
  for start in range(0, count, _LINES):
    some = lines[:, start : start + _LINES]
    a = np.sort(some.T @ (real - centre).T)
    b = np.sort(some.T @ (fake - centre).T)
    gap = a[:, pieces.first] - b[:, pieces.second]
    total += float(np.square(gap, dtype=np.float64).sum(axis=0) @ pieces.mass)
  return 3 * width * total / count
