"""Folders and zips of images, or of latents, in the layout of EDM's programs.

A set is a tree of image files with a `dataset.json` at its top that lists the
class of each: {"labels": [["00000/img00000000.png", 6], ...]}. In a set
without classes the list is null, or there is no such file.
"""

from collections.abc import Callable
import functools
import json
import pathlib
import threading
import zipfile

import numpy as np

from ddo_jax import errors
from ddo_jax.data import encoded

_IMAGES = ('.bmp', '.jpeg', '.jpg', '.png', '.webp')
_LATENTS = '.npy'
_MANIFEST = 'dataset.json'


def opener(path: pathlib.Path) -> tuple[list[str], Callable[[str], bytes]]:
  """Opens a folder or a zip.

  Returns:
    The names of the files in it, relative to it, and a function that reads the
    file of a name and may be called in several threads at once.

  Raises:
    errors.UserError: `path` is neither a folder nor a readable zip.
  """
  if path.is_dir():
    found = [file.relative_to(path).as_posix() for file in path.rglob('*')]

    def read_file(name: str) -> bytes:
      return (path / name).read_bytes()

    return found, read_file

  with encoded.user_error(f'{path} is no readable zip, copy it again'):
    archive = zipfile.ZipFile(path)
  # All threads share one handle behind a lock. A handle for each would parse
  # the index again, which takes 14 s and 700 MB for a million files, while an
  # image is read in 40 µs.
  lock = threading.Lock()

  def read_member(name: str) -> bytes:
    with lock:
      return archive.read(name)

  return archive.namelist(), read_member


def _parse_labels(where: str, content: bytes, names: list[str]) -> list[int]:
  """Reads dataset.json.

  Args:
    where: the path of the file, for errors.
    content: the file.
    names: the names of the rows' files.

  Returns:
    The class of each name; [] if the file says that there are none.

  Raises:
    errors.UserError: the file is malformed, or does not list each name once
      with a class.
  """
  with encoded.user_error(f'{where} is not {{"labels": [[name, class], ...]}}'):
    entries = json.loads(content)['labels']
    if entries is None:
      return []
    class_of = dict(entries)
  missing = class_of.keys() - set(names)
  unlisted = set(names) - class_of.keys()
  if missing or unlisted or len(entries) != len(class_of):
    raise errors.UserError(
      f'{where} lists {len(entries)} images of {len(names)}; wanted each once;'
      f' missing files: {sorted(missing)[:3]},'
      f' not listed: {sorted(unlisted)[:3]}'
    )
  for name, label in class_of.items():
    # `type` and not `isinstance`, because True is an instance of int.
    if type(label) is not int or not 0 <= label < 2**31 - 1:
      raise errors.UserError(
        f'{where}: class of {name!r} is {label!r}; wanted an integer, 0 or up'
      )
  return [class_of[name] for name in names]


def open_files(path: pathlib.Path) -> encoded.EncodedSource:
  """Opens a folder or zip whose rows are files, sorted by their names.

  The rows are images, or latents as EDM2's programs write them: files
  `img-mean-std-*.npy` of float32 [2C,H,W], an autoencoder's means and standard
  deviations.

  Raises:
    errors.UserError: the set cannot be read, is empty, holds both images and
      latents, or has wrong labels. A damaged row is refused when it is read.
  """
  names, read_bytes = opener(path)
  images = sorted(n for n in names if n.lower().endswith(_IMAGES))
  latents = sorted(n for n in names if n.lower().endswith(_LATENTS))
  if bool(images) == bool(latents):
    raise errors.UserError(
      f'{path} holds {len(images)} images and {len(latents)} latents; wanted'
      f' either {_IMAGES} or {_LATENTS}'
    )
  rows = images or latents

  def read(name: str) -> bytes:
    with encoded.user_error(f'{path / name} cannot be read, copy it again'):
      return read_bytes(name)

  labels: list[int] = []
  if _MANIFEST in names:
    labels = _parse_labels(str(path / _MANIFEST), read(_MANIFEST), rows)
  else:
    nested = [n for n in names if n.endswith(f'/{_MANIFEST}')]
    if nested:
      raise errors.UserError(
        f'{path / nested[0]} must be at the top: move it up'
      )
  num_classes = max(labels, default=-1) + 1
  if not labels:
    labels = [0] * len(rows)

  def fetch_row(i: int) -> encoded.EncodedRow:
    name = rows[i]
    return encoded.EncodedRow(str(path / name), read(name), labels[i])

  def fetch(index: list[int]) -> list[encoded.EncodedRow]:
    return [fetch_row(i) for i in index]

  return encoded.EncodedSource(
    name=str(path),
    length=len(rows),
    num_classes=num_classes,
    pixel_values=256,
    fetch=fetch,
    fetch_labels=functools.partial(np.asarray, labels),
    decode=encoded.decode_image if images else encoded.decode_latents,
  )
