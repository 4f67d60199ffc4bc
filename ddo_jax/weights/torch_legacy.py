"""Reads the serial format that PyTorch wrote before 1.6.

NVIDIA's pickles hold each storage as a whole file in this format.
"""

import io
import mmap
from typing import Any

from ddo_jax.weights import arrays
from ddo_jax.weights import pickle_machine

_MAGIC = 0x1950A86A20F9469CFC6C
_FORMAT = 1001


def read_legacy(
  buffer: bytes | mmap.mmap,
  table: pickle_machine.Names,
  budget: pickle_machine.Budget,
) -> Any:
  """Reads a file's five pickles and the raw storages behind them.

  Args:
    buffer: the whole file.
    table: the globals that the saved object may name.
    budget: what the file may cost.

  Returns:
    The object, its tensors not yet arrays.

  Raises:
    ValueError: the file is damaged, hostile or in another format.
  """
  stream = io.BytesIO(buffer) if isinstance(buffer, bytes) else buffer
  storages = {}

  def load(identity):
    key, storage = arrays.storage_of(identity)
    known = storages.setdefault(key, storage)
    if (known.dtype, known.numel) != (storage.dtype, storage.numel):
      raise ValueError('two storages of one name')
    return known

  def run(allowed, persistent=None):
    machine = pickle_machine.Machine(stream, allowed, budget, persistent)
    return machine.run()

  if run({}) != _MAGIC or run({}) != _FORMAT:
    raise ValueError('not the format that PyTorch wrote before 1.6')
  system = run({})
  if not isinstance(system, dict) or system.get('little_endian') is not True:
    raise ValueError('not little-endian')
  value = run(table, load)
  keys = run({})
  if not isinstance(keys, list) or sorted(keys) != sorted(storages):
    raise ValueError('the list of storages is not that of the tensors')
  end = stream.tell()
  for key in keys:
    count = int.from_bytes(buffer[end : end + 8], 'little')
    if count != storages[key].numel:
      raise ValueError('a storage of another length than announced')
    end = storages[key].fill(buffer, end + 8)
  if end != len(buffer):
    raise ValueError(f'{len(buffer) - end} bytes behind the end')
  return value


def load_from_bytes(budget: pickle_machine.Budget, raw: Any) -> arrays.Storage:
  """Returns the storage inside a plain pickle, a whole file of just that."""
  if not isinstance(raw, bytes):
    raise ValueError('a storage that is no bytes')
  value = read_legacy(raw, arrays.STORAGE_TYPES, budget)
  if not isinstance(value, arrays.Storage):
    raise ValueError('bytes that hold something else than a storage')
  return value
