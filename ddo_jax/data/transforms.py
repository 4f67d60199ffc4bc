"""How images are fitted to a model: grey or RGB, cropped, resized, padded."""

import dataclasses
from typing import Any

import numpy as np

from ddo_jax import errors

RESIZES = ('lanczos', 'adm')
_MOST_PIXELS = 2**26  # as 8192×8192 has
_MODES = {1: 'L', 3: 'RGB'}
# Pillow's modes of 8 bits a channel, or fewer, that it converts faithfully.
_CONVERTIBLE = ('1', 'CMYK', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA')


@dataclasses.dataclass(frozen=True)
class Fit:
  """Fits an image in this order: channels, crop and resize, padding.

  Attributes:
    channels: 1 makes images grey (pillow's 'L', ITU-R 601), 3 makes them RGB
      (grey is replicated, palettes are looked up, alpha is left out); 0 leaves
      them as they are.
    resize: the side of the centre square that is kept; 0 leaves the size.
    method: 'lanczos' crops to the largest centre square and resizes it with
      pillow's Lanczos filter, as EDM's ImageNet-64 was. 'adm' halves the image
      by boxes while it is twice the side, resizes it bicubically so that the
      shorter side fits and crops the centre, as ADM's and EDM2's data were.
    pad_to: the side of the black square in which images are centred; 0 leaves
      the size.
    pixel_values: pixels are cut off at pixel_values − 1, beyond which Lanczos
      and bicubic filters overshoot.
  """

  channels: int = 0
  resize: int = 0
  method: str = RESIZES[0]
  pad_to: int = 0
  pixel_values: int = 256

  @property
  def changes(self) -> bool:
    """Whether any image may change."""
    return bool(self.channels or self.resize or self.pad_to)

  def shape(self, where: str, image: Any) -> tuple[int, int, int]:
    """Returns the shape [H,W,C] of a fitted image, C 1 or 3.

    Only what its header says is looked at.

    Args:
      where: the place of the image, for errors.
      image: a PIL image.

    Raises:
      errors.UserError: the image is neither 8-bit grey nor RGB and no
        conversion is asked for, it is larger than what it is padded to, or so
        large that it would take gigabytes.
    """
    mode = image.mode
    if self.channels and mode in _CONVERTIBLE:
      mode = _MODES[self.channels]
    if mode not in _MODES.values():
      remedy = 'convert it to 8 bits'
      if mode in _CONVERTIBLE:
        remedy = 'convert, or set --config.data.channels=3 (1: grey)'
      raise errors.UserError(
        f'{where} is of PIL mode {mode!r}; wanted L (8-bit grey) or RGB:'
        f' {remedy}'
      )
    self._check_pixels(where, image)
    width, height = image.size
    if self.resize:
      width = self.resize
      height = self.resize
    if self.pad_to:
      if max(width, height) > self.pad_to:
        raise errors.UserError(
          f'{where} is {height}×{width}; config.data.pad_to={self.pad_to} pads'
          f' smaller images: set --config.data.resize={self.pad_to}, or pad_to'
          ' to 0'
        )
      width = self.pad_to
      height = self.pad_to
    return height, width, len(mode)

  def _check_pixels(self, where: str, image: Any) -> None:
    """Raises UserError where an image would take gigabytes to fit."""
    width, height = image.size
    pixels = width * height
    if self.resize and self.method == 'adm':  # all of it is resized, then cut
      resized = self.resize**2 * max(image.size) // max(min(image.size), 1)
      pixels = max(pixels, resized)
    if pixels > _MOST_PIXELS:
      raise errors.UserError(
        f'{where} is {height}×{width}; an image may have {_MOST_PIXELS:,}'
        ' pixels, also while it is resized: make it smaller'
      )

  def pixels(self, image: Any) -> np.ndarray:
    """Returns the pixels of a fitted image, uint8 [H,W,C], C 1 or 3.

    Args:
      image: a PIL image of which `shape` has been asked.
    """
    if self.channels:
      image = image.convert(_MODES[self.channels])
    if self.resize:
      crop = _crop_lanczos if self.method == 'lanczos' else _crop_adm
      image = crop(image, self.resize)
    if self.pad_to:
      image = _pad(image, self.pad_to)
    pixels = np.asarray(image)
    if self.resize and self.pixel_values < 256:
      pixels = np.minimum(pixels, np.uint8(self.pixel_values - 1))
    height, width = pixels.shape[:2]
    return pixels.reshape(height, width, -1)

  def array(self, where: str, stored: np.ndarray) -> np.ndarray:
    """Returns images in memory, uint8 [N,H,W,C], fitted.

    Raises:
      errors.UserError: they are no images of 1 or 3 channels, or are larger
        than what they are padded to.
    """
    from PIL import Image

    if stored.dtype != np.uint8 or stored.shape[-1] not in _MODES:
      raise errors.UserError(
        f'{where} holds {stored.dtype} {list(stored.shape)}; only uint8 images'
        ' of 1 or 3 channels can be resized, padded or converted: set'
        ' config.data.resize, pad_to and channels to 0'
      )
    planes = stored[..., 0] if stored.shape[-1] == 1 else stored
    images = [Image.fromarray(image) for image in planes]
    self.shape(where, images[0])
    return np.stack([self.pixels(image) for image in images])


def _centre(image: Any, side: int) -> Any:
  """Returns the centre square of a PIL image."""
  left = (image.width - side) // 2
  top = (image.height - side) // 2
  return image.crop((left, top, left + side, top + side))


def _crop_lanczos(image: Any, side: int) -> Any:
  """Returns the largest centre square, resized; see `Fit.method`."""
  from PIL import Image

  square = _centre(image, min(image.size))
  return square.resize((side, side), Image.Resampling.LANCZOS)


def _crop_adm(image: Any, side: int) -> Any:
  """Returns a centre square as ADM's data loader cuts it; see `Fit.method`."""
  from PIL import Image

  while min(image.size) >= 2 * side:
    half = (image.width // 2, image.height // 2)
    image = image.resize(half, Image.Resampling.BOX)
  scale = side / min(image.size)
  size = (round(image.width * scale), round(image.height * scale))
  return _centre(image.resize(size, Image.Resampling.BICUBIC), side)


def _pad(image: Any, side: int) -> Any:
  """Returns an image in the centre of a black square."""
  from PIL import Image

  square = Image.new(image.mode, (side, side))
  left = (side - image.width) // 2
  top = (side - image.height) // 2
  square.paste(image, (left, top))
  return square
