"""How other programs' files are opened, refused in one line, and written."""

from collections.abc import Iterator
import contextlib
import mmap
import os
import pathlib
import struct
from typing import Any
import zipfile

import numpy as np

from ddo_jax import errors
from ddo_jax.assets import store
from ddo_jax.runtime import reading

MAX_KEY = 500  # characters of a tensor's name; released ones have 50

# What the readers, numpy and zipfile raise over a hostile or damaged file.
_REFUSALS = (
  ValueError,
  TypeError,
  LookupError,
  ArithmeticError,
  RecursionError,
  MemoryError,
  NotImplementedError,
  struct.error,
  zipfile.BadZipFile,
)


@contextlib.contextmanager
def refusing(path: pathlib.Path, wanted: str) -> Iterator[None]:
  """Turns whatever a bad file makes the body raise into one line.

  Args:
    path: the file.
    wanted: what should have been there, for the error.

  Raises:
    errors.UserError: the file is unreadable, damaged or hostile.
  """
  try:
    yield
  except errors.UserError:
    raise
  except OSError as error:
    raise errors.UserError(
      f'cannot read {path} ({error.strerror or error}); wanted {wanted}'
    ) from error
  except _REFUSALS as error:
    reason = ' '.join(str(error).split())[:240] or type(error).__name__
    remedy = 'get the file again from its publisher'
    if store.is_fetched(path):
      remedy = 'delete it, and the same command fetches it again'
    raise errors.UserError(
      f'{path} is refused: {reason}; wanted {wanted}; nothing in it was run:'
      f' {remedy}'
    ) from error


def check_state(state: Any) -> None:
  """Raises ValueError unless a tree is a state dict: real arrays by key."""
  if not isinstance(state, dict):
    raise ValueError(f'a {type(state).__name__}, and no table of tensors')
  for key, value in state.items():
    if not isinstance(key, str) or not 0 < len(key) <= MAX_KEY:
      raise ValueError(f'a tensor under the key {str(key)[:60]!r}')
    is_real = isinstance(value, np.ndarray) and value.dtype.kind in 'biufV'
    if not is_real:
      raise ValueError(f'{key[:60]!r} is no array of plain numbers')


def map_file(path: pathlib.Path) -> mmap.mmap:
  """Maps a file's bytes, read-only; arrays that view them keep them alive.

  Raises:
    OSError: it cannot be read, or is no regular file.
    ValueError: it is empty.
  """
  reading.check_regular(path)
  with path.open('rb') as file:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a path to write to; the file takes `path`'s place once it is whole.

  Raises:
    errors.UserError: the file cannot be written there.
  """
  partial = path.with_name(path.name + '.partial')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    os.replace(partial, path)
  except OSError as error:
    raise errors.UserError(
      f'cannot write {path} ({error.strerror or error}); wanted a folder that'
      ' may be written, with room for it'
    ) from error
  finally:
    partial.unlink(missing_ok=True)
