"""Sets whose rows stand encoded on disk and are decoded whenever they are read.

A row is the content of an image file (PNG, JPEG, …), or of a .npy file that
holds the latents of an image. `files` and `builders` know where such rows are
found; this module decodes them and refuses those that do not fit.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import io
from typing import NamedTuple

import numpy as np

from ddo_jax import errors
from ddo_jax.data import transforms

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
    raise errors.UserError(f'{message} ({error})') from error


def decode_image(
  where: str, content: bytes, fit: transforms.Fit = _AS_IT_IS
) -> np.ndarray:
  """Decodes the bytes of an image file to uint8 [H,W,C], with C 1 or 3.

  Args:
    where: the place of the image, for errors.
    content: the file.
    fit: what is done to the image.

  Raises:
    errors.UserError: the image is damaged, or neither 8-bit grey nor RGB.
  """
  from PIL import Image

  with user_error(f'{where}: the image is damaged or cut off, replace it'):
    with Image.open(io.BytesIO(content)) as image:
      image.load()
  return fit.pixels(where, image)


def decode_latents(where: str, content: bytes) -> np.ndarray:
  """Decodes the bytes of a .npy file of latents to float32 [H,W,2C].

  The file holds float32 [2C,H,W]: the means of the C latents of an image, then
  their standard deviations.

  Raises:
    errors.UserError: the file is damaged, or holds something else.
  """
  with user_error(f'{where} is no whole .npy of plain numbers, write it again'):
    latents = np.load(io.BytesIO(content), allow_pickle=False)
    dtype = latents.dtype
    shape = latents.shape
  fits = dtype == np.float32 and len(shape) == 3 and shape[0] % 2 == 0
  if not fits or not latents.size:
    raise errors.UserError(
      f'{where} is {dtype} {list(shape)}; wanted raw latents, float32 [2C,H,W]:'
      ' C means, then C standard deviations'
    )
  latents = np.ascontiguousarray(np.moveaxis(latents, 0, -1))
  fault = fault_of_latents(latents)
  if fault:
    raise errors.UserError(f'{where} holds {fault}: encode its image again')
  return latents


def fault_of_latents(latents: np.ndarray) -> str:
  """Says what is wrong with latents [...,2C]; '' if nothing is."""
  if not np.isfinite(latents).all():
    return 'NaN or Inf'
  _, deviations = np.split(latents, 2, axis=-1)
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
    decode: turns (where, content) of a row into an array [H,W,C]. All rows
      must have the shape of the first.
    class_names: the names of the classes, by label; () where not known.
  """

  name: str
  length: int
  num_classes: int
  pixel_values: int
  fetch: Callable[[list[int]], list[EncodedRow]]
  fetch_labels: Callable[[], np.ndarray]
  decode: Callable[[str, bytes], np.ndarray] = decode_image
  class_names: tuple[str, ...] = ()

  def fitted(self, fit: transforms.Fit) -> 'EncodedSource':
    """Returns the source with its images fitted, each as it is read.

    Raises:
      errors.UserError: the rows are no images.
    """
    if self.decode is not decode_image:
      raise errors.UserError(
        f'{self.name} holds latents; only images can be resized, padded or'
        ' converted: set config.data.resize, pad_to and channels to 0'
      )
    decode = functools.partial(decode_image, fit=fit)
    return dataclasses.replace(self, decode=decode)

  @functools.cached_property
  def _first(self) -> np.ndarray:
    (row,) = self.fetch([0])
    return self.decode(row.where, row.content)

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
      decoded = self.decode(row.where, row.content)
      if decoded.shape != shape or not 0 <= row.label < num_labels:
        raise errors.UserError(
          f'{row.where} is {list(decoded.shape)}, label {row.label}; wanted'
          f' {list(shape)} [H,W,C] as the first image, label 0 ..'
          f' {num_labels - 1}: images are made alike with --config.data.resize'
          ' and --config.data.channels'
        )
      stored[i] = decoded
      labels[i] = row.label
    return stored, labels
