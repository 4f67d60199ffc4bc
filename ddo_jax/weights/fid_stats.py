"""Published statistics files for FID: EDM's, EDM2's, OpenAI's and ADM's.

Such a file holds the mean and the covariance of a data set's features, with
which a Fréchet distance compares those of generated images.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from ddo_jax import errors
from ddo_jax.evaluation.metrics import statistics
from ddo_jax.runtime import manifest
from ddo_jax.runtime import reading
from ddo_jax.weights import files
from ddo_jax.weights import pickle_reader
from ddo_jax.weights import provenance

# The width of each kind of features; a file of other widths is of other
# features.
WIDTHS = {'fid': 2_048, 'sfid': 2_023, 'fd_dinov2': 1_024}

_WANTED = (
  "EDM's .npz (mu, sigma), EDM2's .pkl, OpenAI's VIRTUAL_*.npz or one that "
  'ddo_jax saved'
)
_IMAGES = 'arr_0'
_NAMES = ('mu', 'sigma', 'mu_s', 'sigma_s', 'n', 'provenance')
_MOST_IMAGES = 2**40


@dataclasses.dataclass(frozen=True, eq=False)
class FidStats:
  """The content of a statistics file.

  Attributes:
    path: where the file lies.
    moments: the moments by kind of features: 'fid', 'sfid', 'fd_dinov2'.
    has_images: whether the file also holds images, for precision and recall.
  """

  path: pathlib.Path
  moments: Mapping[str, statistics.Moments]
  has_images: bool = False

  def of(self, kind: str) -> statistics.Moments:
    """Returns the moments of one kind of features.

    Raises:
      errors.UserError: the file has none of that kind.
    """
    if kind not in self.moments:
      raise errors.UserError(
        f'{self.path} has statistics of {", ".join(self.moments)}, not of '
        f'{kind}; give a statistics file that has'
      )
    return self.moments[kind]

  def images(self) -> np.ndarray:
    """Returns the images [N,H,W,3] uint8 in OpenAI's files (2 GB at 256²).

    Raises:
      errors.UserError: the file holds none.
    """
    with files.refusing(self.path, _WANTED):
      if not self.has_images:
        raise ValueError('no images in it')
      with reading.Npz(self.path) as arrays:
        images = arrays.read(_IMAGES)
      if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] != 3:
        raise ValueError(f'images of {images.dtype} {images.shape}')
      return images


def _moments(
  table: Any, mean: str, covariance: str, n: int, origin: Mapping[str, str]
) -> statistics.Moments:
  """The moments that a table holds under two names."""
  for name in (mean, covariance):
    array = table[name]
    if not isinstance(array, np.ndarray) or array.dtype.kind not in 'biuf':
      raise ValueError(f'{name} is no array of numbers')
    if array.size > max(WIDTHS.values()) ** 2:
      raise ValueError(f'{name} is {list(array.shape)}, which no features have')
  try:
    return statistics.Moments(
      mean=np.asarray(table[mean], np.float64),
      covariance=np.asarray(table[covariance], np.float64),
      n=n,
      provenance=origin,
    )
  except errors.UserError as error:
    raise ValueError(str(error)) from error  # the file is named beside it


def _count(value: Any) -> int:
  """Returns a number of images that a file states."""
  if not isinstance(value, int | np.integer) or not 0 <= value < _MOST_IMAGES:
    raise ValueError(f'it is of {errors.brief(value)} images')
  return int(value)


def _read_npz(path: pathlib.Path, origin: dict[str, str]) -> FidStats:
  """Reads EDM's, OpenAI's and our own files."""
  arrays, names = statistics.read_npz(path, _NAMES)
  has_images = _IMAGES in names
  if not {'mu', 'sigma'} <= arrays.keys():
    kind = 'a batch of samples' if has_images else 'something else'
    raise ValueError(f'no mu and sigma: {kind}, not statistics')
  if 'provenance' in arrays:
    recorded = json.loads(str(arrays['provenance']))
    texts = recorded.values() if isinstance(recorded, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
      raise ValueError('a provenance of something else than text')
    origin = recorded | origin
  # These files do not say which features they are of; the width does.
  kind_of_width = {width: kind for kind, width in WIDTHS.items()}
  kind = kind_of_width.get(arrays['mu'].size, 'fid')
  n = _count(arrays['n'].item() if 'n' in arrays else 0)
  moments = {kind: _moments(arrays, 'mu', 'sigma', n, origin)}
  if 'mu_s' in arrays:
    moments['sfid'] = _moments(arrays, 'mu_s', 'sigma_s', n, origin)
  return FidStats(path, moments, has_images)


def _read_pickle(path: pathlib.Path, origin: dict[str, str]) -> FidStats:
  """Reads EDM2's files, which hold one table for each kind of features."""
  tree = pickle_reader.read(path)
  if not isinstance(tree, dict):
    raise ValueError('a pickle without a table')
  n = _count(tree.get('num_images', 0))
  moments = {}
  for kind in WIDTHS:
    table = tree.get(kind)
    if isinstance(table, dict):
      moments[kind] = _moments(table, 'mu', 'sigma', n, origin)
  if not moments:
    raise ValueError(f'none of {", ".join(WIDTHS)} in it')
  return FidStats(path, moments)


def _read_folder(folder: pathlib.Path) -> FidStats:
  """Reads a folder of `<kind>.npz`, held to the checksums that it has."""
  manifest.check(folder, '', 'write it anew with --mode=fid_stats')
  moments: dict[str, statistics.Moments] = {}
  for kind in WIDTHS:
    path = folder / f'{kind}.npz'
    if path.is_file():
      moments[kind] = read(path).of(kind)
  with files.refusing(folder, _WANTED):
    if not moments:
      raise ValueError(f'none of {", ".join(WIDTHS)} as .npz in it')
  return FidStats(folder, moments)


def read(path: pathlib.Path) -> FidStats:
  """Reads a statistics file.

  Args:
    path: an .npz of EDM, OpenAI, ADM or ddo_jax, or a .pkl of EDM2; or a folder
      that --mode=fid_stats wrote, with a file for each kind of features.

  Raises:
    errors.UserError: the file is missing, damaged, of other features, or
      holds no statistics.
  """
  if path.is_dir():
    return _read_folder(path)
  with files.refusing(path, _WANTED):
    origin = provenance.describe(path)
    if path.suffix == '.pkl':
      fid_stats = _read_pickle(path, origin)
    elif path.suffix == '.npz':
      fid_stats = _read_npz(path, origin)
    else:
      raise ValueError(f'the suffix {path.suffix!r} tells no known layout')
    for kind, moments in fid_stats.moments.items():
      if moments.mean.size != WIDTHS[kind]:
        raise ValueError(
          f'{moments.mean.size} features under {kind}, which has {WIDTHS[kind]}'
        )
  return fid_stats
