"""Folders and zips of images, or of latents, with EDM's dataset.json."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import io
import json
import pathlib
import threading
import zipfile

import numpy as np

from ddo_jax import errors

Row = tuple[str, bytes, int]  # where it stands, its file, label

_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.webp')
_LATENT = '.npy'


@contextlib.contextmanager
def user_error(message: str) -> Iterator[None]:
  """Turns an error of a library that reads the user's files into UserError."""
  try:
    yield
  except Exception as error:  # on damaged files they raise all kinds
    raise errors.UserError(f'{message} ({error})') from error


def decode_image(where: str, encoded: bytes) -> np.ndarray:
  """Decodes an image file to uint8 [H,W,C], C of 1 or 3."""
  from PIL import Image

  with user_error(f'{where}: the image is damaged or cut off, replace it'):
    with Image.open(io.BytesIO(encoded)) as image:
      mode, pixels = image.mode, np.asarray(image)
  if mode not in ('L', 'RGB'):
    raise errors.UserError(
      f'{where} is of PIL mode {mode!r}; wanted L (8-bit grey) or RGB: convert'
    )
  return pixels.reshape(*pixels.shape[:2], -1)


def check_latents(latents: np.ndarray) -> str:
  """Returns what is wrong with raw latents [...,2C], '' if nothing is."""
  if not np.isfinite(latents).all():
    return 'NaN or Inf'
  _, std = np.split(latents, 2, axis=-1)
  return 'standard deviations below 0' if std.min() < 0 else ''


def decode_latents(where: str, encoded: bytes) -> np.ndarray:
  """Reads .npy means and deviations [2C,H,W] to float32 [H,W,2C]."""
  with user_error(f'{where} is no whole .npy of plain numbers, write it again'):
    latents = np.load(io.BytesIO(encoded), allow_pickle=False)
    kind, shape = latents.dtype, latents.shape
  good = kind == np.float32 and len(shape) == 3 and shape[0] % 2 == 0
  if not good or not latents.size:
    raise errors.UserError(
      f'{where} is {kind} {list(shape)}; wanted raw latents, float32 [2C,H,W]:'
      ' C means, then C standard deviations'
    )
  latents = np.ascontiguousarray(np.moveaxis(latents, 0, -1))
  if fault := check_latents(latents):
    raise errors.UserError(f'{where} holds {fault}: encode its image again')
  return latents


def opener(path: pathlib.Path) -> tuple[list[str], Callable[[str], bytes]]:
  """Returns the names in a folder or zip, and a thread-safe reader of one."""
  if path.is_dir():
    names = [file.relative_to(path).as_posix() for file in path.rglob('*')]
    return names, lambda name: (path / name).read_bytes()
  with user_error(f'{path} is no readable zip, copy it again'):
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
  with user_error(f'{where} is not {{"labels": [[name, class], ...]}}'):
    entries = json.loads(content)['labels']
    if entries is None:
      return []
    table = dict(entries)
  lost, left = table.keys() - set(names), set(names) - table.keys()
  if lost or left or len(entries) != len(table):
    raise errors.UserError(
      f'{where} lists {len(entries)} images of {len(names)}; wanted each once;'
      f' missing files: {sorted(lost)[:3]}, not listed: {sorted(left)[:3]}'
    )
  for name, label in table.items():
    if type(label) is not int or not 0 <= label < 2**31 - 1:
      raise errors.UserError(
        f'{where}: class of {name!r} is {label!r}; wanted an integer, 0 or up'
      )
  return [table[name] for name in names]


@dataclasses.dataclass(frozen=True)
class Files:
  """The files of a set, read at random."""

  length: int
  num_classes: int  # 0: no labels
  pixel_values: int
  fetch: Callable[[list[int]], list[Row]]
  decode: Callable[[str, bytes], np.ndarray]  # (name, content) -> [H,W,C]


def open_files(path: pathlib.Path) -> Files:
  """Opens EDM's format: a folder or zip of files and their dataset.json.

  The files are images, or EDM2's raw latents: `img-mean-std-*.npy` of float32
  [2C,H,W], the autoencoder's means and standard deviations.

  Raises:
    UserError: unreadable, empty, of both kinds, or with wrong labels; by
      `fetch` and `decode`, which name the file: damaged or another kind.
  """
  names, read_bytes = opener(path)
  images = sorted(n for n in names if n.lower().endswith(_SUFFIXES))
  latents = sorted(n for n in names if n.lower().endswith(_LATENT))
  if bool(images) == bool(latents):
    raise errors.UserError(
      f'{path} holds {len(images)} images and {len(latents)} latents; wanted'
      f' either {_SUFFIXES} or {_LATENT}'
    )
  decode, found = decode_image, images
  if latents:
    decode, found = decode_latents, latents

  def read(name: str) -> tuple[str, bytes]:
    with user_error(f'{path / name} cannot be read, copy it again'):
      return str(path / name), read_bytes(name)

  labels = []
  if 'dataset.json' in names:
    labels = _labels(*read('dataset.json'), found)
  elif deep := [n for n in names if n.endswith('/dataset.json')]:
    raise errors.UserError(f'{path / deep[0]} must be at the top: move it up')
  num_classes = max(labels, default=-1) + 1
  labels = labels or [0] * len(found)
  fetch = lambda index: [(*read(found[i]), labels[i]) for i in index]
  return Files(len(found), num_classes, 256, fetch, decode)
