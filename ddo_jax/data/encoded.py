"""Sets whose rows stand encoded on disk and are decoded whenever they are read.

A row is the content of an image file (PNG, JPEG, …), or of a .npy file that
holds the latents of an image. `files` and `builders` know where such rows are
found; this module decodes them and refuses those that do not fit. What a row's
header says is looked at before the rest of it is decoded.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import io
import math
from typing import NamedTuple

import numpy as np

from ddo_jax import errors
from ddo_jax.data import transforms
from ddo_jax.runtime import reading

_SCAN = b'\xff\xda'  # the mark of a scan of a JPEG
_MOST_SCANNED = 2**31  # pixels; 32 times those of the largest image
_REASON = 240  # characters of what a library says of a file
_FORMATS = ('BMP', 'GIF', 'JPEG', 'PNG', 'TIFF', 'WEBP')
_MOVING = ('GIF', 'PNG', 'WEBP')  # those of them that may be animations
_AS_IT_IS = transforms.Fit()


class EncodedRow(NamedTuple):
  """One row before decoding.

  Attributes:
    where: the place of the row, as an error should name it.
    content: the bytes of the image or .npy file.
    label: its class, 0 in a set without labels.
  """

  where: str
  content: bytes
  label: int


@contextlib.contextmanager
def user_error(message: str) -> Iterator[None]:
  """Turns whatever a library raises on a user's file into a UserError.

  Args:
    message: what is wrong and what to do; the library's words are appended.
  """
  try:
    yield
  except Exception as error:  # Damaged files make libraries raise all kinds.
    reason = ' '.join(str(error).split())[:_REASON] or type(error).__name__
    raise errors.UserError(f'{message} ({reason})') from error


class Opened(NamedTuple):
  """A row of which only the header was read.

  Attributes:
    shape: the shape [H,W,C] that it will have.
    decode: returns it, an array of that shape.
  """

  shape: tuple[int, ...]
  decode: Callable[[], np.ndarray]


def open_image(
  where: str, content: bytes, fit: transforms.Fit = _AS_IT_IS
) -> Opened:
  """Opens an image file, which decodes to uint8 [H,W,C] with C 1 or 3.

  Args:
    where: the place of the image, for errors.
    content: the file.
    fit: what is done to the image.

  Raises:
    errors.UserError: the image is damaged, very large, an animation, or neither
      8-bit grey nor RGB; or, from `decode`, it is damaged further on.
  """
  from PIL import Image

  damaged = f'{where}: the image is damaged or cut off, replace it'
  with user_error(damaged):
    # Pillow gives other formats, such as PostScript, to other programs.
    image = Image.open(io.BytesIO(content), formats=_FORMATS)
    moves = image.format in _MOVING and getattr(image, 'is_animated', False)
  if moves:
    raise errors.UserError(
      f'{where} is an animation; wanted a still image: write one frame of it'
    )
  shape = fit.shape(where, image)
  # A progressive JPEG is gone over once for each scan, of which it may have
  # thousands in a few bytes each.
  scans = content.count(_SCAN) if image.format in ('JPEG', 'MPO') else 1
  if image.width * image.height * scans > _MOST_SCANNED:
    raise errors.UserError(
      f'{where} is {image.height}×{image.width} in {scans} scans, which takes'
      ' very long to decode: write it as a plain JPEG or PNG'
    )

  def decode() -> np.ndarray:
    with user_error(damaged):
      return fit.pixels(image)

  return Opened(shape, decode)


def open_latents(where: str, content: bytes) -> Opened:
  """Opens a .npy file of latents, which decodes to float32 [H,W,2C].

  The file holds float32 [2C,H,W]: the means of the C latents of an image, then
  their standard deviations.

  Raises:
    errors.UserError: the file holds something else; or, from `decode`, it is
      damaged.
  """
  damaged = f'{where} is no whole .npy of plain numbers, write it again'
  with user_error(damaged):
    file = io.BytesIO(content)
    shape, dtype, order = reading.read_header(file)
  fits = dtype == np.float32 and len(shape) == 3 and shape[0] % 2 == 0
  if not fits or min(shape) < 1:
    raise errors.UserError(
      f'{where} is {dtype} {list(shape)}; wanted raw latents, float32 [2C,H,W]:'
      ' C means, then C standard deviations'
    )

  def decode() -> np.ndarray:
    with user_error(damaged):
      flat = np.frombuffer(content, dtype, math.prod(shape), file.tell())
    planes = flat.reshape(shape, order=order)
    latents = np.ascontiguousarray(np.moveaxis(planes, 0, -1))
    fault = fault_of_latents(latents)
    if fault:
      raise errors.UserError(f'{where} holds {fault}: encode its image again')
    return latents

  return Opened((*shape[1:], shape[0]), decode)


def fault_of_latents(latents: np.ndarray) -> str:
  """Says what is wrong with latents [...,2C]; '' if nothing is."""
  if not np.isfinite(latents).all():
    return 'NaN or Inf'
  deviations = latents[..., latents.shape[-1] // 2 :]
  if deviations.min() < 0:
    return 'standard deviations below 0'
  return ''


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedSource:
  """A `sources.Source` that decodes its rows at every read, in any thread.

  Attributes:
    name: what errors call the set.
    length: the number of rows.
    num_classes: the number of classes; 0 for a set without labels.
    pixel_values: the number of values of a pixel.
    fetch: gives the encoded rows at the given indices; safe in threads.
    fetch_labels: gives the classes of all rows, integers [N].
    open_row: opens a row, given its (where, content). All rows must have the
      shape of the first.
    class_names: the names of the classes, by label; () where not known.
  """

  name: str
  length: int
  num_classes: int
  pixel_values: int
  fetch: Callable[[list[int]], list[EncodedRow]]
  fetch_labels: Callable[[], np.ndarray]
  open_row: Callable[[str, bytes], Opened] = open_image
  class_names: tuple[str, ...] = ()

  def fitted(self, fit: transforms.Fit) -> 'EncodedSource':
    """Returns the source with its images fitted, each as it is read.

    Raises:
      errors.UserError: the rows are no images.
    """
    if self.open_row is not open_image:
      raise errors.UserError(
        f'{self.name} holds latents; only images can be resized, padded or'
        ' converted: set config.data.resize, pad_to and channels to 0'
      )
    open_row = functools.partial(open_image, fit=fit)
    return dataclasses.replace(self, open_row=open_row)

  @functools.cached_property
  def _first(self) -> np.ndarray:
    (row,) = self.fetch([0])
    return self.open_row(row.where, row.content).decode()

  @property
  def stored_shape(self) -> tuple[int, int, int]:
    """The shape (H, W, C) of the first row, which all others must have."""
    return self._first.shape

  def __len__(self) -> int:
    return self.length

  @functools.cached_property
  def _labels(self) -> np.ndarray:
    labels = np.asarray(self.fetch_labels())
    num_labels = max(self.num_classes, 1)
    wrong = np.flatnonzero((labels < 0) | (labels >= num_labels))
    if wrong.size:
      raise errors.UserError(
        f'{self.name}: row {wrong[0]} has label {labels[wrong[0]]}; wanted 0 ..'
        f' {num_labels - 1}'
      )
    return labels.astype(np.int32)

  def labels(self) -> np.ndarray:
    """Returns the class of every row, as `sources.Source` says.

    Raises:
      errors.UserError: a label is out of range, or cannot be read.
    """
    return self._labels

  def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads the rows at `index` [B], as `sources.Source` says.

    Raises:
      errors.UserError: a row cannot be read, or differs from the first in
        shape, or its label is out of range; the message names its file.
    """
    shape = self.stored_shape
    num_labels = max(self.num_classes, 1)
    stored = np.empty((len(index), *shape), self._first.dtype)
    labels = np.empty(len(index), np.int32)
    for i, row in enumerate(self.fetch(index.tolist())):
      opened = self.open_row(row.where, row.content)
      if opened.shape != shape or not 0 <= row.label < num_labels:
        raise errors.UserError(
          f'{row.where} is {list(opened.shape)}, label {row.label}; wanted'
          f' {list(shape)} [H,W,C] as the first image, label 0 ..'
          f' {num_labels - 1}: images are made alike with --config.data.resize'
          ' and --config.data.channels'
        )
      stored[i] = opened.decode()
      labels[i] = row.label
    return stored, labels
