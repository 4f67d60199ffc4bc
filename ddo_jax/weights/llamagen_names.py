"""Names and layouts of LlamaGen's official tensors.

  transformer  'layers.3.attention.wqkv.weight' is row 3 of ('blocks',
               'attention', 'wqkv', 'kernel')
  tokenizer    'encoder.conv_blocks.0.res.1.conv1.weight' is ('encoder',
               'down_0_block_1', 'conv1', 'kernel'); the decoder's conv_blocks
               are numbered as they run, ours by their level

Queries, keys and values of the tokenizer's attention are apart there, and one
layer here.
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from ddo_jax import errors
from ddo_jax.weights import block_names

State = block_names.State
_CODEBOOK = 'quantize.embedding.weight'
# Among the official tensors of some files; they are not read.
_CONSTANTS = ('freqs_cis', 'quantize.codebook_used')
_USED = 65_536  # the length of the last of those
_QKV = re.compile(r'(.+\.)([qkv])\.(weight|bias)')
_FUSED = re.compile(r'(.+\.)qkv\.(weight|bias)')
_MIDDLE = {'0': 'block_1', '1': 'attn_1', '2': 'block_2'}
_KINDS = {'res': 'block', 'attn': 'attn'}
_EMBEDDINGS = (
  'embedding_table',
  'tok_embeddings',
  'cls_embedding',
  'quantize_embedding',
)


def unwrap(tree: Any) -> State:
  """Returns the state dict inside what a program saved.

  Released files are state dicts, or hold one under 'model', as the trainers of
  LlamaGen and CCA save it; DeepSpeed's is under 'module'.

  Raises:
    errors.UserError: there is no state dict.
  """
  for name in ('model', 'module', 'state_dict'):
    if isinstance(tree, Mapping) and name in tree:
      tree = tree[name]
      break
  places = "'model', 'module' or 'state_dict'"
  state = block_names.unwrapped(tree, places, 'LlamaGen')
  return {key: leaf for key, leaf in state.items() if key not in _CONSTANTS}


def is_tokenizer(state: Mapping[str, np.ndarray]) -> bool:
  """Whether a state dict is a tokenizer's rather than a transformer's."""
  return _CODEBOOK in state


def _as_kernel(leaf: str, module: str, ndim: int) -> str:
  """Returns Flax's name of a layer's weight."""
  if leaf != 'weight':
    return leaf
  if module in _EMBEDDINGS:
    return 'embedding'
  return 'kernel' if ndim > 1 else 'scale'


def _transformer_path(key: str, ndim: int) -> block_names.Path:
  """Returns the Flax path of a tensor of the transformer."""
  key = key.replace('cls_embedding.embedding_table.', 'cls_embedding.')
  key = re.sub(r'^output\.', 'head.', key)
  *modules, leaf = key.split('.')
  return (*modules, _as_kernel(leaf, modules[-1], ndim))


def _transformer_key(path: block_names.Path) -> str:
  """Returns the official key of a Flax path of the transformer."""
  *modules, leaf = path
  if leaf in ('kernel', 'scale', 'embedding'):
    leaf = 'weight'
  key = '.'.join([*modules, leaf])
  key = re.sub(r'^blocks\.', 'layers.', key)
  key = re.sub(r'^head\.', 'output.', key)
  return key.replace('cls_embedding.', 'cls_embedding.embedding_table.')


def _tokenizer_path(levels: int):
  """Returns the function from an official key to the Flax path."""

  def to_path(key: str, ndim: int) -> block_names.Path:
    key = key.replace('quantize.embedding.', 'quantize_embedding.')
    half, *rest = key.split('.')
    if rest[0] == 'mid':
      rest = [f'mid_{_MIDDLE[rest[1]]}', *rest[2:]]
    elif rest[0] == 'conv_blocks':
      level = int(rest[1])
      stem = f'down_{level}'
      if half == 'decoder':
        stem = f'up_{levels - 1 - level}'
      if rest[2] in _KINDS:
        rest = [f'{stem}_{_KINDS[rest[2]]}_{rest[3]}', *rest[4:]]
      else:  # downsample.conv or upsample.conv
        rest = [f'{stem}_{rest[2]}_{rest[3]}', *rest[4:]]
    *modules, leaf = (half, *rest)
    return (*modules, _as_kernel(leaf, modules[-1], ndim))

  return to_path


def _tokenizer_key(levels: int):
  """Returns the function from a Flax path to the official key."""
  middle = {ours: theirs for theirs, ours in _MIDDLE.items()}
  kinds = {ours: theirs for theirs, ours in _KINDS.items()}

  def to_key(path: block_names.Path) -> str:
    *modules, leaf = path
    if leaf in ('kernel', 'scale', 'embedding'):
      leaf = 'weight'
    if modules == ['quantize_embedding']:
      return _CODEBOOK
    half, *rest = modules
    first, _, tail = rest[0].partition('_') if rest else ('', '', '')
    if first == 'mid':
      rest = [f'mid.{middle[tail]}', *rest[1:]]
    elif first in ('down', 'up'):
      number, kind, name = tail.split('_')
      level = int(number)
      if first == 'up':
        level = levels - 1 - level
      rest = [f'conv_blocks.{level}.{kinds.get(kind, kind)}.{name}', *rest[1:]]
    return '.'.join([half, *rest, leaf])

  return to_key


def _fuse(state: Mapping[str, np.ndarray]) -> State:
  """Puts queries, keys and values of a layer into one tensor.

  Raises:
    errors.UserError: one of the three is missing.
  """
  fused = {}
  parts: dict[str, State] = {}  # key of the whole -> 'q', 'k' or 'v' -> tensor
  for key, tensor in state.items():
    match = _QKV.fullmatch(key)
    if match:
      whole = f'{match[1]}qkv.{match[3]}'
      parts.setdefault(whole, {})[match[2]] = tensor
    else:
      fused[key] = tensor
  for key, three in parts.items():
    if three.keys() != set('qkv'):
      raise errors.UserError(
        f'{key} is made of {sorted(three)}; wanted q, k and v: the file is not'
        ' whole'
      )
    fused[key] = np.concatenate([three[name] for name in 'qkv'])
  return fused


def _split(state: Mapping[str, np.ndarray]) -> State:
  """Takes queries, keys and values apart; this inverts `_fuse`."""
  apart = {}
  for key, tensor in state.items():
    match = _FUSED.fullmatch(key)
    if match:
      for name, part in zip('qkv', np.split(tensor, 3), strict=True):
        apart[f'{match[1]}{name}.{match[2]}'] = np.ascontiguousarray(part)
    else:
      apart[key] = tensor
  return apart


def transformer_to_flax(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Returns the Flax params of a transformer's state dict, dtypes kept.

  Raises:
    errors.UserError: blocks are missing or of different shapes.
  """
  renamed = {re.sub(r'^layers\.', 'blocks.', k): v for k, v in state.items()}
  return block_names.to_flax(renamed, _transformer_path)


def transformer_to_official(params: Mapping[str, Any]) -> State:
  """Returns the state dict of a transformer; inverts `transformer_to_flax`."""
  return block_names.to_official(params, _transformer_key)


def tokenizer_to_flax(
  state: Mapping[str, np.ndarray], levels: int
) -> dict[str, Any]:
  """Returns the Flax params of a tokenizer's state dict, dtypes kept.

  Args:
    state: official key -> tensor.
    levels: the number of levels of encoder and decoder.

  Raises:
    errors.UserError: queries, keys or values are missing.
  """
  return block_names.to_flax(_fuse(state), _tokenizer_path(levels))


def tokenizer_to_official(params: Mapping[str, Any], levels: int) -> State:
  """Returns the state dict of a tokenizer; this inverts `tokenizer_to_flax`.

  The record of which codes were used, which the original keeps, is zeros.
  """
  state = _split(block_names.to_official(params, _tokenizer_key(levels)))
  return state | {'quantize.codebook_used': np.zeros(_USED, np.float32)}
