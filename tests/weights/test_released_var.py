"""VAR's and its tokenizer's files to folders of params, and back."""

import dataclasses
import json

import jax
import numpy as np
import official_files
import pytest

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import main
from ddo_jax import settings
from ddo_jax.models import var
from ddo_jax.models import vqvae
from ddo_jax.runtime import checkpoint
from ddo_jax.samplers import ancestral
from ddo_jax.training import workspace
from ddo_jax.weights import released
from ddo_jax.weights import torch_zip

TOKENIZER = vqvae.VqvaeConfig((2, 2, 1), (1, 2), 6, 3, base=32, mult=(1,))
CONFIG = var.VarConfig(TOKENIZER, num_classes=3, depth=2, width=8, heads=2)
RECIPE = config_lib.Config(model=CONFIG, sampler=ancestral.Ancestral())


def file_of(tmp_path, layout, config):
  """What a program saved, and the params in it."""
  params, state = official_files.random_state(config)
  tensors = {key: official_files.Tensor(leaf) for key, leaf in state.items()}
  nested = {'config': {'resos': (16,)}, 'var_wo_ddp': tensors}
  tree = {
    'plain': tensors,
    'trainer': {'epoch': 1, 'trainer': nested, 'args': {}},
    'ddo': nested,
  }[layout]
  official_files.zipped(tmp_path / 'theirs.pth', tree)
  return params, tmp_path / 'theirs.pth'


def same(got, wanted):
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize(
  ('layout', 'config'),
  [
    ('plain', CONFIG),
    ('trainer', CONFIG),
    ('ddo', CONFIG),
    ('plain', TOKENIZER),
  ],
)
def test_there_and_back(tmp_path, layout, config):
  """One recipe converts both files; each layout gives the same folder."""
  params, path = file_of(tmp_path, layout, config)
  folder = main.convert(str(path), tmp_path / 'folder', RECIPE)
  weights = released.load_folder(folder)
  assert weights.config == config
  assert weights.provenance['file'] == 'theirs.pth'
  same(weights.params, params)
  for suffix in released.SUFFIXES:
    ours = main.convert(str(folder), tmp_path / f'ours{suffix}')
    again = released.read(ours, config=CONFIG)
    assert again.config == config
    same(again.params, params)
  state = torch_zip.read(tmp_path / 'ours.pth')
  assert state.keys() == official_files.random_state(config)[1].keys()
  beside = json.loads((tmp_path / 'ours.pth.json').read_text())
  assert beside['provenance'] == weights.provenance


def test_a_run_reads_the_folder(tmp_path):
  params, path = file_of(tmp_path, 'plain', TOKENIZER)
  main.convert(str(path), tmp_path / 'folder', RECIPE)
  config = dataclasses.replace(RECIPE, tokenizer_from=str(tmp_path / 'folder'))
  for phase in (config.tokenizer, config.pretrain, config.ddo):
    phase.batch_size = 8
  run = workspace.Run(config, tmp_path / 'run')
  same(jax.device_get(run.frozen['tokenizer']), params)
  lost = dataclasses.replace(config, tokenizer_from='')
  with pytest.raises(errors.UserError, match='no params in'):
    _ = workspace.Run(lost, tmp_path / 'run').frozen


def test_a_runs_own_tokenizer_is_written(tmp_path):
  """Its folder is of the whole run's config."""
  params, _ = official_files.random_state(TOKENIZER)
  meta = {'stage': 'tokenizer', 'config': settings.to_json(RECIPE)}
  checkpoint.save_params(tmp_path / 'params', params, meta)
  weights = released.load_folder(tmp_path / 'params')
  assert weights.config == TOKENIZER
  same(weights.params, params)


def test_another_architecture_is_refused(tmp_path):
  _, path = file_of(tmp_path, 'plain', CONFIG)
  deeper = dataclasses.replace(CONFIG, depth=3)
  with pytest.raises(errors.UserError, match='another architecture'):
    released.read(path, config=deeper)
  with pytest.raises(errors.UserError, match='give the --config'):
    released.read(path)
