"""Says whether a file that came is whole, by what its suffix promises.

A server that does not say how long a file is may stop in its middle, and a
log-in page or an error may come in its place. The formats here tell where they
end, so that neither is kept.
"""

from collections.abc import Callable
import gzip
import json
import pathlib
import struct
import zipfile
import zlib

_CHUNK = 2**20  # bytes
_MOST_NODES = 2**16  # of a graph
_LONGEST_HEADER = 10**8  # bytes, as the library of .safetensors has it


def _is_zip(path: pathlib.Path) -> bool:
  """Whether a file begins as a zip does, and ends with a zip's directory."""
  with path.open('rb') as file:
    return file.read(2) == b'PK' and zipfile.is_zipfile(file)


def _is_pickle(path: pathlib.Path) -> bool:
  """Whether a file begins as a pickle of protocol 2 or later and ends as one.

  Checkpoints from before PyTorch 1.6 are pickles with numbers behind them.
  """
  with path.open('rb') as file:
    start = file.read(2)
    file.seek(-1, 2)
    return start[:1] == b'\x80' and 2 <= start[1] <= 5 and file.read() == b'.'


def _is_checkpoint(path: pathlib.Path) -> bool:
  with path.open('rb') as file:
    legacy = file.read(1) == b'\x80'
  return legacy or _is_zip(path)


def _is_safetensors(path: pathlib.Path) -> bool:
  """Whether a file is as long as its header says."""
  with path.open('rb') as file:
    (length,) = struct.unpack('<Q', file.read(8))
    if length > _LONGEST_HEADER:
      return False
    header = json.loads(file.read(length))
  header.pop('__metadata__', None)
  end = max((entry['data_offsets'][1] for entry in header.values()), default=0)
  return path.stat().st_size == 8 + length + end


def _is_gzip(path: pathlib.Path) -> bool:
  """Whether a file unfolds to its end, and to what its checksum says."""
  with gzip.open(path) as file:
    while file.read(_CHUNK):
      pass
  return True


def _is_graph(path: pathlib.Path) -> bool:
  """Whether a TensorFlow graph's nodes fill a file to its end."""
  size = path.stat().st_size
  at = 0
  with path.open('rb') as file:
    for _ in range(_MOST_NODES):
      file.seek(at)
      start = file.read(11)
      length = 0
      behind = 1
      for behind in range(1, 11):
        length |= (start[behind] & 0x7F) << (7 * (behind - 1))
        if start[behind] < 0x80:
          break
      kind = start[0] & 7
      if kind not in (0, 2) or start[0] < 8:
        return False
      # A number ends there; bytes are of the length that stands before them.
      at += behind + 1 + (length if kind == 2 else 0)
      if at >= size:
        break
  return at == size


_KINDS: dict[str, Callable[[pathlib.Path], bool]] = {
  '.gz': _is_gzip,
  '.npz': _is_zip,
  '.pb': _is_graph,
  '.pkl': _is_pickle,
  '.pt': _is_checkpoint,
  '.pth': _is_checkpoint,
  '.safetensors': _is_safetensors,
  '.tgz': _is_gzip,
  '.zip': _is_zip,
}


def fault(path: pathlib.Path, name: str) -> str:
  """Returns what is wrong with a file that came; '' where nothing is seen.

  Args:
    path: where it lies.
    name: what it is called, whose suffix says what it should be.
  """
  with path.open('rb') as file:
    start = file.read(256).lstrip().lower()
  if not start:
    return 'it is empty'
  if start.startswith((b'<!doctype html', b'<html', b'<?xml')):
    return (
      'it is a web page (HTML) in place of the file, as a log-in or a proxy'
      ' gives: open the address in a browser'
    )
  suffix = pathlib.PurePath(name).suffix.lower()
  if suffix not in _KINDS:
    return ''
  try:
    whole = _KINDS[suffix](path)
  except (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
  ):
    whole = False
  return '' if whole else f'it is cut off, or no {suffix} at all'
