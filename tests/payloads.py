"""Pickles written opcode by opcode, and how they must be received."""

import struct

import pytest

from ddo_jax import errors
from ddo_jax.weights import pickle_reader


def text(value):
  """Pushes a text."""
  raw = value.encode()
  return b'X' + struct.pack('<I', len(raw)) + raw


def name(module, attribute):
  """Pushes what a global names."""
  return f'c{module}\n{attribute}\n'.encode()


def plain(operations):
  """A whole pickle."""
  return b'\x80\x05' + operations + b'.'


def call(full, arguments):
  """A pickle that calls a name with a tuple that `arguments` pushes."""
  module, _, attribute = full.rpartition('.')
  return b'\x80\x03' + name(module, attribute) + arguments + b'R.'


def nested_storage(raw):
  """A pickle whose tensor's storage is bytes of the attacker's."""
  load = name('torch.storage', '_load_from_bytes')
  raw = b'B' + struct.pack('<I', len(raw)) + raw
  return b'\x80\x03' + load + raw + b'\x85R.'


def in_pickle(path, raw):
  path.write_bytes(raw)
  pickle_reader.read(path)


def refusal(read, *args):
  """The one line that refuses and says what was wanted."""
  line = one_line(read, *args)
  assert 'wanted' in line
  return line


def one_line(read, *args):
  """The one line that refuses."""
  with pytest.raises(errors.UserError) as caught:
    read(*args)
  line = str(caught.value)
  assert '\n' not in line and len(line) < 700
  return line
