"""Memory of a DDO step of the released VAR models, device by device.

python -m experiments.bench.var_memory
python -m experiments.bench.var_memory --compile  # ten minutes on two CPU cores

Counted from shapes, at the published microbatches: what stands throughout a
round, and what the backward pass of θ keeps of its rows. With --compile, beside
it what XLA allots to the whole step, encoding and fakes of a pool included, on
simulated devices if there are no others. No array is made for either. What the
result holds already is not measured again.
"""

import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

from absl import app
from absl import flags
import jax
import numpy as np

from ddo_jax import config as config_lib
from ddo_jax import models
from ddo_jax import rng
from ddo_jax.method import likelihood
from ddo_jax.models import var_presets
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import state as state_lib
from ddo_jax.training import step as step_lib
from experiments.bench import memory

_COMPILE = flags.DEFINE_bool('compile', False, 'Ask the compiler, too.')
_OUTPUT = flags.DEFINE_string(
  'output', 'experiments/results/var_memory.json', 'Result.'
)
# Real rows of a device's microbatch, and microbatches a step, as published.
PUBLISHED = {'var_d16': (16, 8), 'var_d30': (4, 32)}
DEVICES = (1, 4, 8)


def _phase(rows: int) -> config_lib.Phase:
  return config_lib.Phase(
    batch_size=rows, normalize=True, weight_decay=0.05, clip_norm=2.0
  )


def _model(name: str, dtype: str, remat: bool) -> tuple[Any, Any]:
  """A released model and the shapes of what is frozen."""
  knobs = dataclasses.replace(var_presets.get(name), dtype=dtype)
  executor = config_lib.Executor(remat=remat)
  config = config_lib.Config(model=knobs, executor=executor)
  tokenizer = jax.eval_shape(models.tokenizer(knobs).init, rng.stream(0))
  return models.build(config, config.ddo), {'tokenizer': tokenizer}


def _arguments(
  model: likelihood.LikelihoodModel,
  frozen: likelihood.Frozen,
  executor: devices_lib.Executor,
  phase: config_lib.Phase,
) -> list[Any]:
  """Shapes of what a step takes, and where it lies."""
  params = jax.eval_shape(model.init, rng.stream(0))
  create = functools.partial(state_lib.create, phase=phase)
  trees = (
    jax.eval_shape(create, params),
    jax.eval_shape(model.reduced, params),
    frozen,
  )
  zeros = lambda dtype, *shape: np.zeros((phase.batch_size, *shape), dtype)
  image, label = zeros(np.uint8, *model.image_shape), zeros(np.int32)
  fake = executor.place_batch({'stored': image, 'label': label})
  real = fake | {'id': executor.place_batch(zeros(np.uint32))}
  return [
    *(checkpoint.abstract(t, executor.state_shardings(t)) for t in trees),
    real,
    fake,
    *executor.replicate((state_lib.Hyper.of(phase, 0), rng.stream(0))),
  ]


def compiled(
  model: likelihood.LikelihoodModel, frozen: likelihood.Frozen, devices: int
) -> dict[str, float]:
  """What XLA allots on each device, GiB, at one real row a device."""
  executor = devices_lib.Executor(config_lib.Executor(kind='fsdp'), devices)
  phase = _phase(devices)
  args = _arguments(model, frozen, executor, phase)
  step = functools.partial(
    step_lib.train_step, model=model, phase=phase.static()
  )
  kept = jax.tree.map(lambda leaf: leaf.sharding, args[0])
  start = time.perf_counter()
  jitted = jax.jit(step, donate_argnums=0, out_shardings=(kept, None))
  done = jitted.lower(*args).compile()
  return {
    'allotted': memory.allotted(done) / 2**30,
    'compile seconds': time.perf_counter() - start,
  }


def measure(name: str, dtype: str, remat: bool) -> dict[str, Any]:
  """GiB of a model under some settings, on each number of devices."""
  rows, parts = PUBLISHED[name]
  model, frozen = _model(name, dtype, remat)
  gib = memory.counted(model, _phase(rows), frozen)
  if remat:  # the block in the works: of all blocks without, its share
    whole = memory.counted(_model(name, dtype, False)[0], _phase(rows), frozen)
    gib['block'] = whole['activations'] // model.transformer.depth
  gib = {key: size / 2**30 for key, size in gib.items()}
  activations = gib['activations'] + gib.get('block', 0)
  standing = sum(gib.values()) - activations
  # Of several microbatches the gradients are summed: one more of them.
  both = standing + gib['gradient'] * (parts > 1)
  alone = {n: standing / n + activations / rows for n in DEVICES}
  made = {
    'counted': gib,
    'a real row': activations / rows,
    'a device': {str(n): both / n + activations for n in DEVICES},
    'at one real row': {str(n): {'counted': alone[n]} for n in DEVICES},
  }
  if _COMPILE.value:
    for n in DEVICES:
      made['at one real row'][str(n)] |= compiled(model, frozen, n)
  return made


def main(_) -> None:
  if _COMPILE.value:
    jax.config.update('jax_num_cpu_devices', max(DEVICES))
  path, known = pathlib.Path(_OUTPUT.value), {}
  if path.exists():  # what was interrupted goes on
    known = records.read_json(path)['GiB']
  for name in PUBLISHED:
    for dtype in ('float32', 'bfloat16'):
      for remat in (False, True):
        key = f'{name}, {dtype}' + ', remat' * remat
        if key not in known:
          known[key] = measure(name, dtype, remat)
        print(key, json.dumps(known[key], indent=1), flush=True)
        made = {'GiB': known, 'environment': devices_lib.environment()}
        records.write_json(path, made)


if __name__ == '__main__':
  app.run(main)
