"""The feature networks of a protocol, run over images in one pass."""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.assets import store
from ddo_jax.data import sources
from ddo_jax.evaluation import evaluator
from ddo_jax.evaluation import protocols
from ddo_jax.evaluation import rows as rows_lib
from ddo_jax.evaluation.networks import dinov2
from ddo_jax.evaluation.networks import extract
from ddo_jax.evaluation.networks import inception
from ddo_jax.weights import dinov2 as dinov2_weights
from ddo_jax.weights import fid_stats as fid_stats_lib
from ddo_jax.weights import inception as inception_weights

# Rows for the Inception Score, beside the kinds that are compared.
LOGITS = 'logits'
_CHUNK = 500  # images of a source that are read at once


def _file(name: str, setting: str) -> pathlib.Path | None:
  """Returns the path of the file that a setting names; None where it is ''."""
  return store.resolve(name, setting) if name else None


class _Unread:
  """A chunk of a source's images: a process reads those that it takes."""

  def __init__(self, source: sources.Source, index: np.ndarray):
    self._source = source
    self._index = index

  def __len__(self) -> int:
    return len(self._index)

  def __getitem__(self, taken: Any) -> np.ndarray:
    images, _ = self._source.read(self._index[taken])
    return images


def of_source(
  source: sources.Source, index: np.ndarray | None = None
) -> rows_lib.Images:
  """Returns the images of a source, for `rows.gather`.

  Args:
    source: holds images, not latents.
    index: [N] the source's rows that images 0 .. N−1 are; None takes all.
  """
  if index is None:
    index = np.arange(len(source))

  def images(ids: np.ndarray) -> Iterator[_Unread]:
    for start in range(0, len(ids), _CHUNK):
      yield _Unread(source, index[ids[start : start + _CHUNK]])

  return images


def param_shapes(kinds: Sequence[str]) -> dict[str, Any]:
  """Returns the shapes of the networks' weights that features come from.

  Args:
    kinds: of 'fid', 'sfid', 'fd_dinov2'.
  """
  shapes = {}
  if 'fid' in kinds or 'sfid' in kinds:
    shapes['inception'] = inception.param_shapes()
  if 'fd_dinov2' in kinds:
    shapes['dinov2'] = dinov2.param_shapes()
  return shapes


def apply(
  params: Mapping[str, Any],
  images: jax.Array,
  protocol: protocols.Protocol,
  kept: Sequence[str],
) -> dict[str, jax.Array]:
  """Returns features [B, D] of images by kind.

  Args:
    params: the networks' weights, by network; see `param_shapes`.
    images: uint8 [B,H,W,C].
    protocol: what is measured.
    kept: the kinds that are returned; beside those that are compared, `LOGITS`.
  """
  found = {}
  top = protocol.pixel_values - 1
  if top != 255:
    bright = images.astype(jnp.int32) * 255 // top
    images = bright.astype(jnp.uint8)
  if images.shape[-1] == 1:
    images = jnp.repeat(images, 3, axis=-1)
  if 'inception' in params:
    taps = inception.apply(params['inception'], images, protocol.resize)
    found['fid'] = taps.features
    found['sfid'] = taps.spatial
    found[LOGITS] = taps.logits_unbiased
  if 'dinov2' in params:
    found['fd_dinov2'] = dinov2.apply(params['dinov2'], images)
  return {kind: found[kind] for kind in kept}


class Extractor:
  """A protocol's feature networks with their weights.

  Attributes:
    protocol: what is measured.
    kinds: the kinds of features that are compared: 'fid', 'sfid', 'fd_dinov2'.
    provenance: where the weights come from, by network.
  """

  def __init__(
    self,
    settings: evaluator.Evaluation,
    protocol: protocols.Protocol | None = None,
  ):
    """Loads the weights that the features need.

    Args:
      settings: they name the files of weights, and the protocol.
      protocol: one that is being made, all of whose features are meant; None
        takes what the settings name.

    Raises:
      errors.UserError: weights are missing (the line says which file to bring
        and where to put it) or damaged, or the settings make no sense.
    """
    if protocol is None:
      evaluator.check(settings)
      self.protocol = protocols.get(settings.protocol)
      self.kinds = evaluator.kinds(settings)
    else:
      self.protocol = protocol
      self.kinds = protocol.features
    self.provenance = {}
    self._params = {}
    self._widths = {}
    if 'fid' in self.kinds or 'sfid' in self.kinds:
      params, origin = inception_weights.load(
        _file(settings.inception, inception_weights.SETTING)
      )
      self._params['inception'] = params
      self.provenance['inception'] = origin
      if self.protocol.inception_score:
        self._widths[LOGITS] = rows_lib.Kind(inception.CLASSES)
    if 'fd_dinov2' in self.kinds:
      params, origin = dinov2_weights.load(
        _file(settings.dinov2, dinov2_weights.SETTING)
      )
      self._params['dinov2'] = params
      self.provenance['dinov2'] = origin
    for kind in self.kinds:
      self._widths[kind] = rows_lib.Kind(fid_stats_lib.WIDTHS[kind])
    self._apply = jax.jit(
      functools.partial(apply, protocol=self.protocol, kept=tuple(self._widths))
    )

  def rows(
    self,
    images: rows_lib.Images,
    count: int,
    name: str = 'features',
    folder: pathlib.Path | None = None,
    devices: Sequence[jax.Device] = (),
  ) -> rows_lib.Rows:
    """Returns the features of images 0 .. count−1 by kind, in one pass.

    Args:
      images: gives the images of ascending ids, in chunks of any size.
      count: N.
      name: a word for the progress bar.
      folder: where features are kept; see `rows.gather`.
      devices: blocks of images take turns on these; () takes all.

    Raises:
      errors.UserError: the images are not what the protocol measures.
    """

    def embed(
      take: rows_lib.Take, ids: np.ndarray
    ) -> Iterator[tuple[np.ndarray, rows_lib.Rows]]:
      def checked(ids: np.ndarray) -> np.ndarray:
        taken = take(ids)
        self.protocol.check_images(taken.dtype, taken.shape[1:])
        return taken

      return extract.by_blocks(self._apply, self._params, checked, ids, devices)

    return rows_lib.gather(embed, self._widths, images, count, name, folder)
