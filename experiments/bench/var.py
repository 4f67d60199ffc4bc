"""Memory of the released VAR models; speed of sampling and of the step.

python -m experiments.bench.var
python -m experiments.bench.var --preset=var_d16 --rows=16  # an accelerator

Memory is counted, not measured: what stands on a device throughout a round.
Times are medians of alternating blocks with random weights; DDO's step is
measured with fakes of a pool, and with fakes drawn inside.
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
from ddo_jax import likelihood
from ddo_jax import models
from ddo_jax import parallel
from ddo_jax import records
from ddo_jax import rng
from ddo_jax import train_state
from ddo_jax import train_step
from ddo_jax.models import var_presets
from ddo_jax.samplers import scalewise

_PRESET = flags.DEFINE_string(
  'preset', '', 'A released model; empty: that of configs/digits_var.py.'
)
_ROWS = flags.DEFINE_integer('rows', 64, 'Real rows of a step, and of samples.')
_BLOCKS = flags.DEFINE_integer('blocks', 5, 'Timed blocks; median reported.')
_OUTPUT = flags.DEFINE_string(
  'output', 'experiments/results/var.json', 'Result.'
)


def _gib(tree: Any, size: int = 4) -> float:
  return size * sum(x.size for x in jax.tree.leaves(tree)) / 2**30


def memory(name: str, devices: int) -> dict[str, float]:
  """GiB a device: 'pmap' keeps all whole, 'fsdp' splits over the devices."""
  config = config_lib.Config(model=var_presets.get(name))
  model = models.build(config, config.ddo)
  weights = _gib(jax.eval_shape(model.init, rng.stream(0)))
  learner = models.tokenizer(config.model)
  tokenizer = _gib(jax.eval_shape(learner.init, rng.stream(0)))
  whole = 5 * weights + tokenizer  # θ, two moments, gradient, θ_ref
  length, knobs = model.example_shape[0], config.model
  cache = 2 * knobs.depth * length * knobs.width * 2 / 2**30
  logits = 2 * knobs.chunk * knobs.tokenizer.vocab * 4 / 2**30
  return {
    'weights': weights,
    'tokenizer': tokenizer,
    'pmap': whole,
    f'fsdp {devices}': whole / devices,
    # Beside that, for each real row of a microbatch:
    'cache a row': cache,  # of sampling, bfloat16
    'logits a row': logits,  # of a real and a fake row
    'residuals a row': 2 * knobs.depth * length * knobs.width * 4 / 2**30,
  }


def _median(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
  """Seconds of each, after a first call that compiles."""
  seconds = {name: [] for name in calls}
  for block in range(_BLOCKS.value + 1):
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      if block:
        seconds[name].append(time.perf_counter() - start)
  return {name: float(np.median(values)) for name, values in seconds.items()}


def _setting() -> config_lib.Config:
  config = digits_var.get_config()
  if _PRESET.value:
    config.model = var_presets.get(_PRESET.value)
    config.model.dtype = 'bfloat16'
  return config


def _weights(
  config: config_lib.Config, model: likelihood.LikelihoodModel
) -> tuple[Any, Any]:
  """Random params of the model, and frozen ones."""
  learner = models.tokenizer(config.model)
  params = jax.jit(model.init)(rng.stream(0))
  return params, {'tokenizer': jax.jit(learner.init)(rng.stream(1))}


def speed(config: config_lib.Config) -> dict[str, float]:
  """Tokens/s of sampling; ms of the steps."""
  rows = _ROWS.value
  model = models.build(config, config.ddo)
  params, frozen = _weights(config, model)
  label = jnp.arange(rows, dtype=jnp.int32) % config.model.num_classes
  keys = rng.per_example(rng.stream(2), jnp.arange(rows, dtype=jnp.uint32))

  def drawing(guidance):
    sampler = scalewise.Scalewise(guidance=guidance)
    fn = jax.jit(functools.partial(model.sample, sampler=sampler))
    return lambda: fn(params, frozen, label, keys)

  draw = np.random.RandomState(0).randint(
    0, model.levels, (rows, *model.image_shape)
  )
  raw = {
    'image': jnp.asarray(draw, jnp.uint8),
    'label': label,
    'id': jnp.arange(rows, dtype=jnp.uint32),
  }

  def stepping(**changes):
    phase = dataclasses.replace(config.ddo, batch_size=rows, **changes)
    static = {'model': model, 'phase': phase, 'sampler': scalewise.Scalewise()}
    fn = jax.jit(functools.partial(train_step.train_step, **static))
    state = train_state.create(params, phase)
    hyper = train_state.Hyper.of(phase, 0)
    pool = raw if (phase.objective, phase.fakes) == ('ddo', 'pool') else None
    args = (state, params, frozen, raw, pool, hyper, rng.stream(3))
    return lambda: fn(*args)

  seconds = _median(
    {
      'sample': drawing(0.0),
      'sample guided': drawing(1.5),
      'mle': stepping(objective='mle'),
      'ddo, pool': stepping(fakes='pool'),
      'ddo, online': stepping(fakes='online'),
    }
  )
  tokens = rows * model.example_shape[0]
  result = {
    f'{name}, tokens/s': tokens / seconds.pop(name)
    for name in ('sample', 'sample guided')
  }
  result |= {f'{name} step, ms': 1e3 * s for name, s in seconds.items()}
  result['ddo over mle'] = seconds['ddo, pool'] / seconds['mle']
  return result


def main(_) -> None:
  config = _setting()
  results = {
    'memory, GiB': {n: memory(n, 8) for n in ('var_d16', 'var_d30')},
    'speed': {'model': _PRESET.value or config.name, 'rows': _ROWS.value},
    'environment': parallel.environment(),
  }
  results['speed'] |= speed(config)
  records.write_json(pathlib.Path(_OUTPUT.value), results)
  print(json.dumps(results, indent=1))


if __name__ == '__main__':
  app.run(main)
