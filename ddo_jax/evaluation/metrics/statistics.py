"""Feature statistics to the last bit, however the work was cut up.

An evaluation of 50,000 images runs in batches, on several devices, is killed
and resumed. `Accumulator` makes its sums a function of the set of (image id,
features) alone: rows wait until all of a block's ids are there, a block is
summed in one fixed shape, and blocks are added on two fixed grids on which
float64's addition rounds nothing, hence neither order nor grouping matters.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from ddo_jax import errors
from ddo_jax.evaluation.metrics import frechet

BLOCK = 2_048  # consecutive ids that are summed as one
MAX_BLOCKS = 2**12  # 8,388,608 images; the fine sums stay exact up to here
_COARSE = 2.0**8  # multiples of 2^-8 are added exactly up to 2^45
_FINE = 2.0**50  # what is left over: below 2^-9 a block, in multiples of 2^-50
_LARGEST = 2.0**44  # of a sum
_KIND = f'ddo_jax feature sums of {BLOCK}'


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
  """Mean and covariance of features, such as a reference file holds.

  `frechet.distance` takes it as it takes `frechet.Statistics`.

  Attributes:
    mean: [D] float64.
    covariance: [D, D] float64, symmetric, divided by n - 1.
    n: rows they were made of; 0 if the file does not say.
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
    if not (
      np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()
    ):
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
    """The moments of sums."""
    return cls(sums.mean, sums.covariance, sums.n, provenance)


def rank_note(name: str, n: int, width: int) -> str:
  """One line if a covariance is singular for want of rows, else ''.

  A Fréchet distance of such a set is defined, but biased upward by far: say
  so beside the number.

  Args:
    name: of the set, for the line.
    n: rows.
    width: features.
  """
  if n > width:
    return ''
  return (
    f'{name}: the covariance of {n} rows of {width} features is rank-deficient'
    f' (rank {n - 1} at most); use more than {width} images for a distance'
    ' that can be compared'
  )


class Accumulator:
  """Sums of features by image id: order-free, mergeable, resumable.

  Memory is two [D, D] float64, a few more while a block is summed, and the
  rows of unfinished blocks.
  """

  def __init__(self, width: int):
    """Starts without rows; `width` is the number of features D."""
    if width < 1:
      raise errors.UserError(f'{width} features; it must be 1 or more')
    self.width = width
    self._done = set()  # numbers of the blocks that are in the sums
    self._rows = {}  # block -> [BLOCK, D] float32, zero where not yet there
    self._here = {}  # block -> [BLOCK] bool
    self._sums = [
      np.zeros(shape)
      for shape in ((width,), (width, width))
      for _ in (_COARSE, _FINE)
    ]

  @property
  def n(self) -> int:
    """Rows so far."""
    waiting = sum(int(here.sum()) for here in self._here.values())
    return len(self._done) * BLOCK + waiting

  def add(self, ids: np.ndarray, features: np.ndarray) -> None:
    """Takes rows, in any order and number.

    Args:
      ids: [B] whole numbers from 0, each once in all.
      features: [B, D]; kept as float32.

    Raises:
      UserError: wrong shapes, NaN or Inf, an id twice or out of range, or
        features too large to be summed exactly.
    """
    features = frechet.check_features('features', features)
    ids = np.asarray(ids)
    if features.shape != (len(ids), self.width) or ids.dtype.kind not in 'iu':
      raise errors.UserError(
        f'{features.shape} features for ids {ids.dtype} {ids.shape}; wanted '
        f'[B, {self.width}] and [B] whole numbers'
      )
    if ids.min() < 0 or ids.max() >= MAX_BLOCKS * BLOCK:
      raise errors.UserError(
        f'ids from {ids.min()} to {ids.max()}; they must be from 0 to '
        f'{MAX_BLOCKS * BLOCK - 1}: number the images consecutively'
      )
    for number in np.unique(ids // BLOCK):
      mine = ids // BLOCK == number
      self._put(int(number), ids[mine] % BLOCK, features[mine])

  def _put(self, number: int, at: np.ndarray, rows: np.ndarray) -> None:
    """Puts rows at places of a block, and sums it once it is whole."""
    here = self._here.get(number)
    if here is None:
      here = np.full(BLOCK, number in self._done)
    if here[at].any() or len(np.unique(at)) < len(at):
      twice = at[here[at]] if here[at].any() else at
      raise errors.UserError(
        f'image {number * BLOCK + twice[0]} comes twice; give every image an '
        'id of its own, and after a resume only the missing ones'
      )
    if number not in self._rows:
      self._rows[number] = np.zeros((BLOCK, self.width), np.float32)
      self._here[number] = here
    self._rows[number][at] = rows
    here[at] = True
    if here.all():
      _add(self._sums, _split(self._rows[number]))
      del self._rows[number], self._here[number]
      self._done.add(number)

  def missing(self, n: int) -> np.ndarray:
    """The ids below `n` that have not come, ascending: what a resume owes."""
    here = np.zeros(-(-n // BLOCK) * BLOCK, bool).reshape(-1, BLOCK)
    for number in self._done:
      here[number : number + 1] = True
    for number, there in self._here.items():
      here[number : number + 1] = there
    return np.flatnonzero(~here.reshape(-1)[:n])

  def merge(self, other: 'Accumulator') -> None:
    """Takes another's rows, such as another process's.

    Raises:
      UserError: another number of features, or an image in both.
    """
    if other.width != self.width:
      raise errors.UserError(
        f'cannot merge sums of {self.width} and of {other.width} features; use '
        'one feature network for both'
      )
    common = other._done & (self._done | self._here.keys())
    common |= self._done & other._here.keys()
    common |= {
      number
      for number in self._here.keys() & other._here.keys()
      if (self._here[number] & other._here[number]).any()
    }
    if common:
      raise errors.UserError(
        f'both sums hold images from {min(common) * BLOCK} on; give every '
        'process images of its own'
      )
    _add(self._sums, other._sums)
    self._done |= other._done
    for number, here in other._here.items():
      at = np.flatnonzero(here)
      self._put(number, at, other._rows[number][at])

  def statistics(self) -> frechet.Statistics:
    """The sums of all rows so far, unfinished blocks included.

    Raises:
      UserError: there are no rows, or numbers too large to be exact.
    """
    if not self.n:
      raise errors.UserError('statistics of no images; add features first')
    sums = [x.copy() for x in self._sums]
    for rows in self._rows.values():
      _add(sums, _split(rows))
    coarse, fine, outer_coarse, outer_fine = sums
    return frechet.Statistics(self.n, coarse + fine, outer_coarse + outer_fine)

  def save(
    self, path: pathlib.Path, provenance: Mapping[str, str] | None = None
  ) -> None:
    """Writes all of it as .npz (no pickle), whole or not at all."""
    waiting = sorted(self._rows)
    shape = (len(waiting), BLOCK, self.width)
    rows = np.zeros(shape, np.float32)
    here = np.zeros(shape[:2], bool)
    for i, number in enumerate(waiting):
      rows[i], here[i] = self._rows[number], self._here[number]
    arrays = {
      'kind': np.array(_KIND),
      'done': np.array(sorted(self._done), np.int64),
      'waiting': np.array(waiting, np.int64),
      'rows': rows,
      'here': here,
      'provenance': np.array(json.dumps(dict(provenance or {}))),
      **{f'sum_{i}': x for i, x in enumerate(self._sums)},
    }
    _write(path, arrays)

  @classmethod
  def load(cls, path: pathlib.Path) -> tuple['Accumulator', dict[str, str]]:
    """What `save` wrote, and its provenance.

    Raises:
      UserError: missing, damaged, or another kind of file.
    """
    arrays = read_npz(path)
    if str(arrays.get('kind')) != _KIND:
      raise errors.UserError(
        f'{path} holds no feature sums; wanted a file that an evaluation saved'
      )
    made = cls(len(arrays['sum_0']))
    made._done = set(arrays['done'].tolist())
    made._sums = [arrays[f'sum_{i}'] for i in range(4)]
    for i, number in enumerate(arrays['waiting'].tolist()):
      made._rows[number] = arrays['rows'][i]
      made._here[number] = arrays['here'][i]
    return made, json.loads(str(arrays['provenance']))


def _split(rows: np.ndarray) -> list[np.ndarray]:
  """A block's sums [D] and [D, D], each as (coarse, fine) on the grids."""
  sums = frechet.Statistics.of(rows)
  parts = []
  for rest in (sums.total, sums.outer):  # in place: these are 32 MiB each
    coarse = rest * _COARSE
    np.rint(coarse, out=coarse)
    coarse /= _COARSE
    rest -= coarse
    rest *= _FINE
    np.rint(rest, out=rest)
    rest /= _FINE
    parts += [coarse, rest]
  return parts


def _add(sums: list[np.ndarray], parts: list[np.ndarray]) -> None:
  """Adds in place, exactly; UserError where it would not be."""
  for x, part in zip(sums, parts, strict=True):
    x += part
    largest = max(x.max(), -x.min())
    if largest >= _LARGEST:
      raise errors.UserError(
        f'sums of features reach {largest:.3g}, above {_LARGEST:.3g}; use '
        'features of order one'
      )


def _write(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  partial = path.with_name(path.name + '.partial')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open('wb') as file:
      np.savez(file, **arrays)
    partial.replace(path)
  except OSError as error:
    raise errors.UserError(
      f'cannot write {path} ({error.strerror or error}); wanted a folder that '
      'may be written, with room for it'
    ) from error
  finally:
    partial.unlink(missing_ok=True)


def read_npz(path: pathlib.Path, skip: tuple[str, ...] = ()) -> dict[str, Any]:
  """All arrays of an .npz but those named in `skip`; nothing is unpickled.

  Raises:
    UserError: missing, damaged, or it holds Python objects.
  """
  try:
    with np.load(path, allow_pickle=False) as arrays:
      return {key: arrays[key] for key in arrays.files if key not in skip}
  except Exception as error:  # zipfile, zlib, numpy: each has its own
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    raise errors.UserError(
      f'cannot read {path} ({reason}); wanted an .npz of plain arrays'
    ) from error


def save(path: pathlib.Path, moments: Moments) -> None:
  """Writes a reference .npz, which EDM's programs read as well (mu, sigma)."""
  _write(
    path,
    {
      'mu': moments.mean,
      'sigma': moments.covariance,
      'n': np.array(moments.n),
      'provenance': np.array(json.dumps(dict(moments.provenance))),
    },
  )
