"""Reads the constants of a TensorFlow GraphDef (.pb) without TensorFlow.

A protobuf message is a run of fields: (field number, wire type, value). Only
the fields that lead to a constant's numbers are entered. All others are stepped
over by their announced length, and every length is compared with what is there.
The numbers of the fields that are entered:

  GraphDef     node 1
  NodeDef      name 1, op 2, attr 5 (a map: key 1, value 2)
  AttrValue    tensor 8
  TensorProto  dtype 1, tensor_shape 2, tensor_content 4, float_val 5
  TensorShape  dim 2 (whose size is 1)
"""

from collections.abc import Iterator
import math
import pathlib
import struct
from typing import Any

import numpy as np

from ddo_jax.weights import files
from ddo_jax.weights import pickle_machine

_WANTED = "TensorFlow's frozen classify_image_graph_def.pb"
# Wire types.
_VARINT = 0
_FIXED_64 = 1
_BYTES = 2
_FIXED_32 = 5
_FLOAT = 1  # TensorProto's DT_FLOAT
_MAX_NODES = 2**16
_MAX_AXES = 8
_LARGEST = 2**27  # numbers in a tensor; the network's have 2**21

Value = int | memoryview


def _varint(raw: memoryview, at: int) -> tuple[int, int]:
  """Returns a number of variable length, and where it ends."""
  value = 0
  for count in range(10):
    if at + count >= len(raw):
      raise ValueError('a message is cut off')
    byte = raw[at + count]
    value |= (byte & 0x7F) << (7 * count)
    if byte < 0x80:
      return value, at + count + 1
  raise ValueError('a number of more than ten bytes')


def _fields(
  raw: memoryview, budget: pickle_machine.Budget
) -> Iterator[tuple[int, Value]]:
  """Yields the (field number, value) of each field of a message."""
  at = 0
  while at < len(raw):
    budget.step()
    tag, at = _varint(raw, at)
    number = tag >> 3
    wire = tag & 7
    if wire == _VARINT:
      value, at = _varint(raw, at)
      yield number, value
    else:
      if wire == _BYTES:
        length, at = _varint(raw, at)
      elif wire in (_FIXED_32, _FIXED_64):
        length = 4 if wire == _FIXED_32 else 8
      else:
        raise ValueError(f'wire type {wire}, which no GraphDef has')
      if number == 0 or length > len(raw) - at:
        raise ValueError('a message is cut off')
      message = raw[at : at + length]
      at += length
      yield number, message


def _message(value: Value) -> memoryview:
  """Returns the bytes of a field that must hold some."""
  if isinstance(value, int):
    raise ValueError('a number where a message belongs')
  return value


def _text(value: Value) -> str:
  return bytes(_message(value)).decode('utf-8')


def _shape(raw: memoryview, budget: pickle_machine.Budget) -> tuple[int, ...]:
  """Returns the shape in a TensorShape."""
  shape: list[Any] = []
  for number, value in _fields(raw, budget):
    if number == 2:
      axis = _fields(_message(value), budget)
      sizes = [size for n, size in axis if n == 1]
      if len(sizes) > 1 or not all(isinstance(s, int) for s in sizes):
        raise ValueError('an axis without one size')
      shape.append(sizes[0] if sizes else 0)
  if len(shape) > _MAX_AXES or max(shape, default=0) >= _LARGEST:
    raise ValueError('a tensor of an absurd shape')
  if math.prod(shape) >= _LARGEST:
    raise ValueError('a tensor of an absurd shape')
  return tuple(shape)


def _tensor(
  raw: memoryview, budget: pickle_machine.Budget
) -> np.ndarray | None:
  """Returns the array of a TensorProto; None unless it is float32."""
  dtype: Any = 0
  shape: tuple[int, ...] = ()
  content: bytes | memoryview = b''
  values = []
  for number, value in _fields(raw, budget):
    if number == 1:
      dtype = value
    elif number == 2:
      shape = _shape(_message(value), budget)
    elif number == 4:
      content = _message(value)
    elif number == 5:
      values.append(bytes(_message(value)))
  if dtype != _FLOAT:
    return None
  count = math.prod(shape)
  data = np.frombuffer(bytes(content) or b''.join(values), '<f4')
  if not content and len(data) == 1:  # a single value fills the tensor
    data = np.broadcast_to(data, (count,))
  if len(data) != count:
    raise ValueError(f'{len(data)} numbers for a tensor of {count}')
  array = data.reshape(shape)
  array.flags.writeable = False
  return array


def _constant(
  raw: memoryview, budget: pickle_machine.Budget
) -> tuple[str, np.ndarray | None]:
  """Returns a node's name and numbers; None if it is no float32 constant."""
  name = ''
  operation = ''
  array = None
  for number, value in _fields(raw, budget):
    if number == 1:
      name = _text(value)
    elif number == 2:
      operation = _text(value)
    elif number == 5:
      entry = dict(_fields(_message(value), budget))
      key = _text(entry.get(1, memoryview(b'')))
      if key == 'value':
        attribute = _message(entry.get(2, memoryview(b'')))
        for inner, tensor in _fields(attribute, budget):
          if inner == 8:
            array = _tensor(_message(tensor), budget)
  return name, array if operation == 'Const' else None


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the float32 constants of a frozen graph, by node name.

  Raises:
    errors.UserError: the file is missing, damaged, or no GraphDef with
      constants.
  """
  with files.refusing(path, _WANTED):
    raw = memoryview(files.map_file(path))
    budget = pickle_machine.Budget.of(len(raw))
    constants = {}
    for count, (number, value) in enumerate(_fields(raw, budget)):
      if count >= _MAX_NODES:
        raise ValueError(f'more than {_MAX_NODES} nodes')
      if number != 1:
        continue
      try:
        name, array = _constant(_message(value), budget)
      except struct.error as error:
        raise ValueError('a tensor is cut off') from error
      if array is not None:
        if name in constants:
          raise ValueError(f'two constants named {name[:80]!r}')
        constants[name] = array
    if not constants:
      raise ValueError('no GraphDef with constants')
    return constants
