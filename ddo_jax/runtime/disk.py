"""Writing: a file is whole or absent, and a full disk is one line."""

from collections.abc import Iterator
import contextlib
import errno
import io
import os
import pathlib
from typing import BinaryIO

from ddo_jax import errors
from ddo_jax.runtime import processes

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Libraries that write for us may say so in words.
_FULL_WORDS = ('No space left', 'RESOURCE_EXHAUSTED', 'Disk quota')


def check_path(name: str, path: pathlib.Path) -> None:
  """Refuses a path at which nothing is and nothing can come to be.

  Args:
    name: what names it, for the error, such as '--workdir'.
    path: it need not be there.

  Raises:
    errors.UserError: it is too long, or goes around in links, or through one
      to nothing, or is no path at all.
  """
  fault = ''
  try:
    path.stat()
  except FileNotFoundError:
    for place in (path, *path.parents):
      if place.is_symlink() and not place.exists():
        fault = f'{place} is a link to {os.readlink(place)}, which is not there'
  except (NotADirectoryError, PermissionError):
    pass  # who goes there says so
  except (OSError, ValueError) as error:
    fault = getattr(error, 'strerror', None) or str(error)
  if fault:
    raise errors.UserError(
      f'{name} is {errors.brief(str(path))} ({fault}); wanted a path that can'
      ' be made: name another'
    )


@contextlib.contextmanager
def guarded(place: pathlib.Path) -> Iterator[None]:
  """Turns what goes wrong while its body writes into one line.

  Args:
    place: the file or folder that is written, for the line.

  Raises:
    errors.UserError: the disk is full, or `place` may not be written.
  """
  try:
    yield
  except errors.UserError:
    raise
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or str(error).partition('\n')[0]
    full = any(word in str(error) for word in _FULL_WORDS)
    if full or getattr(error, 'errno', None) in _FULL:
      raise errors.UserError(
        f'disk full while writing {place} ({reason[:200]}); what was saved'
        ' before is whole: free some space and run the same command again'
      ) from error
    if not isinstance(error, OSError):
      raise
    raise errors.UserError(
      f'cannot write {place} ({reason[:200]}); wanted a place that may be'
      ' written: what was saved before is whole, make it writable and run the'
      ' same command again'
    ) from error


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[BinaryIO]:
  """Opens a file that takes the place of `path` when the body has ended.

  However the writing ends, `path` is as it was before or whole: what is being
  written has the name '<name>.partial' until the disk has all of it. Of several
  processes, process 0 writes; what the others write goes nowhere.

  Args:
    path: the file; its folder is made where it is missing.

  Raises:
    errors.UserError: see `guarded`.
  """
  if not processes.is_main():
    yield io.BytesIO()
    return
  partial = path.with_name(f'{path.name}.partial')
  with guarded(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      with partial.open('wb') as file:
        yield file
        file.flush()
        # A quota of a network's file system may speak up only here.
        os.fsync(file.fileno())
      os.replace(partial, path)
    except BaseException:
      with contextlib.suppress(OSError):
        partial.unlink()
      raise
