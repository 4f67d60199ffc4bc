"""Weights as files of the original programs, and as folders of params.

A file holds the official state dict, to the bit. A folder holds float32 params
that are projected, and is what training starts from.
"""

import dataclasses
import json
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors
from ddo_jax import models
from ddo_jax import rng
from ddo_jax import settings
from ddo_jax.assets import download
from ddo_jax.assets import store
from ddo_jax.method import likelihood
from ddo_jax.models import dit
from ddo_jax.models import llamagen
from ddo_jax.models import llamagen_vq
from ddo_jax.models import var
from ddo_jax.models import vqvae
from ddo_jax.models import vqvae_learner
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import layout as layout_lib
from ddo_jax.runtime import manifest
from ddo_jax.runtime import processes
from ddo_jax.runtime import records
from ddo_jax.weights import dit_names
from ddo_jax.weights import edm_configs
from ddo_jax.weights import edm_names
from ddo_jax.weights import files
from ddo_jax.weights import llamagen_names
from ddo_jax.weights import pickle_reader
from ddo_jax.weights import provenance
from ddo_jax.weights import safetensors_file
from ddo_jax.weights import torch_zip
from ddo_jax.weights import var_names

_LOGGER = logging.getLogger(__name__)
SUFFIXES = ('.pth', '.safetensors')  # of the files that are written
_TORCH = ('.pth', '.pt', '.bin')  # what PyTorch's files are called


@dataclasses.dataclass(frozen=True)
class Weights:
  """A network's weights, and what is known of them.

  Attributes:
    config: the dataclass of the model, or of the tokenizer.
    params: Flax params; numpy arrays in the types of the file.
    provenance: what `provenance.describe` returned; {} for weights that were
      trained from scratch.
  """

  config: Any
  params: likelihood.Params
  provenance: dict[str, str]


# Only the five functions below depend on which kind of model it is.


def _build(config: Any) -> likelihood.LikelihoodModel | vqvae_learner.Learner:
  """Returns what initialises and projects the params of a config."""
  if isinstance(config, vqvae.VqvaeConfig | llamagen_vq.VqConfig):
    return vqvae_learner.build(config)
  return config.build()


def _recorded(config: Any) -> dict[str, Any]:
  """Returns a model's config as JSON values, for `models.from_json`."""
  recorded = settings.to_json(config)
  named = {f'model.{name}': value for name, value in recorded.items()}
  return {'model.type': type(config).__name__} | named


def _unwrap(config: Any, state: Any) -> tuple[Any, Any]:
  """Returns the config of the network inside a file, and its state dict."""
  if isinstance(config, dit.TransformerConfig):
    return config, dit_names.unwrap(state)
  if isinstance(config, llamagen.GptConfig | llamagen_vq.VqConfig):
    state = llamagen_names.unwrap(state)
    tokenizer = getattr(config, 'tokenizer', None)
    if tokenizer and llamagen_names.is_tokenizer(state):
      config = tokenizer
    return config, state
  if not isinstance(config, var.VarConfig):
    return config, state
  state = var_names.unwrap(state)
  if var_names.is_tokenizer(state):
    config = config.tokenizer
  return config, state


def _to_flax(config: Any, state: dict[str, np.ndarray]) -> likelihood.Params:
  """Returns the Flax params of an official state dict."""
  if isinstance(config, var.VarConfig | vqvae.VqvaeConfig):
    return var_names.to_flax(state)
  if isinstance(config, dit.TransformerConfig):
    return dit_names.to_flax(state, config.grid)
  if isinstance(config, llamagen.GptConfig):
    return llamagen_names.transformer_to_flax(state)
  if isinstance(config, llamagen_vq.VqConfig):
    return llamagen_names.tokenizer_to_flax(state, len(config.mult))
  return edm_names.to_flax(state, edm_configs.taps_of(config))


def _to_official(
  config: Any, params: likelihood.Params
) -> dict[str, np.ndarray]:
  """Returns the official state dict of Flax params."""
  if isinstance(config, var.VarConfig):
    return var_names.to_official(params, config.tokenizer.patch_nums)
  if isinstance(config, vqvae.VqvaeConfig):
    return var_names.to_official(params, config.patch_nums)
  if isinstance(config, dit.TransformerConfig):
    return dit_names.to_official(params, config.grid)
  if isinstance(config, llamagen.GptConfig):
    return llamagen_names.transformer_to_official(params)
  if isinstance(config, llamagen_vq.VqConfig):
    return llamagen_names.tokenizer_to_official(params, len(config.mult))
  return edm_names.to_official(params, edm_configs.taps_of(config))


def _shapes(config: Any) -> Any:
  """Returns the shapes and types of the params, in their tree."""
  return jax.eval_shape(_build(config).init, rng.stream(0))


def read(path: pathlib.Path, source: str = '', config: Any = None) -> Weights:
  """Reads a file of weights.

  Args:
    path: a .pkl of EDM, EDM2 or DDO; an official state dict as .safetensors
      or as PyTorch's .pth, .pt or .bin; or one of these that the trainer of
      VAR, LlamaGen, CCA, DDO, DiT or SiT saved. From a trainer's checkpoint
      only the transformer is loaded, of DiT's and SiT's its average.
    source: the address that the file was fetched from, if any.
    config: the model's dataclass, for a file that does not say which network
      it holds. With VAR's and LlamaGen's, a file of the tokenizer is known by
      its tensors.

  Raises:
    errors.UserError: the file is unreadable, or holds an unknown network or
      another one than `config` says.
  """
  if path.suffix == '.pkl':
    network = pickle_reader.read_network(path, source=source)
    with files.refusing(path, 'the .pkl of an EDM, EDM2 or DDO network'):
      config = edm_configs.config_of(network)
    state = network.state_dict
    origin = network.provenance
  elif path.suffix == '.safetensors':
    state, metadata = safetensors_file.read(path)
    origin = provenance.describe(path, source, metadata.get('licence', ''))
    if 'model' in metadata:
      with files.refusing(path, "its model's settings as JSON"):
        config = models.from_json(json.loads(metadata['model']))
  elif path.suffix in _TORCH:
    state = torch_zip.read(path)
    origin = provenance.describe(path, source)
  else:
    raise errors.UserError(
      f'{path} is no file of weights by its name; wanted .pkl, .safetensors or'
      f' {", ".join(_TORCH)}'
    )
  if config is None:
    raise errors.UserError(
      f'{path} does not say which network it is of: give the --config of a'
      ' recipe with that model'
    )
  with files.refusing(path, "the state dict of the config's network"):
    config, state = _unwrap(config, state)
    files.check_state(state)
    params = _to_flax(config, state)
  checkpoint.check_shapes(params, _shapes(config), path)
  return Weights(config, params, origin)


def write(path: pathlib.Path, weights: Weights) -> None:
  """Writes the official state dict as .pth or .safetensors.

  Which model it is and where the weights come from stands in the metadata of a
  .safetensors, and in a .json beside a .pth.

  Raises:
    errors.UserError: the file cannot be written.
  """
  state = _to_official(weights.config, weights.params)
  recorded = _recorded(weights.config)
  if path.suffix == '.safetensors':
    metadata = {'model': json.dumps(recorded)} | weights.provenance
    safetensors_file.write(path, state, metadata)
  else:
    torch_zip.write(path, state)
    description = recorded | {'provenance': weights.provenance}
    records.write_json(path.with_name(path.name + '.json'), description)


def _project(
  model: likelihood.LikelihoodModel | vqvae_learner.Learner,
  params: likelihood.Params,
) -> likelihood.Params:
  """Projects the params that are not yet projected; keeps others to the bit.

  A second projection moves a weight by less than 1e-3 of it, and what the
  network computes, which projects once more, by 1e-7.
  """

  def settle(leaf, projected):
    settled = jnp.allclose(leaf, projected, rtol=1e-3, atol=0)
    return jnp.where(settled, leaf, projected)

  return jax.tree.map(settle, params, model.rules.project(params))


def _as_float32(leaf: Any) -> np.ndarray:
  return np.asarray(leaf, np.float32)


def save_folder(folder: pathlib.Path, weights: Weights) -> None:
  """Writes a folder of params: float32, projected, with their provenance."""
  model = _build(weights.config)
  params = jax.tree.map(_as_float32, weights.params)
  params = jax.jit(_project, static_argnums=0)(model, params)
  meta = {
    'stage': 'convert',
    'config': _recorded(weights.config),
    'provenance': weights.provenance,
  }
  checkpoint.save_params(folder, params, meta)


def load_folder(folder: pathlib.Path, recipe: Any = None) -> Weights:
  """Reads a folder of params that `save_folder` or a run wrote.

  Raises:
    errors.UserError: the folder holds no params, or damaged ones.
  """
  meta = checkpoint.load_meta(folder)
  config = models.from_json(meta['config'], recipe)
  if meta.get('stage') == 'tokenizer':
    # A run records the config of the whole model beside its tokenizer, too.
    config = config.tokenizer
  shapes = _shapes(config)
  executor = devices_lib.Executor(layout_lib.ExecutorConfig())
  target = checkpoint.abstract(shapes, executor.state_shardings(shapes))
  params, _ = checkpoint.load_params(folder, target)
  return Weights(config, devices_lib.fetch(params), meta.get('provenance', {}))


def _is_of(folder: pathlib.Path, path: pathlib.Path) -> bool:
  """Returns whether a folder was made of what a file holds now."""
  origin = checkpoint.load_meta(folder).get('provenance', {})
  return origin.get('sha256') == download.sha256_of(path)


def _made(name: str, folder: pathlib.Path) -> pathlib.Path:
  """Returns where in a folder what a setting names is converted to."""
  asset = store.asset_of(name)
  return folder / (asset.name if asset else pathlib.PurePath(name).stem)


def found(
  name: str, folder: pathlib.Path, deep: bool = False
) -> pathlib.Path | None:
  """Returns the folder of params that a setting names, if it is there already.

  Args:
    name: see `folder_of`.
    folder: where it would have been converted.
    deep: whether all of what was converted is read, to see whether it is whole.

  Returns:
    None where something is yet to be fetched or converted, or to be converted
    again because it is damaged.
  """
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    return path
  made = _made(name, folder)
  damaged = manifest.faults(folder, made.name, deep)
  for file, fault in damaged.items():
    _LOGGER.warning('%s %s: converting it again', folder / file, fault)
    return None
  if made.exists() and (not path.is_file() or _is_of(made, path)):
    return made
  return None


def folder_of(
  name: str, folder: pathlib.Path, setting: str, config: Any = None
) -> pathlib.Path:
  """Returns the folder of params that a setting names.

  Anything but a folder is fetched, if need be, and converted once; the result
  stays, and is made anew only where a file of one's own has changed.

  Args:
    name: a folder of params, or what `store.resolve` takes: a file's path, the
      name of a published one, or an address.
    folder: what is converted is kept here, each in a folder of its name.
    setting: the setting, for errors, such as '--config.init_from'.
    config: the model's dataclass, for a file that does not say which network
      it holds.

  Raises:
    errors.UserError: there is no such file and none can be fetched, or it is
      refused.
  """
  with processes.main_first(f'convert {name}'):
    there = found(name, folder, deep=True)
    if there:
      return there
    with download.alone(_made(name, folder), 'converts'):
      there = found(name, folder, deep=True)  # after another run's start
      return there or _convert(name, folder, setting, config)


def _convert(
  name: str, folder: pathlib.Path, setting: str, config: Any
) -> pathlib.Path:
  """Converts what is not there yet; see `folder_of`."""
  asset = store.asset_of(name)
  source = asset.address if asset else name
  weights = read(store.resolve(name, setting), source, config)
  _LOGGER.info('licence of %s: %s', name, weights.provenance['licence'])
  made = _made(name, folder)
  kept = manifest.Manifest(folder, ('*/',))
  save_folder(made, weights)
  kept.add(made.name)
  return made
