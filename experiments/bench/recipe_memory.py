"""Memory of each recipe's steps on the devices that its first lines state.

python -m experiments.bench.recipe_memory
python -m experiments.bench.recipe_memory --recipe=digits --recipe=fashion_edm

Beside the count, by which `auto` chooses, there is what XLA plans for the whole
step on as many simulated CPU devices; no array of the model is made. XLA is
told to schedule for little memory, as it does on accelerators. It computes
bfloat16 in float32 on a CPU, and so plans more than a GPU takes; recipes with
such products are measured once more with all of them in float32, where the two
compare. What the result holds already is counted again, and not compiled again.
(A CPU heeds no remat where blocks are not a loop, see docs/scaling.md.)
"""

from collections.abc import Iterator
from collections.abc import Sequence
import importlib
import os
import pathlib
import re
import time
from typing import Any

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import config as config_lib
from ddo_jax import rng
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import layout as layout_lib
from ddo_jax.runtime import memory
from ddo_jax.runtime import records
from ddo_jax.training import fit as fit_lib
from ddo_jax.training import state as state_lib
from ddo_jax.training import step as step_lib
from ddo_jax.training import workspace

_STATED = re.compile(r'^Devices: (\d+) with (\d+) GiB', re.MULTILINE)
RECIPES = sorted(
  path.stem for path in pathlib.Path(__file__).parents[2].glob('configs/*.py')
)


_IN_FLOAT32 = ', in float32'  # after the name of a recipe


def load(name: str) -> tuple[config_lib.Config, int]:
  """Returns a recipe, and the number of devices that it is stated for.

  Its executor may take what these devices are stated to hold.

  Args:
    name: the recipe's; with ', in float32' at its end its products are, and its
      microbatches and remat are those of the recipe.
  """
  if name.endswith(_IN_FLOAT32):
    config, num_devices = load(name.removesuffix(_IN_FLOAT32))
    layout = layout_lib.Layout(config.executor, num_devices)
    fit = workspace.Run(config, None, layout).fit
    config.executor.accumulate = fit.accumulate
    config.executor.remat = fit.remat
    config.model.dtype = 'float32'
    return config, num_devices
  module = importlib.import_module(f'configs.{name}')
  config = module.get_config()
  stated = _STATED.search(module.__doc__)
  if not stated:
    raise ValueError(f'configs/{name}.py states no devices')
  config.executor.device_memory_gib = float(stated[2])
  return config, int(stated[1])


def arguments(
  stage: fit_lib.Stage, executor: devices_lib.Executor, remat: bool
) -> list[Any]:
  """Returns the shapes of what a step takes, and where it lies."""
  model = stage.build(remat)
  params = jax.eval_shape(model.init, rng.stream(0))

  def create(params):
    return state_lib.at_start(params, model.rules, stage.phase)

  def placed(tree, part='params'):
    return checkpoint.abstract(tree, executor.state_shardings(tree, part))

  rows = fit_lib.make_rows(stage, model, stage.phase.batch_size)
  real, fake = executor.place_batch(
    jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), (rows.real, rows.fake))
  )
  numbers = jax.tree.map(jnp.float32, (model, stage.phase))
  return [
    placed(jax.eval_shape(create, params)),
    placed(jax.eval_shape(model.rules.reduce, params), 'reference'),
    placed(stage.frozen),
    real,
    fake,
    *executor.replicate((*numbers, rng.stream(0))),
  ]


def planned(
  stage: fit_lib.Stage, executor: devices_lib.Executor, fit: fit_lib.Fit
) -> dict[str, float]:
  """Compiles a step; returns what XLA plans, and the time that it took."""
  begin = time.perf_counter()
  step = executor.traceable_step(
    step_lib.train_step, sampler=stage.sampler, accumulate=fit.accumulate
  )
  program = step.lower(*arguments(stage, executor, fit.remat)).compile()
  return {
    'planned by XLA': memory.allotted(program) / 2**30,
    'compile seconds': time.perf_counter() - begin,
  }


def measure(name: str, known: dict[str, Any]) -> dict[str, Any]:
  """Returns what a recipe's steps take, counted and as XLA plans them.

  Args:
    name: the recipe's.
    known: what an earlier call returned, if its settings were the same; else
      the steps are compiled.
  """
  config, num_devices = load(name)
  layout = layout_lib.Layout(config.executor, num_devices)
  run = workspace.Run(config, None, layout)
  fit = run.fit
  made: dict[str, Any] = {
    'devices': num_devices,
    'kind': config.executor.kind,
    'GiB stated': config.executor.device_memory_gib,
    'accumulate': fit.accumulate,
    'remat': fit.remat,
  }
  same = made.items() <= known.items()
  made['phases'] = {}
  executor = devices_lib.Executor(config.executor, num_devices)
  for phase in run.phases:
    stage = run.stage(phase)
    parts = fit_lib.step_parts(stage, layout, fit.accumulate, fit.remat)
    found = {
      'counted by part': {part: n / 2**30 for part, n in parts.items()},
      'counted': sum(parts.values()) / 2**30,
    }
    if same:
      made['phases'][phase] = known['phases'][phase] | found
    else:
      made['phases'][phase] = found | planned(stage, executor, fit)
  return made


def table(known: dict[str, Any], environment: dict[str, str]) -> str:
  """Returns the results as a page of Markdown."""
  lines = [
    '# Memory of the recipes',
    '',
    'GiB of each device that a step takes on the devices that a recipe states,',
    'counted, and planned by XLA for as many simulated CPU devices, which',
    'compute bfloat16 in float32: `python -m experiments.bench.recipe_memory`.',
    'Recipes with products in bfloat16 therefore stand here once more with all',
    'of them in float32.',
    f'{environment["devices"]}, jax {environment["jax"]}.',
    '',
    '| recipe | phase | devices | executor | microbatches | remat | counted |'
    ' planned | planned / counted |',
    '|---|---|---|---|---|---|---|---|---|',
  ]
  for name, made in sorted(known.items()):
    for phase, found in made['phases'].items():
      counted = found['counted']
      planned = found['planned by XLA']
      cells = [
        name,
        phase,
        f'{made["devices"]} × {made["GiB stated"]:g} GiB',
        made['kind'],
        str(made['accumulate']),
        str(made['remat']),
        f'{counted:.3g}',
        f'{planned:.3g}',
        f'{planned / counted:.2f}',
      ]
      lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def _names(recipes: Sequence[str]) -> Iterator[str]:
  """Yields the recipes, and those with products in bfloat16 once more."""
  for name in recipes:
    yield name
    config, _ = load(name)
    if getattr(config.model, 'dtype', '') == 'bfloat16':
      yield name + _IN_FLOAT32


def main(_) -> None:
  os.environ['XLA_FLAGS'] = ' '.join(
    [
      os.environ.get('XLA_FLAGS', ''),
      '--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED',
    ]
  )
  jax.config.update('jax_num_cpu_devices', 8)
  path = pathlib.Path(flags.FLAGS.output)
  known = records.read_json(path)['recipes'] if path.exists() else {}
  for name in _names(flags.FLAGS.recipe or RECIPES):
    known[name] = measure(name, known.get(name, {}))
    environment = devices_lib.environment()
    records.write_json(path, {'recipes': known, 'environment': environment})
    path.with_suffix('.md').write_text(table(known, environment))
    print(name, known[name], flush=True)


if __name__ == '__main__':
  flags.DEFINE_multi_string('recipe', [], 'Recipes; none are all.')
  flags.DEFINE_string(
    'output', 'experiments/results/memory_recipes.json', 'The file to write.'
  )
  app.run(main)
