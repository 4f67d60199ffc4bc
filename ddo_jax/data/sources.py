"""What a source of real images is, and which source a setting names.

A source gives any of its rows by index, as they are stored: uint8 pixels, or
float32 latents. Nothing is scaled here; `codec` does that on the devices.
"""

from concurrent import futures
import dataclasses
import logging
import pathlib
from typing import Any
from typing import Protocol

import numpy as np

from ddo_jax import errors
from ddo_jax import settings
from ddo_jax.data import builders
from ddo_jax.data import classes as classes_lib
from ddo_jax.data import encoded
from ddo_jax.data import files
from ddo_jax.data import hugging_face
from ddo_jax.data import selection
from ddo_jax.data import splits
from ddo_jax.data import transforms
from ddo_jax.runtime import processes
from ddo_jax.runtime import progress
from ddo_jax.runtime import reading

_LOGGER = logging.getLogger(__name__)
_IN_MEMORY = 2**30  # A split of up to this many bytes is decoded once.
_CHUNK = 256  # Rows that a thread decodes at once.
_THREADS = 4


def _not_science(default: Any) -> Any:
  """Declares a field that may change between two starts of one run."""
  return dataclasses.field(default=default, metadata={'science': False})


@dataclasses.dataclass
class Data:
  """The settings that say where real images come from; see `open_source`."""

  # A TFDS name (digits, fashion_mnist and cifar10 need no TensorFlow); or the
  # path of an .npz, of a folder or zip of images, whose classes are its
  # sub-folders or stand in EDM's dataset.json, of a parquet file or a folder
  # of them, or of what Hugging Face's save_to_disk wrote; or hf:owner/name.
  # `{split}` in a path stands for the name of the split. A folder with only
  # train, test, … in it has these splits.
  source: str = 'digits'
  # Where the held-out images are, if they are not the split `test_split` of
  # `source`; of the same kinds.
  test_source: str = ''
  # The share of the training split that is held out, in (0, 1): of every class
  # alike, and always the same images. 0 leaves the set's own splits.
  holdout: float = 0.0
  # The side of the centre square to which images are cropped and resized, and
  # how (see `transforms.Fit`); 0 leaves the size.
  resize: int = 0
  resize_by: str = 'lanczos'
  # 1 turns images grey and 3 into RGB; 0 leaves them as they are.
  channels: int = 0
  # Smaller images are centred in a black square of this side; 0 leaves them.
  pad_to: int = 0
  # The field of the classes in a TFDS set or a table; '' takes `label`, or the
  # only one there is, and 'none' takes no classes.
  label_field: str = ''
  # The label of the first class, where they do not begin at 0.
  first_label: int = 0
  train_split: str = 'train'
  test_split: str = 'test'
  # Where TFDS keeps prepared data; '' is TFDS's own default.
  data_dir: str = _not_science('')
  # Folder of the published files that a builder reads (fashion_mnist: the
  # four *-ubyte.gz; cifar10: cifar-10-binary.tar.gz); '' fetches them.
  raw_dir: str = _not_science('')
  # Processes that read a set too large for memory; 0 reads it in threads, and
  # 'auto' is half of the cores, eight at most.
  workers: settings.OrAuto = _not_science(settings.AUTO)

  def check(self) -> None:
    """Raises UserError, naming the field, where a value makes no sense."""
    errors.require(
      0 <= self.holdout < 1, 'data.holdout', self.holdout, 'a share in [0, 1)'
    )
    errors.require(
      not (self.holdout and self.test_source),
      'data.test_source',
      self.test_source,
      "'' where config.data.holdout cuts the held-out images",
    )
    errors.require(
      self.train_split != self.test_split,
      'data.test_split',
      self.test_split,
      'another than config.data.train_split',
    )
    errors.require(
      self.resize_by in transforms.RESIZES,
      'data.resize_by',
      self.resize_by,
      f'one of {transforms.RESIZES}',
    )
    errors.require(
      self.channels in (0, 1, 3),
      'data.channels',
      self.channels,
      '1 (grey), 3 (RGB) or 0 (as they are)',
    )
    for name in ('resize', 'pad_to', 'first_label'):
      value = getattr(self, name)
      errors.require(value >= 0, f'data.{name}', value, '0 or more')
    whole = isinstance(self.workers, int) and not isinstance(self.workers, bool)
    errors.require(
      self.workers == settings.AUTO or (whole and self.workers >= 0),
      'data.workers',
      self.workers,
      "0 or more, or 'auto'",
    )


class Source(Protocol):
  """Random access to the stored rows of a set and to their labels."""

  @property
  def name(self) -> str:
    """What errors call the set."""

  @property
  def stored_shape(self) -> tuple[int, int, int]:
    """The shape (H, W, C) of every stored row."""

  @property
  def num_classes(self) -> int:
    """The number of classes; 0 for a set without labels."""

  @property
  def pixel_values(self) -> int:
    """Pixels are 0 .. pixel_values−1, also those of images kept as latents."""

  @property
  def class_names(self) -> tuple[str, ...]:
    """The names of the classes, by label; () where they are not known."""

  def __len__(self) -> int: ...

  def labels(self) -> np.ndarray:
    """Returns the class of every row, int32 [N]; all 0 without classes.

    No image is decoded for it, and it is cheap when it is asked for again.
    """

  def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads rows; may be called in several threads at once.

    Args:
      index: [B] integers in 0 .. len − 1.

    Returns:
      The rows [B,H,W,C] as they are stored, and their labels, int32 [B], which
      are 0 in a set without labels. Rows are uint8 pixels, or float32 latents
      of which the first C/2 channels are means and the others standard
      deviations (see `codec.Latents`).
    """


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
  """A source held in memory.

  Attributes:
    name: what errors call the set.
    stored: the rows [N,H,W,C], N > 0: uint8 pixels, or float32 latents with
      an even C.
    classes: the rows' classes, integers [N] in 0 .. num_classes−1; all 0 in a
      set without labels.
    num_classes: the number of classes; 0 for a set without labels.
    pixel_values: the number of values of a pixel.
    class_names: the names of the classes, by label; () where not known.

  Raises:
    errors.UserError: the arrays are not as described.
  """

  name: str
  stored: np.ndarray
  classes: np.ndarray
  num_classes: int = 0
  pixel_values: int = 256
  class_names: tuple[str, ...] = ()

  def __post_init__(self):
    stored = self.stored
    shape = stored.shape
    is_pixels = stored.dtype == np.uint8 and stored.ndim == 4
    is_latents = (
      stored.dtype == np.float32 and stored.ndim == 4 and shape[3] % 2 == 0
    )
    fits = (is_pixels or is_latents) and stored.size > 0
    if not fits or self.classes.shape != shape[:1]:
      raise errors.UserError(
        f'{self.name}: images are {stored.dtype} {list(shape)}, labels'
        f' {list(self.classes.shape)}; wanted unscaled uint8 [N,H,W,C],'
        ' pixels 0 .. 255 (or float32 latents, C even), and [N], N > 0'
      )
    if is_latents:
      fault = encoded.fault_of_latents(stored)
      if fault:
        raise errors.UserError(f'{self.name} holds {fault}; encode it again')
    top_label = classes_lib.count_classes(self.name, self.classes) - 1
    top_pixel = int(stored.max()) if is_pixels else 0
    label_limit = max(self.num_classes, 1) - 1
    pixel_limit = self.pixel_values - 1
    if top_label > label_limit or top_pixel > pixel_limit:
      raise errors.UserError(
        f'{self.name}: labels reach {top_label} and pixels {top_pixel}; wanted'
        f' at most {label_limit} and {pixel_limit}'
      )

  @property
  def stored_shape(self) -> tuple[int, int, int]:
    """The shape (H, W, C) of every stored row."""
    _, height, width, channels = self.stored.shape
    return height, width, channels

  def __len__(self) -> int:
    return len(self.stored)

  def fitted(self, fit: transforms.Fit) -> 'ArraySource':
    """Returns the source with its images fitted.

    Raises:
      errors.UserError: the rows are no images, or larger than they may be.
    """
    stored = fit.array(self.name, self.stored)
    return dataclasses.replace(self, stored=stored)

  def labels(self) -> np.ndarray:
    """Returns the class of every row, as `Source` says."""
    return self.classes.astype(np.int32)

  def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads the rows at `index` [B], as `Source` says."""
    return self.stored[index], self.classes[index].astype(np.int32)


def _one_of(known: list[str], names: tuple[str, ...]) -> str:
  """Returns the first of some names that is known; '' if none is."""
  return next((name for name in names if name in known), '')


def open_npz(path: pathlib.Path) -> ArraySource:
  """Opens an .npz file of images and, if they are there, labels.

  Images are the array `image`, `images` or `arr_0` (as in OpenAI's files),
  labels `label`, `labels` or `arr_1`.

  Raises:
    errors.UserError: the file is damaged, or its arrays are not those of a set.
  """
  name = str(path)
  if not path.is_file():
    raise errors.UserError(f'no file {name}; wanted the path of an .npz')
  stored = None
  labels = None
  with encoded.user_error(
    f'{name} is no whole .npz of plain arrays, write it again'
  ):
    with reading.Npz(path) as file:
      known = file.names
      images = _one_of(known, ('image', 'images', 'arr_0'))
      classes = _one_of(known, ('label', 'labels', 'arr_1'))
      if images:
        stored = file.read(images)
      if images and classes:
        labels = file.read(classes)
  if stored is None:
    raise errors.UserError(
      f'{name} has no array `image` (or arr_0), uint8 [N,H,W,C]; it has'
      f' {errors.brief(known)}'
    )
  is_planes = stored.ndim == 4 and stored.shape[1] in (1, 3)
  if stored.dtype == np.uint8 and is_planes and stored.shape[3] not in (1, 3):
    raise errors.UserError(
      f'{name}: images are {list(stored.shape)}, which looks like [N,C,H,W];'
      ' wanted [N,H,W,C]: write np.moveaxis(images, 1, -1)'
    )
  if labels is None:
    return ArraySource(name, stored, np.zeros(stored.shape[:1], np.int32))
  return ArraySource(
    name=name,
    stored=stored,
    classes=labels,
    num_classes=classes_lib.count_classes(name, labels),
  )


def _open_place(
  data: Data, place: str, wanted: splits.Wanted
) -> ArraySource | encoded.EncodedSource:
  """Opens what `data.source` or `data.test_source` names, as it is stored.

  Args:
    data: the settings.
    place: a name, a path or an address.
    wanted: the split, where the place has several.
  """
  path = pathlib.Path(place.replace('{split}', wanted.name)).expanduser()
  if '{split}' in place:
    wanted = dataclasses.replace(wanted, alone=True)
  if hugging_face.is_address(place):
    path = hugging_face.fetch(place)
  is_path = path.suffix in ('.npz', '.parquet', '.zip') or path.is_dir()
  if place in builders.SPECS or not is_path:
    return builders.open_split(
      name=place,
      split=wanted.name,
      data_dir=data.data_dir,
      raw_dir=data.raw_dir,
      label_field=data.label_field,
    )
  if path.suffix == '.npz':
    wanted.choose(str(path), [])
    return open_npz(path)
  if path.suffix != '.zip' and hugging_face.is_set(path):
    cache = pathlib.Path(data.data_dir or '~/.cache/ddo_jax/data').expanduser()
    return hugging_face.open_set(path, wanted, data.label_field, cache)
  return files.open_files(path, wanted)


def _open_whole(data: Data, place: str, wanted: splits.Wanted) -> Source:
  """Opens all of a split, its images fitted, its labels from 0."""
  source = _open_place(data, place, wanted)
  fit = transforms.Fit(
    channels=data.channels,
    resize=data.resize,
    method=data.resize_by,
    pad_to=data.pad_to,
    pixel_values=source.pixel_values,
  )
  if fit.changes:
    source = source.fitted(fit)
  return selection.from_first(source, data.first_label)


def _cut(data: Data, whole: Source, held_out: bool) -> Source:
  """Returns the held-out images of a set, or the others.

  An image that a set in memory has twice is not held out where its copy is not.
  """
  held = splits.held_out(whole.labels(), data.holdout)
  if isinstance(whole, ArraySource):
    rows = np.flatnonzero(held)
    copied = splits.copies(whole.stored[~held], whole.stored[rows])
    held[rows[copied]] = False
  count = int(held.sum())
  errors.require(
    0 < count < len(whole),
    'data.holdout',
    data.holdout,
    f'such that of the {len(whole)} images of {whole.name} some are held out'
    f' and some are not; {count} are',
  )
  if not held_out:
    _LOGGER.info(
      '%s: %d of %d images are held out (config.data.holdout=%g), the same'
      ' share of every class',
      whole.name,
      count,
      len(whole),
      data.holdout,
    )
  split = data.test_split if held_out else data.train_split
  rows = np.flatnonzero(held == held_out)
  return selection.of_rows(whole, rows, f'{whole.name} ({split})')


def _in_memory(source: Source) -> Source:
  """Reads a small source into memory; returns a large one as it is."""
  if isinstance(source, ArraySource):
    return source
  first, _ = source.read(np.arange(1))
  if len(source) * first.nbytes > _IN_MEMORY:
    return source
  stored = np.empty((len(source), *first.shape[1:]), first.dtype)
  labels = np.empty(len(source), np.int32)
  starts = range(0, len(source), _CHUNK)
  parts = [np.arange(len(source))[start : start + _CHUNK] for start in starts]
  with (
    futures.ThreadPoolExecutor(_THREADS) as pool,
    progress.follow(f'reading {source.name}', len(source)) as bar,
  ):
    for part, rows in zip(parts, pool.map(source.read, parts), strict=True):
      stored[part], labels[part] = rows
      bar.update(len(part))
  return ArraySource(
    name=source.name,
    stored=stored,
    classes=labels,
    num_classes=source.num_classes,
    pixel_values=source.pixel_values,
    class_names=source.class_names,
  )


def open_source(data: Data, split: str) -> Source:
  """Opens the real images of a split.

  Args:
    data: the settings.
    split: the name of the split; of a TFDS set also a slice, 'train[:90%]'.

  Raises:
    errors.UserError: nothing is there, or what is there is no set of images or
      has no such split, or the settings do not suit it.
  """
  data.check()
  # What is fetched or prepared on the way is so by one process.
  with processes.main_first(f'open {split}'):
    return _open(data, split)


def _open(data: Data, split: str) -> Source:
  """Opens a split; see `open_source`."""
  wanted = splits.Wanted(
    name=split,
    train=data.train_split,
    test=data.test_split,
    alone=split == data.train_split,
  )
  train = dataclasses.replace(wanted, name=data.train_split, alone=True)
  held_out = split == data.test_split
  if data.holdout and (held_out or wanted.alone):
    whole = _in_memory(_open_whole(data, data.source, train))
    return _in_memory(_cut(data, whole, held_out))
  place = data.source
  if held_out and data.test_source:
    place = data.test_source
    wanted = dataclasses.replace(wanted, alone=True)
  source = _open_whole(data, place, wanted)
  if held_out and source.class_names:
    whole = _open_whole(data, data.source, train)
    source = selection.named_like(source, whole)
  return _in_memory(source)


def compare(train: Source, test: Source) -> np.ndarray | None:
  """Says which held-out images are copies of training images.

  Returns:
    bool [M], one for each held-out image; None where the sets are not in
    memory, for only such sets are compared.

  Raises:
    errors.UserError: all of them are, or they are of another shape.
  """
  if train.stored_shape != test.stored_shape:
    raise errors.UserError(
      f'the held-out images of {test.name} are {list(test.stored_shape)}, the'
      f' training images of {train.name} {list(train.stored_shape)}: make them'
      ' alike with --config.data.resize and --config.data.channels'
    )
  if not isinstance(train, ArraySource) or not isinstance(test, ArraySource):
    return None
  copied = splits.copies(train.stored, test.stored)
  count = int(copied.sum())
  if count == len(test):
    raise errors.UserError(
      f'all {count} held-out images of {test.name} are copies of training'
      f' images of {train.name}: nothing can be measured with them; cut others'
      ' with --config.data.holdout=0.1, or name them with'
      ' --config.data.test_source'
    )
  if count:
    _LOGGER.warning(
      '%d of the %d held-out images of %s are copies of training images',
      count,
      len(test),
      test.name,
    )
  return copied
