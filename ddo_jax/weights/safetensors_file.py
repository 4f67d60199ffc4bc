"""State dicts as .safetensors files, by the library of that name."""

from collections.abc import Mapping
import pathlib

import numpy as np
import safetensors
import safetensors.numpy

from ddo_jax import errors
from ddo_jax.runtime import reading
from ddo_jax.weights import files

_WANTED = 'a .safetensors file'


def read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Reads a file.

  Returns:
    (arrays by key, metadata). The keys are in the file's order, which is not
    that of the state dict that was written.

  Raises:
    errors.UserError: the file is missing, damaged, or no .safetensors.
  """
  with files.refusing(path, _WANTED):
    reading.check_regular(path)
    try:
      with safetensors.safe_open(path, 'np') as file:
        return file.get_tensors(), file.metadata() or {}
    except safetensors.SafetensorError as error:
      raise ValueError(str(error)) from error
    except AttributeError as error:  # the library looks a type up in numpy
      raise ValueError(f'an array of a type that {error}') from error


def write(
  path: pathlib.Path,
  state: Mapping[str, np.ndarray],
  metadata: Mapping[str, str],
) -> None:
  """Writes a file, whole or not at all.

  Args:
    path: replaced if it exists.
    state: arrays by key.
    metadata: text by name, such as `provenance.describe` returns.

  Raises:
    errors.UserError: the format lacks an array's type, or the disk is full.
  """
  # The library writes an array's memory as it lies, whatever its strides.
  contiguous = {}
  for key, array in state.items():
    contiguous[key] = np.require(array, requirements='C')
  with files.whole(path) as partial:
    try:
      safetensors.numpy.save_file(contiguous, partial, dict(metadata))
    except safetensors.SafetensorError as error:
      raise errors.UserError(
        f'cannot write {path} ({error}); wanted arrays of plain numbers, and'
        ' room on the disk'
      ) from error
