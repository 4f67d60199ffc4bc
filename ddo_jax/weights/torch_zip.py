"""Reads and writes PyTorch's .pth files without PyTorch.

A file is a zip of uncompressed members: `<root>/data.pkl` is a pickle of the
object, whose tensors name their storages, and `<root>/data/<key>` holds the raw
numbers of a storage. Files from before PyTorch 1.6 are in the serial format of
`torch_legacy`.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import io
import math
import mmap
import pathlib
import struct
from typing import Any
import zipfile
import zlib

import numpy as np

from ddo_jax import errors
from ddo_jax.weights import arrays
from ddo_jax.weights import files
from ddo_jax.weights import pickle_machine
from ddo_jax.weights import torch_legacy

_WANTED = 'a .pth file of a state dict'
_LOCAL_HEADER = struct.Struct('<4s5H3I2H')
_ENCRYPTED = 1  # a bit of a member's flags
_UTF8 = 0x800  # another: the name is UTF-8
_ALIGNMENT = 64
_PADDING_ID = 0x4246  # the extra field that PyTorch pads with, too
_TYPES = {dtype: name for name, dtype in arrays.DTYPES.items()}


def read(path: pathlib.Path) -> Any:
  """Reads what torch.save wrote.

  Args:
    path: a .pth (.pt) file of either format.

  Returns:
    The object as it was saved: plain values and containers, nested as they
    were, and read-only arrays in place of tensors. The arrays may view the
    file: do not overwrite it while they live.

  Raises:
    errors.UserError: the file is missing, damaged or over the limits, or
      names anything that weights do not need.
  """
  with files.refusing(path, _WANTED):
    buffer = files.map_file(path)
    budget = pickle_machine.Budget.of(len(buffer))
    table = arrays.names(budget)
    if buffer[:4] == b'PK\3\4':
      tree = _read_zip(buffer, table, budget)
    elif buffer[:1] == b'\x80':
      tree = torch_legacy.read_legacy(buffer, table, budget)
    else:
      raise ValueError('no file that torch.save writes')
    return arrays.resolve(tree, budget)


def _read_zip(
  buffer: mmap.mmap,
  table: pickle_machine.Names,
  budget: pickle_machine.Budget,
) -> Any:
  """Returns the object of a zip, its tensors not yet arrays."""
  members = _members(buffer)
  root = _root(members)
  if f'{root}/constants.pkl' in members:
    raise ValueError('a TorchScript program, not a state dict')
  if f'{root}/byteorder' in members:
    start, end = members[f'{root}/byteorder']
    if buffer[start:end] != b'little':
      raise ValueError('not little-endian')
  storages = {}

  def load(identity):
    key, storage = arrays.storage_of(identity)
    if (key, storage.dtype) not in storages:
      span = members.get(f'{root}/data/{key}')
      if span is None:
        raise ValueError(f'no storage {pickle_machine.quote(key)} in the zip')
      if storage.fill(buffer, span[0]) != span[1]:
        raise ValueError(
          f'a storage of {storage.numel} numbers in {span[1] - span[0]} bytes'
        )
      storages[key, storage.dtype] = storage
    known = storages[key, storage.dtype]
    if known.numel != storage.numel:
      raise ValueError('two storages of one name')
    return known

  start, end = members[f'{root}/data.pkl']
  stream = io.BytesIO(buffer[start:end])
  tree = pickle_machine.Machine(stream, table, budget, load).run()
  if stream.tell() != end - start:
    raise ValueError('bytes behind the end of data.pkl')
  return tree


def _root(members: Mapping[str, tuple[int, int]]) -> str:
  """Returns the folder inside the zip that holds data.pkl."""
  roots = []
  for name in members:
    folder, _, rest = name.partition('/')
    if rest == 'data.pkl':
      roots.append(folder)
  if len(roots) != 1:
    raise ValueError(f'a zip with {len(roots)} data.pkl, not one')
  return roots[0]


def _members(buffer: mmap.mmap) -> dict[str, tuple[int, int]]:
  """Returns where each member's bytes start and end, proven to be whole."""
  with zipfile.ZipFile(buffer) as archive:  # type: ignore[call-overload]
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    limit = archive.start_dir
  members = {}
  behind = 0
  for info in infos:
    name = info.orig_filename
    if name in members:
      raise ValueError(f'two members named {pickle_machine.quote(name)}')
    if '\\' in name or set(name.split('/')) & {'', '.', '..'}:
      raise ValueError(f'a member named {pickle_machine.quote(name)}')
    stored = info.compress_type == zipfile.ZIP_STORED
    if not stored or info.flag_bits & _ENCRYPTED:
      raise ValueError(f'{pickle_machine.quote(name)} is compressed or locked')
    start, end = _span(buffer, info)
    if info.header_offset < behind or end > limit:
      raise ValueError(f'{pickle_machine.quote(name)} overlaps another member')
    if zlib.crc32(memoryview(buffer)[start:end]) != info.CRC:
      raise ValueError(f'{pickle_machine.quote(name)} is damaged (CRC)')
    behind = end
    members[name] = (start, end)
  return members


def _span(buffer: mmap.mmap, info: zipfile.ZipInfo) -> tuple[int, int]:
  """Returns where a member's bytes start and end.

  The zip's directory and the header in front of the member must agree.
  """
  fields = _LOCAL_HEADER.unpack_from(buffer, info.header_offset)
  signature = fields[0]
  name_length, extra_length = fields[-2:]
  name_start = info.header_offset + _LOCAL_HEADER.size
  name_end = name_start + name_length
  coding = 'utf-8' if info.flag_bits & _UTF8 else 'cp437'
  same_name = buffer[name_start:name_end] == info.orig_filename.encode(coding)
  if signature != b'PK\3\4' or not same_name:
    raise ValueError(
      f'{pickle_machine.quote(info.orig_filename)} has another header'
    )
  if info.compress_size != info.file_size:
    raise ValueError(
      f'{pickle_machine.quote(info.orig_filename)} has two sizes'
    )
  start = name_end + extra_length
  return start, start + info.file_size


def write(path: pathlib.Path, state: Mapping[str, np.ndarray]) -> None:
  """Writes a state dict that `torch.load(weights_only=True)` accepts.

  Equal state dicts give equal bytes in files of one name.

  Args:
    path: replaced if it exists.
    state: arrays by key, of float64/32/16, bfloat16, int64/32/16/8, uint8 or
      bool.

  Raises:
    errors.UserError: an array is of another type, or the disk is full.
  """
  for key, array in state.items():
    if array.dtype.newbyteorder('<') not in _TYPES:
      raise errors.UserError(
        f'{key} is {array.dtype}, which a .pth cannot hold; wanted one of'
        f' {", ".join(map(str, _TYPES))}'
      )
  root = path.stem
  with files.whole(path) as partial, zipfile.ZipFile(partial, 'w') as archive:
    _add(archive, f'{root}/data.pkl', _pickle(state))
    _add(archive, f'{root}/byteorder', b'little')
    for index, array in enumerate(state.values()):
      raw = array.astype(array.dtype.newbyteorder('<'), copy=False).tobytes()
      _add(archive, f'{root}/data/{index}', raw)
    _add(archive, f'{root}/version', b'3\n')


def _add(archive: zipfile.ZipFile, name: str, raw: bytes) -> None:
  """Adds a member whose bytes start at a multiple of 64, so as to be mapped."""
  info = zipfile.ZipInfo(name)  # dated 1980, so that the bytes do not vary
  start = archive.fp.tell() + _LOCAL_HEADER.size + len(name.encode()) + 4
  padding = -start % _ALIGNMENT
  info.extra = struct.pack('<2H', _PADDING_ID, padding) + bytes(padding)
  archive.writestr(info, raw)


def _pickle(state: Mapping[str, np.ndarray]) -> bytes:
  """Returns the pickle, in protocol 2, of an OrderedDict of tensors.

  In the opcodes below, '(' marks where a tuple or the dict's items begin, 't'
  makes the tuple, 'R' calls, 'Q' refers to a storage, and 'u.' fills the dict
  and ends.
  """
  empty = _global('collections', 'OrderedDict') + b')R'  # (), called
  parts = [b'\x80\x02', empty, b'(']
  for index, (key, array) in enumerate(state.items()):
    shape = array.shape
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    parts += [
      _text(key),
      _global('torch._utils', '_rebuild_tensor_v2'),
      b'((',  # the tensor's arguments, the first of them a persistent id
      _text('storage'),
      _global('torch', _TYPES[array.dtype.newbyteorder('<')]),
      _text(str(index)),
      _text('cpu'),
      _number(array.size),
      b'tQ',
      _number(0),  # offset
      _numbers(shape),
      _numbers(strides),
      b'\x89',  # no gradient
      empty + b'tR',  # no hooks; the tensor
    ]
  parts.append(b'u.')
  return b''.join(parts)


def _global(module: str, name: str) -> bytes:
  return f'c{module}\n{name}\n'.encode()


def _text(text: str) -> bytes:
  raw = text.encode()
  return b'X' + struct.pack('<I', len(raw)) + raw


def _number(value: int) -> bytes:
  if value < 2**31:
    return b'J' + struct.pack('<i', value)
  return b'\x8a\x08' + struct.pack('<q', value)


def _numbers(values: Sequence[int]) -> bytes:
  return b'(' + b''.join(map(_number, values)) + b't'
