"""Writes sets of images in the layouts that other programs read."""

import json
import pathlib

import numpy as np
from PIL import Image

from ddo_jax.runtime import disk


class ImageWriter:
  """Writes images one batch after the other, in any order of their ids.

  Where the path ends in .npz, the result is a file in the layout of OpenAI's
  evaluations: `arr_0` holds the images and `arr_1` the labels. They are
  shuffled, because the Inception Score of that program reads them in order.
  Elsewhere the result is a folder of PNGs with a dataset.json, in the layout
  of EDM's programs (see `files`).
  """

  def __init__(self, path: pathlib.Path):
    """Prepares to write to `path`; nothing is written yet."""
    self.path = path
    self._labels: dict[int, int] = {}
    self._images: dict[int, np.ndarray] = {}

  def add(
    self, ids: np.ndarray, images: np.ndarray, labels: np.ndarray
  ) -> None:
    """Takes images, uint8 [B,H,W,C], of ids [B] and labels [B]."""
    for number, image, label in zip(ids.tolist(), images, labels, strict=True):
      self._labels[number] = int(label)
      if self.path.suffix == '.npz':
        self._images[number] = image
      else:
        file = self.path / _file_name(number)
        with disk.guarded(file):
          file.parent.mkdir(parents=True, exist_ok=True)
          Image.fromarray(image.squeeze()).save(file)

  def close(self) -> None:
    """Writes what can be written only once all images are known."""
    numbers = sorted(self._labels)
    if self.path.suffix == '.npz':
      shuffled = np.random.RandomState(0).permutation(numbers).tolist()
      images = np.stack([self._images[number] for number in shuffled])
      labels = np.array([self._labels[number] for number in shuffled])
      with disk.whole(self.path) as file:
        np.savez(file, arr_0=images, arr_1=labels)
      return
    entries = [[_file_name(n), self._labels[n]] for n in numbers]
    content = json.dumps({'labels': entries})
    with disk.whole(self.path / 'dataset.json') as file:
      file.write(content.encode())


def _file_name(number: int) -> str:
  """Returns the name of an image's file, a thousand to a folder."""
  return f'{number // 1000:05d}/img{number:08d}.png'
