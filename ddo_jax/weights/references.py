"""Published reference statistics: EDM's, EDM2's, OpenAI's and ADM's files."""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from ddo_jax import errors
from ddo_jax.evaluation.metrics import statistics
from ddo_jax.weights import files
from ddo_jax.weights import pickle_reader
from ddo_jax.weights import provenance

# What each kind of features has; a file of other widths is of other features.
WIDTHS = {'fid': 2_048, 'sfid': 2_023, 'fd_dinov2': 1_024}

_WANTED = (
  "EDM's .npz (mu, sigma), EDM2's .pkl, OpenAI's VIRTUAL_*.npz or one that "
  'ddo_jax saved'
)
_IMAGES = 'arr_0'


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
  """A reference file.

  Attributes:
    path: where it lies.
    moments: by kind of features: 'fid', 'sfid', 'fd_dinov2'.
    has_images: the file also holds images, for precision and recall.
  """

  path: pathlib.Path
  moments: Mapping[str, statistics.Moments]
  has_images: bool = False

  def of(self, kind: str) -> statistics.Moments:
    """The moments of one kind of features.

    Raises:
      errors.UserError: the file has none of that kind.
    """
    if kind not in self.moments:
      raise errors.UserError(
        f'{self.path} has statistics of {", ".join(self.moments)}, not of '
        f'{kind}; give a reference file that has'
      )
    return self.moments[kind]

  def images(self) -> np.ndarray:
    """The images [N,H,W,3] uint8 that OpenAI's files hold (2 GB at 256²).

    Raises:
      errors.UserError: the file holds none.
    """
    with files.refusing(self.path, _WANTED):
      if not self.has_images:
        raise ValueError('no images in it')
      with np.load(self.path, allow_pickle=False) as arrays:
        images = arrays[_IMAGES]
      if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] != 3:
        raise ValueError(f'images of {images.dtype} {images.shape}')
      return images


def _moments(
  table: Any, mean: str, covariance: str, n: int, origin: Mapping[str, str]
) -> statistics.Moments:
  mean, covariance = (
    np.asarray(table[name], np.float64) for name in (mean, covariance)
  )
  return statistics.Moments(mean, covariance, n, origin)


def _of_npz(path: pathlib.Path, origin: dict[str, str]) -> Reference:
  arrays = statistics.read_npz(path, skip=(_IMAGES,))
  with np.load(path, allow_pickle=False) as all_arrays:
    has_images = _IMAGES in all_arrays.files
  if not {'mu', 'sigma'} <= arrays.keys():
    kind = 'a batch of samples' if has_images else 'something else'
    raise ValueError(f'no mu and sigma: {kind}, not a reference')
  if 'provenance' in arrays:
    origin = json.loads(str(arrays['provenance'])) | origin
  kind = {v: k for k, v in WIDTHS.items()}.get(arrays['mu'].size, 'fid')
  n = int(arrays.get('n', 0))
  moments = {kind: _moments(arrays, 'mu', 'sigma', n, origin)}
  if 'mu_s' in arrays:
    moments['sfid'] = _moments(arrays, 'mu_s', 'sigma_s', n, origin)
  return Reference(path, moments, has_images)


def _of_pickle(path: pathlib.Path, origin: dict[str, str]) -> Reference:
  tree = pickle_reader.read(path)
  if not isinstance(tree, dict):
    raise ValueError('a pickle without a table')
  n = int(tree.get('num_images', 0))
  moments = {
    kind: _moments(tree[kind], 'mu', 'sigma', n, origin)
    for kind in WIDTHS
    if isinstance(tree.get(kind), dict)
  }
  if not moments:
    raise ValueError(f'none of {", ".join(WIDTHS)} in it')
  return Reference(path, moments)


def read(path: pathlib.Path) -> Reference:
  """Reads a reference file.

  Args:
    path: an .npz or .pkl; see the module.

  Raises:
    errors.UserError: missing, damaged, of other features, or no reference.
  """
  with files.refusing(path, _WANTED):
    origin = provenance.describe(path)
    if path.suffix == '.pkl':
      reference = _of_pickle(path, origin)
    elif path.suffix == '.npz':
      reference = _of_npz(path, origin)
    else:
      raise ValueError(f'the suffix {path.suffix!r} tells no known layout')
    for kind, moments in reference.moments.items():
      if moments.mean.size != WIDTHS[kind]:
        raise ValueError(
          f'{moments.mean.size} features under {kind}, which has {WIDTHS[kind]}'
        )
  return reference
