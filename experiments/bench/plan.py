"""A plan with a probe beside the run that it plans, on the devices at hand.

python -m experiments.bench.plan  # ten minutes on two CPU cores

Each recipe is planned with --probe, played, and planned again, so that a change
of the machine's load is seen. Compared is the time of the stages, which
summary.json records, compiling included; the start of the program is in
neither.
"""

import importlib
import pathlib
import tempfile
from typing import Any

from absl import app
from absl import flags
from absl import logging as absl_logging

from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import plan as plan_lib
from ddo_jax.training import run as run_lib

_RECIPES = flags.DEFINE_list('recipes', ['digits', 'digits_var'], 'Which.')
_OUTPUT = flags.DEFINE_string(
  'output', 'experiments/results/plan_measured.json', 'The file to write.'
)


def planned(made: plan_lib.Plan) -> dict[str, float]:
  """Returns the seconds of a plan by stage, and their total."""
  hours = {part.name: made.hours(part) for part in made.parts}
  found = {}
  for name in ('tokenizer', 'pretrain'):
    compiling = made.seconds.get(f'first {name} step', 0.0)
    found[name] = 3_600 * hours.get(name, 0.0) + compiling
  total = 3_600 * made.total_hours
  found['rounds'] = total - sum(found.values())
  return found | {'total': total}


def measured(summary: dict[str, Any]) -> dict[str, float]:
  """Returns the seconds of a run by stage, and their total."""
  seconds = summary['seconds']
  rounds = [key for key in seconds if key.startswith('round_')]
  found = {name: seconds.get(name, 0.0) for name in ('tokenizer', 'pretrain')}
  found['rounds'] = sum(seconds[name] for name in rounds)
  return found | {'total': seconds['total']}


def compare(recipe: str) -> dict[str, dict[str, float]]:
  """Plans, plays and plans again; returns the seconds of each."""
  config = importlib.import_module(f'ddo_jax.configs.{recipe}').get_config()
  before = planned(plan_lib.plan(config, probe=True))
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder) / 'run'
    run_lib.play(config, workdir)
    found = measured(records.read_json(workdir / 'summary.json'))
  after = planned(plan_lib.plan(config, probe=True))
  return {'planned before': before, 'measured': found, 'planned after': after}


def main(_) -> None:
  absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax speaks through absl
  path = pathlib.Path(_OUTPUT.value)
  known = records.read_json(path)['seconds'] if path.exists() else {}
  for recipe in _RECIPES.value:
    known[recipe] = compare(recipe)
    print(recipe, known[recipe], flush=True)
    environment = devices_lib.environment()
    records.write_json(path, {'seconds': known, 'environment': environment})


if __name__ == '__main__':
  app.run(main)
