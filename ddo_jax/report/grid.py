"""Sheets of sample images."""

import pathlib

import numpy as np
from PIL import Image


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


def save(
  path: pathlib.Path, images: np.ndarray, pixel_values: int, columns: int = 10
) -> None:
  """Writes a PNG of images uint8 [N,H,W,C]; small ones are enlarged."""
  sheet = grid(images, columns, pixel_values)
  zoom = max(1, 32 // images.shape[1])
  sheet = sheet.repeat(zoom, 0).repeat(zoom, 1)
  Image.fromarray(sheet.squeeze()).save(path)
