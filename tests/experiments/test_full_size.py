"""Released sizes on a CPU: convert, evaluate, one DDO step; time and memory.

python -m pytest -m full_size tests/test_full_size.py

writes experiments/results/full_size.json.
"""

import functools
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
from ddo_jax import rng
from ddo_jax.method import likelihood
from ddo_jax.models import presets
from ddo_jax.models import var_presets
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import run as run_lib
from ddo_jax.training import state as state_lib
from ddo_jax.training import step as step_lib
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
# Preset: its config, real rows of a step, and the knobs of its phase.
CASES = {
  'edm-cifar10-32x32-cond-vp': (presets.get, 2, {}),
  'edm2-img64-s': (presets.get, 1, {'ema_width': (0.05,)}),
  'var_d16': (var_presets.get, 1, {'normalize': True}),
}
# Of a .pkl: the class in it, its arguments, its type.
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
  """Files in the official layout, with random weights."""
  config = config_lib.Config(model=CASES[name][0](name))
  model = models.build(config, config.ddo)
  if name in PICKLED:
    class_name, kwargs, dtype = PICKLED[name]
    params = random_params(model.init, dtype)
    state = edm_names.to_official(params, edm_configs.taps_of(config.model))
    table = official_files.released(class_name, state, kwargs)
    (folder / 'params.pkl').write_bytes(official_files.dumps(table))
    return
  learner = models.tokenizer(config.model)
  for part, init in (('params', model.init), ('tokenizer', learner.init)):
    params = random_params(init, np.float32)
    patch_nums = config.model.tokenizer.patch_nums
    state = var_names.to_official(params, patch_nums)
    torch_zip.write(folder / f'{part}.pth', state)


def load_files(config, model, executor, folder):
  """Converts the files; returns the reference and the frozen weights."""
  paths = sorted(folder.glob('*.p*'))
  for path in paths:
    main.convert(str(path), folder / path.stem, config)
  load = lambda part, model: run_lib.load_params(
    folder / part, model, executor
  )[0]
  frozen = {}
  if learner := models.tokenizer(config.model):
    frozen = {'tokenizer': load('tokenizer', learner)}
  return load('params', model), frozen


def measure(name, folder):
  """Seconds of each piece, peak memory, and the loss of the first step."""
  get_config, batch, knobs = CASES[name]
  phase = config_lib.Phase(batch_size=batch, **knobs)
  config = config_lib.Config(model=get_config(name), ddo=phase)
  model = models.build(config, phase)
  # Elsewhere, as their publisher would: its memory is not counted here.
  process = multiprocessing.get_context('spawn').Process(
    target=write_files, args=(name, folder)
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

  executor = devices_lib.Executor(config.executor)
  reference, frozen = load_files(config, model, executor, folder)
  lap('convert', (reference, frozen))
  shape = getattr(model, 'image_shape', model.example_shape)
  draw = np.random.default_rng(1)
  pixels = lambda: draw.integers(0, 256, (batch, *shape), np.uint8)
  label, ids = np.arange(batch, dtype=np.int32), np.arange(batch)
  real = {'stored': pixels(), 'label': label, 'id': ids.astype(np.uint32)}
  fake = executor.place_batch({'stored': pixels(), 'label': label})
  real = executor.place_batch(real)
  keys = jax.random.split(rng.stream(0), batch)

  def log_prob(params, frozen, image):
    x = model.encode(frozen, image[0], keys)
    batch = likelihood.Batch(x, label, ids)
    return model.log_prob(params, frozen, batch, keys)

  found = jax.jit(log_prob)(reference, frozen, real['stored'])
  lap('log-likelihood, compiled', found)
  assert np.isfinite(found).all()
  step = executor.compile_step(
    step_lib.train_step, model=model, phase=phase.static(), accumulate=1
  )
  hyper, key = executor.replicate((state_lib.Hyper.of(phase, 0), rng.stream(0)))
  create = functools.partial(state_lib.create, phase=phase)
  state = executor.make_state(create, reference)
  lap('state', state)
  state, metrics = step(state, reference, frozen, real, fake, hyper, key)
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
    'environment': devices_lib.environment(),
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
