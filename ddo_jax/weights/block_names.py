"""State dicts of PyTorch programs, to Flax params and back, by a rule of names.

The blocks of a transformer are numbered there and stacked here, where Flax
scans over them: 'blocks.3.ffn.fc1.weight' is row 3 of ('blocks', 'ffn', 'fc1',
'kernel'). Convolutions [out,in,h,w] become [h,w,in,out], linear layers [out,in]
become [in,out]; parameters that belong to no layer keep their shape.
"""

from collections.abc import Callable
from collections.abc import Mapping
import re
from typing import Any

from flax import traverse_util
import numpy as np

from ddo_jax import errors

Path = tuple[str, ...]
State = dict[str, np.ndarray]
_MAX_BLOCKS = 2**10  # the largest VAR has 30
_WRAPPERS = ('_orig_mod.', 'module.')
_TO_FLAX = {4: (2, 3, 1, 0), 2: (1, 0)}
_TO_OFFICIAL = {4: (3, 2, 0, 1), 2: (1, 0)}
_BLOCK = re.compile(r'blocks\.(\d+)\.(.+)')


def _is_state(tree: Any) -> bool:
  """Whether a tree is a state dict: a table of arrays, and not empty."""
  if not isinstance(tree, Mapping) or not tree:
    return False
  return all(
    isinstance(key, str) and isinstance(leaf, np.ndarray)
    for key, leaf in tree.items()
  )


def unwrapped(tree: Any, places: str, program: str) -> State:
  """Returns a state dict without the prefixes that wrappers add to its keys.

  Args:
    tree: what should be a state dict.
    places: where in a file it may stand, for the error.
    program: whose file it should be, for the error.

  Raises:
    errors.UserError: it is none.
  """
  if not _is_state(tree):
    got = sorted(map(str, tree)) if isinstance(tree, Mapping) else tree
    raise errors.UserError(
      f'the file holds {errors.brief(got)}; wanted a state dict of tensors,'
      f' plain or under {places}: is it a checkpoint of {program}?'
    )
  return {_without_wrappers(key): tensor for key, tensor in tree.items()}


def _without_wrappers(key: str) -> str:
  """Strips the prefixes of compiled and of distributed modules."""
  while key.startswith(_WRAPPERS):
    for wrapper in _WRAPPERS:
      key = key.removeprefix(wrapper)
  return key


def _transposed(
  tensor: np.ndarray, leaf: str, axes: Mapping[int, tuple[int, ...]]
) -> np.ndarray:
  """Reorders the axes of a layer's kernel; other parameters keep theirs."""
  if leaf != 'kernel':
    return tensor
  return np.transpose(tensor, axes[tensor.ndim])


def _stack(key: str, rows: Mapping[int, np.ndarray], depth: int) -> np.ndarray:
  """Stacks one tensor of the blocks 0 … depth−1 to an array [depth,...]."""
  shapes = {row.shape for row in rows.values()}
  if sorted(rows) != list(range(depth)) or len(shapes) != 1:
    raise errors.UserError(
      f'{key} is there for blocks {sorted(rows)}, in shapes {sorted(shapes)};'
      f' wanted one shape for each of {depth} blocks: the file is not whole'
    )
  return np.stack([rows[i] for i in range(depth)])


def to_flax(
  state: Mapping[str, np.ndarray], to_path: Callable[[str, int], Path]
) -> dict[str, Any]:
  """Returns the Flax params of a state dict, dtypes kept.

  Args:
    state: official key -> tensor.
    to_path: returns the Flax path of a key and its tensor's number of axes; of
      a block's tensor it is asked for what follows 'blocks.3.'.

  Raises:
    errors.UserError: blocks are missing or of different shapes.
  """
  flat = {}
  blocks = {}  # path -> {number of the block: tensor}
  depth = 0
  for key, tensor in state.items():
    match = _BLOCK.fullmatch(key)
    path = to_path(match[2] if match else key, tensor.ndim)
    tensor = _transposed(tensor, path[-1], _TO_FLAX)
    if match:
      number = int(match[1])
      if number >= _MAX_BLOCKS:
        raise ValueError(f'a block of the number {number}')
      blocks.setdefault(('blocks', *path), {})[number] = tensor
      depth = max(depth, number + 1)
    else:
      flat[path] = tensor
  for path, rows in blocks.items():
    flat[path] = _stack('.'.join(path), rows, depth)
  return traverse_util.unflatten_dict(flat)


def to_official(
  params: Mapping[str, Any], to_key: Callable[[Path], str]
) -> State:
  """Returns the state dict of Flax params; this inverts `to_flax`.

  Args:
    params: the Flax params.
    to_key: returns the official key of a Flax path; that of a block's tensor
      begins with ('blocks', '3').

  Returns:
    Official key -> tensor, dtypes kept, contiguous.
  """
  state = {}

  def put(path, tensor):
    tensor = _transposed(tensor, path[-1], _TO_OFFICIAL)
    state[to_key(path)] = np.require(tensor, requirements='C')

  for path, leaf in traverse_util.flatten_dict(dict(params)).items():
    leaf = np.asarray(leaf)
    if path[0] == 'blocks':
      for i, row in enumerate(leaf):
        put(('blocks', str(i), *path[1:]), row)
    else:
      put(path, leaf)
  return state
