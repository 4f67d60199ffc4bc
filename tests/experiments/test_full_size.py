"""Released sizes on a CPU: convert, evaluate, one DDO step; time and memory.

python -m pytest -m full_size tests/experiments/test_full_size.py

It writes experiments/results/full_size.json. To measure one network and only
print the result:

PYTHONPATH=.:tests python tests/experiments/test_full_size.py var_d16
"""

import json
import multiprocessing
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import official_files
import pytest

from ddo_jax import config as config_lib
from ddo_jax import main
from ddo_jax import rng
from ddo_jax.method import ddo
from ddo_jax.method import likelihood
from ddo_jax.models import presets
from ddo_jax.models import var_presets
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import state as state_lib
from ddo_jax.training import step as step_lib
from ddo_jax.training import workspace
from ddo_jax.weights import edm_configs
from ddo_jax.weights import edm_names
from ddo_jax.weights import torch_zip
from ddo_jax.weights import var_names

ROOT = pathlib.Path(__file__).parents[2]
RESULT = ROOT / 'experiments' / 'results' / 'full_size.json'
CIFAR10 = {
  'model_type': 'SongUNet',
  'img_resolution': 32,
  'img_channels': 3,
  'label_dim': 10,
  'embedding_type': 'positional',
  'encoder_type': 'standard',
  'decoder_type': 'standard',
  'channel_mult_noise': 1,
  'resample_filter': [1, 1],
  'model_channels': 128,
  'channel_mult': [2, 2, 2],
  'dropout': 0.13,
  'augment_dim': 9,
}
EDM2_S = {
  'img_resolution': 64,
  'img_channels': 3,
  'label_dim': 1000,
  'use_fp16': True,
  'model_channels': 192,
  'dropout': 0.0,
}
# The package, and the helpers of these tests.
PATHS = os.pathsep.join([str(ROOT), str(ROOT / 'tests')])
# By preset: what gives its config, and the phase that a step is taken of.
CASES = {
  'edm-cifar10-32x32-cond-vp': (presets.get, config_lib.Phase(batch_size=2)),
  'edm2-img64-s': (
    presets.get,
    config_lib.Phase(batch_size=1, averages=config_lib.Averages(width=(0.05,))),
  ),
  'var_d16': (
    var_presets.get,
    config_lib.Phase(batch_size=1, objective=ddo.DDO(normalize=True)),
  ),
}
# The class that a .pkl holds, its arguments and its type.
PICKLED = {
  'edm-cifar10-32x32-cond-vp': ('EDMPrecond', CIFAR10, np.float32),
  'edm2-img64-s': ('Precond', EDM2_S, np.float16),
}


def random_params(init, dtype):
  draw = np.random.default_rng(0)

  def leaf(shape):
    values = draw.standard_normal(shape.shape, np.float32)
    fan_in = np.prod(shape.shape[:-1], initial=1.0)
    return (values / np.sqrt(fan_in)).astype(dtype)

  return jax.tree.map(leaf, jax.eval_shape(init, rng.stream(0)))


def write_files(name, folder):
  """Writes files in the official layout, with random weights."""
  get_config, _ = CASES[name]
  config = get_config(name)
  model = config.build()
  if name in PICKLED:
    class_name, kwargs, dtype = PICKLED[name]
    params = random_params(model.init, dtype)
    state = edm_names.to_official(params, edm_configs.taps_of(config))
    table = official_files.released(class_name, state, kwargs)
    (folder / 'params.pkl').write_bytes(official_files.dumps(table))
    return
  learner = config.build_tokenizer()
  for part, init in (('params', model.init), ('tokenizer', learner.init)):
    params = random_params(init, np.float32)
    state = var_names.to_official(params, config.tokenizer.patch_nums)
    torch_zip.write(folder / f'{part}.pth', state)


def load_files(config, model, executor, folder):
  """Converts the files; returns the reference and the frozen weights."""
  for path in sorted(folder.glob('*.p*')):
    main.convert(str(path), folder / path.stem, config)
  reference, _ = workspace.load_params(folder / 'params', model, executor)
  learner = config.model.build_tokenizer()
  if learner is None:
    return reference, {}
  tokenizer, _ = workspace.load_params(folder / 'tokenizer', learner, executor)
  return reference, {'tokenizer': tokenizer}


class Laps:
  """Takes the seconds of each piece, and the peak memory so far in GiB."""

  def __init__(self):
    self.seconds = {}
    self.peak = {}
    self._clock = time.perf_counter()

  def lap(self, stage, value):
    jax.block_until_ready(value)
    now = time.perf_counter()
    self.seconds[stage] = now - self._clock
    self._clock = now
    usage = resource.getrusage(resource.RUSAGE_SELF)
    self.peak[stage] = usage.ru_maxrss / 2**20  # Linux counts it in KiB


def random_rows(model, batch):
  """Returns real and fake rows of random pixels, as they are stored."""
  shape = model.codec.stored_shape(model.example_shape)
  random = np.random.default_rng(1)
  ids = np.arange(batch, dtype=np.uint32)
  label = np.arange(batch, dtype=np.int32)
  real = random.integers(0, 256, (batch, *shape), np.uint8)
  fake = random.integers(0, 256, (batch, *shape), np.uint8)
  return (
    {'stored': real, 'label': label, 'id': ids},
    {'stored': fake, 'label': label},
  )


def measure(name, folder):
  """Measures each piece in seconds and GiB, and the first step's loss."""
  get_config, phase = CASES[name]
  phase = config_lib.at_round(phase, 0)
  batch = phase.batch_size
  config = config_lib.Config(model=get_config(name))
  model = config.model.build(noise=phase.noise)
  # Elsewhere, as their publisher would: its memory is not counted here.
  process = multiprocessing.get_context('spawn').Process(
    target=write_files, args=(name, folder)
  )
  process.start()
  process.join()

  laps = Laps()
  executor = devices_lib.Executor(config.executor)
  reference, frozen = load_files(config, model, executor, folder)
  laps.lap('convert', (reference, frozen))

  rows, fake_rows = random_rows(model, batch)
  real = executor.place_batch(rows)
  fake = executor.place_batch(fake_rows)
  keys = jax.random.split(rng.stream(0), batch)

  def log_prob(params, frozen, stored):
    x = model.codec.encode(frozen, stored[0], keys)
    batch = likelihood.Batch(x, rows['label'], rows['id'])
    return model.log_prob(params, frozen, batch, keys)

  found = jax.jit(log_prob)(reference, frozen, real['stored'])
  laps.lap('log-likelihood, compiled', found)
  assert np.isfinite(found).all()

  step = executor.compile_step(step_lib.train_step, sampler=None, accumulate=1)
  numbers = jax.tree.map(jnp.float32, (model, phase))
  traced_model, traced_phase, key = executor.replicate(
    (*numbers, rng.stream(0))
  )
  transform = phase.optimizer.transform(model.rules, batch, phase.images)

  def create(params):
    return state_lib.create(params, transform, phase.averages)

  state = executor.make_state(create, reference)
  laps.lap('state', state)
  state, metrics = step(
    state, reference, frozen, real, fake, traced_model, traced_phase, key
  )
  laps.lap('DDO step, compiled', metrics)

  metrics = jax.device_get(metrics)
  np.testing.assert_allclose(metrics['loss'], metrics['chance_loss'], rtol=1e-3)
  assert metrics['max_abs_logit'] <= 1e-3
  assert np.isfinite(metrics['grad_norm'])
  size = sum(leaf.size for leaf in jax.tree.leaves(reference))
  return {
    'batch': f'{batch}+{batch}',
    'arrays_millions': size / 1e6,
    'seconds': laps.seconds,
    'peak_gib': laps.peak,
    'loss': float(metrics['loss']),
    'environment': devices_lib.environment(),
  }


@pytest.mark.full_size
@pytest.mark.parametrize('name', CASES)
def test_released_size_on_a_cpu(name):
  """In a process of its own, whose peak memory is its own."""
  done = subprocess.run(
    [sys.executable, __file__, name],
    cwd=ROOT,
    env={'PATH': '', 'PYTHONPATH': PATHS, 'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  result = json.loads(done.stdout.splitlines()[-1])
  assert max(result['peak_gib'].values()) < 16e9 / 2**30
  known = records.read_json(RESULT) if RESULT.exists() else {}
  records.write_json(RESULT, known | {name: result})


if __name__ == '__main__':
  with tempfile.TemporaryDirectory() as scratch:
    print(json.dumps(measure(sys.argv[1], pathlib.Path(scratch))))
