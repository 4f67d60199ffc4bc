"""Step time, and the share of the loop that waits for the host.

python -m experiments.bench.step_time

There are two configurations, the digits MLP and a CIFAR-shaped small U-Net. For
each of them four things are measured after warm-up, as medians of alternating
blocks: the pure step, with its arrays already on the devices; the loop with its
data pipeline and logging; the share of the loop that this adds; and DDO's step
against MLE's of the same batch.
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
import jax.numpy as jnp
import numpy as np

from configs import digits
from ddo_jax import config as config_lib
from ddo_jax import rng
from ddo_jax.data import sources
from ddo_jax.method import objective as objective_lib
from ddo_jax.models import toy
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import loop as loop_lib
from ddo_jax.training import state as state_lib
from ddo_jax.training import step as step_lib

_BLOCKS = flags.DEFINE_integer('blocks', 7, 'Timed blocks; median reported.')
_OUTPUT = flags.DEFINE_string(
  'output', 'experiments/results/step_time.json', 'The file to write.'
)


def cifar_shaped() -> config_lib.Config:
  """Returns the digits' recipe with a small U-Net on 32×32×3 images."""
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
  config.pretrain.batch_size = 32
  config.ddo.batch_size = 32
  return config


def make_job(
  config: config_lib.Config,
  name: str,
  objective: objective_lib.Objective,
  folder: pathlib.Path,
  steps: int,
) -> loop_lib.Job:
  """Returns a training job on random images, without evaluation."""
  rhythm = dataclasses.replace(
    config.ddo.rhythm,
    eval_images=0,
    log_images=max(1, steps // 10) * config.ddo.batch_size,
  )
  phase = dataclasses.replace(
    config.ddo,
    objective=objective,
    images=steps * config.ddo.batch_size,
    rhythm=rhythm,
  )
  phase = config_lib.at_round(phase, 0)
  model = config.model.build(noise=phase.noise)
  executor = devices_lib.Executor(config.executor)
  random = np.random.RandomState(0)
  pixel_values = model.codec.pixel_values
  images = random.randint(0, pixel_values, (2_000, *model.example_shape))
  labels = np.arange(2_000, dtype=np.int32) % 10
  source = sources.ArraySource(
    'random', images.astype(np.uint8), labels, 10, pixel_values
  )
  start = functools.partial(executor.make_state, model.init, rng.stream(0))
  return loop_lib.Job(
    name=name,
    folder=folder,
    seed=0,
    phase=phase,
    model=model,
    start=start,
    reference=start(),
    frozen={},
    real=source,
    fake=source if objective.contrastive else None,
    sampler=None,
    executor=executor,
    accumulate=1,
    log=records.MetricsLog(folder),
    evaluate=None,
    metric='',
  )


def pure_step(job: loop_lib.Job, steps: int) -> float:
  """Returns the seconds of a step with everything on the devices."""
  executor = job.executor
  step_fn = executor.compile_step(
    step_lib.train_step, sampler=job.sampler, accumulate=job.accumulate
  )
  state = executor.make_state(
    lambda params: state_lib.at_start(params, job.model.rules, job.phase),
    job.reference,
  )
  real, fake = next(loop_lib.batches(job, 0))
  numbers = jax.tree.map(jnp.float32, (job.model, job.phase))
  model, phase, key = executor.replicate((*numbers, rng.stream(0)))
  for step in range(steps + 2):
    if step == 2:  # after warm-up
      jax.block_until_ready(state)
      start = time.perf_counter()
    state, _ = step_fn(state, job.reference, {}, real, fake, model, phase, key)
  jax.block_until_ready(state)
  return (time.perf_counter() - start) / steps


def loop(job: loop_lib.Job, block: int) -> float:
  """Returns the seconds of a step of the real loop, from its own records."""
  name = f'{job.name}_{block}'
  loop_lib.run(dataclasses.replace(job, name=name, folder=job.folder / name))
  rates = [record['images_per_second'] for record in job.log.read(name)]
  return job.phase.batch_size / float(np.median(rates[2:]))


def measure(config: config_lib.Config, steps: int) -> dict[str, float]:
  """Returns all figures of one configuration; its blocks alternate."""
  batch = config.ddo.batch_size
  objectives = {'mle': objective_lib.MLE(), 'ddo': config.ddo.objective}
  result = {}
  with tempfile.TemporaryDirectory() as folder:
    for name, objective in objectives.items():
      job = make_job(config, name, objective, pathlib.Path(folder), steps)
      pure = []
      looped = []
      for block in range(_BLOCKS.value):
        pure.append(pure_step(job, steps))
        looped.append(loop(job, block))
      shares = 1 - np.array(pure) / np.array(looped)
      seconds = float(np.median(pure))
      result[f'{name}_step_ms'] = seconds * 1e3
      result[f'{name}_images_per_second'] = batch / seconds
      result[f'{name}_loop_ms'] = float(np.median(looped)) * 1e3
      result[f'{name}_host_share'] = float(np.median(shares))
  result['ddo_over_mle'] = result['ddo_step_ms'] / result['mle_step_ms']
  return result


def main(_) -> None:
  absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax speaks through absl
  results = {
    'digits': measure(digits.get_config(), 800),
    'cifar_shaped': measure(cifar_shaped(), 12),
  }
  results['environment'] = devices_lib.environment()
  records.write_json(pathlib.Path(_OUTPUT.value), results)
  print(json.dumps(results, indent=1))


if __name__ == '__main__':
  app.run(main)
