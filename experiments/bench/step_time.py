"""Step time and the share of the loop that waits for the host.

python -m experiments.bench.step_time

Two configurations: the digits MLP and a CIFAR-shaped small U-Net. For each,
after warm-up and as medians of alternating blocks: the pure step (arrays
already on the devices), the loop with its data pipeline and logging, the share
of the loop that this adds, and DDO's step against MLE's of the same batch.
"""

import dataclasses
import functools
import json
import pathlib
import tempfile
import time

from absl import app
from absl import flags
from absl import logging as absl_logging
import jax
import numpy as np

from configs import digits
from ddo_jax import config as config_lib
from ddo_jax import models
from ddo_jax import rng
from ddo_jax.data import sources
from ddo_jax.models import toy
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import loop as loop_lib
from ddo_jax.training import state as state_lib
from ddo_jax.training import step as step_lib

_BLOCKS = flags.DEFINE_integer('blocks', 7, 'Timed blocks; median reported.')
_OUTPUT = flags.DEFINE_string(
  'output', 'experiments/results/step_time.json', 'Result.'
)


def cifar_shaped() -> config_lib.Config:
  """A small U-Net on random 32×32×3 images."""
  config = digits.get_config()
  config.name = 'cifar_shaped'
  config.model = toy.ToyConfig(
    network='unet',
    hidden=16,
    blocks=1,
    image_shape=(32, 32, 3),
    sigma_data=0.5,
    pixel_values=256,
  )
  for phase in (config.pretrain, config.ddo):
    phase.batch_size = 32
  return config


def make_job(
  config: config_lib.Config, objective: str, folder: pathlib.Path, steps: int
) -> loop_lib.Job:
  """A training job on random images, without evaluation."""
  phase = dataclasses.replace(
    config.ddo,
    objective=objective,
    images=steps * config.ddo.batch_size,
    eval_images=0,
    log_images=max(1, steps // 10) * config.ddo.batch_size,
  )
  model = models.build(config, phase)
  executor = devices_lib.Executor(config.executor)
  draw = np.random.RandomState(0)
  images = draw.randint(0, model.pixel_values, (2_000, *model.example_shape))
  labels = np.arange(2_000, dtype=np.int32) % 10
  source = sources.ArraySource(
    'random', images.astype(np.uint8), labels, 10, model.pixel_values
  )
  start = functools.partial(executor.make_state, model.init, rng.stream(0))
  return loop_lib.Job(
    name=objective,
    folder=folder,
    seed=0,
    phase=phase,
    round_index=0,
    model=model,
    start=start,
    reference=start(),
    frozen={},
    real=source,
    fake=source if objective == 'ddo' else None,
    sampler=None,
    executor=executor,
    accumulate=1,
    log=records.MetricsLog(folder),
    evaluate=None,
    metric='',
  )


def pure_step(job: loop_lib.Job, steps: int) -> float:
  """Seconds a step with everything on the devices."""
  step_fn = job.executor.compile_step(
    step_lib.train_step,
    model=job.model,
    phase=job.phase.static(),
    accumulate=1,
  )
  create = functools.partial(state_lib.create, phase=job.phase)
  state = job.executor.make_state(create, job.reference)
  real, fake = next(loop_lib.batches(job, 0))
  hyper, key = job.executor.replicate(
    (state_lib.Hyper.of(job.phase, 0), rng.stream(0))
  )
  for step in range(steps + 2):
    if step == 2:  # after warm-up
      jax.block_until_ready(state)
      start = time.perf_counter()
    state, _ = step_fn(state, job.reference, {}, real, fake, hyper, key)
  jax.block_until_ready(state)
  return (time.perf_counter() - start) / steps


def loop(job: loop_lib.Job, block: int) -> float:
  """Seconds a step of the real loop, from its own records."""
  name = f'{job.name}_{block}'
  loop_lib.run(dataclasses.replace(job, name=name, folder=job.folder / name))
  rates = [r['images_per_second'] for r in job.log.read(name)]
  return job.phase.batch_size / float(np.median(rates[2:]))


def measure(config: config_lib.Config, steps: int) -> dict[str, float]:
  """All figures of one configuration; its blocks alternate."""
  result, batch = {}, config.ddo.batch_size
  with tempfile.TemporaryDirectory() as folder:
    for objective in ('mle', 'ddo'):
      job = make_job(config, objective, pathlib.Path(folder), steps)
      blocks = np.array(
        [(pure_step(job, steps), loop(job, b)) for b in range(_BLOCKS.value)]
      )
      pure, looped = np.median(blocks, axis=0)
      shares = 1 - blocks[:, 0] / blocks[:, 1]
      result[f'{objective}_step_ms'] = pure * 1e3
      result[f'{objective}_images_per_second'] = batch / pure
      result[f'{objective}_loop_ms'] = looped * 1e3
      result[f'{objective}_host_share'] = float(np.median(shares))
  result['ddo_over_mle'] = result['ddo_step_ms'] / result['mle_step_ms']
  return result


def main(_) -> None:
  absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax's voice
  results = {
    'digits': measure(digits.get_config(), 800),
    'cifar_shaped': measure(cifar_shaped(), 12),
  }
  results['environment'] = devices_lib.environment()
  records.write_json(pathlib.Path(_OUTPUT.value), results)
  print(json.dumps(results, indent=1))


if __name__ == '__main__':
  app.run(main)
