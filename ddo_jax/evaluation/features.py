"""Features of images under a protocol, in one pass.

Images are drawn or read once, chunk by chunk; every feature network sees each
chunk, and only the features are kept.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import pathlib
from typing import Any

import jax
import numpy as np
import tqdm

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax.data import sources
from ddo_jax.evaluation import protocols
from ddo_jax.evaluation.metrics import frechet
from ddo_jax.evaluation.metrics import statistics
from ddo_jax.evaluation.networks import dinov2
from ddo_jax.evaluation.networks import extract
from ddo_jax.evaluation.networks import inception
from ddo_jax.method import generate
from ddo_jax.method import likelihood
from ddo_jax.weights import dinov2 as dinov2_weights
from ddo_jax.weights import fid_stats
from ddo_jax.weights import inception as inception_weights

Rows = dict[str, np.ndarray]  # kind of features -> [N, D] float32
Chunks = Callable[[np.ndarray], Iterable[np.ndarray]]  # ids -> images, in order
Keep = Callable[[np.ndarray, np.ndarray, np.ndarray], None]

LOGITS = 'logits'  # beside the kinds that references have
_CHUNK = 500  # stored images read at once


class Extractor:
  """A protocol's feature networks with their weights.

  Attributes:
    protocol: what is measured.
    kinds: of features: 'fid', 'sfid', 'fd_dinov2'.
    provenance: of the weights, by network.
  """

  def __init__(self, config: config_lib.Config):
    """Loads the weights that the protocol, and what is asked of it, needs.

    Raises:
      errors.UserError: they are missing (the line says which file to bring
        and where to put it) or damaged, or the protocol has no such features.
    """
    evaluation, self._seed = config.evaluation, config.seed
    self.protocol = protocols.get(evaluation.protocol)
    self.kinds = tuple(evaluation.features) or self.protocol.features
    if lost := set(self.kinds) - set(self.protocol.features):
      raise errors.UserError(
        f'config.evaluation.features has {", ".join(sorted(lost))}; protocol'
        f' {self.protocol.name} has {", ".join(self.protocol.features)}'
      )
    path = lambda text: pathlib.Path(text).expanduser() if text else None
    loaded, self._widths = {}, {}
    if {'fid', 'sfid'} & set(self.kinds):
      loaded['inception'] = inception_weights.load(path(evaluation.inception))
      if self.protocol.inception_score:
        self._widths[LOGITS] = inception.CLASSES
    if 'fd_dinov2' in self.kinds:
      loaded['dinov2'] = dinov2_weights.load(path(evaluation.dinov2))
    self._widths |= {kind: fid_stats.WIDTHS[kind] for kind in self.kinds}
    self._params = {name: params for name, (params, _) in loaded.items()}
    self.provenance = {name: origin for name, (_, origin) in loaded.items()}
    self._apply = jax.jit(self._networks)

  def _networks(self, params: Any, images: jax.Array) -> dict[str, jax.Array]:
    """All features [B, D] of images uint8 [B,H,W,3], by kind."""
    found = {}
    if 'inception' in params:
      taps = inception.apply(params['inception'], images, self.protocol.resize)
      found = {'fid': taps.features, 'sfid': taps.spatial}
      found[LOGITS] = taps.logits_unbiased
    if 'dinov2' in params:
      found['fd_dinov2'] = dinov2.apply(params['dinov2'], images)
    return {kind: found[kind] for kind in self._widths}

  def _checked(self, chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The chunks; UserError unless they are what the protocol measures."""
    shape = self.protocol.image_shape
    for images in chunks:
      if images.dtype != np.uint8 or images.shape[1:] != shape:
        raise errors.UserError(
          f'images are {images.dtype} {list(images.shape[1:])}; protocol'
          f' {self.protocol.name} measures uint8 {list(shape)}: write them so,'
          ' or name another --config.evaluation.protocol'
        )
      yield images

  def features(
    self,
    chunks: Chunks,
    count: int,
    name: str = 'features',
    folder: pathlib.Path | None = None,
    devices: Sequence[jax.Device] = (),
  ) -> Rows:
    """Features of images 0 .. count−1, by kind, in one pass.

    Args:
      chunks: gives the images of ascending ids, in parts of any size.
      count: N.
      name: on the progress bar.
      folder: rows are kept here as they come, and a later call goes on where
        this one was cut off; None keeps them in memory.
      devices: blocks of images take turns on these; default: all.

    Raises:
      errors.UserError: the images are not what the protocol measures.
    """
    rows = {
      kind: _open_rows(folder, kind, (count, width))
      for kind, width in self._widths.items()
    }
    # A row is NaN until it has come; features never are.
    missing = [np.isnan(array[:, 0]) for array in rows.values()]
    ids = np.flatnonzero(np.any(missing, axis=0))
    take = _Buffer(self._checked(chunks(ids)))
    with tqdm.tqdm(
      total=count, initial=count - len(ids), desc=name, unit='img', disable=None
    ) as bar:
      for mine, found in extract.by_blocks(
        self._apply, self._params, take, ids, devices
      ):
        for kind, array in rows.items():
          array[mine] = frechet.check_features(kind, found[kind])
        bar.update(len(mine))
    return rows

  def read(self, source: sources.Source, index: np.ndarray) -> Rows:
    """Features of images of a source."""

    def chunks(places):
      for start in range(0, len(places), _CHUNK):
        yield source.read(index[places[start : start + _CHUNK]])[0]

    return self.features(chunks, len(index), source.name)

  def draw(
    self,
    generator: generate.Generator,
    params: likelihood.Params,
    key: jax.Array,
    ids: np.ndarray,
    folder: pathlib.Path | None = None,
    keep: Keep | None = None,
  ) -> Rows:
    """Features of drawn images.

    Args:
      generator: of the model.
      params: its weights, on the devices.
      key: of the stream; an image's own key folds in its id.
      ids: [N] of the images, ascending; they settle the classes too.
      folder: see `features`.
      keep: takes (ids, images, labels) of every chunk, e.g. to write them.
    """
    labels = self.protocol.classes(ids, generator.model.num_classes, self._seed)

    def chunks(places):
      done = 0
      mine, classes = ids[places], labels[places]
      for stored in generator.stream(params, key, mine, classes):
        part = slice(done, done + len(stored))
        images, done = generator.render(stored), part.stop
        if keep:
          keep(mine[part], images, classes[part])
        yield images

    return self.features(chunks, len(ids), 'evaluate', folder)


class _Buffer:
  """Hands out a stream of chunks in the portions that are asked for."""

  def __init__(self, chunks: Iterable[np.ndarray]):
    self._chunks, self._parts, self._held = iter(chunks), [], 0

  def __call__(self, ids: np.ndarray) -> np.ndarray:
    while self._held < len(ids):
      self._parts.append(next(self._chunks))
      self._held += len(self._parts[-1])
    held = np.concatenate(self._parts)
    self._parts, self._held = [held[len(ids) :]], len(held) - len(ids)
    return held[: len(ids)]


def _open_rows(
  folder: pathlib.Path | None, kind: str, shape: tuple[int, int]
) -> np.ndarray:
  """Rows of NaN, or what an earlier pass left in the folder."""
  if folder is None:
    return np.full(shape, np.nan, np.float32)
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f'{kind}.npy'
  if path.exists():
    rows = np.lib.format.open_memmap(path, 'r+')
    if rows.shape == shape:
      return rows
  rows = np.lib.format.open_memmap(path, 'w+', np.float32, shape)
  rows[:] = np.nan
  return rows


def sums(rows: np.ndarray) -> frechet.Statistics:
  """The exact sums of rows, whatever their order was."""
  sums = statistics.Accumulator(rows.shape[1])
  for start in range(0, len(rows), statistics.BLOCK):
    part = rows[start : start + statistics.BLOCK]
    sums.add(np.arange(start, start + len(part)), part)
  return sums.statistics()
