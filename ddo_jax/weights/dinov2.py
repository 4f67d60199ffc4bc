"""Weights of DINOv2's ViT-L/14, from its published state dict."""

from collections.abc import Mapping
import pathlib
from typing import Any

from flax import traverse_util
import numpy as np

from ddo_jax.assets import store
from ddo_jax.assets import table
from ddo_jax.evaluation.networks import dinov2
from ddo_jax.weights import files
from ddo_jax.weights import provenance
from ddo_jax.weights import safetensors_file
from ddo_jax.weights import torch_zip

SETTING = '--config.evaluation.dinov2'
PUBLISHED = 'dinov2_vitl14_pretrain.pth'

_WANTED = f'{PUBLISHED} of DINOv2, or a .safetensors with its names'
_PLACES = {
  'qkv': 'attn.qkv',
  'proj': 'attn.proj',
  'fc1': 'mlp.fc1',
  'fc2': 'mlp.fc2',
  'ls1': 'ls1.gamma',
  'ls2': 'ls2.gamma',
  'patch_embed': 'patch_embed.proj',
}
_LEAVES = {'kernel': 'weight', 'scale': 'weight'}


def key_of(path: tuple[str, ...]) -> str:
  """Returns the official key of a Flax path: 'blocks.0.attn.qkv.weight'."""
  official = _PLACES | _LEAVES
  parts = [official.get(part, part) for part in path]
  return '.'.join(parts).replace('blocks_', 'blocks.')


def to_flax(
  state: Mapping[str, np.ndarray], network: dinov2.DinoV2
) -> dict[str, Any]:
  """Returns the params of a network for an official state dict.

  Args:
    state: official key -> tensor, [out,in,h,w] and [out,in]. Keys that the
      network does not use are ignored, such as the mask token.
    network: the network, of the state dict's sizes.

  Returns:
    A tree of float32 numpy arrays.

  Raises:
    ValueError: a tensor is missing, of another shape, or not finite.
  """
  flat = {}
  shapes = traverse_util.flatten_dict(dinov2.param_shapes(network))
  for path, leaf in shapes.items():
    key = key_of(path)
    if key not in state:
      raise ValueError(f'the tensor {key} is missing')
    array = state[key]
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim, range(array.ndim))
    array = np.transpose(array, axes)
    if array.shape != leaf.shape:
      raise ValueError(f'{key} gives {array.shape}, not {leaf.shape}')
    array = np.asarray(array, np.float32)
    if not np.isfinite(array).all():
      raise ValueError(f'{key} holds NaN or Inf')
    flat[path] = array
  return traverse_util.unflatten_dict(flat)


def load(
  path: pathlib.Path | None = None,
  network: dinov2.DinoV2 = dinov2.VIT_L14,
) -> tuple[dict[str, Any], dict[str, str]]:
  """Returns the network's params and where they come from.

  Args:
    path: the .pth, or a .safetensors of the same names; None takes the
      published one.
    network: the network, of the file's sizes. FD-DINOv2 means ViT-L/14.

  Returns:
    (params, float32 numpy arrays, for the network in
    `evaluation.networks.dinov2`; the file's name, sha256, licence and date).

  Raises:
    errors.UserError: there is no file and it cannot be fetched, or it is
      damaged or of another network.
  """
  if path is None:
    path = store.fetch(table.find(PUBLISHED), SETTING)
  with files.refusing(path, _WANTED):
    if path.suffix == '.safetensors':
      state = safetensors_file.read(path)[0]
    else:
      state = torch_zip.read(path)
    files.check_state(state)
    params = to_flax(state, network)
    return params, provenance.describe(path, licence=table.DINOV2)
