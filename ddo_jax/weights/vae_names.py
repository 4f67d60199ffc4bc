"""Names and layouts of AutoencoderKL's official tensors, to Flax and back.

The public weights exist with two names for the attention's layers: older ones
(`query`, `key`, `value`, `proj_attn`) and newer ones (`to_q`, `to_k`, `to_v`,
`to_out.0`), whose tensors are [out,in] or [out,in,1,1]. All of these are read;
the newer names and [out,in] are written. Convolutions are [out,in,h,w].
`models.vae` uses the same names, with 'resnets.0' written 'resnets_0'.
"""

from collections.abc import Mapping
import functools
import pathlib
import re
from typing import Any

from flax import traverse_util
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
  """Returns the official key of a Flax path, by the newer names."""
  *modules, leaf = path
  parts = [_NUMBER.sub(r'.\1', module) for module in modules]
  parts.append('bias' if leaf == 'bias' else 'weight')
  return '.'.join(parts)


def _newer_key(key: str) -> str:
  """Returns an official key with the newer names of the attention's layers."""
  return _OLDER.sub(lambda match: _NEWER[match[0]], key)


@functools.cache
def _wanted(
  network: vae.AutoencoderKL,
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
  """Returns the Flax path and shape of every tensor, by its official key."""
  shapes = traverse_util.flatten_dict(vae.param_shapes(network))
  return {_key(path): (path, leaf.shape) for path, leaf in shapes.items()}


def _to_layout(tensor: np.ndarray, ndim: int) -> np.ndarray:
  """Returns an official tensor in Flax's layout, with `ndim` axes."""
  if tensor.ndim == 4:
    tensor = np.transpose(tensor, (2, 3, 1, 0))
  elif tensor.ndim == 2:
    tensor = tensor.T[None, None]
  if ndim == 2 and tensor.shape[:2] == (1, 1):
    # A convolution with a kernel of 1×1 is a linear layer.
    tensor = tensor[0, 0]
  return tensor


def _count(names: set[str]) -> str:
  """Returns '3 tensors (encoder.conv_in.bias, …)', for an error."""
  example = f' ({min(names)}, …)' if names else ''
  return f'{len(names)} tensors{example}'


def to_flax(
  state: Mapping[str, np.ndarray], network: vae.AutoencoderKL
) -> dict[str, Any]:
  """Returns the Flax params of an official state dict, dtypes kept.

  Args:
    state: official key -> tensor; the whole state dict.
    network: the network that the params are for.

  Raises:
    errors.UserError: tensors are missing, left over, of another shape or no
      floating-point numbers.
  """
  wanted = _wanted(network)
  key_of = {_newer_key(key): key for key in state}
  missing = wanted.keys() - key_of.keys()
  unknown = key_of.keys() - wanted.keys()
  # Two keys may have one newer name; only the second of them is in `key_of`.
  unknown |= set(state) - set(key_of.values())
  if missing or unknown:
    raise errors.UserError(
      f'the weights lack {_count(missing)} of this AutoencoderKL and have'
      f" {_count(unknown)} too many: wanted diffusers' names, as in"
      ' stabilityai/sd-vae-ft-mse'
    )
  flat = {}
  for key, (path, shape) in wanted.items():
    tensor = state[key_of[key]]
    flat[path] = _to_layout(tensor, len(shape))
    is_floating = jnp.issubdtype(tensor.dtype, jnp.floating)
    if flat[path].shape != shape or not is_floating:
      raise errors.UserError(
        f'{key_of[key]} is {tensor.dtype} {list(tensor.shape)}; wanted floating'
        f" point, {list(shape)} once in Flax's order: the file is of another"
        ' AutoencoderKL'
      )
  return traverse_util.unflatten_dict(flat)


def to_official(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns the official state dict of params; this inverts `to_flax`.

  Returns:
    Official key -> tensor, dtypes kept, contiguous.
  """
  order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
  state = {}
  for path, tensor in traverse_util.flatten_dict(dict(params)).items():
    axes = order[np.ndim(tensor)]
    state[_key(path)] = np.ascontiguousarray(np.transpose(tensor, axes))
  return state


def read(
  path: pathlib.Path, network: vae.AutoencoderKL | None = None
) -> dict[str, Any]:
  """Reads a file of public weights and returns the Flax params.

  Args:
    path: diffusion_pytorch_model.safetensors, or the .bin beside it.
    network: the network of the weights; None means the one of
      stabilityai/sd-vae-ft-mse.

  Raises:
    errors.UserError: the file is unreadable, or does not fit the network.
  """
  if path.suffix == '.safetensors':
    state, _ = safetensors_file.read(path)
  else:
    state = torch_zip.read(path)
  is_state = isinstance(state, dict) and all(
    isinstance(tensor, np.ndarray) for tensor in state.values()
  )
  if not is_state:
    raise errors.UserError(
      f'{path} holds something else than tensors by name; wanted the'
      " AutoencoderKL in diffusers' format"
    )
  try:
    return to_flax(state, network or vae.AutoencoderKL())
  except errors.UserError as error:
    raise errors.UserError(f'{path}: {error}') from error
