"""Real images: random-access sources, a stateless order, batches.

A source reads any image by its index. `order` maps a position of the endless
training stream to an index, so that a batch is a pure function of (seed, step):
nothing is saved to resume, any number of processes sees the same stream.
"""

import collections
from collections.abc import Callable
from collections.abc import Iterator
from concurrent import futures
import contextlib
import dataclasses
import functools
import io
import json
import math
import pathlib
import threading
from typing import Protocol
import zipfile

import numpy as np

from ddo_jax import config
from ddo_jax import datasets

Batch = dict[str, np.ndarray]

_IN_MEMORY = 2**30  # bytes; a TFDS split up to this size is decoded once
_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.webp')
_AHEAD = 4  # batches read before they are asked for, a thread each


class Source(Protocol):
  """Random access over images, raw as stored."""

  name: str  # what errors call it
  image_shape: tuple[int, int, int]  # H, W, C
  num_classes: int  # 0: no labels
  levels: int  # pixel values are 0 .. levels-1

  def __len__(self) -> int: ...

  def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads rows [B] to uint8 [B,H,W,C] and int32 [B], 0 without labels."""


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
  """Images in memory; raises UserError if an array is not as said here."""

  name: str
  images: np.ndarray  # uint8 [N,H,W,C], N > 0
  labels: np.ndarray  # integers [N] in 0 .. num_classes-1; 0 without labels
  num_classes: int = 0
  levels: int = 256

  def __post_init__(self):
    images, labels = self.images, self.labels
    good = images.dtype == np.uint8 and images.ndim == 4 and images.size
    if not good or labels.shape != images.shape[:1]:
      raise config.UserError(
        f'{self.name}: images are {images.dtype} {list(images.shape)}, labels'
        f' {list(labels.shape)}; wanted unscaled uint8 [N,H,W,C] and [N], N > 0'
      )
    top = _count_classes(self.name, labels) - 1, int(images.max())
    limit = max(self.num_classes, 1) - 1, self.levels - 1
    if top[0] > limit[0] or top[1] > limit[1]:
      raise config.UserError(
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
  levels: int
  fetch: Callable[[list[int]], list[datasets.Row]]

  @functools.cached_property
  def image_shape(self) -> tuple[int, int, int]:
    ((where, encoded, _),) = self.fetch([0])
    return _decode(where, encoded).shape

  def __len__(self) -> int:
    return self.length

  def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See `Source`; raises UserError that names the image it cannot read."""
    shape, limit = self.image_shape, max(self.num_classes, 1)
    images = np.empty((len(index), *shape), np.uint8)
    labels = np.empty(len(index), np.int32)
    for i, (where, encoded, label) in enumerate(self.fetch(index.tolist())):
      image = _decode(where, encoded)
      if image.shape != shape or not 0 <= label < limit:
        raise config.UserError(
          f'{where} is {list(image.shape)}, label {label}; wanted {list(shape)}'
          f' [H,W,C] as the first image, label 0 .. {limit - 1}'
        )
      images[i], labels[i] = image, label
    return images, labels


@contextlib.contextmanager
def _user_error(message: str) -> Iterator[None]:
  """Turns an error of a library that reads the user's files into UserError."""
  try:
    yield
  except Exception as error:  # on damaged files they raise all kinds
    raise config.UserError(f'{message} ({error})') from error


def _decode(where: str, encoded: bytes) -> np.ndarray:
  """Decodes an image file to uint8 [H,W,C], C of 1 or 3."""
  from PIL import Image

  with _user_error(f'{where}: the image is damaged or cut off, replace it'):
    with Image.open(io.BytesIO(encoded)) as image:
      mode, pixels = image.mode, np.asarray(image)
  if mode not in ('L', 'RGB'):
    raise config.UserError(
      f'{where} is of PIL mode {mode!r}; wanted L (8-bit grey) or RGB: convert'
    )
  return pixels.reshape(*pixels.shape[:2], -1)


def _count_classes(where: str, labels: np.ndarray) -> int:
  """Returns the largest label + 1; raises UserError if one is no class id."""
  low, high = (labels.min(), labels.max()) if labels.size else (0, -1)
  whole = np.issubdtype(labels.dtype, np.integer)
  if not whole or low < 0 or high >= 2**31 - 1:
    raise config.UserError(
      f'{where}: labels are {labels.dtype} {low} .. {high}; wanted ints from 0'
    )
  return int(high) + 1


def open_npz(path: pathlib.Path) -> ArraySource:
  """Opens arrays `image` or `images` and, if present, `label` or `labels`."""
  name, keys = str(path), ('image', 'images', 'label', 'labels')
  with _user_error(f'{name} is no whole .npz of plain arrays, write it again'):
    with np.load(path, allow_pickle=False) as file:
      arrays = {key.removesuffix('s'): file[key] for key in file if key in keys}
  if 'image' not in arrays:
    raise config.UserError(f'{name} has no array `image`, uint8 [N,H,W,C]')
  images, labels = arrays['image'], arrays.get('label')
  if labels is None:
    return ArraySource(name, images, np.zeros(images.shape[:1], np.int32))
  return ArraySource(name, images, labels, _count_classes(name, labels))


def _opener(path: pathlib.Path) -> tuple[list[str], Callable[[str], bytes]]:
  """Returns the names in a folder or zip, and a thread-safe reader of one."""
  if path.is_dir():
    names = [file.relative_to(path).as_posix() for file in path.rglob('*')]
    return names, lambda name: (path / name).read_bytes()
  with _user_error(f'{path} is no readable zip, copy it again'):
    archive = zipfile.ZipFile(path)
  # A lock round one handle rather than a handle a thread: parsing the index
  # costs 14 s and 700 MB for a million files, reading an image 40 us.
  lock = threading.Lock()

  def read(name: str) -> bytes:
    with lock:
      return archive.read(name)

  return archive.namelist(), read


def _labels(where: str, content: bytes, names: list[str]) -> list[int]:
  """Returns the classes of the images `names` by dataset.json; [] if null."""
  with _user_error(f'{where} is not {{"labels": [[name, class], ...]}}'):
    entries = json.loads(content)['labels']
    if entries is None:
      return []
    table = dict(entries)
  lost, left = table.keys() - set(names), set(names) - table.keys()
  if lost or left or len(entries) != len(table):
    raise config.UserError(
      f'{where} lists {len(entries)} images of {len(names)}; wanted each once;'
      f' missing files: {sorted(lost)[:3]}, not listed: {sorted(left)[:3]}'
    )
  for name, label in table.items():
    if type(label) is not int or not 0 <= label < 2**31 - 1:
      raise config.UserError(
        f'{where}: class of {name!r} is {label!r}; wanted an integer, 0 or up'
      )
  return [table[name] for name in names]


def _open_files(path: pathlib.Path) -> EncodedSource:
  """Opens EDM's format: a folder or zip of images and their dataset.json."""
  names, opener = _opener(path)
  images = sorted(n for n in names if n.lower().endswith(_SUFFIXES))
  if not images:
    raise config.UserError(f'{path} holds no image; wanted {_SUFFIXES}')

  def read(name: str) -> tuple[str, bytes]:
    with _user_error(f'{path / name} cannot be read, copy it again'):
      return str(path / name), opener(name)

  labels = []
  if 'dataset.json' in names:
    labels = _labels(*read('dataset.json'), images)
  elif deep := [n for n in names if n.endswith('/dataset.json')]:
    raise config.UserError(f'{path / deep[0]} must be at the top: move it up')
  num_classes = max(labels, default=-1) + 1
  labels = labels or [0] * len(images)
  fetch = lambda index: [(*read(images[i]), labels[i]) for i in index]
  return EncodedSource(str(path), len(images), num_classes, 256, fetch)


def _open_tfds(data: config.Data, split: str) -> Source:
  """Opens a split of a TFDS set; a small one is decoded once, here."""
  found = datasets.open_split(data.source, split, data.data_dir, data.raw_dir)
  source = EncodedSource(f'{data.source}/{split}', **vars(found))
  if len(source) * math.prod(source.image_shape) > _IN_MEMORY:
    return source
  arrays = source.read(np.arange(len(source)))
  return ArraySource(source.name, *arrays, source.num_classes, source.levels)


def open_source(data: config.Data, split: str) -> Source:
  """Opens the real images of a split.

  Args:
    data: `source` is a key of `datasets.SPECS` (prepared on first use), else
      the path of an .npz, a .zip or a folder, else the TFDS name of a prepared
      set. `{split}` in a path stands for the split's name; a path without it
      is the training split and no other.
    split: name of the split; of a TFDS set also a slice, 'train[:90%]'.

  Raises:
    UserError: nothing is there, or what is there is no set of images.
  """
  path = pathlib.Path(data.source.replace('{split}', split)).expanduser()
  is_path = path.suffix in ('.npz', '.zip') or path.is_dir()
  if data.source in datasets.SPECS or not is_path:
    return _open_tfds(data, split)
  if '{split}' not in data.source and split != data.train_split:
    raise config.UserError(
      f'{path} is the split {data.train_split!r}, not {split!r}: put {{split}}'
      ' into config.data.source where the paths differ'
    )
  return open_npz(path) if path.suffix == '.npz' else _open_files(path)


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
) -> Iterator[Batch]:
  """Returns this process's batches of steps start_step .. stop_step-1.

  A pure function of (seed, step); images on disk are read ahead in threads,
  which end when the iterator does or is closed.

  Args:
    source: the images.
    seed: see `order`.
    batch_size: B, rows of a step over all processes; of these a process reads
      b = B / process_count consecutive ones.

  Returns:
    Iterator of 'image' uint8 [b,H,W,C], 'label' int32 [b] and 'id' uint32 [b]:
    the rows' global positions step * B + row, modulo 2**32.

  Raises:
    UserError: b is no integer; later, a failed read.
  """
  if batch_size % process_count:
    raise config.UserError(
      f'batch_size {batch_size} must be a multiple of {process_count} processes'
    )
  rows = batch_size // process_count
  first = process_index * rows + np.arange(rows, dtype=np.int64)

  def make(step: int) -> Batch:
    positions = step * batch_size + first
    image, label = source.read(order(seed, positions, len(source)))
    row_id = (positions % 2**32).astype(np.uint32)
    return {'image': image, 'label': label, 'id': row_id}

  if isinstance(source, ArraySource):
    return (make(step) for step in range(start_step, stop_step))
  return _ahead(make, range(start_step, stop_step))
