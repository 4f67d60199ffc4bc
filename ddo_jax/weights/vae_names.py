"""Official names and layouts of AutoencoderKL's tensors, to Flax and back.

The public weights exist with two names for the attention's layers, older ones
(`query`, `key`, `value`, `proj_attn`) and newer ones (`to_q`, `to_k`, `to_v`,
`to_out.0`), whose tensors are [out, in] or [out, in, 1, 1]. All are read;
the newer names and [out, in] are written. Elsewhere convolutions are
[out, in, h, w]; `models.vae` has the names, 'resnets.0' as 'resnets_0'.
"""

from collections.abc import Mapping
import functools
import pathlib
import re
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors
from ddo_jax.models import vae
from ddo_jax.weights import safetensors_file
from ddo_jax.weights import torch_zip

_NEWER = {
  'query': 'to_q',
  'key': 'to_k',
  'value': 'to_v',
  'proj_attn': 'to_out.0',
}
_OLDER = re.compile(rf'(?<=\.attentions\.0\.)({"|".join(_NEWER)})(?=\.)')
_NUMBER = re.compile(r'_(\d+)$')


def _key(path: tuple[str, ...]) -> str:
  """The official key, of the newer names, of a Flax path."""
  *modules, leaf = (_NUMBER.sub(r'.\1', part) for part in path)
  return '.'.join([*modules, 'bias' if leaf == 'bias' else 'weight'])


@functools.cache
def _wanted(
  network: vae.AutoencoderKL,
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
  """Official key -> Flax path and shape of every tensor."""
  images = jnp.zeros((1, *[2 ** len(network.widths)] * 2, 3))
  shapes = jax.eval_shape(network.init, jax.random.key(0), images)['params']
  return {
    _key(path): (path, leaf.shape)
    for path, leaf in traverse_util.flatten_dict(shapes).items()
  }


def _to_layout(tensor: np.ndarray, ndim: int) -> np.ndarray:
  """An official tensor as a Flax one of `ndim` axes."""
  if tensor.ndim == 4:
    tensor = np.transpose(tensor, (2, 3, 1, 0))
  elif tensor.ndim == 2:
    tensor = tensor.T[None, None]
  if ndim == 2 and tensor.shape[:2] == (1, 1):  # 1×1: a linear layer
    tensor = tensor[0, 0]
  return tensor


def _few(names: set[str]) -> str:
  return f'{len(names)} tensors' + (f' ({min(names)}, …)' if names else '')


def to_flax(
  state: Mapping[str, np.ndarray], network: vae.AutoencoderKL
) -> dict[str, Any]:
  """Flax params of an official state dict, dtypes kept.

  Args:
    state: official key -> tensor, all of them.
    network: that the params are for; traced only.

  Raises:
    errors.UserError: tensors are missing, left over, of another shape or no
      floating-point numbers.
  """
  wanted = _wanted(network)
  newer = {_OLDER.sub(lambda m: _NEWER[m[0]], key): key for key in state}
  lost, left = wanted.keys() - newer.keys(), set(state) - set(newer.values())
  left |= newer.keys() - wanted.keys()
  if lost or left:
    raise errors.UserError(
      f'the weights lack {_few(lost)} of this AutoencoderKL and have'
      f" {_few(left)} too many: wanted diffusers' names, as in"
      ' stabilityai/sd-vae-ft-mse'
    )
  flat = {}
  for key, (path, shape) in wanted.items():
    tensor = state[newer[key]]
    flat[path] = _to_layout(tensor, len(shape))
    numbers = jnp.issubdtype(tensor.dtype, jnp.floating)
    if flat[path].shape != shape or not numbers:
      raise errors.UserError(
        f'{newer[key]} is {tensor.dtype} {list(tensor.shape)}; wanted floating'
        f" point, {list(shape)} once in Flax's order: the file is of another"
        ' AutoencoderKL'
      )
  return traverse_util.unflatten_dict(flat)


def to_official(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The official state dict of params; inverts `to_flax`.

  Returns:
    Official key -> tensor, dtypes kept, contiguous.
  """
  state = {}
  for path, tensor in traverse_util.flatten_dict(dict(params)).items():
    axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[np.ndim(tensor)]
    state[_key(path)] = np.ascontiguousarray(np.transpose(tensor, axes))
  return state


def read(
  path: pathlib.Path, network: vae.AutoencoderKL | None = None
) -> dict[str, Any]:
  """Flax params of a file of public weights.

  Args:
    path: diffusion_pytorch_model.safetensors, or the .bin beside it.
    network: of the weights; by default that of stabilityai/sd-vae-ft-mse.

  Raises:
    errors.UserError: unreadable, or see `to_flax`.
  """
  if path.suffix == '.safetensors':
    state, _ = safetensors_file.read(path)
  else:
    state = torch_zip.read(path)
  tensors = state.values() if isinstance(state, dict) else [None]
  if not all(isinstance(tensor, np.ndarray) for tensor in tensors):
    raise errors.UserError(
      f'{path} holds something else than tensors by name; wanted the'
      " AutoencoderKL in diffusers' format"
    )
  try:
    return to_flax(state, network or vae.AutoencoderKL())
  except errors.UserError as error:
    raise errors.UserError(f'{path}: {error}') from error
