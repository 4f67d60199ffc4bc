"""Memory of a DDO step of the released VAR models, device by device.

python -m experiments.bench.var_memory
python -m experiments.bench.var_memory --compile  # ten minutes on two CPU cores

Two things are counted from shapes, at the published microbatches: what stands
throughout a round, and what the backward pass of θ keeps of its rows. With
--compile there is beside them what XLA allots to the whole step, encoding and
fakes of a pool included, on simulated devices if there are no others. No array
is made for either. What the result holds already is not measured again.
"""

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
from ddo_jax.method import likelihood
from ddo_jax.models import var_presets
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import memory as memory_lib
from ddo_jax.runtime import records
from ddo_jax.training import state as state_lib
from ddo_jax.training import step as step_lib
from experiments.bench import memory

_COMPILE = flags.DEFINE_bool('compile', False, 'Ask the compiler, too.')
_OUTPUT = flags.DEFINE_string(
  'output', 'experiments/results/var_memory.json', 'The file to write.'
)
# Real rows of a device's microbatch, and microbatches a step, as published.
PUBLISHED = {'var_d16': (16, 8), 'var_d30': (4, 32)}
DEVICES = (1, 4, 8)


def _phase(rows: int) -> config_lib.Phase:
  """Returns the phase of one microbatch, at its first round."""
  phase = config_lib.Phase(
    objective=ddo.DDO(normalize=True),
    batch_size=rows,
    optimizer=config_lib.Optimizer(weight_decay=0.05, clip_norm=2.0),
  )
  return config_lib.at_round(phase, 0)


def _model(
  name: str, dtype: str, remat: bool
) -> tuple[likelihood.LikelihoodModel, likelihood.Frozen]:
  """Returns a released model, and the shapes of its frozen weights."""
  knobs = dataclasses.replace(var_presets.get(name), dtype=dtype)
  learner = knobs.build_tokenizer()
  frozen = {'tokenizer': jax.eval_shape(learner.init, rng.stream(0))}
  return knobs.build(remat=remat), frozen


def _arguments(
  model: likelihood.LikelihoodModel,
  frozen: likelihood.Frozen,
  executor: devices_lib.Executor,
  phase: config_lib.Phase,
) -> list[Any]:
  """Returns the shapes of what a step takes, and where it lies."""
  params = jax.eval_shape(model.init, rng.stream(0))

  def fresh(params):
    return state_lib.at_start(params, model.rules, phase)

  def placed(tree):
    return checkpoint.abstract(tree, executor.state_shardings(tree))

  rows = phase.batch_size
  image_shape = model.codec.stored_shape(model.example_shape)
  fake = executor.place_batch(
    {
      'stored': np.zeros((rows, *image_shape), np.uint8),
      'label': np.zeros(rows, np.int32),
    }
  )
  real = fake | {'id': executor.place_batch(np.zeros(rows, np.uint32))}
  numbers = jax.tree.map(jnp.float32, (model, phase))
  traced_model, traced_phase, key = executor.replicate(
    (*numbers, rng.stream(0))
  )
  return [
    placed(jax.eval_shape(fresh, params)),
    placed(jax.eval_shape(model.rules.reduce, params)),
    placed(frozen),
    real,
    fake,
    traced_model,
    traced_phase,
    key,
  ]


def compiled(
  model: likelihood.LikelihoodModel, frozen: likelihood.Frozen, devices: int
) -> dict[str, float]:
  """Returns the GiB that XLA allots on each device at one real row a device."""
  executor = devices_lib.Executor(config_lib.Executor(kind='fsdp'), devices)
  args = _arguments(model, frozen, executor, _phase(devices))
  start = time.perf_counter()
  step = executor.traceable_step(step_lib.train_step)
  done = step.lower(*args).compile()
  return {
    'allotted': memory_lib.allotted(done) / 2**30,
    'compile seconds': time.perf_counter() - start,
  }


def measure(name: str, dtype: str, remat: bool) -> dict[str, Any]:
  """Returns the GiB of a model under some settings, by number of devices."""
  rows, parts = PUBLISHED[name]
  phase = _phase(rows)
  model, frozen = _model(name, dtype, remat)
  gib = memory.counted(model, phase, frozen)
  if remat:
    # The block in the works has the activations of its share of all blocks.
    plain, _ = _model(name, dtype, remat=False)
    whole = memory.counted(plain, phase, frozen)
    gib['block'] = whole['activations'] // var_presets.get(name).depth
  gib = {key: size / 2**30 for key, size in gib.items()}
  activations = gib['activations'] + gib.get('block', 0)
  standing = sum(gib.values()) - activations
  # Several microbatches sum up their gradients, which takes one more of them.
  both = standing + gib['gradient'] * (parts > 1)
  a_row = activations / rows
  made = {
    'counted': gib,
    'a real row': a_row,
    'a device': {str(n): both / n + activations for n in DEVICES},
    'at one real row': {
      str(n): {'counted': standing / n + a_row} for n in DEVICES
    },
  }
  if _COMPILE.value:
    for n in DEVICES:
      made['at one real row'][str(n)] |= compiled(model, frozen, n)
  return made


def main(_) -> None:
  if _COMPILE.value:
    jax.config.update('jax_num_cpu_devices', max(DEVICES))
  path = pathlib.Path(_OUTPUT.value)
  known = {}
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
