"""Weights as files of the original programs, and as folders of params.

A folder is what training starts from: float32, projected. A file holds the
official state dict, to the bit.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import models
from ddo_jax import rng
from ddo_jax.method import likelihood
from ddo_jax.models import var
from ddo_jax.models import vqvae
from ddo_jax.models import vqvae_learner
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.weights import edm_configs
from ddo_jax.weights import edm_names
from ddo_jax.weights import files
from ddo_jax.weights import pickle_reader
from ddo_jax.weights import provenance
from ddo_jax.weights import safetensors_file
from ddo_jax.weights import torch_zip
from ddo_jax.weights import var_names

SUFFIXES = ('.pth', '.safetensors')  # what is written


@dataclasses.dataclass(frozen=True)
class Weights:
  """A network's weights, and what is known of them.

  Attributes:
    config: the model's dataclass; of a tokenizer, its own.
    params: Flax params; numpy, in the types of the file.
    provenance: see `provenance.describe`; {} for weights trained from scratch.
  """

  config: Any
  params: likelihood.Params
  provenance: dict[str, str]


def _shapes(config: Any) -> Any:
  """Of the params of a model or of a tokenizer."""
  return jax.eval_shape(_model(config).init, rng.stream(0))


def _to_flax(config: Any, state: dict[str, np.ndarray]) -> likelihood.Params:
  if isinstance(config, var.VarConfig | vqvae.VqvaeConfig):
    return var_names.to_flax(state)
  return edm_names.to_flax(state, edm_configs.taps_of(config))


def _to_official(config: Any, params: likelihood.Params) -> Any:
  if isinstance(config, var.VarConfig):
    return var_names.to_official(params, config.tokenizer.patch_nums)
  if isinstance(config, vqvae.VqvaeConfig):
    return var_names.to_official(params, config.patch_nums)
  return edm_names.to_official(params, edm_configs.taps_of(config))


def _model(config: Any) -> likelihood.LikelihoodModel | vqvae_learner.Learner:
  """What knows `init` and `project` of the params."""
  if isinstance(config, vqvae.VqvaeConfig):
    return vqvae_learner.build(config)
  return config.build()


def _recorded(config: Any) -> dict[str, Any]:
  """The model's part of a recorded config, see `models.from_json`."""
  recorded = config_lib.to_json(config_lib.Config(model=config))
  return {k: v for k, v in recorded.items() if k.startswith('model.')}


def read(path: pathlib.Path, source: str = '', config: Any = None) -> Weights:
  """Reads a file.

  Args:
    path: .pkl of EDM, EDM2 or DDO, or an official state dict as .safetensors
      or .pth; or a .pth of VAR's, CCA's or DDO's trainer.
    source: the address that it was fetched from, if any.
    config: the model's dataclass, for a file that does not say. With VAR's,
      a tokenizer's file is known by its tensors.

  Raises:
    errors.UserError: unreadable, of an unknown network, or of another one
      than `config` says.
  """
  if path.suffix == '.pkl':
    network = pickle_reader.read_network(path, source=source)
    config = edm_configs.config_of(network)
    state, origin = network.state_dict, network.provenance
  elif path.suffix == '.safetensors':
    state, metadata = safetensors_file.read(path)
    origin = provenance.describe(path, source, metadata.get('licence', ''))
    if 'model' in metadata:
      config = models.from_json(json.loads(metadata['model']))
  elif path.suffix == '.pth':
    state, origin = torch_zip.read(path), provenance.describe(path, source)
  else:
    raise errors.UserError(
      f'{path} is no file of weights by its name; wanted .pkl, .safetensors or'
      ' .pth'
    )
  if config is None:
    raise errors.UserError(
      f'{path} does not say which network it is of: give the --config of a'
      ' recipe with that model'
    )
  with files.refusing(path, "the state dict of the config's network"):
    if isinstance(config, var.VarConfig):
      state = var_names.unwrap(state)
      if var_names.is_tokenizer(state):
        config = config.tokenizer
    if not all(isinstance(v, np.ndarray) for v in state.values()):
      raise ValueError('it holds more than arrays')
    params = _to_flax(config, state)
  checkpoint.check_shapes(params, _shapes(config), path)
  return Weights(config, params, origin)


def write(path: pathlib.Path, weights: Weights) -> None:
  """Writes the official state dict as .pth or .safetensors.

  Where the weights come from stands in the metadata of a .safetensors, and in
  a .json beside a .pth.
  """
  state = _to_official(weights.config, weights.params)
  recorded = _recorded(weights.config)
  if path.suffix == '.safetensors':
    metadata = {'model': json.dumps(recorded), **weights.provenance}
    return safetensors_file.write(path, state, metadata)
  torch_zip.write(path, state)
  description = recorded | {'provenance': weights.provenance}
  records.write_json(path.with_name(path.name + '.json'), description)
  return None


def _project(
  model: likelihood.LikelihoodModel | vqvae_learner.Learner,
  params: likelihood.Params,
) -> likelihood.Params:
  """Projects what is not yet projected; the rest is kept to the bit.

  A second projection moves a weight by less than 1e-3 of it, and what the
  network computes, which projects once more, by 1e-7.
  """

  def settle(leaf, projected):
    settled = jnp.allclose(leaf, projected, rtol=1e-3, atol=0)
    return jnp.where(settled, leaf, projected)

  return jax.tree.map(settle, params, model.rules.project(params))


def save_folder(folder: pathlib.Path, weights: Weights) -> None:
  """Writes a folder of params: float32, projected, with its provenance."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float32), weights.params)
  params = jax.jit(_project, static_argnums=0)(_model(weights.config), params)
  meta = {
    'stage': 'convert',
    'config': _recorded(weights.config),
    'provenance': weights.provenance,
  }
  checkpoint.save_params(folder, params, meta)


def load_folder(folder: pathlib.Path, recipe: Any = None) -> Weights:
  """Reads a folder of params, of this module's making or of a run's.

  Raises:
    errors.UserError: no params there, or damaged.
  """
  meta = checkpoint.load_meta(folder)
  config = models.from_json(meta['config'], recipe)
  # A run's folder of its tokenizer has the config of the whole model.
  if meta.get('stage') == 'tokenizer':
    config = config.tokenizer
  shapes = _shapes(config)
  executor = devices_lib.Executor(config_lib.Executor())
  target = checkpoint.abstract(shapes, executor.state_shardings(shapes))
  params, _ = checkpoint.load_params(folder, target)
  return Weights(config, devices_lib.fetch(params), meta.get('provenance', {}))
