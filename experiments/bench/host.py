"""What the host does for a step of the loop, in microseconds.

python -m experiments.bench.host

The step's own arithmetic is left out: it is a stand-in that adds a number to
each array of a state, which has as many arrays as the CIFAR-10 recipe's (417 of
params; as many of the reference, of each of Adam's moments and of an average).
What is timed is the host's part, up to where each call returns:

* `read`: two batches of 512 images from memory, in the order of the data
* `place`: their way to the devices
* `dispatch`: the call of the compiled step
* `rest`: what the loop asks and says between two steps
* `logged`: a step whose metrics are fetched and written, beside the others'

Simulated devices share this machine's cores, so that what eight of them take is
more than eight real ones would.

After these, a checkpoint: `save_blocks` is how long the loop stands still, with
nothing under way and with the save before it under way; `whole` is when the
checkpoint is whole on disk.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import app
from absl import flags
from absl import logging as absl_logging

_DEVICES = flags.DEFINE_integer('devices', 0, 'Simulated; 0 plays 1 and 8.')
_STEPS = flags.DEFINE_integer('steps', 100, 'Timed steps; median reported.')
_LEAVES = flags.DEFINE_integer('leaves', 417, 'Arrays of the params.')
_SAVED = flags.DEFINE_integer('saved', 500, 'MB of the state that is saved.')
_OUTPUT = flags.DEFINE_string('output', 'experiments/results/host.json', '')

BATCH = 512
SHAPE = (32, 32, 3)


def stand_in(state, reference, frozen, real, fake, model, phase, key, **_):
  """A step of the loop's signature without its arithmetic."""
  import jax
  import jax.numpy as jnp

  del reference, frozen, fake, model, phase, key
  state = jax.tree.map(lambda leaf: leaf + 1, state)
  return state, {'loss': jnp.float32(real['id'].shape[0])}


def make_tree(executor: Any, size: int, shape: tuple[int, ...]) -> Any:
  """A state's four parts of `size` arrays each, on the devices."""
  import jax.numpy as jnp

  def make():
    return [[jnp.zeros(shape) for _ in range(size)] for _ in range(4)]

  return executor.make_state(make)


def measure_steps(folder: pathlib.Path) -> dict[str, float]:
  """Microseconds of each part of a step."""
  import jax
  import numpy as np

  from ddo_jax.data import loader
  from ddo_jax.data import sources
  from ddo_jax.runtime import devices as devices_lib
  from ddo_jax.runtime import layout as layout_lib
  from ddo_jax.runtime import progress
  from ddo_jax.runtime import records
  from ddo_jax.training import loop

  random = np.random.default_rng(0)
  images = random.integers(0, 256, (50_000, *SHAPE), np.uint8)
  source = sources.ArraySource('random', images, np.arange(50_000) % 10, 10)
  streams = [loader.batches(source, seed, BATCH, 0, 10**6) for seed in range(2)]
  executor = devices_lib.Executor(layout_lib.ExecutorConfig())
  step_fn = executor.compile_step(stand_in)
  state = make_tree(executor, _LEAVES.value, (16,))
  reference = make_tree(executor, _LEAVES.value, (16,))[0]
  key = executor.replicate(jax.random.key(0))
  agree = devices_lib.Agreement(executor)
  log = records.MetricsLog(folder)
  times: dict[str, list[float]] = {
    part: [] for part in ('read', 'place', 'dispatch', 'rest', 'logged')
  }

  def clock(part: str, before: float) -> float:
    now = time.perf_counter()
    times[part].append(1e6 * (now - before))
    return now

  with progress.follow('bench', None) as bar:
    for step in range(_STEPS.value + 5):
      now = time.perf_counter()
      real, fake = [next(stream) for stream in streams]
      now = clock('read', now)
      with executor.no_implicit_transfers():
        real = executor.place_batch(real)
        fake = executor.place_batch(fake)
        now = clock('place', now)
        state, metrics = step_fn(state, reference, {}, real, fake, (), (), key)
      now = clock('dispatch', now)
      agree(0, 0)
      for images in (10**5, 10**6, 10**7):
        loop._due(step, images, BATCH)
      bar.update(BATCH)
      clock('rest', now)
      jax.block_until_ready(state)
      now = time.perf_counter()
      record = {'stage': 'bench', 'kind': 'train', 'step': step, 'images': 0}
      log.write(record | devices_lib.fetch(metrics))
      clock('logged', now)
  return {
    part: round(statistics.median(values[5:]), 1)
    for part, values in times.items()
  }


def measure_save(folder: pathlib.Path) -> dict[str, Any]:
  """Seconds that a save keeps the loop."""
  import jax

  from ddo_jax.runtime import checkpoint
  from ddo_jax.runtime import devices as devices_lib
  from ddo_jax.runtime import layout as layout_lib
  from ddo_jax.training import state as state_lib

  executor = devices_lib.Executor(layout_lib.ExecutorConfig())
  size = _SAVED.value * 2**20 // (4 * 4 * 16)
  params, first, second, average = make_tree(executor, 16, (size,))
  state = state_lib.TrainState(
    step=executor.replicate(jax.numpy.int32(0)),
    params=params,
    ema={'average': average},
    opt_state=[first, second],
  )
  jax.block_until_ready(state)
  blocks = []
  whole = []
  with checkpoint.Checkpoints(folder / 'checkpoints') as checkpoints:
    for step in range(1, 5):
      begin = time.perf_counter()
      checkpoints.save(state, step)
      blocks.append(round(time.perf_counter() - begin, 2))
      if step != 3:  # the fourth finds the third under way
        checkpoints.wait()
        whole.append(round(time.perf_counter() - begin, 2))
  return {
    'megabytes': _SAVED.value,
    'save_blocks_first': blocks[0],  # compiles the checksums
    'save_blocks': blocks[1],
    'save_blocks_while_one_is_under_way': blocks[3],
    'whole': whole[1],
  }


def play(devices: int) -> dict[str, Any]:
  """Measures in a process of so many simulated devices."""
  count = f'--xla_force_host_platform_device_count={devices}'
  command = [sys.executable, '-m', 'experiments.bench.host']
  chosen = {flag.name: flag.value for flag in (_STEPS, _LEAVES, _SAVED)}
  done = subprocess.run(
    [*command, f'--devices={devices}']
    + [f'--{name}={value}' for name, value in chosen.items()],
    env=os.environ | {'XLA_FLAGS': count, 'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    check=True,
    text=True,
  )
  return json.loads(done.stdout)


def main(_) -> None:
  absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax speaks through absl
  if _DEVICES.value:
    with tempfile.TemporaryDirectory() as name:
      folder = pathlib.Path(name)
      result = {'microseconds': measure_steps(folder)}
      if _DEVICES.value == 1:
        result['checkpoint_seconds'] = measure_save(folder)
    print(json.dumps(result))
    return
  from ddo_jax.runtime import devices as devices_lib
  from ddo_jax.runtime import records

  results: dict[str, Any] = {'batch_size': BATCH, 'leaves': _LEAVES.value}
  for devices in (1, 8):
    results[f'devices_{devices}'] = play(devices)
  results['environment'] = devices_lib.environment() | {
    'cores': os.cpu_count(),
    'load_average': round(os.getloadavg()[0], 1),
  }
  records.write_json(pathlib.Path(_OUTPUT.value), results)
  print(json.dumps(results, indent=1))


if __name__ == '__main__':
  app.run(main)
