"""Names and layouts of EDM's and EDM2's official tensors, to Flax and back.

The networks in `models` name their submodules after the checkpoints, so that a
rule suffices in place of a table:

  official  'model.enc.8x8_block0.qkv.weight' in EDM, 'unet.enc.…' in EDM2
  Flax      ('network', 'enc_8x8_block0', 'qkv', 'kernel')

Official convolutions are [out,in,h,w] and linear layers [out,in]; in Flax they
are [h,w,in,out] and [in,out]. Nothing but names and layouts changes.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from flax import traverse_util
import numpy as np

from ddo_jax import errors

Path = tuple[str, ...]
_PREFIXES = ('model', 'unet')  # what EDM and EDM2 call the network
_SIDES = ('enc', 'dec')
_FILTER = 'resample_filter'  # a constant that EDM's checkpoints store
# The submodules that store it, by the end of their block's name.
_FILTERED = {
  'down': (('conv0',), ('skip',)),
  'up': (('conv0',), ('skip',)),
  'aux_residual': ((),),
}
_TO_FLAX = {4: (2, 3, 1, 0), 2: (1, 0)}
_TO_OFFICIAL = {4: (3, 2, 0, 1), 2: (1, 0)}


def to_path(key: str, ndim: int) -> Path:
  """Returns the Flax path of an official tensor of `ndim` axes."""
  *modules, leaf = key.split('.')
  if modules and modules[0] in _PREFIXES:
    modules[0] = 'network'
  for i, part in enumerate(modules):
    if part in _SIDES:
      modules[i : i + 2] = [f'{part}_{modules[i + 1]}']
      break
  if leaf == 'weight':
    leaf = 'kernel' if ndim > 1 else 'scale'
  return (*modules, leaf)


def to_key(path: Path, prefix: str) -> str:
  """Returns the official key of a Flax path.

  Args:
    path: the Flax path.
    prefix: what the checkpoint calls the network: 'model' or 'unet'.
  """
  *modules, leaf = path
  parts = [prefix if part == 'network' else part for part in modules]
  for i, part in enumerate(parts):
    if part.startswith(tuple(f'{side}_' for side in _SIDES)):
      parts[i] = part.replace('_', '.', 1)
  if leaf in ('kernel', 'scale'):
    leaf = 'weight'
  return '.'.join([*parts, leaf])


def resample_filter(taps: Sequence[float]) -> np.ndarray:
  """Returns the filter [1,1,n,n] float32 as EDM's checkpoints store it."""
  row = np.asarray(taps, np.float32)
  return np.outer(row, row)[None, None] / row.sum() ** 2


def to_flax(
  state: Mapping[str, np.ndarray], taps: Sequence[float] = ()
) -> dict[str, Any]:
  """Returns the Flax params of an official state dict, dtypes kept.

  Args:
    state: official key -> tensor, for a whole denoiser or for one module.
    taps: the taps of the resampling filter of the network that the state dict
      is meant for. The stored filters are compared with it and left out. EDM2
      stores none: ().

  Raises:
    errors.UserError: a stored filter differs.
  """
  flat = {}
  for key, tensor in state.items():
    if key.rpartition('.')[2] == _FILTER:
      wanted = resample_filter(taps) if taps else np.zeros(())
      if not np.array_equal(np.asarray(tensor, np.float32), wanted):
        raise errors.UserError(
          f'{key} is not the filter of taps {tuple(taps)}: the file is of'
          ' another network; convert it with its own config'
        )
      continue
    axes = _TO_FLAX.get(tensor.ndim, range(tensor.ndim))
    flat[to_path(key, tensor.ndim)] = np.transpose(tensor, axes)
  return traverse_util.unflatten_dict(flat)


def to_official(
  params: Mapping[str, Any], taps: Sequence[float] = ()
) -> dict[str, np.ndarray]:
  """Returns the official state dict of a denoiser's params.

  This inverts `to_flax`.

  Args:
    params: the Flax params of EDM's or EDM2's denoiser.
    taps: the taps of EDM's resampling filter, which its state dict must hold.

  Returns:
    Official key -> tensor, dtypes kept, contiguous.
  """
  prefix = 'unet' if 'logvar_linear' in params else 'model'
  state = {}
  for path, tensor in traverse_util.flatten_dict(dict(params)).items():
    tensor = np.asarray(tensor)
    axes = _TO_OFFICIAL.get(tensor.ndim, range(tensor.ndim))
    tensor = np.transpose(tensor, axes)
    # Not `ascontiguousarray`, which turns a scalar into a vector.
    state[to_key(path, prefix)] = np.require(tensor, requirements='C')
  if taps:
    kernel = resample_filter(taps)
    for name in params['network']:
      block = name.split('_', 2)[-1]
      for part in _FILTERED.get(block, ()):
        path = ('network', name, *part, _FILTER)
        state[to_key(path, prefix)] = kernel
  return state
