"""Released sizes on a CPU: convert, denoise, one DDO step; time and memory.

python -m pytest -m full_size tests/test_full_size.py

writes experiments/results/full_size.json.
"""

import json
import multiprocessing
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import official_files
import pytest

from ddo_jax import config as config_lib
from ddo_jax import main
from ddo_jax import models
from ddo_jax import parallel
from ddo_jax import records
from ddo_jax import rng
from ddo_jax import train_state
from ddo_jax import train_step
from ddo_jax import workspace
from ddo_jax.convert import edm_configs
from ddo_jax.convert import edm_names
from ddo_jax.models import presets

ROOT = pathlib.Path(__file__).parents[1]
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
# Preset: the class in its file, its arguments, its type, real rows of a step.
CASES = {
  'edm-cifar10-32x32-cond-vp': ('EDMPrecond', CIFAR10, np.float32, 2),
  'edm2-img64-s': ('Precond', EDM2_S, np.float16, 1),
}


def write_pkl(name, path):
  """A file in the official layout, with random weights."""
  class_name, kwargs, dtype, _ = CASES[name]
  config = config_lib.Config(model=presets.get(name))
  model = models.build(config, config.ddo)
  shapes = jax.eval_shape(model.init, rng.stream(0))
  draw = np.random.default_rng(0)

  def leaf(shape):
    values = draw.standard_normal(shape.shape, np.float32)
    fan_in = np.prod(shape.shape[:-1], initial=1.0)
    return (values / np.sqrt(fan_in)).astype(dtype)

  params = jax.tree.map(leaf, shapes)
  taps = edm_configs.taps_of(presets.get(name))
  state = edm_names.to_official(params, taps)
  table = official_files.released(class_name, state, kwargs)
  path.write_bytes(official_files.dumps(table))


def measure(name, folder):
  """Seconds of each piece, peak memory, and the loss of the first step."""
  batch = CASES[name][-1]
  phase = config_lib.Phase(
    batch_size=batch, ema_width=() if name.startswith('edm-') else (0.05,)
  )
  config = config_lib.Config(model=presets.get(name), ddo=phase)
  config.executor.remat = True
  model = models.build(config, phase)
  # Elsewhere, as its publisher would: its memory is not counted here.
  path = folder / f'{name}.pkl'
  process = multiprocessing.get_context('spawn').Process(
    target=write_pkl, args=(name, path)
  )
  process.start()
  process.join()
  seconds, peak, clock = {}, {}, time.perf_counter()

  def lap(stage, value=None):
    nonlocal clock
    jax.block_until_ready(value)
    now = time.perf_counter()
    seconds[stage], clock = now - clock, now
    usage = resource.getrusage(resource.RUSAGE_SELF)
    peak[stage] = usage.ru_maxrss / 2**20  # of Linux's KiB: GiB so far

  main.convert(str(path), folder / 'params')
  lap('convert')
  executor = parallel.Executor(config.executor)
  reference, _ = workspace.load_params(folder / 'params', model, executor)
  lap('load')
  x = np.random.default_rng(1).uniform(-1, 1, (batch, *model.example_shape))
  rows = {
    'x': np.asarray(x, np.float32),
    'sigma': np.full(batch, 0.5, np.float32),
    'label': np.arange(batch, dtype=np.int32),
  }
  denoised = jax.jit(model.denoise)(reference, *rows.values())
  assert np.isfinite(denoised).all()
  lap('denoise, compiled', denoised)
  pixels = np.asarray((x + 1) * 127.5, np.uint8)
  real = {'image': pixels, 'label': rows['label']}
  fake = executor.place_batch({k: v.copy() for k, v in real.items()})
  real = executor.place_batch(real | {'id': np.arange(batch, dtype=np.uint32)})
  step = executor.compile_step(
    train_step.train_step, model=model, phase=phase.static(), accumulate=1
  )
  hyper, key = executor.replicate(
    (train_state.Hyper.of(phase, 0), rng.stream(0))
  )
  state = executor.place_state(train_state.create(reference, phase))
  clock = time.perf_counter()
  state, metrics = step(state, reference, {}, real, fake, hyper, key)
  lap('DDO step, compiled', metrics)
  metrics = jax.device_get(metrics)
  np.testing.assert_allclose(metrics['loss'], metrics['chance_loss'], rtol=1e-3)
  assert metrics['max_abs_logit'] <= 1e-3
  assert np.isfinite(metrics['grad_norm'])
  size = sum(leaf.size for leaf in jax.tree.leaves(reference))
  return {
    'batch': f'{batch}+{batch}',
    'arrays_millions': size / 1e6,
    'seconds': seconds,
    'peak_gib': peak,
    'loss': float(metrics['loss']),
    'environment': parallel.environment(),
  }


@pytest.mark.full_size
@pytest.mark.parametrize('name', CASES)
def test_released_size_on_a_cpu(name):
  """In a process of its own, whose peak memory is its own."""
  done = subprocess.run(
    [sys.executable, __file__, name],
    cwd=ROOT,
    env={'PATH': '', 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
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
