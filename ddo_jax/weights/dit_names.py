"""Names and layouts of DiT's and SiT's official tensors, which are the same.

  official  'blocks.3.attn.qkv.weight', 'final_layer.linear.weight'
  Flax      row 3 of ('network', 'blocks', 'attn', 'qkv', 'kernel'),
            ('network', 'final_layer', 'linear', 'kernel')

The mirror of DiT under diffusers' names is read, too. It splits queries, keys
and values, and repeats the embeddings of time and class in every block.
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from ddo_jax import errors
from ddo_jax.models import dit_layers
from ddo_jax.weights import block_names

State = block_names.State
_POSITIONS = 'pos_embed'
_TABLE = 'embedding_table'
# Where the official names have a dot and Flax's an underscore, or nothing.
_JOINED = (
  (re.compile(r'\bmlp\.(\d)\.'), r'mlp_\1.'),
  (re.compile(r'\badaLN_modulation\.1\.'), 'adaLN_modulation.'),
)
_SPLIT = (
  (re.compile(r'\bmlp_(\d)\.'), r'mlp.\1.'),
  (re.compile(r'\badaLN_modulation\.'), 'adaLN_modulation.1.'),
)
# diffusers' names, from the first that matches.
_EMBEDDERS = 'blocks.0.norm1.emb.'
_DIFFUSERS = (
  (re.compile(r'^pos_embed\.proj\.'), 'x_embedder.proj.'),
  (re.compile(r'^proj_out_1\.'), 'final_layer.adaLN_modulation.1.'),
  (re.compile(r'^proj_out_2\.'), 'final_layer.linear.'),
  (re.compile(r'^transformer_blocks\.'), 'blocks.'),
  (re.compile(r'\.norm1\.linear\.'), '.adaLN_modulation.1.'),
  (re.compile(r'\.attn1\.to_out\.0\.'), '.attn.proj.'),
  (re.compile(r'\.ff\.net\.0\.proj\.'), '.mlp.fc1.'),
  (re.compile(r'\.ff\.net\.2\.'), '.mlp.fc2.'),
)
_FROM_EMBEDDERS = {
  'timestep_embedder.linear_1.': 't_embedder.mlp.0.',
  'timestep_embedder.linear_2.': 't_embedder.mlp.2.',
  'class_embedder.embedding_table.': 'y_embedder.embedding_table.',
}
_THREE = ('to_q', 'to_k', 'to_v')


def unwrap(tree: Any) -> State:
  """Returns the network's state dict inside what a program saved.

  Released files are state dicts. The trainers save {'model': …, 'ema': …,
  'opt': …, 'args': …}; of these the average is taken.

  Raises:
    errors.UserError: there is no state dict.
  """
  for name in ('ema', 'model'):
    if isinstance(tree, Mapping) and name in tree:
      tree = tree[name]
      break
  state = block_names.unwrapped(tree, "'ema' or 'model'", 'DiT or SiT')
  if any(key.startswith('transformer_blocks.') for key in state):
    state = _from_diffusers(state)
  return state


def _from_diffusers(state: State) -> State:
  """Returns the state dict under the official names.

  Raises:
    errors.UserError: a block lacks its queries, keys or values.
  """
  renamed = {}
  parts: dict[str, State] = {}  # official key -> part of it -> tensor
  for key, tensor in state.items():
    for pattern, replacement in _DIFFUSERS:
      key = pattern.sub(replacement, key)
    if '.norm1.emb.' in key:
      for name, official in _FROM_EMBEDDERS.items():
        if key.startswith(_EMBEDDERS + name):
          renamed[key.replace(_EMBEDDERS + name, official)] = tensor
      continue
    match = re.fullmatch(r'(.+)\.attn1\.(to_[qkv])\.(weight|bias)', key)
    if match:
      whole = f'{match[1]}.attn.qkv.{match[3]}'
      parts.setdefault(whole, {})[match[2]] = tensor
    else:
      renamed[key] = tensor
  for key, three in parts.items():
    if three.keys() != set(_THREE):
      raise errors.UserError(
        f'{key} is made of {sorted(three)}; wanted {", ".join(_THREE)}: the'
        ' file is not whole'
      )
    renamed[key] = np.concatenate([three[name] for name in _THREE])
  return renamed


def _to_path(key: str, ndim: int) -> block_names.Path:
  """Returns the Flax path of an official tensor of `ndim` axes."""
  for pattern, replacement in _JOINED:
    key = pattern.sub(replacement, key)
  *modules, leaf = key.split('.')
  if leaf == 'weight':
    leaf = 'embedding' if modules[-1] == _TABLE else 'kernel'
  return (*modules, leaf)


def _to_key(path: block_names.Path) -> str:
  """Returns the official key of a Flax path."""
  *modules, leaf = path
  if leaf in ('kernel', 'embedding'):
    leaf = 'weight'
  key = '.'.join([*modules, leaf])
  for pattern, replacement in _SPLIT:
    key = pattern.sub(replacement, key)
  return key


def to_flax(
  state: Mapping[str, np.ndarray], grid: tuple[int, int]
) -> dict[str, Any]:
  """Returns the Flax params of an official state dict, dtypes kept.

  Positions are not among the params: they are compared with those that the
  network here adds, and left out.

  Args:
    state: official key -> tensor.
    grid: the number of rows and of columns of an image's tokens.

  Raises:
    errors.UserError: the positions are others, or blocks are missing or of
      different shapes.
  """
  kept = dict(state)
  table = kept.pop(_POSITIONS, None)
  if table is not None:
    wanted = dit_layers.positions(*grid, table.shape[-1])[None]
    same = table.shape == wanted.shape
    # Rows of another order differ by more than 1, those of bfloat16 by 4e-3.
    if not same or np.abs(table - wanted).max() > 1e-2:
      raise errors.UserError(
        f'{_POSITIONS} {list(table.shape)} is not the table of sines and'
        f' cosines of {grid[0]} by {grid[1]} tokens: the file is of another'
        ' network, or of another size of images'
      )
  return {'network': block_names.to_flax(kept, _to_path)}


def to_official(params: Mapping[str, Any], grid: tuple[int, int]) -> State:
  """Returns the official state dict of a denoiser's params.

  This inverts `to_flax`.

  Args:
    params: the Flax params of `dit.Dit`'s or `sit.Sit`'s denoiser.
    grid: the number of rows and of columns of an image's tokens, whose
      positions it must hold.

  Returns:
    Official key -> tensor, dtypes kept, contiguous.
  """
  network = params['network']
  width = network['x_embedder']['proj']['bias'].shape[0]
  table = dit_layers.positions(*grid, width).astype(np.float32)
  return {_POSITIONS: table[None]} | block_names.to_official(network, _to_key)
