"""How other programs' files are opened, refused in one line, and written."""

from collections.abc import Iterator
import contextlib
import mmap
import os
import pathlib
import struct
import zipfile

from ddo_jax import errors

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
    raise errors.UserError(
      f'{path} is refused: {reason}; wanted {wanted}; nothing in it was run:'
      ' get the file again from its publisher'
    ) from error


def map_file(path: pathlib.Path) -> mmap.mmap:
  """Maps a file's bytes, read-only; arrays that view them keep them alive."""
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
