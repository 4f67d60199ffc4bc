"""What a source of real images is, and which source a setting names.

A source gives any of its rows by index, as they are stored: uint8 pixels, or
float32 latents. Nothing is scaled here; `codec` does that on the devices.
"""

import dataclasses
import math
import pathlib
from typing import Any
from typing import Protocol

import numpy as np

from ddo_jax import errors
from ddo_jax.data import builders
from ddo_jax.data import encoded
from ddo_jax.data import files

_IN_MEMORY = 2**30  # A TFDS split of up to this many bytes is decoded once.


def _not_science(default: Any) -> Any:
  """Declares a field that may change between two starts of one run."""
  return dataclasses.field(default=default, metadata={'science': False})


@dataclasses.dataclass
class Data:
  """The settings that say where real images come from; see `open_source`."""

  # A TFDS name (digits, fashion_mnist and cifar10 need no TensorFlow), or the
  # path of an .npz, or of a folder or zip of images with EDM's dataset.json.
  source: str = 'digits'
  # Smaller images are centred in a black square of this side; 0 leaves them.
  pad_to: int = 0
  train_split: str = 'train'
  test_split: str = 'test'
  # Where TFDS keeps prepared data; '' is TFDS's own default.
  data_dir: str = _not_science('')
  # Folder of the published files that a builder reads (fashion_mnist: the
  # four *-ubyte.gz; cifar10: cifar-10-binary.tar.gz); '' fetches them.
  raw_dir: str = _not_science('')


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

  Raises:
    errors.UserError: the arrays are not as described.
  """

  name: str
  stored: np.ndarray
  classes: np.ndarray
  num_classes: int = 0
  pixel_values: int = 256

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
        f' {list(self.classes.shape)}; wanted unscaled uint8 [N,H,W,C] (or'
        ' float32 latents, C even) and [N], N > 0'
      )
    if is_latents:
      fault = encoded.fault_of_latents(stored)
      if fault:
        raise errors.UserError(f'{self.name} holds {fault}; encode it again')
    top_label = count_classes(self.name, self.classes) - 1
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

  def labels(self) -> np.ndarray:
    """Returns the class of every row, as `Source` says."""
    return self.classes.astype(np.int32)

  def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads the rows at `index` [B], as `Source` says."""
    return self.stored[index], self.classes[index].astype(np.int32)


def count_classes(where: str, labels: np.ndarray) -> int:
  """Returns the largest label plus one, and 0 for no labels.

  Args:
    where: the place of the labels, for errors.
    labels: [N].

  Raises:
    errors.UserError: a label is no integer, negative, or beyond int32.
  """
  low = labels.min() if labels.size else 0
  high = labels.max() if labels.size else -1
  whole = np.issubdtype(labels.dtype, np.integer)
  if not whole or low < 0 or high >= 2**31 - 1:
    raise errors.UserError(
      f'{where}: labels are {labels.dtype} {low} .. {high}; wanted ints from 0'
    )
  return int(high) + 1


def open_npz(path: pathlib.Path) -> ArraySource:
  """Opens the arrays `image` and, if it is there, `label` of an .npz file.

  The plurals `images` and `labels` are accepted, too.

  Raises:
    errors.UserError: the file is damaged, or its arrays are not those of a set.
  """
  name = str(path)
  with encoded.user_error(
    f'{name} is no whole .npz of plain arrays, write it again'
  ):
    with np.load(path, allow_pickle=False) as file:
      arrays = {
        key.removesuffix('s'): file[key]
        for key in file
        if key in ('image', 'images', 'label', 'labels')
      }
  if 'image' not in arrays:
    raise errors.UserError(f'{name} has no array `image`, [N,H,W,C]')
  stored = arrays['image']
  if 'label' not in arrays:
    return ArraySource(name, stored, np.zeros(stored.shape[:1], np.int32))
  labels = arrays['label']
  return ArraySource(
    name=name,
    stored=stored,
    classes=labels,
    num_classes=count_classes(name, labels),
  )


def open_source(data: Data, split: str) -> Source:
  """Opens the real images of a split.

  Args:
    data: the settings. `data.source` is a key of `builders.SPECS`, which is
      prepared on first use, or the path of an .npz, a .zip or a folder, of
      images or latents, or the TFDS name of a set prepared before. `{split}`
      in a path stands for the split's name; a path without it is the training
      split and no other.
    split: the name of the split; of a TFDS set also a slice, 'train[:90%]'.

  Raises:
    errors.UserError: nothing is there, or what is there is no set of images,
      or it cannot be padded as `data.pad_to` says.
  """
  source = _open(data, split)
  if data.pad_to:
    return _pad(source, data.pad_to)
  return source


def _open(data: Data, split: str) -> Source:
  """Opens a split like `open_source`, but leaves its images unpadded."""
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
  return files.open_files(path)


def _open_tfds(data: Data, split: str) -> Source:
  """Opens a split of a TFDS set, and decodes a small one into memory."""
  source = builders.open_split(
    name=data.source,
    split=split,
    data_dir=data.data_dir,
    raw_dir=data.raw_dir,
  )
  if len(source) * math.prod(source.stored_shape) > _IN_MEMORY:
    return source
  stored, labels = source.read(np.arange(len(source)))
  return ArraySource(
    name=source.name,
    stored=stored,
    classes=labels,
    num_classes=source.num_classes,
    pixel_values=source.pixel_values,
  )


def _pad(source: Source, side: int) -> Source:
  """Centres the images of a source in black squares of the given side.

  Raises:
    errors.UserError: the images are larger, or not held in memory.
  """
  height, width, _ = source.stored_shape
  if (height, width) == (side, side):
    return source
  rows = side - height
  columns = side - width
  if not isinstance(source, ArraySource) or rows < 0 or columns < 0:
    raise errors.UserError(
      f'{source.name}: config.data.pad_to={side} pads smaller images held in'
      f' memory (.npz, or a small TFDS set); these are {height}×{width}: pad'
      ' them on disk, or set it to 0'
    )
  top = rows // 2
  left = columns // 2
  margins = ((0, 0), (top, rows - top), (left, columns - left), (0, 0))
  return dataclasses.replace(source, stored=np.pad(source.stored, margins))
