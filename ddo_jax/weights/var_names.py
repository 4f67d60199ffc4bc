"""Names and layouts of VAR's and its tokenizer's official tensors.

  transformer  'blocks.3.ffn.fc1.weight' is row 3 of ('blocks', 'ffn', 'fc1',
               'kernel'), since Flax scans over the stacked blocks
  tokenizer    'encoder.down.0.block.1.conv1.weight' is ('encoder',
               'down_0_block_1', 'conv1', 'kernel')

Convolutions [out,in,h,w] become [h,w,in,out], linear layers [out,in] become
[in,out]; parameters that belong to no layer keep their shape.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import re
from typing import Any

import numpy as np

from ddo_jax.weights import block_names

Path = block_names.Path
State = block_names.State
# Constants among the official tensors; they are not read but made anew.
_BUFFERS = (
  'zero_k_bias',
  'attn_bias_for_masking',
  'lvl_1L',
  'ema_vocab_hit_SV',
)
_EMBEDDINGS = ('class_emb', 'lvl_embed', 'embedding')
# Where the official names have a dot and Flax's an underscore: in the
# tokenizer's resolutions and its φ, and in AdaLN's linear layer.
_JOINED = (
  (re.compile(r'\b(down|up)\.(\d+)\.(\w+)\.(\w+)'), r'\1_\2_\3_\4'),
  (re.compile(r'\bmid\.'), 'mid_'),
  (re.compile(r'\bquant_resi\.qresi_ls\.'), 'qresi_ls_'),
  (re.compile(r'ada_lin\.1\.'), 'ada_lin.'),
)
_SPLIT = (
  (re.compile(r'\b(down|up)_(\d+)_(\w+?)_(\w+)'), r'\1.\2.\3.\4'),
  (re.compile(r'\bmid_'), 'mid.'),
  (re.compile(r'\bqresi_ls_'), 'quant_resi.qresi_ls.'),
  (re.compile(r'ada_lin\.'), 'ada_lin.1.'),
)


def unwrap(tree: Any) -> State:
  """Returns the transformer's state dict inside what a program saved.

  Released files are state dicts. VAR's trainer saves {'trainer':
  {'var_wo_ddp': …}}, CCA's {'trainer': …}, DDO's {'var_wo_ddp': …}. From these
  only the transformer is taken.

  Args:
    tree: what the file holds.

  Returns:
    Official key -> tensor, without the prefixes that wrappers add.

  Raises:
    errors.UserError: there is no state dict.
  """
  for name in ('trainer', 'var_wo_ddp'):
    if isinstance(tree, Mapping) and name in tree:
      tree = tree[name]
  return block_names.unwrapped(tree, "'trainer' and 'var_wo_ddp'", 'VAR')


def is_tokenizer(state: Mapping[str, np.ndarray]) -> bool:
  """Whether a state dict is a tokenizer's rather than a transformer's."""
  return 'quantize.embedding.weight' in state


def _to_path(key: str, ndim: int) -> Path:
  """Returns the Flax path of an official tensor of `ndim` axes."""
  for pattern, replacement in _JOINED:
    key = pattern.sub(replacement, key)
  *modules, leaf = key.split('.')
  if leaf == 'weight':
    leaf = 'kernel' if ndim > 1 else 'scale'
    if modules[-1] in _EMBEDDINGS:
      leaf = 'embedding'
  return (*modules, leaf)


def _to_key(path: Path) -> str:
  """Returns the official key of a Flax path."""
  *modules, leaf = path
  if leaf in ('kernel', 'scale', 'embedding'):
    leaf = 'weight'
  key = '.'.join([*modules, leaf])
  for pattern, replacement in _SPLIT:
    key = pattern.sub(replacement, key)
  return key


def to_flax(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Returns the Flax params of an official state dict, dtypes kept.

  Args:
    state: official key -> tensor, for a transformer or for a tokenizer. The
      constants among them are left out.

  Raises:
    errors.UserError: blocks are missing or of different shapes.
  """
  kept = {}
  for key, tensor in state.items():
    if key.rpartition('.')[2] not in _BUFFERS:
      kept[key] = tensor
  return block_names.to_flax(kept, _to_path)


def to_official(
  params: Mapping[str, Any], patch_nums: Sequence[int]
) -> dict[str, np.ndarray]:
  """Returns the official state dict of params; this inverts `to_flax`.

  Args:
    params: the Flax params of `var.Var` or of `vqvae.Vqvae`.
    patch_nums: sides of the model's scales; the constants are made from them.

  Returns:
    Official key -> tensor, dtypes kept, contiguous; with the constants. Among
    these, the statistic of how often each code was used is zeros.
  """
  state = block_names.to_official(params, _to_key)
  if 'blocks' in params:
    return state | _transformer_buffers(state, patch_nums)
  return state | _tokenizer_buffers(state, patch_nums)


def _transformer_buffers(state: State, patch_nums: Sequence[int]) -> State:
  """The number of every token's scale, the mask, and the keys' zero biases."""
  squares = np.square(np.asarray(patch_nums, np.int64))
  scale = np.repeat(np.arange(len(squares)), squares)
  mask = np.where(scale[:, None] >= scale[None, :], 0, -np.inf)
  buffers: State = {
    'lvl_1L': scale[None].astype(np.int64),
    'attn_bias_for_masking': mask[None, None].astype(np.float32),
  }
  for key, bias in state.items():
    if key.endswith('.q_bias'):
      name = key.replace('q_bias', 'zero_k_bias')
      buffers[name] = np.zeros_like(bias)
  return buffers


def _tokenizer_buffers(state: State, patch_nums: Sequence[int]) -> State:
  """How often each code was used at each scale: zeros."""
  key = 'quantize.embedding.weight'
  if key not in state:
    return {}
  shape = (len(patch_nums), len(state[key]))
  return {'quantize.ema_vocab_hit_SV': np.zeros(shape, np.float32)}
