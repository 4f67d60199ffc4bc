"""Time and memory of DDO's step by the precision of its products, on a GPU.

python -m experiments.bench.precision

For each recipe the step of one microbatch is compiled and timed under
`config.model.precision` 'highest', 'high' and 'default' (TF32), and with every
product made of three: of TF32 numbers, or of bfloat16 ones that go to the
tensor cores as such. Beside time and memory stands how far the gradient is from
that under 'highest', where θ = θ_ref: if a chip or a compiler does not do what
its name says, it shows there. The weights are random, none of them zero.

It was not run on a GPU yet. On a CPU, where all that changes is the rounding by
hand, `--rows=2 --calls=1` shows that it runs.
"""

import dataclasses
import functools
import importlib
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
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import state as state_lib
from ddo_jax.training import step as step_lib
from experiments import rounding

# name: (config.model.precision, how products are split by hand)
KINDS = {
  'highest': ('highest', None),
  'high': ('high', None),
  'default': ('default', None),
  'tf32x3': ('default', rounding.KINDS['tf32x3']),
  'bf16x3': ('default', rounding.Rounding(7, 3, jnp.bfloat16)),
}


def _pixels(model: Any, count: int, seed: int) -> dict[str, Any]:
  """Returns random rows as stored."""
  random = np.random.default_rng(seed)
  values = random.integers(0, 256, (count, *model.example_shape), np.uint8)
  return {'stored': values, 'label': np.zeros(count, np.int32)}


def _params(model: Any) -> Any:
  """Returns weights without a zero: at first the last layer hides the rest."""
  numbers = np.random.default_rng(0)

  def normal(leaf):
    return jnp.asarray(0.05 * numbers.standard_normal(leaf.shape, np.float32))

  return model.rules.project(
    jax.tree.map(normal, jax.eval_shape(model.init, rng.stream(0)))
  )


def measure(
  config: config_lib.Config, rows: int, kind: str, calls: int
) -> tuple[dict[str, float], Any]:
  """Compiles and times a step; returns its figures, and a gradient.

  Args:
    config: the recipe.
    rows: real rows of the microbatch.
    kind: one of `KINDS`.
    calls: the number of timed calls.
  """
  precision, split = KINDS[kind]
  model_config: Any = config.model
  model_config = dataclasses.replace(model_config, precision=precision)
  phase = dataclasses.replace(config.ddo, batch_size=rows)
  phase = config_lib.at_round(phase, 0)
  model = model_config.build(noise=phase.noise)
  params = _params(model)
  reference = jax.tree.map(jnp.copy, params)
  state = state_lib.at_start(params, model.rules, phase)
  real = _pixels(model, rows, 0) | {'id': np.arange(rows, dtype=np.uint32)}
  fake = _pixels(model, rows, 1)
  key = rng.stream(0)
  with rounding.trained_in(split):
    start = time.perf_counter()
    step = jax.jit(step_lib.train_step, donate_argnums=0)
    args = (reference, {}, real, fake, model, phase, key)
    compiled = step.lower(state, *args).compile()
    compile_seconds = time.perf_counter() - start
    gradient = jax.jit(functools.partial(step_lib.gradient_of, sampler=None))
    batch = step_lib.Microbatch(
      real=real,
      fake=fake,
      keys=rng.per_example(key, real['id']),
      dropped=np.zeros(rows, bool),
    )
    _, _, grads = gradient(params, reference, {}, batch, model, phase)
  grads = jax.device_get(grads)
  del params
  seconds = []
  for _ in range(calls + 2):
    start = time.perf_counter()
    state, metrics = compiled(state, *args)
    jax.block_until_ready(metrics)
    seconds.append(time.perf_counter() - start)
  memory = compiled.memory_analysis()
  size = memory.argument_size_in_bytes + memory.output_size_in_bytes
  size += memory.temp_size_in_bytes - memory.alias_size_in_bytes
  figures = {
    'seconds': float(np.median(seconds[2:])),
    'compile_seconds': compile_seconds,
    'gib': size / 2**30,
  }
  return figures, grads


def _flat(tree: Any) -> np.ndarray:
  leaves = jax.tree.leaves(tree)
  return np.concatenate([np.asarray(leaf, float).ravel() for leaf in leaves])


def compare(
  config: config_lib.Config, rows: int, calls: int
) -> dict[str, dict[str, float]]:
  """Measures all kinds; returns their figures by name."""
  found = {}
  exact = None
  for kind in KINDS:
    found[kind], grads = measure(config, rows, kind, calls)
    grads = _flat(grads)
    exact = grads if exact is None else exact
    error = np.linalg.norm(grads - exact) / np.linalg.norm(exact)
    found[kind]['gradient_error'] = float(error)
    print(kind, json.dumps(found[kind]), flush=True)
  return found


def main(_) -> None:
  given = flags.FLAGS
  result: dict[str, Any] = {'environment': devices_lib.environment()}
  for name, rows in zip(given.recipes, given.rows, strict=True):
    recipe = importlib.import_module(f'configs.{name}').get_config()
    result[name] = compare(recipe, int(rows), given.calls)
    result[name]['rows'] = int(rows)
    records.write_json(pathlib.Path(given.output), result)


if __name__ == '__main__':
  flags.DEFINE_list(
    'recipes', ['cifar10_edm_uncond', 'imagenet64_edm2_s'], 'Names in configs/.'
  )
  flags.DEFINE_list(
    'rows', ['128', '32'], 'Real rows of a microbatch, one for each recipe.'
  )
  flags.DEFINE_integer('calls', 10, 'Timed calls; median reported.')
  flags.DEFINE_string(
    'output', 'experiments/results/precision_gpu.json', 'The file to write.'
  )
  app.run(main)
