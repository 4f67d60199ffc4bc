"""Makes numpy arrays of the tensors and arrays in other programs' files.

PyTorch writes a tensor as (storage, offset, size, stride), all counted in
elements, through the globals of `names`. They become inert records first, and
arrays once all is checked: bytes are only ever viewed within bounds that were
compared with the storage's own length.
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

# PyTorch's names of storages; the data is little-endian.
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
  ['b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8']
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
  """A flat run of numbers; `data` [numel] may be filled in later.

  Attributes:
    dtype: the type of the numbers.
    numel: how many there are.
    data: the numbers; None until they are there.
  """

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
  """Where in a storage a tensor's numbers lie; counted in elements."""

  storage: Storage
  offset: int
  size: tuple[int, ...]
  stride: tuple[int, ...]

  def array(self, budget: pickle_machine.Budget) -> np.ndarray:
    """Returns the numbers as a read-only array, contiguous and aligned."""
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
    """Checks (version, byte order, subtype, names, fields, ...).

    The last three must be empty.
    """
    _, order, *composite = state[:5]
    if order not in ('<', '|') or any(composite):
      raise ValueError('an array of something else than plain numbers')


class Array(pickle_machine.Stateful):
  """A numpy array under construction; its state brings the numbers."""

  def __init__(self, budget: pickle_machine.Budget, *_: Any):
    self.budget = budget
    self.array: np.ndarray | None = None

  def build(self, state: tuple) -> None:
    """Takes (version, shape, dtype, is Fortran, bytes)."""
    _, shape, dtype, fortran, raw = state
    order = 'F' if fortran else 'C'
    self.array = _ndarray(self.budget, raw, dtype, shape, order)


@dataclasses.dataclass(eq=False)
class Record(pickle_machine.Stateful):
  """An object in a file, of whatever class.

  Attributes:
    name: the name of its class, e.g. 'EDMPrecond'.
    state: usually {attribute: value}.
    source: the source text that came with it; it is never run.
  """

  name: str
  state: Any = None
  source: str = dataclasses.field(default='', repr=False)

  def build(self, state: Any) -> None:
    """Keeps the attributes."""
    self.state = state


def _view(raw: Any, dtype: np.dtype) -> np.ndarray:
  """Returns a 1-D array over bytes, without a copy."""
  if len(raw) == 0:
    return np.empty(0, dtype)
  if dtype.kind == 'b' and np.frombuffer(raw, np.uint8).max() > 1:
    raise ValueError('truth values other than 0 and 1')
  return np.frombuffer(raw, dtype)


def _counts(values: Any) -> tuple[int, ...]:
  """Returns a shape, or strides, once all are whole numbers from 0."""
  if not isinstance(values, tuple) or len(values) > _MAX_DIMS:
    raise ValueError('a shape that is no short tuple')
  for value in values:
    if type(value) is not int or not 0 <= value < _LARGEST:
      raise ValueError('a negative, huge or fractional size, stride or offset')
  return values


def _ndarray(
  budget: pickle_machine.Budget, raw: Any, dtype: Any, shape: Any, order: Any
) -> np.ndarray:
  """Returns a read-only numpy array of its pickled parts."""
  if not isinstance(dtype, Dtype) or not isinstance(raw, bytes | bytearray):
    raise ValueError('an array of something else than plain numbers')
  count = math.prod(_counts(shape))
  if count * dtype.dtype.itemsize != len(raw):
    raise ValueError(f'{len(raw)} bytes for an array of {count} numbers')
  budget.spend(len(raw))
  array = _view(memoryview(raw).toreadonly(), dtype.dtype)
  # The file gives the order: anything but 'F' is taken as 'C'.
  return array.reshape(shape, order='F' if order == 'F' else 'C')


def _scalar(budget: pickle_machine.Budget, dtype: Any, raw: Any) -> Any:
  """Returns a numpy scalar of its pickled parts."""
  return _ndarray(budget, raw, dtype, (), 'C')[()]


def _tensor(
  storage: Any, offset: Any, size: Any, stride: Any, *_: Any
) -> Tensor:
  """Returns a tensor that is proven to stay inside its storage."""
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
  """Returns the tensor of a parameter."""
  if not isinstance(data, Tensor):
    raise ValueError('a parameter that is no tensor')
  return data


def _encode(budget: pickle_machine.Budget, text: str, codec: str) -> bytes:
  """Returns bytes, which protocol 2 writes as text to be encoded."""
  if codec != 'latin1' or not isinstance(text, str):
    raise ValueError('text in another encoding than latin1')
  budget.spend(len(text))
  return text.encode('latin-1')


def _set(budget: pickle_machine.Budget, items: Any) -> set:
  """Returns a set of text and numbers."""
  if not isinstance(items, list):
    raise ValueError('a set of something else than a list')
  budget.spend(64 * len(items))
  return set(map(pickle_machine.check_key, items))


def _namespace() -> Record:
  """Returns the record of a command line's arguments, which get their state."""
  return Record('Namespace')


def _empty_dict() -> dict[str, Any]:
  return {}


def _empty_bytes() -> bytes:
  return b''


def names(budget: pickle_machine.Budget) -> dict[str, Callable | None]:
  """Returns the table of the globals that state dicts and arrays need."""
  table = dict(STORAGE_TYPES)
  table |= {
    'collections.OrderedDict': _empty_dict,
    '_codecs.encode': functools.partial(_encode, budget),
    'torch.Size': _counts,
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_parameter': _parameter,
    'numpy.dtype': Dtype,
    'numpy.ndarray': None,
    # The trainers of DiT and SiT save their arguments.
    'argparse.Namespace': _namespace,
  }
  # Python's builtins had the first name until protocol 3.
  for builtins in ('__builtin__', 'builtins'):
    table |= {
      f'{builtins}.set': functools.partial(_set, budget),
      f'{builtins}.bytes': _empty_bytes,  # protocol 2 writes b'' as a call
    }
  # Numpy's core had the first name until numpy 2.
  for core in ('numpy.core', 'numpy._core'):
    table |= {
      f'{core}.multiarray.scalar': functools.partial(_scalar, budget),
      f'{core}.multiarray._reconstruct': functools.partial(Array, budget),
      f'{core}.numeric._frombuffer': functools.partial(_ndarray, budget),
    }
  return table


def storage_of(identity: tuple) -> tuple[str, Storage]:
  """Returns the key and the unfilled storage of a persistent id.

  Args:
    identity: ('storage', type, key, location, numel), and perhaps a view, which
      must be None.

  Raises:
    ValueError: it is something else.
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
  """Returns a value that is no container as the caller shall see it."""
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
    budget: the arrays count against it.

  Returns:
    New containers and records of the same content, with the names of types as
    text. Values that were shared stay shared.

  Raises:
    ValueError: the tree is nested too deep or over budget.
  """
  done = {}  # id of a value -> what it became

  def visit(value, depth):
    if id(value) in done:
      return done[id(value)]
    if depth > _MAX_DEPTH:
      raise ValueError(f'containers nested deeper than {_MAX_DEPTH}')
    if isinstance(value, _PLAIN):
      return value
    # A record, a dict or a list may hold itself: what it becomes is noted
    # before its content is visited.
    if isinstance(value, Record):
      made = Record(value.name, source=value.source)
      done[id(value)] = made
      made.state = visit(value.state, depth + 1)
    elif isinstance(value, dict):
      made = {}
      done[id(value)] = made
      for key, item in value.items():
        made[key] = visit(item, depth + 1)
    elif isinstance(value, list):
      made = []
      done[id(value)] = made
      for item in value:
        made.append(visit(item, depth + 1))
    elif isinstance(value, tuple):
      made = tuple([visit(item, depth + 1) for item in value])
      done[id(value)] = made
    else:
      made = _leaf(value, budget)
      done[id(value)] = made
    return made

  return visit(tree, 0)
