"""Folders and zips of images, or of latents.

A set is a tree of files. A `dataset.json` at its top, as EDM's programs write
it, lists the class of each: {"labels": [["00000/img00000000.png", 6], ...]},
or null in a set without classes. Where there is no such file, the folders say
the classes: all that stands below the k-th folder, by name, is of class k.

Two kinds of folders are no classes: `train`, `test` and their like are the
splits of a set, and folders of five digits or more that hold numbered images
(EDM's 00000/img00000000.png, FFHQ's 00000/00000.png) are chunks of one set.
"""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import functools
import json
import logging
import os
import pathlib
import re
import threading
from typing import Any
import zipfile

import numpy as np

from ddo_jax import errors
from ddo_jax.data import encoded
from ddo_jax.data import splits
from ddo_jax.runtime import reading

IMAGES = ('.bmp', '.jpeg', '.jpg', '.png', '.webp')
LATENTS = '.npy'
_LOGGER = logging.getLogger(__name__)
LABELS = 'dataset.json'
RECORD = 'latents.json'  # of a set that `latent_set` writes
MOST_BYTES = 2**28  # in the file of a row
_MOST_LINKED = 1_000  # folders that are entered again through symlinks
# A list of labels has so many bytes for an image, beside its name.
_LISTED_BYTES = 256
# Gives the file of a name, of at most so many bytes.
Read = Callable[[str, int], bytes]
_CHUNKED = re.compile(r'\d{5,}/(img|img-mean-std-)?\d+\.\w+')


def _is_hidden(name: str) -> bool:
  """Whether a file or folder is none of the user's, such as macOS's notes."""
  return name.startswith('.') or name == '__MACOSX'


def walk(folder: str) -> Iterator[str]:
  """Yields the names of all files below a folder, also through symlinks.

  Hidden files and folders are left out.

  Raises:
    OSError: a folder cannot be read, or symlinks lead to the same folders over
      and over.
  """
  seen: set[str] = set()
  again = 0

  def below(folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    nonlocal again
    real = os.path.realpath(folder)
    if real in above:
      return
    again += real in seen
    if again > _MOST_LINKED:
      raise OSError(f'symlinks lead to {real} over and over')
    seen.add(real)
    with os.scandir(folder) as entries:
      for entry in sorted(entries, key=lambda entry: entry.name):
        if _is_hidden(entry.name):
          continue
        if entry.is_dir():
          name = f'{prefix}{entry.name}/'
          yield from below(entry.path, name, (*above, real))
        else:
          yield prefix + entry.name

  return below(folder, '', ())


@dataclasses.dataclass(frozen=True)
class _Folder:
  """Reads the files of a folder."""

  path: pathlib.Path

  def __call__(self, name: str, most: int) -> bytes:
    return reading.read(self.path / name, most)


class _Zip:
  """Reads the files of a zip; another process opens it anew.

  All threads share one handle behind a lock. A handle for each would parse the
  index again, which takes 14 s and 700 MB for a million files, while an image
  is read in 40 µs.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._archive = zipfile.ZipFile(path)
    self._lock = threading.Lock()

  def __reduce__(self) -> Any:
    return _Zip, (self._path,)

  def names(self) -> list[str]:
    return self._archive.namelist()

  def __call__(self, name: str, most: int) -> bytes:
    with self._lock:
      return reading.read_member(self._archive, name, most)


def opener(path: pathlib.Path) -> tuple[list[str], Read]:
  """Opens a folder or a zip.

  Returns:
    The names of the files in it, relative to it, and a function that reads the
    file of a name, which may have so many bytes, and may be called in several
    threads at once and sent to other processes. Hidden files and folders are
    left out.

  Raises:
    errors.UserError: `path` is neither a folder nor a readable zip.
  """
  if path.is_dir():
    with encoded.user_error(f'{path} cannot be read'):
      found = list(walk(str(path)))
    return found, _Folder(path)

  with encoded.user_error(f'{path} is no readable zip, copy it again'):
    reading.check_regular(path)
    archive = _Zip(path)
    names = archive.names()
    _check_names(names)
  names = [
    name
    for name in names
    if not any(_is_hidden(part) for part in name.split('/'))
  ]
  return names, archive


def _check_names(names: list[str]) -> None:
  """Raises ValueError where a zip's names are no relative ones, each once."""
  once = set(names)
  if len(once) < len(names):
    raise ValueError('it holds two files of one name')
  for name in names:
    if name.startswith('/') or '..' in name.split('/'):
      raise ValueError(f'it holds {errors.brief(name)}, which leads out of it')


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
    if not all(isinstance(name, str) for name in class_of):
      raise ValueError('a name that is no text')
  missing = class_of.keys() - set(names)
  unlisted = set(names) - class_of.keys()
  if missing or unlisted or len(entries) != len(class_of):
    raise errors.UserError(
      f'{where} lists {len(entries)} images of {len(names)}; wanted each once;'
      f' missing files: {errors.brief(sorted(missing)[:3])},'
      f' not listed: {errors.brief(sorted(unlisted)[:3])}'
    )
  for name, label in class_of.items():
    # `type` and not `isinstance`, because True is an instance of int.
    if type(label) is not int or not 0 <= label < 2**31 - 1:
      raise errors.UserError(
        f'{where}: class of {name!r} is {errors.brief(label)}; wanted an'
        ' integer, 0 or up'
      )
  return [class_of[name] for name in names]


def _above(names: list[str]) -> list[str]:
  """Returns the folders, one in the other, that all files stand in."""
  shared = os.path.commonpath([os.path.dirname(name) for name in names])
  return shared.split('/') if shared else []


def _folder_labels(names: list[str]) -> tuple[list[int], tuple[str, ...]]:
  """Returns the labels that folders give to files, and the classes' names.

  Args:
    names: the rows' files.

  Returns:
    The class of each file and the folder of each class; ([], ()) if the
    folders are no classes.
  """
  above = ''.join(f'{folder}/' for folder in _above(names))
  below = [name.removeprefix(above) for name in names]
  loose = sum('/' not in name for name in below)
  if 0 < loose < len(names):
    _LOGGER.warning(
      '%s and %d more images stand beside the folders of the others: the'
      ' folders are not taken as classes',
      next(name for name in below if '/' not in name),
      loose - 1,
    )
  if loose or all(map(_CHUNKED.fullmatch, below)):
    return [], ()
  folder_of = [name.partition('/')[0] for name in below]
  folders = sorted(set(folder_of))
  label_of = {folder: label for label, folder in enumerate(folders)}
  # A folder's name may be no UTF-8, which could not be written elsewhere.
  class_names = [os.fsencode(f).decode(errors='replace') for f in folders]
  return [label_of[folder] for folder in folder_of], tuple(class_names)


def _label(
  path: pathlib.Path, manifest: bytes | None, names: list[str]
) -> tuple[list[int], tuple[str, ...]]:
  """Returns the labels of files and the names of the classes.

  Args:
    path: the set.
    manifest: the content of its dataset.json; None if there is none.
    names: the rows' files.

  Returns:
    ([], ()) for a set without classes.
  """
  by_folder, folders = _folder_labels(names)
  if manifest is None:
    return by_folder, folders
  where = path / LABELS
  labels = _parse_labels(str(where), manifest, names)
  if not by_folder:
    return labels, ()
  folder_of = dict(zip(labels, by_folder, strict=False))
  pairs = set(zip(labels, by_folder, strict=False))
  if len(pairs) == len(folder_of) == len(folders):  # perhaps in another order
    named = {label: folders[folder] for label, folder in folder_of.items()}
    return labels, tuple(named.get(k, '') for k in range(max(named) + 1))
  _LOGGER.warning(
    '%s says other classes than the folders (%s): the file is followed',
    where,
    ', '.join(folders[:3]) + (', …' if len(folders) > 3 else ''),
  )
  return labels, ()


def _folder_of_split(
  path: pathlib.Path, rows: list[str], wanted: splits.Wanted
) -> str:
  """Returns the folder of a split, 'train/'; '' if there are no such folders.

  Args:
    path: the set, for errors.
    rows: the files of all rows.
    wanted: the split.

  Raises:
    errors.UserError: there are folders of other splits only, or none and the
      set is no such split.
  """
  # A zip often holds one folder with all the others, so this looks below it.
  above = _above(rows)
  for depth in range(len(above) + 1):
    start = ''.join(f'{folder}/' for folder in above[:depth])
    folders = {name[len(start) :].partition('/')[0] for name in rows}
    if folders <= set(wanted.known):
      return f'{start}{wanted.choose(str(path), sorted(folders))}/'
  return wanted.choose(str(path), [])


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Fetches rows that are files; may be sent to another process.

  Attributes:
    path: the set, or the folder of a split in it, for errors.
    top: what stands before the names in the set.
    read_file: what `opener` returns.
    names: the rows' files.
    labels: their classes.
  """

  path: pathlib.Path
  top: str
  read_file: Read
  names: list[str]
  labels: list[int]

  def __call__(self, index: list[int]) -> list[encoded.EncodedRow]:
    return [self._row(i) for i in index]

  def _row(self, i: int) -> encoded.EncodedRow:
    where = f'{self.path}/{self.names[i]}'
    content = _read(where, self.read_file, self.top + self.names[i], MOST_BYTES)
    return encoded.EncodedRow(where, content, self.labels[i])


def _read(where: str, read_file: Read, name: str, most: int) -> bytes:
  """Reads a file; says where it is if that fails."""
  with encoded.user_error(f'{where} cannot be read, copy it again'):
    return read_file(name, most)


def _check_whole(path: pathlib.Path, record: bytes, rows: list[str]) -> None:
  """Raises UserError where a set of latents was not written to its end."""
  with encoded.user_error(f'{path / RECORD} is damaged'):
    wanted = int(json.loads(record)['rows'])
  if len(rows) != wanted:
    raise errors.UserError(
      f'{path} holds {len(rows)} of {wanted} latents: run the same command of'
      ' --mode=encode again to write the others'
    )


def open_files(
  path: pathlib.Path, wanted: splits.Wanted | None = None
) -> encoded.EncodedSource:
  """Opens a folder or zip whose rows are files, sorted by their names.

  The rows are images, or latents as EDM2's programs write them: files
  `img-mean-std-*.npy` of float32 [2C,H,W], an autoencoder's means and standard
  deviations.

  Args:
    path: the folder or zip.
    wanted: the split, of a set that has a folder for each; None where folders
      are no splits.

  Raises:
    errors.UserError: the set cannot be read, is empty, holds both images and
      latents, or has wrong labels. A damaged row is refused when it is read.
  """
  names, read_file = opener(path)
  top = ''
  rows = [n for n in names if n.lower().endswith((*IMAGES, LATENTS))]
  if wanted and LABELS in names:
    wanted.choose(str(path), [])
  elif wanted and rows:
    top = _folder_of_split(path, rows, wanted)
    names = [n.removeprefix(top) for n in names if n.startswith(top)]
    path = path / top
  images = sorted(n for n in names if n.lower().endswith(IMAGES))
  latents = sorted(n for n in names if n.lower().endswith(LATENTS))
  if bool(images) == bool(latents):
    raise errors.UserError(
      f'{path} holds {len(images)} images and {len(latents)} latents; wanted'
      f' either {IMAGES} or {LATENTS}'
    )
  rows = images or latents
  if RECORD in names:
    _check_whole(
      path, _read(str(path / RECORD), read_file, top + RECORD, 2**16), rows
    )

  manifest = None
  if LABELS in names:
    listed = sum(_LISTED_BYTES + 4 * len(name) for name in rows)
    where = str(path / LABELS)
    manifest = _read(where, read_file, top + LABELS, 2**20 + listed)
  nested = [n for n in names if n.endswith(f'/{LABELS}')]
  if nested and manifest is None:
    raise errors.UserError(f'{path / nested[0]} must be at the top: move it up')
  labels, class_names = _label(path, manifest, rows)
  num_classes = max(labels, default=-1) + 1
  if not labels:
    labels = [0] * len(rows)

  return encoded.EncodedSource(
    name=str(path),
    length=len(rows),
    num_classes=num_classes,
    pixel_values=256,
    fetch=_Rows(path, top, read_file, rows, labels),
    fetch_labels=functools.partial(np.asarray, labels),
    open_row=encoded.open_image if images else encoded.open_latents,
    class_names=class_names,
  )
