"""Weights of the InceptionV3 of 2015-12-05, from any of its published files.

Four kinds of files hold the same numbers: PyTorch state dicts (pytorch-fid,
torch-fidelity), NVIDIA's pickle, TensorFlow's frozen graph, and safetensors.
All are read into the names and layouts of the state dict:
'<module>.conv.weight' [out,in,h,w], '<module>.bn.{weight,bias,running_mean,
running_var}', 'fc.{weight,bias}'.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import pathlib
import re
from typing import Any

from flax import traverse_util
import numpy as np

from ddo_jax.assets import store
from ddo_jax.assets import table
from ddo_jax.evaluation.networks import inception
from ddo_jax.weights import files
from ddo_jax.weights import graph_def
from ddo_jax.weights import pickle_reader
from ddo_jax.weights import provenance
from ddo_jax.weights import safetensors_file
from ddo_jax.weights import torch_zip

State = Mapping[str, np.ndarray]

SETTING = '--config.evaluation.inception'
# The publishers' names; any one of them will do, and the first is fetched.
PUBLISHED = (
  'pt_inception-2015-12-05-6726825d.pth',
  'weights-inception-2015-12-05-6726825d.pth',
  'inception-2015-12-05.pkl',
  'classify_image_graph_def.pb',
)

_LEAVES = {
  'kernel': 'conv.weight',
  'scale': 'bn.weight',
  'bias': 'bn.bias',
  'mean': 'bn.running_mean',
  'var': 'bn.running_var',
}
_STEM = ('1a_3x3', '2a_3x3', '2b_3x3', '3b_1x1', '4a_3x3')
_BLOCKS = ('5b', '5c', '5d', '6a', '6b', '6c', '6d', '6e', '7a', '7b', '7c')
# What TensorFlow calls the branches of each kind of block.
_SCOPES = (
  (
    ('5b', '5c', '5d'),
    {'branch1x1': '', 'branch5x5': 'tower', 'branch3x3dbl': 'tower_1'},
  ),
  (('6a',), {'branch3x3': '', 'branch3x3dbl': 'tower'}),
  (
    ('6b', '6c', '6d', '6e'),
    {'branch1x1': '', 'branch7x7': 'tower', 'branch7x7dbl': 'tower_1'},
  ),
  (('7a',), {'branch3x3': 'tower', 'branch7x7x3': 'tower_1'}),
  (
    ('7b', '7c'),
    {'branch1x1': '', 'branch3x3': 'tower', 'branch3x3dbl': 'tower_1'},
  ),
)
_TENSORFLOW = {
  'conv2d_params': 'conv.weight',
  'batchnorm/gamma': 'bn.weight',
  'batchnorm/beta': 'bn.bias',
  'batchnorm/moving_mean': 'bn.running_mean',
  'batchnorm/moving_variance': 'bn.running_var',
}
_NVIDIA = {
  'weight': 'conv.weight',
  'gamma': 'bn.weight',
  'beta': 'bn.bias',
  'mean': 'bn.running_mean',
  'var': 'bn.running_var',
}


def _keys() -> Iterator[tuple[tuple[str, ...], str, tuple[int, ...]]]:
  """Yields (Flax path, state-dict key, Flax shape) of every parameter."""
  flat = traverse_util.flatten_dict(inception.param_shapes())
  for path, leaf in flat.items():
    *modules, name = path
    if path == ('fc_bias',):
      key = 'fc.bias'
    elif path == ('fc', 'kernel'):
      key = 'fc.weight'
    else:
      key = '.'.join([*modules, _LEAVES[name]])
    yield path, key, leaf.shape


def modules() -> list[str]:
  """Returns the names of the 94 convolutions, such as 'Mixed_5b.branch1x1'."""
  end = '.conv.weight'
  return [key.removesuffix(end) for _, key, _ in _keys() if key.endswith(end)]


def _numbered(scope: str, index: int) -> str:
  """Returns 'conv' for index 0, 'conv_1' for index 1, and so on."""
  return f'{scope}_{index}' if index else scope


def scope_of(module: str) -> str:
  """Returns what TensorFlow calls a module.

  For example, 'Mixed_7b.branch3x3_2b' is 'mixed_9/tower/mixed/conv_1'.
  """
  block, _, branch = module.partition('.')
  if not branch:
    return _numbered('conv', _STEM.index(block.removeprefix('Conv2d_')))
  name = block.removeprefix('Mixed_')
  scope = _numbered('mixed', _BLOCKS.index(name))
  towers = next(towers for names, towers in _SCOPES if name in names)
  if branch == 'branch_pool':
    return f'{scope}/{_numbered("tower", len(towers) - 1)}/conv'
  stem, number, letter = re.fullmatch(
    r'(branch\w*?)(?:_(\d)([ab]?))?', branch
  ).groups()
  tower = towers[stem]
  scope = f'{scope}/{tower}' if tower else scope
  index = int(number or 1) - 1
  if letter:
    # Branches of the last two blocks end in two convolutions side by side.
    return f'{scope}/mixed/{_numbered("conv", "ab".index(letter))}'
  return f'{scope}/{_numbered("conv", index)}'


def _from_tensorflow(constants: State) -> dict[str, np.ndarray]:
  """Returns a frozen graph's constants in the state dict's names and layouts.

  Constants that the graph lacks are left out.
  """
  state = {}
  for module in modules():
    scope = scope_of(module)
    for name, leaf in _TENSORFLOW.items():
      array = constants.get(f'{scope}/{name}')
      if array is None:
        continue
      if array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
      state[f'{module}.{leaf}'] = array
  for name, key in (('weights', 'fc.weight'), ('biases', 'fc.bias')):
    array = constants.get(f'softmax/{name}')
    if array is not None:
      state[key] = array.T
  return _with_gammas(state)


def _from_nvidia(found: State) -> dict[str, np.ndarray]:
  """Returns the arrays of NVIDIA's pickle under the state dict's names.

  NVIDIA's names are those of TensorFlow with underscores, such as
  'layers.mixed_9_tower_mixed_conv_1.beta', and 'output.bias'.
  """
  module_of = {_flat(scope_of(module)): module for module in modules()}
  state = {}
  for key, array in found.items():
    place, _, leaf = key.rpartition('.')
    place = place.removeprefix('layers.')
    if place == 'output':
      state[f'fc.{leaf}'] = array
    elif _flat(place) in module_of and leaf in _NVIDIA:
      state[f'{module_of[_flat(place)]}.{_NVIDIA[leaf]}'] = array
  return _with_gammas(state)


def _flat(name: str) -> str:
  """Returns a name with underscores in place of dots and slashes."""
  return re.sub(r'[./]', '_', name)


def _with_gammas(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Adds the normalisations' scales, 1, which the graph may leave out."""
  for module in modules():
    bias = state.get(f'{module}.bn.bias')
    if bias is not None:
      state.setdefault(f'{module}.bn.weight', np.ones_like(bias))
  return state


def to_flax(state: State) -> dict[str, Any]:
  """Returns the params of the network for a state dict.

  Args:
    state: arrays in the names and layouts of this module's docstring. Other
      keys are ignored, such as the number of batches that some files count.

  Returns:
    A tree of float32 numpy arrays, [h,w,in,out] and [in,out].

  Raises:
    ValueError: a tensor is missing, of another shape, or not finite.
  """
  flat = {}
  missing = []
  for path, key, shape in _keys():
    array = state.get(key)
    if array is None:
      missing.append(key)
      continue
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim, range(array.ndim))
    array = np.transpose(array, axes)
    if array.shape != shape:
      raise ValueError(f'{key} gives {array.shape}, not {shape}')
    array = np.asarray(array, np.float32)
    if not np.isfinite(array).all():
      raise ValueError(f'{key} holds NaN or Inf')
    flat[path] = array
  if missing:
    raise ValueError(
      f'{len(missing)} of {len(missing) + len(flat)} tensors are missing'
      f' (first: {missing[0]})'
    )
  return traverse_util.unflatten_dict(flat)


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads a file of any kind, which its suffix tells, as a state dict."""
  wanted = f'one of {", ".join(PUBLISHED)}, or a .safetensors with their names'
  with files.refusing(path, wanted):
    if path.suffix == '.safetensors':
      return safetensors_file.read(path)[0]
    if path.suffix == '.pb':
      return _from_tensorflow(graph_def.read(path))
    if path.suffix == '.pkl':
      network = pickle_reader.read(path)
      if isinstance(network, dict):
        network = next(iter(network.values()), None)
      if not isinstance(network, pickle_reader.Record):
        raise ValueError('a pickle without a network')
      return _from_nvidia(pickle_reader.state_dict(network))
    if path.suffix in ('.pth', '.pt'):
      state = torch_zip.read(path)
      if not isinstance(state, dict):
        raise ValueError('no state dict')
      return {
        key: value
        for key, value in state.items()
        if isinstance(value, np.ndarray)
      }
    raise ValueError(f'the suffix {path.suffix!r} tells no known layout')


def published() -> table.Asset:
  """Returns the published file that is used where none is named."""
  return store.preferred(PUBLISHED)


def load(
  path: pathlib.Path | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
  """Returns the network's params and where they come from.

  Args:
    path: a file of any kind; None takes a published one.

  Returns:
    (params, float32 numpy arrays, for the network in
    `evaluation.networks.inception`; the file's name, sha256, licence and date).

  Raises:
    errors.UserError: there is no file and none can be fetched, or it is damaged
      or of another network.
  """
  if path is None:
    path = store.fetch(published(), SETTING)
  state = _read(path)
  wanted = f'the Inception of 2015-12-05: one of {", ".join(PUBLISHED)}'
  with files.refusing(path, wanted):
    files.check_state(state)
    params = to_flax(state)
    return params, provenance.describe(path, licence=table.INCEPTION)
