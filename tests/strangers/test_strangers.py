"""Objectives and models from outside play a round and touch nothing inside.

Each stands in one file with its recipe, which is given on the command line.
"""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax import rng

ROOT = pathlib.Path(__file__).parents[2]
NAMES = ('hinge_objective', 'flow_denoiser', 'raster_tokens', 'nnx_denoiser')
CUT = '# --- From here on, what the house asks for'


def load(name):
  return importlib.import_module(f'tests.strangers.{name}')


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
  """One device, and one cache of what all of them compile."""
  cache = {
    'JAX_NUM_CPU_DEVICES': '1',
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('compiled')),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  return os.environ | cache


@pytest.mark.parametrize('name', NAMES)
def test_a_stranger_plays_a_round(name, tmp_path, environment):
  workdir = tmp_path / 'run'
  command = [sys.executable, '-m', 'ddo_jax.main']
  command += [f'--config=tests/strangers/{name}.py', f'--workdir={workdir}']
  done = subprocess.run(
    command,
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  (result,) = json.loads((workdir / 'summary.json').read_text())['rounds']
  assert np.isfinite(result['after']['fd_train']['mean'])
  assert (workdir / 'report.html').exists()
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  first = next(r for r in records if 'chance_loss' in r)
  assert first['loss'] == pytest.approx(first['chance_loss'], rel=1e-3)
  assert first['grad_norm'] > 0


@pytest.mark.parametrize(
  ('name', 'most'),
  [('hinge_objective', 60), ('flow_denoiser', 60), ('raster_tokens', 80)],
)
def test_a_stranger_is_small(name, most):
  """What the house asks for, counted without the network beside it."""
  source = (ROOT / 'tests' / 'strangers' / f'{name}.py').read_text()
  ours = source.partition(CUT)[2] or source
  assert len([line for line in ours.splitlines() if line.strip()]) <= most


def test_the_raster_model_samples_what_it_scores():
  """Cached decoding is the full forward pass, token by token."""
  module = load('raster_tokens')
  config = module.get_config()
  model = config.model.build()
  params = model.init(rng.stream(0))
  label = jnp.arange(4, dtype=jnp.int32)
  keys = jax.random.split(rng.stream(1), 4)
  greedy = module.ancestral.Ancestral(top_k=1)
  tokens = model.sample(params, {}, label, keys, greedy)
  logits = model.network.module.apply({'params': params}, label, tokens)
  np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), tokens)
  assert len(np.unique(tokens)) > 1
