"""DiT's and SiT's files to folders of params and back; diffusers' names."""

import argparse
import dataclasses
import pickle

import golden_io
import jax
import numpy as np
import official_files
import pytest

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import main
from ddo_jax import models
from ddo_jax.assets import table
from ddo_jax.models import dit
from ddo_jax.models import dit_presets
from ddo_jax.models import sit
from ddo_jax.samplers import heun
from ddo_jax.weights import dit_names
from ddo_jax.weights import released
from ddo_jax.weights import safetensors_file
from ddo_jax.weights import torch_zip

SIZES = {
  'image_shape': (8, 4, 4),
  'num_classes': 3,
  'patch': 2,
  'width': 8,
  'depth': 2,
  'heads': 2,
}
CONFIGS = {'dit': dit.DitConfig(**SIZES), 'sit': sit.SitConfig(**SIZES)}


def same(got, wanted):
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  jax.tree.map(np.testing.assert_array_equal, got, wanted)


def tensors(state):
  return {key: official_files.Tensor(leaf) for key, leaf in state.items()}


@pytest.mark.golden
def test_the_keys_are_the_official_ones():
  """dit_forward.npz: sd/*, names, order, shapes and numbers, there and back."""
  golden = golden_io.state_dict(golden_io.load('dit_forward.npz'))
  state = dit_names.to_official(
    dit_names.to_flax(golden, grid=(4, 4)), grid=(4, 4)
  )
  assert state.keys() == golden.keys()
  for key, wanted in golden.items():
    assert state[key].dtype == wanted.dtype, key
    np.testing.assert_array_equal(state[key], wanted, err_msg=key)


@pytest.mark.parametrize(
  ('name', 'count'),
  [
    ('DiT-XL-2-256x256', 292),
    ('SiT-L-4-256x256', 252),
    ('DiT-S-8-512x512', 132),
  ],
)
def test_the_number_of_tensors(name, count):
  """Stacks of blocks, unstacked, and the positions."""
  config = dit_presets.get(name)
  leaves = jax.tree.leaves_with_path(released._shapes(config))
  stacked = [p for p, _ in leaves if p[1].key == 'blocks']
  assert len(leaves) + (config.depth - 1) * len(stacked) + 1 == count


@pytest.mark.parametrize('family', CONFIGS)
@pytest.mark.parametrize('layout', ['plain', 'trainer'])
def test_there_and_back(tmp_path, family, layout):
  """Official file, folder, our files; of a trainer's, the average is read."""
  config = CONFIGS[family]
  params, state = official_files.random_state(config)
  tree = tensors(state)
  if layout == 'trainer':
    worse = {key: leaf + 1 for key, leaf in state.items()}
    arguments = argparse.Namespace(model='DiT-XL/2', lr=1e-4, data_path=None)
    optimizer = {'state': {0: {'step': 7}}, 'param_groups': [{'lr': 1e-4}]}
    tree = {
      'model': tensors(worse),
      'ema': tree,
      'opt': optimizer,
      'args': arguments,
    }
  path = tmp_path / 'theirs.pt'
  official_files.zipped(path, tree)
  recipe = config_lib.Config(model=config, sampler=heun.Heun())
  folder = main.convert(str(path), tmp_path / 'folder', recipe)
  weights = released.load_folder(folder)
  assert weights.config == config
  same(weights.params, params)
  for suffix in released.SUFFIXES:
    ours = main.convert(str(folder), tmp_path / f'ours{suffix}')
    same(released.read(ours, config=config).params, params)
  got, metadata = safetensors_file.read(tmp_path / 'ours.safetensors')
  assert got.keys() == torch_zip.read(tmp_path / 'ours.pth').keys()
  assert got.keys() == state.keys() and 'model' in metadata
  for key, tensor in state.items():
    np.testing.assert_array_equal(got[key], tensor, err_msg=key)


def test_arguments_are_kept_as_inert_records(tmp_path):
  """The class is never made; another one of that module is refused."""
  value = {'args': argparse.Namespace(lr=1e-4)}
  official_files.zipped(tmp_path / 'x.pt', value)
  record = torch_zip.read(tmp_path / 'x.pt')['args']
  assert type(record).__name__ == 'Record' and record.state == {'lr': 1e-4}
  official_files.zipped(tmp_path / 'y.pt', {'args': argparse.ArgumentError})
  with pytest.raises(errors.UserError, match='ArgumentError'):
    torch_zip.read(tmp_path / 'y.pt')
  assert b'Namespace' in pickle.dumps(value, 2)


def diffusers_of(state):
  """A state dict under the names of the mirror."""
  embedders = {
    't_embedder.mlp.0': 'timestep_embedder.linear_1',
    't_embedder.mlp.2': 'timestep_embedder.linear_2',
    'y_embedder.embedding_table': 'class_embedder.embedding_table',
  }
  inside = {
    'adaLN_modulation.1': 'norm1.linear',
    'attn.proj': 'attn1.to_out.0',
    'mlp.fc1': 'ff.net.0.proj',
    'mlp.fc2': 'ff.net.2',
  }
  outside = {
    'x_embedder.proj': 'pos_embed.proj',
    'final_layer.adaLN_modulation.1': 'proj_out_1',
    'final_layer.linear': 'proj_out_2',
  }
  found = {}
  for key, tensor in state.items():
    module, _, leaf = key.rpartition('.')
    if module in outside:
      found[f'{outside[module]}.{leaf}'] = tensor
    elif module in embedders:
      for i, shift in ((0, 0), (1, 9)):  # what the others hold is not read
        name = f'transformer_blocks.{i}.norm1.emb.{embedders[module]}.{leaf}'
        found[name] = tensor + shift
    elif module.startswith('blocks.'):
      _, number, module = module.split('.', 2)
      block = f'transformer_blocks.{number}'
      if module == 'attn.qkv':
        for part, rows in zip('qkv', np.split(tensor, 3), strict=True):
          found[f'{block}.attn1.to_{part}.{leaf}'] = rows
      else:
        found[f'{block}.{inside[module]}.{leaf}'] = tensor
  return found


def test_the_mirror_under_diffusers_names(tmp_path):
  params, state = official_files.random_state(CONFIGS['dit'])
  theirs = diffusers_of(state)
  # 19 in each block, with five of its own embedders, and three layers.
  assert len(theirs) == 2 * 19 + 6
  safetensors_file.write(tmp_path / 'x.safetensors', theirs, {})
  official_files.zipped(tmp_path / 'x.bin', tensors(theirs))
  for name in ('x.safetensors', 'x.bin'):
    weights = released.read(tmp_path / name, config=CONFIGS['dit'])
    same(weights.params, params)
  del theirs['transformer_blocks.1.attn1.to_k.weight']
  safetensors_file.write(tmp_path / 'x.safetensors', theirs, {})
  with pytest.raises(errors.UserError, match='wanted to_q, to_k, to_v'):
    released.read(tmp_path / 'x.safetensors', config=CONFIGS['dit'])


def test_other_positions_are_refused():
  _, state = official_files.random_state(CONFIGS['dit'])
  positions = state['pos_embed']
  others = (
    positions[..., ::-1],
    positions[:, ::-1],
    positions[:, :4],
    positions + 0.1,
    positions[0],
  )
  for other in others:
    with pytest.raises(errors.UserError, match='pos_embed'):
      dit_names.to_flax(state | {'pos_embed': other}, (4, 2))
  with pytest.raises(errors.UserError, match='of 2 by 4 tokens'):
    dit_names.to_flax(state, (2, 4))
  rounded = {'pos_embed': positions.astype(np.float16)}
  dit_names.to_flax(state | rounded, (4, 2))


def test_files_of_something_else():
  _, state = official_files.random_state(CONFIGS['sit'])
  with pytest.raises(errors.UserError, match=r"under 'ema' or 'model'.*DiT"):
    dit_names.unwrap({'opt': state})
  del state['blocks.0.attn.qkv.weight']
  with pytest.raises(errors.UserError, match='is not whole'):
    dit_names.to_flax(state, (4, 2))
  state['blocks.1024.attn.qkv.weight'] = np.zeros((1, 1))
  with pytest.raises(ValueError, match='number 1024'):
    dit_names.to_flax(state, (4, 2))


def test_another_number_of_channels_is_refused(tmp_path):
  """SiT's own sampling script expects 4 of its checkpoints, which have 8."""
  _, state = official_files.random_state(CONFIGS['sit'])
  official_files.zipped(tmp_path / 'x.pt', tensors(state))
  plain = dataclasses.replace(CONFIGS['sit'], learn_sigma=False)
  with pytest.raises(errors.UserError, match='another architecture'):
    released.read(tmp_path / 'x.pt', config=plain)


@pytest.mark.parametrize('config', CONFIGS.values())
def test_a_record_gives_the_config(config):
  assert models.from_json(released._recorded(config)) == config


def test_published_files_are_named_as_their_presets():
  named = [n for n in table.ASSETS if n.startswith(('DiT', 'SiT'))]
  assert len(named) == 3
  for name in named:
    assert dit_presets.get(name).latents
    assert table.ASSETS[name].file.endswith('.pt')
