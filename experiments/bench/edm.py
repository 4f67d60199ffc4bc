"""Speed and memory of a published network, with random weights.

python -m experiments.bench.edm --model=edm-cifar10-32x32-cond-vp --batch=4
python -m experiments.bench.edm --model=SiT-S-2-256x256 --batch=4

Four calls are timed, each as the median of several after warm-up: a forward
pass, the MLE step, the DDO step of the same number of real rows (and as many
fakes), and 18-step Heun sampling. Beside them stand the compile times, the rate
of a plain matrix product in the same run, and the bytes of a DDO step, counted
from shapes.
"""

from collections.abc import Callable
import dataclasses
import json
import pathlib
import time
from typing import Any

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import config as config_lib
from ddo_jax import rng
from ddo_jax.method import ddo
from ddo_jax.method import diffusion
from ddo_jax.method import objective as objective_lib
from ddo_jax.models import dit_presets
from ddo_jax.models import presets
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.runtime import work
from ddo_jax.samplers import heun
from ddo_jax.training import state as state_lib
from ddo_jax.training import step as step_lib
from experiments.bench import memory

_MODEL = flags.DEFINE_string(
  'model',
  'edm-cifar10-32x32-cond-vp',
  'A published name; see models/presets and models/dit_presets.',
)
_BATCH = flags.DEFINE_integer('batch', 4, 'Real rows a step; images a call.')
_CALLS = flags.DEFINE_integer('calls', 5, 'Timed calls; median reported.')
_REMAT = flags.DEFINE_bool('remat', False, 'Recompute activations.')
_OUTPUT = flags.DEFINE_string(
  'output', 'experiments/results/edm_speed.json', 'The file to write.'
)


def timed(call: Callable[[], Any], images: int) -> dict[str, float]:
  """Times a call; the first one compiles, the second one warms up."""
  seconds = []
  for _ in range(_CALLS.value + 2):
    start = time.perf_counter()
    jax.block_until_ready(call())
    seconds.append(time.perf_counter() - start)
  median = float(np.median(seconds[2:]))
  return {
    'seconds': median,
    'images_per_second': images / median,
    'compile_seconds': seconds[0] - median,
  }


def matmul_rate(size: int = 2048) -> float:
  """Returns the FLOP/s of a float32 matrix product at the highest precision."""
  matrix = jnp.ones((size, size))

  @jax.jit
  def product(a):
    return jnp.matmul(a, a, precision='highest')

  return 2 * size**3 / timed(lambda: product(matrix), 1)['seconds']


def step_speed(
  executor: devices_lib.Executor,
  model: diffusion.Diffusion,
  phase: config_lib.Phase,
  params: Any,
) -> dict[str, float]:
  """Times the step of a phase on random pixels; its state is donated.

  Args:
    executor: the devices.
    model: the model, with the phase's noise law.
    phase: the phase at a round, see `config.at_round`.
    params: θ and θ_ref, on the devices.
  """
  count = phase.batch_size
  random = np.random.default_rng(0)

  def pixels():
    return {
      'stored': random.integers(
        0, 256, (count, *model.example_shape), np.uint8
      ),
      'label': np.zeros(count, np.int32),
    }

  ids = {'id': np.arange(count, dtype=np.uint32)}
  real = executor.place_batch(pixels() | ids)
  fake = None
  if phase.objective.contrastive:
    fake = executor.place_batch(pixels())
  step = executor.compile_step(step_lib.train_step, sampler=None, accumulate=1)
  state = executor.make_state(
    lambda params: state_lib.at_start(params, model.rules, phase), params
  )
  numbers = jax.tree.map(jnp.float32, (model, phase))
  traced_model, traced_phase, key = executor.replicate(
    (*numbers, rng.stream(0))
  )

  def call():
    nonlocal state
    state, metrics = step(
      state, params, {}, real, fake, traced_model, traced_phase, key
    )
    return metrics

  return timed(call, count)


def phase_of(objective: objective_lib.Objective, rows: int) -> config_lib.Phase:
  """Returns a phase of one average, at its first round."""
  phase = config_lib.Phase(
    objective=objective,
    batch_size=rows,
    averages=config_lib.Averages(halflife=(1e5,)),
  )
  return config_lib.at_round(phase, 0)


def config_of(name: str) -> Any:
  """Returns a model's settings; its data are random pixels."""
  if name in dit_presets.PRESETS:
    return dataclasses.replace(dit_presets.get(name), latents=False)
  return presets.get(name)


def measure(name: str, rows: int) -> dict[str, Any]:
  """Returns all figures of one network."""
  mle_phase = phase_of(objective_lib.MLE(), rows)
  ddo_phase = phase_of(ddo.DDO(), rows)
  model = config_of(name).build(noise=ddo_phase.noise, remat=_REMAT.value)
  executor = devices_lib.Executor(config_lib.Executor(remat=_REMAT.value))
  params = executor.make_state(model.init, rng.stream(0))
  label = jnp.zeros(rows, jnp.int32)
  keys = jax.random.split(rng.stream(0), rows)
  x = jnp.ones((rows, *model.example_shape))
  sigma = jnp.ones(rows)
  denoise = jax.jit(model.denoise)
  sample = jax.jit(model.sample, static_argnums=4)
  sampler = heun.Heun(num_steps=18, sigma_min=0.002, sigma_max=80.0)
  result = {
    'forward': timed(lambda: denoise(params, x, sigma, label), rows),
    'mle_step': step_speed(executor, model, mle_phase, params),
    'ddo_step': step_speed(executor, model, ddo_phase, params),
    'heun_18': timed(lambda: sample(params, {}, label, keys, sampler), rows),
  }
  # XLA would count the blocks of a transformer, which are one loop, once.
  flops = work.of(model.denoise, params, x, sigma, label).total
  rate = flops / result['forward']['seconds']
  ceiling = matmul_rate()
  seconds = {key: value['seconds'] for key, value in result.items()}
  return result | {
    'ddo_over_mle': seconds['ddo_step'] / seconds['mle_step'],
    'forward_gflop_per_image': flops / rows / 1e9,
    'forward_gflop_per_second': rate / 1e9,
    'matmul_gflop_per_second': ceiling / 1e9,
    'step_bytes': memory.counted(model, ddo_phase, {}),
    'batch': rows,
    'remat': _REMAT.value,
    'environment': devices_lib.environment(),
  }


def main(_) -> None:
  result = measure(_MODEL.value, _BATCH.value)
  path = pathlib.Path(_OUTPUT.value)
  known = records.read_json(path) if path.exists() else {}
  records.write_json(path, known | {_MODEL.value: result})
  print(json.dumps(result, indent=1))


if __name__ == '__main__':
  app.run(main)
