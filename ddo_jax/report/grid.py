"""Sheets of images: laid out, written, and cut into rows again."""

import pathlib

import numpy as np
from PIL import Image

from ddo_jax.runtime import disk

COLUMNS = 10  # images in a row, where nobody says otherwise


def grid(
  images: np.ndarray, columns: int, pixel_values: int = 256
) -> np.ndarray:
  """Lays images [N,H,W,C] out in rows, one pixel apart, at full contrast.

  Args:
    images: uint8.
    columns: the number of images in a row.
    pixel_values: a pixel is one of 0 .. pixel_values − 1.

  Returns:
    uint8 [rows·(H+1)+1, columns·(W+1)+1, C], white between the images.
  """
  _, height, width, channels = images.shape
  rows = -(-len(images) // columns)
  size = (rows * (height + 1) + 1, columns * (width + 1) + 1, channels)
  sheet = np.full(size, 255, np.uint8)
  bright = images.astype(np.uint32) * 255 // (pixel_values - 1)
  for i, image in enumerate(bright.astype(np.uint8)):
    top = (i // columns) * (height + 1) + 1
    left = (i % columns) * (width + 1) + 1
    sheet[top : top + height, left : left + width] = image
  return sheet


def _zoom(height: int) -> int:
  """Returns by how much a sheet of images of this height is enlarged."""
  return max(1, 32 // height)


def save(
  path: pathlib.Path,
  images: np.ndarray,
  pixel_values: int,
  columns: int = COLUMNS,
) -> None:
  """Writes a PNG of images uint8 [N,H,W,C]; small ones are enlarged."""
  sheet = grid(images, columns, pixel_values)
  zoom = _zoom(images.shape[1])
  sheet = sheet.repeat(zoom, 0).repeat(zoom, 1)
  with disk.whole(path) as file:
    Image.fromarray(sheet.squeeze()).save(file, 'PNG')


def load(path: pathlib.Path) -> Image.Image | None:
  """Returns a sheet; None where it is missing or still being written."""
  try:
    with Image.open(path) as image:
      image.load()
      return image
  except OSError:
    return None


def cut(sheet: Image.Image, height: int) -> Image.Image:
  """Returns a sheet whose lines between the images are transparent.

  Args:
    sheet: one that was saved with ten images in a row.
    height: H of its images.
  """
  zoom = _zoom(height)
  x = np.arange(sheet.width) % ((sheet.width - zoom) // COLUMNS)
  y = np.arange(sheet.height) % (zoom * (height + 1))
  inside = (x >= zoom) & (y >= zoom)[:, None]
  sheet = sheet.copy()
  sheet.putalpha(Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)))
  return sheet


def row(sheet: Image.Image, index: int, height: int) -> Image.Image:
  """Cuts a row of images, and nothing above and below, out of a sheet.

  Args:
    sheet: one that was saved.
    index: the row, from 0.
    height: H of its images.
  """
  zoom = _zoom(height)
  top = zoom * (index * (height + 1) + 1)
  return sheet.crop((0, top, sheet.width, top + zoom * height))
