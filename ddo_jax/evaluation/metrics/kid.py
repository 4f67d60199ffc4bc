"""The Kernel Inception Distance (Bińkowski et al. 2018, arXiv 1801.01401).

It is the unbiased squared maximum mean discrepancy under the kernel
(x·y/D + 1)³. Unlike FID's, its expectation does not depend on the number of
images.
"""

from typing import NamedTuple

import numpy as np

from ddo_jax import errors
from ddo_jax.evaluation.metrics import frechet

_SEED = 2020  # torch-fidelity draws its subsets by this seed
_TILE = 2_048


class Kid(NamedTuple):
  """Mean and population standard deviation over the subsets.

  The deviation is that of one subset, not the error of the mean.
  """

  mean: float
  sd: float


def _kernel_sum(a: np.ndarray, b: np.ndarray, tile: int) -> float:
  """Returns Σ_ij (a_i·b_j/D + 1)³, in float64."""
  total = 0.0
  for i in range(0, len(a), tile):
    x = a[i : i + tile].astype(np.float64) / a.shape[1]
    for j in range(0, len(b), tile):
      kernel = x @ b[j : j + tile].astype(np.float64).T
      kernel += 1
      total += float((kernel * kernel * kernel).sum())
  return total


def _self_sum(a: np.ndarray, tile: int) -> float:
  """Returns Σ_{i≠j} (a_i·a_j/D + 1)³, in float64."""
  wide = a.astype(np.float64)
  diagonal = (np.square(wide).sum(axis=1) / a.shape[1] + 1) ** 3
  return _kernel_sum(a, a, tile) - float(diagonal.sum())


def _check(real: np.ndarray, fake: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns both sets as arrays; UserError if they do not go together."""
  real = frechet.check_features('real', real)
  fake = frechet.check_features('fake', fake)
  if real.shape[1] != fake.shape[1]:
    raise errors.UserError(
      f'{real.shape[1]} real and {fake.shape[1]} fake features; use one '
      'feature network for both'
    )
  if min(len(real), len(fake)) < 2:
    raise errors.UserError(
      f'{len(real)} real and {len(fake)} fake rows; wanted 2 or more of each'
    )
  return real, fake


def mmd2(real: np.ndarray, fake: np.ndarray, tile: int = _TILE) -> float:
  """Returns the unbiased estimate from all pairs; it may lie just below 0.

  Args:
    real: [N, D] features.
    fake: [M, D] features.
    tile: the number of rows of each set that are compared at once; memory is a
      small multiple of 8·tile² bytes.

  Raises:
    UserError: a set has fewer than two rows or holds NaN or Inf, or the sets
      have different D.
  """
  real, fake = _check(real, fake)
  n = len(real)
  m = len(fake)
  within = _self_sum(real, tile) / (n * (n - 1))
  within += _self_sum(fake, tile) / (m * (m - 1))
  return within - 2 * _kernel_sum(fake, real, tile) / (n * m)


def kid(
  real: np.ndarray, fake: np.ndarray, subsets: int = 100, size: int = 1_000
) -> Kid:
  """Returns torch-fidelity's mean over random subsets, in float64.

  Args:
    real: [N, D] features.
    fake: [M, D] features.
    subsets: the number of subsets.
    size: the number of rows that a subset has of each set, drawn without
      replacement.

  Raises:
    UserError: there is no subset, a set has fewer than `size` rows or holds NaN
      or Inf, or the sets have different D.
  """
  real, fake = _check(real, fake)
  if not 2 <= size <= min(len(real), len(fake)) or subsets < 1:
    raise errors.UserError(
      f'{subsets} subsets of {size} from {len(real)} real and {len(fake)} fake '
      'images; wanted 1 or more, of 2 up to the smaller set'
    )
  random = np.random.RandomState(_SEED)
  values = []
  for _ in range(subsets):
    fakes = random.choice(len(fake), size, replace=False)
    reals = random.choice(len(real), size, replace=False)
    values.append(mmd2(real[reals], fake[fakes]))
  return Kid(float(np.mean(values)), float(np.std(values)))
