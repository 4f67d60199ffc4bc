"""LlamaGen's files to folders of params and back."""

import argparse

import golden_io
import jax
import ml_dtypes
import numpy as np
import official_files
import pytest

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import main
from ddo_jax import models
from ddo_jax.assets import table
from ddo_jax.models import llamagen
from ddo_jax.models import llamagen_presets
from ddo_jax.models import llamagen_vq
from ddo_jax.samplers import ancestral
from ddo_jax.weights import llamagen_names
from ddo_jax.weights import released

TOKENIZER = llamagen_vq.VqConfig(
  image_shape=(4, 4, 1), vocab=6, channels=2, features=4, base=32, mult=(1, 1)
)
CONFIG = llamagen.LlamagenConfig(
  num_classes=3,
  depth=2,
  width=8,
  heads=2,
  hidden=4,
  tokenizer=TOKENIZER,
)


def same(got, wanted):
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  jax.tree.map(np.testing.assert_array_equal, got, wanted)


def tensors(state):
  return {key: official_files.Tensor(leaf) for key, leaf in state.items()}


@pytest.mark.golden
def test_the_keys_are_the_official_ones():
  """llamagen_gpt.npz: sd/*, names, shapes and numbers, there and back."""
  golden = golden_io.state_dict(golden_io.load('llamagen_gpt.npz'))
  state = llamagen_names.transformer_to_official(
    llamagen_names.transformer_to_flax(golden)
  )
  assert state.keys() == golden.keys()
  for key, wanted in golden.items():
    np.testing.assert_array_equal(state[key], wanted, err_msg=key)


@pytest.mark.parametrize('kind', ['transformer', 'tokenizer'])
@pytest.mark.parametrize('layout', ['plain', 'trainer'])
def test_there_and_back(tmp_path, kind, layout):
  """Official file, folder, our files; the config is that of the transformer."""
  wanted = CONFIG if kind == 'transformer' else TOKENIZER
  params, state = official_files.random_state(wanted)
  tree = tensors(state)
  if layout == 'trainer':
    if kind == 'transformer':
      tree['freqs_cis'] = official_files.Tensor(np.zeros((5, 2, 2), np.float32))
    arguments = argparse.Namespace(gpt_model='GPT-B', lr=1e-4)
    tree = {'model': tree, 'steps': 7, 'args': arguments}
  path = tmp_path / 'theirs.pt'
  official_files.zipped(path, tree)
  recipe = config_lib.Config(model=CONFIG, sampler=ancestral.Ancestral())
  folder = main.convert(str(path), tmp_path / 'folder', recipe)
  weights = released.load_folder(folder)
  assert weights.config == wanted
  same(weights.params, params)
  for suffix in released.SUFFIXES:
    ours = main.convert(str(folder), tmp_path / f'ours{suffix}')
    same(released.read(ours, config=CONFIG).params, params)


def test_other_types_are_read(tmp_path):
  """The types of the released files are not published."""
  params, state = official_files.random_state(CONFIG)
  for dtype in (np.float16, ml_dtypes.bfloat16):
    small = {key: leaf.astype(dtype) for key, leaf in state.items()}
    official_files.zipped(tmp_path / 'x.pt', tensors(small))
    got = released.read(tmp_path / 'x.pt', config=CONFIG).params
    same(got, jax.tree.map(lambda leaf, to=dtype: leaf.astype(to), params))


def test_files_of_something_else():
  _, state = official_files.random_state(CONFIG)
  with pytest.raises(errors.UserError, match=r"under 'model', 'mod.*LlamaGen"):
    llamagen_names.unwrap({'optimizer': state})
  del state['layers.0.attention.wqkv.weight']
  with pytest.raises(errors.UserError, match='is not whole'):
    llamagen_names.transformer_to_flax(state)
  _, state = official_files.random_state(TOKENIZER)
  del state['decoder.mid.1.k.weight']
  with pytest.raises(errors.UserError, match='wanted q, k and v'):
    llamagen_names.tokenizer_to_flax(state, 2)


@pytest.mark.parametrize(
  'config', [CONFIG, TOKENIZER, llamagen.PixelGptConfig()]
)
def test_a_record_gives_the_config(config):
  assert models.from_json(released._recorded(config)) == config


def test_published_files_are_named_as_their_presets():
  named = [n for n in table.ASSETS if n.startswith('c2i_')]
  assert len(named) == 12
  for name in named:
    assert llamagen_presets.get(name.removesuffix('-cca'))
    assert table.ASSETS[name].file.endswith('.pt')
  assert llamagen_presets.TOKENIZERS.keys() <= table.ASSETS.keys()
