"""Reads files that others wrote: regular ones alone, and not without end.

A FIFO that is called .png would be waited for, and a device read, without end;
a few kilobytes of a zip may unfold to gigabytes. All functions raise OSError or
ValueError with a short reason, which their callers put into one line.
"""

import functools
import io
import pathlib
import stat
from typing import IO
from typing import Literal
from typing import NamedTuple
import zipfile

import numpy as np

_KINDS = {
  stat.S_IFDIR: 'a folder',
  stat.S_IFIFO: 'a FIFO',
  stat.S_IFSOCK: 'a socket',
  stat.S_IFCHR: 'a device',
  stat.S_IFBLK: 'a device',
}
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# What a member of a zip unfolds to may be this large, or so many times what it
# takes in the zip. Images compress to a third; blank ones to a thousandth.
_SMALL = 2**28  # bytes
_RATIO = 64


def kind_of(path: pathlib.Path) -> str:
  """Returns what a path names, 'a FIFO'; '' for a regular file.

  Raises:
    OSError: there is nothing, or it may not be looked at.
  """
  mode = stat.S_IFMT(path.stat().st_mode)
  return '' if mode == stat.S_IFREG else _KINDS.get(mode, 'no file')


def check_regular(path: pathlib.Path) -> None:
  """Raises OSError unless a path names a regular file, or a link to one."""
  kind = kind_of(path)
  if kind:
    raise OSError(f'it is {kind}, not a file')


def read(path: pathlib.Path, most: int) -> bytes:
  """Returns the bytes of a regular file.

  Args:
    path: the file.
    most: how many bytes it may have.

  Raises:
    OSError: it cannot be read, is no regular file or is larger.
  """
  check_regular(path)
  size = path.stat().st_size
  if size > most:
    raise OSError(f'it has {size:,} bytes; at most {most:,} are read')
  with path.open('rb') as file:
    return file.read(most)


def check_member(info: zipfile.ZipInfo, most: int | None) -> None:
  """Raises ValueError where a zip's member is locked or unfolds to too much.

  Args:
    info: what the zip says of it, which its reader then holds it to.
    most: how many bytes it may unfold to; None leaves that to what it takes in
      the zip.
  """
  if info.compress_type not in _COMPRESSIONS or info.flag_bits & 1:
    raise ValueError('it is locked, or compressed by other means than deflate')
  size = info.file_size
  if most is None:
    most = max(_SMALL, _RATIO * info.compress_size)
  if size > most:
    raise ValueError(
      f'it unfolds to {size:,} bytes, {info.compress_size:,} in the zip; at'
      f' most {most:,} are read'
    )


def read_member(archive: zipfile.ZipFile, name: str, most: int | None) -> bytes:
  """Returns the bytes of a zip's member, held to its size and checksum.

  Args:
    archive: the zip.
    name: the member.
    most: see `check_member`.

  Raises:
    ValueError: it is not there, locked or too large.
    zipfile.BadZipFile: it is damaged.
  """
  info = archive.getinfo(name)
  check_member(info, most)
  with archive.open(info) as file:
    # With its size: to read all at once would unfold what lies behind, too.
    content = file.read(info.file_size)
    file.read(1)
  if len(content) != info.file_size:
    raise zipfile.BadZipFile('it is cut off')
  return content


class Header(NamedTuple):
  """What a .npy says of its array.

  Attributes:
    shape: the shape.
    dtype: the type of its elements.
    order: 'C', or 'F' where the first index changes fastest.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  order: Literal['C', 'F']


# The files of a set have one header, and to parse it takes twice as long as to
# read an image's latents.
@functools.lru_cache(maxsize=16)
def _parse_header(content: bytes) -> Header:
  parsed = np.lib.format.read_array_header_1_0(io.BytesIO(content))
  shape, is_fortran, dtype = parsed
  if dtype.hasobject or dtype.names:
    raise ValueError('an array of objects, which are not read')
  return Header(shape, dtype, 'F' if is_fortran else 'C')


def read_header(file: IO[bytes]) -> Header:
  """Reads the header of a .npy, up to where the array begins.

  Raises:
    ValueError: it is none of plain numbers or text.
  """
  version = np.lib.format.read_magic(file)
  if version != (1, 0):  # others are for arrays of records
    raise ValueError('no .npy of plain numbers')
  length = file.read(2)
  return _parse_header(length + file.read(int.from_bytes(length, 'little')))


class Npz:
  """An .npz file, whose arrays are looked at before they are read.

  Attributes:
    names: the arrays' names.
  """

  def __init__(self, path: pathlib.Path):
    """Opens a file; `close` it, or use it in a `with` statement."""
    check_regular(path)
    self._archive = zipfile.ZipFile(path)
    self._members = {
      name.removesuffix('.npy'): name for name in self._archive.namelist()
    }
    self.names = list(self._members)

  def __enter__(self) -> 'Npz':
    return self

  def __exit__(self, *_: object) -> None:
    self._archive.close()

  def header(self, name: str) -> Header:
    """Returns what is said of an array, without reading it."""
    info = self._archive.getinfo(self._members[name])
    check_member(info, info.file_size)
    with self._archive.open(info) as file:
      return read_header(file)

  def read(self, name: str, most: int | None = None) -> np.ndarray:
    """Returns an array.

    Args:
      name: its name.
      most: how many bytes it may have; see `check_member`.

    Raises:
      LookupError: there is none of that name.
      ValueError: it is damaged, too large or of something else than numbers.
    """
    shape, dtype, _ = self.header(name)
    info = self._archive.getinfo(self._members[name])
    check_member(info, None if most is None else most + 2**16)
    count = int(np.prod(shape, dtype=object))
    behind = info.file_size - count * dtype.itemsize
    if not 0 <= behind < 2**17:
      raise ValueError(
        f'an array {list(shape)} of {dtype} in {info.file_size:,} bytes'
      )
    with self._archive.open(info) as file:
      array = np.lib.format.read_array(file, allow_pickle=False)
      if file.read(1):
        raise ValueError(f'{behind:,} bytes behind the array')
    return array
