"""Tensors and arrays of foreign files: inert records, checked, then numpy.

PyTorch writes a tensor as (storage, offset, size, stride), all counted in
elements, through the globals of `names`. Bytes are only ever looked at through
bounds that were checked against the storage's own length.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any

import ml_dtypes
import numpy as np

from ddo_jax.weights import pickle_machine

# PyTorch's names; the data is little-endian.
DTYPES: Mapping[str, np.dtype] = {
  'DoubleStorage': np.dtype('<f8'),
  'FloatStorage': np.dtype('<f4'),
  'HalfStorage': np.dtype('<f2'),
  'BFloat16Storage': np.dtype(ml_dtypes.bfloat16),
  'LongStorage': np.dtype('<i8'),
  'IntStorage': np.dtype('<i4'),
  'ShortStorage': np.dtype('<i2'),
  'CharStorage': np.dtype('i1'),
  'ByteStorage': np.dtype('u1'),
  'BoolStorage': np.dtype('?'),
}
_NUMPY_CODES = frozenset(
  f'{kind}{size}'
  for kind, sizes in {'b': '1', 'i': '1248', 'u': '1248', 'f': '248'}.items()
  for size in sizes
)
_PLAIN = (type(None), bool, int, float, str, bytes)
_LARGEST = 2**47  # elements; the products below stay far from overflow
_MAX_DIMS = 32
_MAX_DEPTH = 100  # containers within containers; released networks have 20

STORAGE_TYPES: pickle_machine.Names = {
  f'{module}.{name}': None
  for module in ('torch', 'torch.cuda')
  for name in DTYPES
}


@dataclasses.dataclass(eq=False)
class Storage:
  """A flat run of numbers; `data` [numel] may be filled in later."""

  dtype: np.dtype
  numel: int
  data: np.ndarray | None = None

  def fill(self, buffer: Any, start: int) -> int:
    """Views the bytes of `buffer` from `start`; returns where they end."""
    end = start + self.numel * self.dtype.itemsize
    if end > len(buffer):
      raise ValueError(
        f'a storage of {self.numel} numbers, cut off after'
        f' {max(len(buffer) - start, 0)} bytes'
      )
    self.data = _view(memoryview(buffer)[start:end], self.dtype)
    return end


@dataclasses.dataclass(eq=False)
class Tensor:
  """Where a tensor's numbers lie; offset and stride in elements."""

  storage: Storage
  offset: int
  size: tuple[int, ...]
  stride: tuple[int, ...]

  def array(self, budget: pickle_machine.Budget) -> np.ndarray:
    """The numbers: a read-only array, contiguous and aligned."""
    data = self.storage.data
    budget.spend(math.prod(self.size) * data.itemsize)
    if 0 in self.size:
      array = np.empty(self.size, data.dtype)
    else:
      array = np.lib.stride_tricks.as_strided(
        data[self.offset :],
        self.size,
        [step * data.itemsize for step in self.stride],
        writeable=False,
      )
    if not (array.flags.c_contiguous and array.flags.aligned):
      array = np.array(array, order='C')
    array.flags.writeable = False
    return array


class Dtype(pickle_machine.Stateful):
  """A numpy dtype under construction: plain little-endian numbers only."""

  def __init__(self, code: Any, *_: Any):
    if code not in _NUMPY_CODES:
      raise ValueError('an array of something else than plain numbers')
    self.dtype = np.dtype(code)

  def build(self, state: tuple) -> None:
    """Checks (version, byte order, no subtype, no names, no fields, ...)."""
    _, order, *composite = state[:5]
    if order not in ('<', '|') or any(composite):
      raise ValueError('an array of something else than plain numbers')


class Array(pickle_machine.Stateful):
  """A numpy array under construction; a machine fills it by its state."""

  def __init__(self, budget: pickle_machine.Budget, *_: Any):
    self.budget = budget
    self.array = None

  def build(self, state: tuple) -> None:
    """Takes (version, shape, dtype, is Fortran, bytes)."""
    _, shape, dtype, fortran, raw = state
    order = 'F' if fortran else 'C'
    self.array = _ndarray(self.budget, raw, dtype, shape, order)


@dataclasses.dataclass(eq=False)
class Record(pickle_machine.Stateful):
  """An object of a file: the name of its class and its attributes."""

  name: str  # 'EDMPrecond'
  state: Any = None  # usually {attribute: value}
  source: str = dataclasses.field(default='', repr=False)  # text, never run

  def build(self, state: Any) -> None:
    """Keeps the attributes."""
    self.state = state


def _view(raw: Any, dtype: np.dtype) -> np.ndarray:
  """A 1-D array over bytes, without a copy."""
  if len(raw) == 0:
    return np.empty(0, dtype)
  if dtype.kind == 'b' and np.frombuffer(raw, np.uint8).max() > 1:
    raise ValueError('truth values other than 0 and 1')
  return np.frombuffer(raw, dtype)


def _counts(values: Any) -> tuple[int, ...]:
  """Checks a shape, or strides: whole numbers from 0."""
  if not isinstance(values, tuple) or len(values) > _MAX_DIMS:
    raise ValueError('a shape that is no short tuple')
  for value in values:
    if type(value) is not int or not 0 <= value < _LARGEST:
      raise ValueError('a negative, huge or fractional size, stride or offset')
  return values


def _ndarray(
  budget: pickle_machine.Budget, raw: Any, dtype: Any, shape: Any, order: Any
) -> np.ndarray:
  """A read-only numpy array from its pickled parts."""
  if not isinstance(dtype, Dtype) or not isinstance(raw, bytes | bytearray):
    raise ValueError('an array of something else than plain numbers')
  count = math.prod(_counts(shape))
  if count * dtype.dtype.itemsize != len(raw):
    raise ValueError(f'{len(raw)} bytes for an array of {count} numbers')
  budget.spend(len(raw))
  array = _view(memoryview(raw).toreadonly(), dtype.dtype)
  return array.reshape(shape, order='F' if order == 'F' else 'C')


def _scalar(budget: pickle_machine.Budget, dtype: Any, raw: Any) -> Any:
  return _ndarray(budget, raw, dtype, (), 'C')[()]


def _tensor(
  storage: Any, offset: Any, size: Any, stride: Any, *_: Any
) -> Tensor:
  """Checks that a tensor stays inside its storage."""
  if not isinstance(storage, Storage):
    raise ValueError('a tensor without a storage')
  _counts((offset,))
  if len(_counts(size)) != len(_counts(stride)):
    raise ValueError(f'{len(size)} sizes but {len(stride)} strides')
  count = math.prod(size)
  last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
  if count > storage.numel or (count and offset + last >= storage.numel):
    raise ValueError(
      f'a tensor reaches past the {storage.numel} numbers of its storage'
    )
  return Tensor(storage, offset, size, stride)


def _parameter(data: Any, *_: Any) -> Tensor:
  if not isinstance(data, Tensor):
    raise ValueError('a parameter that is no tensor')
  return data


def _encode(budget: pickle_machine.Budget, text: str, codec: str) -> bytes:
  """How protocol 2 writes bytes."""
  if codec != 'latin1' or not isinstance(text, str):
    raise ValueError('text in another encoding than latin1')
  budget.spend(len(text))
  return text.encode('latin-1')


def _set(budget: pickle_machine.Budget, items: Any) -> set:
  if not isinstance(items, list):
    raise ValueError('a set of something else than a list')
  budget.spend(64 * len(items))
  return set(map(pickle_machine.check_key, items))


def names(budget: pickle_machine.Budget) -> dict[str, Callable | None]:
  """The globals that state dicts and arrays need."""
  table = {
    **STORAGE_TYPES,
    'collections.OrderedDict': lambda: {},
    '_codecs.encode': functools.partial(_encode, budget),
    'torch.Size': _counts,
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_parameter': _parameter,
    'numpy.dtype': Dtype,
    'numpy.ndarray': None,
  }
  for builtins in ('__builtin__', 'builtins'):  # before and since protocol 3
    table |= {
      f'{builtins}.set': functools.partial(_set, budget),
      f'{builtins}.bytes': lambda: b'',  # how protocol 2 writes no bytes
    }
  for core in ('numpy.core', 'numpy._core'):  # before and since numpy 2
    table |= {
      f'{core}.multiarray.scalar': functools.partial(_scalar, budget),
      f'{core}.multiarray._reconstruct': functools.partial(Array, budget),
      f'{core}.numeric._frombuffer': functools.partial(_ndarray, budget),
    }
  return table


def storage_of(identity: tuple) -> tuple[str, Storage]:
  """The (key, empty storage) that a persistent id stands for.

  Args:
    identity: ('storage', type, key, location, numel[, no view]).
  """
  kind, dtype, key, _, numel, *views = identity
  name = dtype.name if isinstance(dtype, pickle_machine.Global) else ''
  if kind != 'storage' or name not in STORAGE_TYPES or any(views):
    raise ValueError('a reference to something else than a storage')
  if not isinstance(key, str):
    raise ValueError('a storage without a name')
  _counts((numel,))
  return key, Storage(DTYPES[name.rsplit('.', 1)[1]], numel)


def _leaf(value: Any, budget: pickle_machine.Budget) -> Any:
  """What is no container, as a user shall see it."""
  if isinstance(value, Tensor):
    return value.array(budget)
  if isinstance(value, Array) and value.array is not None:
    return value.array
  if isinstance(value, Dtype):
    return value.dtype
  if isinstance(value, pickle_machine.Global):
    return value.name
  if isinstance(value, Storage | Array):
    raise ValueError('numbers without a shape')
  return value


def resolve(tree: Any, budget: pickle_machine.Budget) -> Any:
  """Returns a tree with numpy arrays in place of tensors.

  Args:
    tree: what a machine returned, its storages filled.
    budget: arrays are counted against it.

  Returns:
    The same containers and records anew; names of types as text. What was
    shared stays shared.

  Raises:
    ValueError: nested too deep, or over budget.
  """
  done = {}

  def visit(value, depth):
    if id(value) in done:
      return done[id(value)]
    if depth > _MAX_DEPTH:
      raise ValueError(f'containers nested deeper than {_MAX_DEPTH}')
    if isinstance(value, Record):
      made = done[id(value)] = Record(value.name, source=value.source)
      made.state = visit(value.state, depth + 1)
    elif isinstance(value, dict):
      made = done[id(value)] = {}
      for key, item in value.items():
        made[key] = visit(item, depth + 1)
    elif isinstance(value, list | tuple):
      made = []
      if isinstance(value, list):
        done[id(value)] = made  # a list may hold itself
      for item in value:
        made.append(visit(item, depth + 1))
      made = tuple(made) if isinstance(value, tuple) else made
      done[id(value)] = made
    elif not isinstance(value, _PLAIN):
      made = done[id(value)] = _leaf(value, budget)
    else:
      made = value
    return made

  return visit(tree, 0)
