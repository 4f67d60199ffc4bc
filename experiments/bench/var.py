r"""Speed and peak memory of a token model's sampling and of its step.

python -m experiments.bench.var
python -m experiments.bench.var --preset=var_d16 --rows=16  # an accelerator
python -m experiments.bench.var --preset=c2i_B_256 --dtype=float32 --rows=1 \
  --blocks=2 --output=experiments/results/llamagen.json

Times are medians of alternating blocks, with random weights. DDO's step is
measured with fakes of a pool, and with fakes drawn inside. The memory is what
XLA allots to a call, its arguments included; a step's state is not donated.
"""

from collections.abc import Callable
import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from configs import digits_var
from ddo_jax import config as config_lib
from ddo_jax import rng
from ddo_jax.method import negatives as negatives_lib
from ddo_jax.method import objective as objective_lib
from ddo_jax.models import llamagen_presets
from ddo_jax.models import var_presets
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import memory
from ddo_jax.runtime import records
from ddo_jax.samplers import ancestral
from ddo_jax.training import state as state_lib
from ddo_jax.training import step as step_lib

# A jitted function and its arguments.
Call = tuple[Callable[..., Any], tuple[Any, ...]]

_PRESET = flags.DEFINE_string(
  'preset', '', "A released model; '' is that of configs/digits_var.py."
)
_DTYPE = flags.DEFINE_enum(
  'dtype',
  'bfloat16',
  ['bfloat16', 'float32'],
  "Of a released model's products; a CPU has to emulate bfloat16.",
)
_ROWS = flags.DEFINE_integer('rows', 64, 'Real rows of a step, and of samples.')
_BLOCKS = flags.DEFINE_integer('blocks', 5, 'Timed blocks; median reported.')
_OUTPUT = flags.DEFINE_string(
  'output', 'experiments/results/var.json', 'The file to write.'
)


def _measured(calls: dict[str, Call]) -> dict[str, dict[str, float]]:
  """Returns each call's median seconds, those to compile it, and its MiB.

  The first block of calls is left out.
  """
  compiled = {}
  compiling = {}
  for name, (function, args) in calls.items():
    start = time.perf_counter()
    compiled[name] = function.lower(*args).compile()
    compiling[name] = time.perf_counter() - start
  seconds = {name: [] for name in calls}
  for block in range(_BLOCKS.value + 1):
    for name, (_, args) in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(compiled[name](*args))
      if block:
        seconds[name].append(time.perf_counter() - start)
  return {
    name: {
      'seconds': float(np.median(seconds[name])),
      'compile seconds': compiling[name],
      'MiB': memory.allotted(program) / 2**20,
    }
    for name, program in compiled.items()
  }


def _setting() -> config_lib.Config:
  """Returns the digits' recipe, with the released model that was asked for."""
  config = digits_var.get_config()
  if _PRESET.value:
    presets = var_presets
    if _PRESET.value in llamagen_presets.PRESETS:
      presets = llamagen_presets
    config.model = presets.get(_PRESET.value)
    config.model.dtype = _DTYPE.value
  return config


def _calls(config: config_lib.Config) -> dict[str, Call]:
  """Returns what is measured, by name."""
  rows = _ROWS.value
  model = config.model.build()
  learner = config.model.build_tokenizer()
  params = jax.jit(model.init)(rng.stream(0))
  frozen = {'tokenizer': jax.jit(learner.init)(rng.stream(1))}
  label = jnp.arange(rows, dtype=jnp.int32) % config.model.num_classes
  ids = jnp.arange(rows, dtype=jnp.uint32)
  keys = rng.per_example(rng.stream(2), ids)

  def drawing(guidance):
    sampler = ancestral.Ancestral(guidance=guidance)
    function = jax.jit(functools.partial(model.sample, sampler=sampler))
    return function, (params, frozen, label, keys)

  shape = (rows, *model.codec.stored_shape(model.example_shape))
  random = np.random.RandomState(0)
  images = random.randint(0, model.codec.pixel_values, shape)
  stored = jnp.asarray(images, jnp.uint8)
  batch = {'stored': stored, 'label': label, 'id': ids}

  round_zero = config_lib.at_round(config.ddo, 0)
  state = state_lib.at_start(params, model.rules, round_zero)
  reference = model.rules.reduce(params)
  step = functools.partial(step_lib.train_step, sampler=ancestral.Ancestral())

  def stepping(**changes):
    phase = dataclasses.replace(config.ddo, batch_size=rows, **changes)
    phase = config_lib.at_round(phase, 0)
    pool = None
    if phase.used_negatives.needs_pool:
      pool = batch
    args = (state, reference, frozen, batch, pool, model, phase, rng.stream(3))
    return jax.jit(step), args

  return {
    'sample': drawing(0.0),
    'sample guided': drawing(1.5),
    'MLE step': stepping(objective=objective_lib.MLE()),
    'DDO step, pool': stepping(negatives=negatives_lib.Pool()),
    'DDO step, online': stepping(negatives=negatives_lib.Online()),
  }


def main(_) -> None:
  config = _setting()
  rows = _ROWS.value
  length = config.model.build().network.length
  results = _measured(_calls(config))
  for result in results.values():
    result['images/s'] = rows / result['seconds']
    result['tokens/s'] = length * result['images/s']
  made = {
    'model': _PRESET.value or config.name,
    'dtype': config.model.dtype,
    'rows': rows,
    'blocks': _BLOCKS.value,
    'calls': results,
    'environment': devices_lib.environment(),
  }
  records.write_json(pathlib.Path(_OUTPUT.value), made)
  print(json.dumps(made, indent=1))


if __name__ == '__main__':
  app.run(main)
