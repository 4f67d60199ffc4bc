"""Official names and layouts of EDM's and EDM2's tensors, to Flax and back.

The networks in `models` name their submodules after the checkpoints, so a
rule suffices. Official: 'model.enc.8x8_block0.qkv.weight' (EDM) and
'unet.enc.…' (EDM2); convolutions [out, in, h, w], linear layers [out, in].
Flax: ('network', 'enc_8x8_block0', 'qkv', 'kernel'); [h, w, in, out] and
[in, out]. Nothing but the layout changes.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from flax import traverse_util
import numpy as np

from ddo_jax import errors

Path = tuple[str, ...]
_PREFIXES = ('model', 'unet')  # of the network in EDM and in EDM2
_SIDES = ('enc', 'dec')
_FILTER = 'resample_filter'  # a constant that EDM's checkpoints store
# Where it is stored: by the end of the block's name, under which submodules.
_FILTERED = {
  'down': (('conv0',), ('skip',)),
  'up': (('conv0',), ('skip',)),
  'aux_residual': ((),),
}
_TO_FLAX = {4: (2, 3, 1, 0), 2: (1, 0)}
_TO_OFFICIAL = {4: (3, 2, 0, 1), 2: (1, 0)}


def to_path(key: str, ndim: int) -> Path:
  """The Flax path of an official tensor of `ndim` axes."""
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
  """The official key of a Flax path; `prefix` is 'model' or 'unet'."""
  *modules, leaf = path
  parts = [prefix if part == 'network' else part for part in modules]
  for i, part in enumerate(parts):
    if part.startswith(tuple(f'{side}_' for side in _SIDES)):
      parts[i] = part.replace('_', '.', 1)
  if leaf in ('kernel', 'scale'):
    leaf = 'weight'
  return '.'.join([*parts, leaf])


def resample_filter(taps: Sequence[float]) -> np.ndarray:
  """[1,1,n,n] float32, the filter as EDM's checkpoints store it."""
  taps = np.asarray(taps, np.float32)
  return np.outer(taps, taps)[None, None] / taps.sum() ** 2


def to_flax(
  state: Mapping[str, np.ndarray], taps: Sequence[float] = ()
) -> dict[str, Any]:
  """Flax params of an official state dict, dtypes kept.

  Args:
    state: official key -> tensor; of a whole denoiser or of one module.
    taps: of the resampling filter of the network that it is meant for; the
      stored filters are compared with it and left out. EDM2 stores none.

  Raises:
    errors.UserError: a stored filter is another.
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
  """The official state dict of a denoiser's params; inverts `to_flax`.

  Args:
    params: of `edm.denoiser` or of `edm2`'s.
    taps: of EDM's resampling filter, which its state dict must hold.

  Returns:
    Official key -> tensor, dtypes kept, contiguous.
  """
  prefix = 'unet' if 'logvar_linear' in params else 'model'
  state = {}
  for path, tensor in traverse_util.flatten_dict(dict(params)).items():
    tensor = np.asarray(tensor)
    axes = _TO_OFFICIAL.get(tensor.ndim, range(tensor.ndim))
    # `require`, as `ascontiguousarray` turns a scalar into a vector.
    state[to_key(path, prefix)] = np.require(
      np.transpose(tensor, axes), requirements='C'
    )
  if taps:
    kernel = resample_filter(taps)
    for name in params['network']:
      for part in _FILTERED.get(name.split('_', 2)[-1], ()):
        state[to_key(('network', name, *part, _FILTER), prefix)] = kernel
  return state
