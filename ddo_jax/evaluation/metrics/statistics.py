"""Mean and covariance of features, and the .npz files that hold them."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from ddo_jax import errors
from ddo_jax.evaluation.metrics import frechet
from ddo_jax.runtime import disk
from ddo_jax.runtime import reading

_MOST_BYTES = 2**27  # of an array; a covariance of 2,048 features has 2**25


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
  """Mean and covariance of features, as a file of FID statistics holds them.

  `frechet.distance` accepts these in the place of `frechet.Statistics`.

  Attributes:
    mean: [D] float64.
    covariance: [D, D] float64, symmetric, divided by n - 1.
    n: the number of rows they were made from; 0 if the file does not say.
    provenance: text by name: file, sha256, network, resize, ...
  """

  mean: np.ndarray
  covariance: np.ndarray
  n: int = 0
  provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    width = self.mean.size
    shapes = (self.mean.shape, self.covariance.shape)
    if shapes != ((width,), (width, width)) or width == 0:
      raise errors.UserError(
        f'mean and covariance have shapes {shapes}; wanted [D] and [D, D]: the '
        'file is damaged or holds something else'
      )
    finite = np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()
    if not finite:
      raise errors.UserError(
        'a mean or covariance holds NaN or Inf; compute the statistics anew'
      )
    skew = np.abs(self.covariance - self.covariance.T).max()
    if skew > 1e-6 * np.abs(self.covariance).max():
      raise errors.UserError(
        f'a covariance is not symmetric (by {skew:.3g}); the file is damaged '
        'or holds something else'
      )

  @classmethod
  def of(
    cls, sums: frechet.Statistics, provenance: Mapping[str, str]
  ) -> 'Moments':
    """Makes the moments that follow from sums of features."""
    return cls(sums.mean, sums.covariance, sums.n, provenance)


def rank_note(name: str, n: int, width: int) -> str:
  """Returns one line if a covariance is singular for want of rows, else ''.

  A Fréchet distance of such a set is defined, but it is biased upward by far;
  the line belongs beside the number.

  Args:
    name: what the line calls the set.
    n: the number of rows.
    width: the number of features.
  """
  if n > width:
    return ''
  return (
    f'{name}: the covariance of {n} rows of {width} features is rank-deficient'
    f' (rank {n - 1} at most); use more than {width} images for a distance'
    ' that can be compared'
  )


def read_npz(
  path: pathlib.Path, names: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
  """Reads some arrays of an .npz.

  Nothing is unpickled.

  Args:
    path: the file.
    names: the arrays that are wanted, where the file has them.

  Returns:
    (the arrays by name, the names of all that the file has).

  Raises:
    UserError: the file is missing or damaged, or one of those arrays is larger
      than any covariance or holds Python objects.
  """
  try:
    with reading.Npz(path) as file:
      found = [name for name in names if name in file.names]
      arrays = {name: file.read(name, _MOST_BYTES) for name in found}
      return arrays, file.names
  except Exception as error:  # zipfile, zlib and numpy each raise their own
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    raise errors.UserError(
      f'cannot read {path} ({reason}); wanted an .npz of plain arrays'
    ) from error


def save(path: pathlib.Path, moments: Moments) -> None:
  """Writes an .npz of FID statistics, whole or not at all.

  EDM's programs can read the file too: they look for `mu` and `sigma`.

  Raises:
    UserError: the file cannot be written.
  """
  with disk.whole(path) as file:
    np.savez(
      file,
      mu=moments.mean,
      sigma=moments.covariance,
      n=np.array(moments.n),
      provenance=np.array(json.dumps(dict(moments.provenance))),
    )
