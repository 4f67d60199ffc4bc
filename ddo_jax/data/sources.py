"""Real images or their latents: random-access sources, a stateless order.

A source reads any image by its index. `order` maps a position of the endless
training stream to an index, so that a batch is a pure function of (seed, step):
nothing is saved to resume, any number of processes sees the same stream.
"""

import collections
from collections.abc import Callable
from collections.abc import Iterator
from concurrent import futures
import dataclasses
import functools
import math
import pathlib
from typing import Protocol

import numpy as np

from ddo_jax import config
from ddo_jax import errors
from ddo_jax.data import builders
from ddo_jax.data import files as image_files

Batch = dict[str, np.ndarray]

_IN_MEMORY = 2**30  # bytes; a TFDS split up to this size is decoded once
_AHEAD = 4  # batches read before they are asked for, a thread each


class Source(Protocol):
  """Random access over images, or raw latents of images, as stored."""

  name: str  # what errors call it
  image_shape: tuple[int, int, int]  # H, W, C
  num_classes: int  # 0: no labels
  pixel_values: (
    int  # pixel values are 0 .. pixel_values-1, also of latents' images
  )

  def __len__(self) -> int: ...

  def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads rows [B] to [B,H,W,C] and int32 labels [B], 0 without labels.

    Images are uint8. Raw latents are float32, C/2 means and as many standard
    deviations, see `encoders.Latents`.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
  """Rows in memory; raises UserError if an array is not as said here."""

  name: str
  images: np.ndarray  # uint8, or latents float32 [N,H,W,C], C even; N > 0
  labels: np.ndarray  # integers [N] in 0 .. num_classes-1; 0 without labels
  num_classes: int = 0
  pixel_values: int = 256

  def __post_init__(self):
    images, labels = self.images, self.labels
    shape = images.shape
    latents = (
      images.dtype == np.float32 and len(shape) == 4 and not shape[3] % 2
    )
    good = latents or (images.dtype == np.uint8 and len(shape) == 4)
    if not good or not images.size or labels.shape != shape[:1]:
      raise errors.UserError(
        f'{self.name}: images are {images.dtype} {list(shape)}, labels'
        f' {list(labels.shape)}; wanted unscaled uint8 [N,H,W,C] (or float32'
        ' latents, C even) and [N], N > 0'
      )
    if latents and (fault := image_files.check_latents(images)):
      raise errors.UserError(f'{self.name} holds {fault}; encode it again')
    high = 0 if latents else int(images.max())
    top = _count_classes(self.name, labels) - 1, high
    limit = max(self.num_classes, 1) - 1, self.pixel_values - 1
    if top[0] > limit[0] or top[1] > limit[1]:
      raise errors.UserError(
        f'{self.name}: (label, pixel) reach {top}; wanted at most {limit}'
      )

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return self.images.shape[1:]

  def __len__(self) -> int:
    return len(self.images)

  def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See `Source`."""
    return self.images[index], self.labels[index].astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedSource:
  """Images decoded at every read, in any thread; all as large as the first."""

  name: str
  length: int
  num_classes: int
  pixel_values: int
  fetch: Callable[[list[int]], list[builders.Row]]
  decode: Callable[[str, bytes], np.ndarray] = image_files.decode_image

  @functools.cached_property
  def _first(self) -> np.ndarray:
    ((where, encoded, _),) = self.fetch([0])
    return self.decode(where, encoded)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return self._first.shape

  def __len__(self) -> int:
    return self.length

  def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See `Source`; raises UserError that names the image it cannot read."""
    shape, limit = self.image_shape, max(self.num_classes, 1)
    images = np.empty((len(index), *shape), self._first.dtype)
    labels = np.empty(len(index), np.int32)
    for i, (where, encoded, label) in enumerate(self.fetch(index.tolist())):
      image = self.decode(where, encoded)
      if image.shape != shape or not 0 <= label < limit:
        raise errors.UserError(
          f'{where} is {list(image.shape)}, label {label}; wanted {list(shape)}'
          f' [H,W,C] as the first image, label 0 .. {limit - 1}'
        )
      images[i], labels[i] = image, label
    return images, labels


def _count_classes(where: str, labels: np.ndarray) -> int:
  """Returns the largest label + 1; raises UserError if one is no class id."""
  low, high = (labels.min(), labels.max()) if labels.size else (0, -1)
  whole = np.issubdtype(labels.dtype, np.integer)
  if not whole or low < 0 or high >= 2**31 - 1:
    raise errors.UserError(
      f'{where}: labels are {labels.dtype} {low} .. {high}; wanted ints from 0'
    )
  return int(high) + 1


def open_npz(path: pathlib.Path) -> ArraySource:
  """Opens arrays `image` or `images` and, if present, `label` or `labels`."""
  name, keys = str(path), ('image', 'images', 'label', 'labels')
  with image_files.user_error(
    f'{name} is no whole .npz of plain arrays, write it again'
  ):
    with np.load(path, allow_pickle=False) as file:
      arrays = {key.removesuffix('s'): file[key] for key in file if key in keys}
  if 'image' not in arrays:
    raise errors.UserError(f'{name} has no array `image`, [N,H,W,C]')
  images, labels = arrays['image'], arrays.get('label')
  if labels is None:
    return ArraySource(name, images, np.zeros(images.shape[:1], np.int32))
  return ArraySource(name, images, labels, _count_classes(name, labels))


def _open_tfds(data: config.Data, split: str) -> Source:
  """Opens a split of a TFDS set; a small one is decoded once, here."""
  found = builders.open_split(data.source, split, data.data_dir, data.raw_dir)
  source = EncodedSource(f'{data.source}/{split}', **vars(found))
  if len(source) * math.prod(source.image_shape) > _IN_MEMORY:
    return source
  arrays = source.read(np.arange(len(source)))
  return ArraySource(
    source.name, *arrays, source.num_classes, source.pixel_values
  )


def _padded(source: Source, side: int) -> Source:
  """The source with its images in the middle of black squares, if asked.

  Raises:
    UserError: they are larger, or no images in memory.
  """
  height, width, _ = source.image_shape
  if not side or (height, width) == (side, side):
    return source
  rows, columns = side - height, side - width
  if not isinstance(source, ArraySource) or min(rows, columns) < 0:
    raise errors.UserError(
      f'{source.name}: config.data.pad_to={side} pads smaller images held in'
      f' memory (.npz, or a small TFDS set); these are {height}×{width}: pad'
      ' them on disk, or set it to 0'
    )
  around = [(n // 2, n - n // 2) for n in (rows, columns)]
  images = np.pad(source.images, [(0, 0), *around, (0, 0)])
  return dataclasses.replace(source, images=images)


def open_source(data: config.Data, split: str) -> Source:
  """Opens the real images of a split, padded as `data` says.

  Args:
    data: `source` is a key of `datasets.SPECS` (prepared on first use), else
      the path of an .npz, a .zip or a folder, of images or latents, else the
      TFDS name of a prepared set. `{split}` in a path stands for the split's
      name; a path without it is the training split and no other.
    split: name of the split; of a TFDS set also a slice, 'train[:90%]'.

  Raises:
    UserError: nothing is there, or what is there is no set of images.
  """
  return _padded(_open(data, split), data.pad_to)


def _open(data: config.Data, split: str) -> Source:
  """As `open_source`, the images as they are."""
  path = pathlib.Path(data.source.replace('{split}', split)).expanduser()
  is_path = path.suffix in ('.npz', '.zip') or path.is_dir()
  if data.source in builders.SPECS or not is_path:
    return _open_tfds(data, split)
  if '{split}' not in data.source and split != data.train_split:
    raise errors.UserError(
      f'{path} is the split {data.train_split!r}, not {split!r}: put {{split}}'
      ' into config.data.source where the paths differ'
    )
  if path.suffix == '.npz':
    return open_npz(path)
  return EncodedSource(str(path), **vars(image_files.open_files(path)))


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
  # RandomState, because its numbers never change between numpy's versions.
  return np.random.RandomState([seed, epoch]).permutation(length)


def order(seed: int, positions: np.ndarray, length: int) -> np.ndarray:
  """Returns the indices of the images at positions of the endless stream.

  Every epoch of `length` positions is a permutation of its own.

  Args:
    seed: the stream's seed, in [0, 2**32).
    positions: step * batch_size + row, any shape.
    length: number of images; the indices, int64, are in 0 .. length-1.
  """
  epochs, offsets = np.divmod(np.asarray(positions, np.int64), length)
  index = np.empty_like(offsets)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    index[here] = _permutation(seed, int(epoch), length)[offsets[here]]
  return index


def _ahead(make: Callable[[int], Batch], steps: range) -> Iterator[Batch]:
  """Yields make(step) in order, made ahead of time in threads."""
  pool = futures.ThreadPoolExecutor(_AHEAD)
  pending = collections.deque()
  try:
    for step in steps:
      pending.append(pool.submit(make, step))
      if len(pending) > _AHEAD:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
  finally:  # also when the iterator is closed early, or a read fails
    pool.shutdown(cancel_futures=True)


def batches(
  source: Source,
  seed: int,
  batch_size: int,
  start_step: int,
  stop_step: int,
  process_index: int = 0,
  process_count: int = 1,
  other_label: bool = False,
) -> Iterator[Batch]:
  """Returns this process's batches of steps start_step .. stop_step-1.

  A pure function of (seed, step); images on disk are read ahead in threads,
  which end when the iterator does or is closed.

  Args:
    source: the images.
    seed: see `order`.
    batch_size: B, rows of a step over all processes; of these a process reads
      b = B / process_count consecutive ones.
    other_label: also give each row the label of the next row of the step, the
      last that of the first, wherever that is read.

  Returns:
    Iterator of 'stored' [b,H,W,C] as on disk, 'label' int32 [b] and 'id' uint32
    [b]: the rows' global positions step * B + row, modulo 2**32.

  Raises:
    UserError: b is no integer; later, a failed read.
  """
  if batch_size % process_count:
    raise errors.UserError(
      f'batch_size {batch_size} must be a multiple of {process_count} processes'
    )
  rows = batch_size // process_count
  first = process_index * rows + np.arange(rows, dtype=np.int64)

  def make(step: int) -> Batch:
    positions = step * batch_size + first
    stored, label = source.read(order(seed, positions, len(source)))
    row_id = (positions % 2**32).astype(np.uint32)
    batch = {'stored': stored, 'label': label, 'id': row_id}
    if other_label:
      following = step * batch_size + (first[-1:] + 1) % batch_size
      _, after = source.read(order(seed, following, len(source)))
      batch['other_label'] = np.append(label[1:], after)
    return batch

  if isinstance(source, ArraySource):
    return (make(step) for step in range(start_step, stop_step))
  return _ahead(make, range(start_step, stop_step))
