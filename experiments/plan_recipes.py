"""Plans every recipe for some machines: what fits, with what, for how long.

python -m experiments.plan_recipes  # half an hour on two CPU cores

Nothing is computed: all is counted from shapes, and hours are those of
`runtime.chips`, an estimate. Recipes that the result holds already are not
planned again, unless --again names them. The page has beside these tables what
`experiments.bench.plan` measured.
"""

import argparse
import dataclasses
import importlib
import pathlib
from typing import Any

from ddo_jax import errors
from ddo_jax import recipes
from ddo_jax.runtime import chips
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import plan as plan_lib

_MEASURED = pathlib.Path('experiments/results/plan_measured.json')

# Chips and their number, by name of the machine.
MACHINES = {
  '1 H100': ('h100', 1),
  '8 H100': ('h100', 8),
  '8 A100-40G': ('a100-40g', 8),
  'v5e-8': ('v5e', 8),
}


def cell(recipe: str, chip: str, num_devices: int) -> dict[str, Any]:
  """Plans a recipe for a machine.

  Returns:
    {'settings': as the plan shows them, 'devices': the number that they need,
    'gib', 'hours', 'own': whether the recipe's own settings do}; {} where
    nothing does.
  """
  module = importlib.import_module(f'ddo_jax.configs.{recipe}')
  config = module.get_config()
  own = True
  needed = num_devices
  try:
    made = plan_lib.plan(config, chip, num_devices)
  except errors.UserError:
    own = False
    found = plan_lib.what_fits(config, chips.get(chip), num_devices)
    if found is None:
      return {}
    run, needed = found
    settings = {'accumulate': run.fit.accumulate, 'remat': run.fit.remat}
    settings['sample_batch'] = run.sample_batch
    config.executor = dataclasses.replace(run.config.executor, **settings)
    made = plan_lib.plan(config, chip, needed)
  return {
    'settings': made.settings,
    'devices': needed,
    'gib': made.most_bytes / 2**30,
    'hours': made.total_hours,
    'own': own,
  }


def _row(recipe: str, found: dict[str, Any], num_devices: int) -> str:
  """Returns a line of a machine's table."""
  if not found:
    return f'| {recipe} | no | | | |'
  fits = 'yes' if found['own'] else 'with other settings'
  if found['devices'] != num_devices:
    fits = f'no; {found["devices"]} do'
  settings = ', '.join(f'{k}={v}' for k, v in found['settings'].items())
  time = plan_lib.duration(found['hours'])
  return f'| {recipe} | {fits} | {settings} | {found["gib"]:.3g} | {time} |'


def page(cells: dict[str, dict[str, Any]]) -> str:
  """Returns the tables, one a machine, in Markdown."""
  parts = []
  for machine, (chip, num_devices) in MACHINES.items():
    room = chips.get(chip).room_gib
    lines = [
      f'## {machine}',
      '',
      f'| recipe | fits | executor | GiB a device, of {room:g} | time |',
      '|---|---|---|---|---|',
    ]
    for recipe, by_machine in cells.items():
      lines.append(_row(recipe, by_machine[machine], num_devices))
    parts.append('\n'.join(lines))
  return '\n\n'.join(parts)


def _measured() -> str:
  """Returns what `experiments.bench.plan` measured, as a section."""
  if not _MEASURED.exists():
    return ''
  known = records.read_json(_MEASURED)
  environment = known['environment']
  lines = [
    '## A probe beside the run that it plans',
    '',
    f'`python -m experiments.bench.plan`, jax {environment["jax"]} on '
    f'{environment["devices"]}. Seconds of the stages,',
    'planned before the run and again after it, for the load of the machine',
    'changed.',
    '',
    '| recipe | stage | planned | measured | planned again |',
    '|---|---|---|---|---|',
  ]
  for recipe, seconds in known['seconds'].items():
    for stage, found in seconds['measured'].items():
      if found:
        times = (
          seconds['planned before'][stage],
          found,
          seconds['planned after'][stage],
        )
        cells = ' | '.join(f'{time:.1f}' for time in times)
        lines.append(f'| {recipe} | {stage} | {cells} |')
  return '\n'.join(lines)


def write_page(path: pathlib.Path, known: dict[str, Any]) -> None:
  """Writes the page of what is known.

  Args:
    path: where.
    known: the JSON of `main`.
  """
  environment = known['environment']
  head = f"""# Plans of the recipes

`python -m experiments.plan_recipes` (jax {environment['jax']}), as
`ddo-jax --mode=plan --config=RECIPE --chip=CHIP --num_devices=N` prints them.
Memory is counted from shapes, and "auto" leaves a fifth of the room free. Times
are an estimate: {chips.UTILISATION:.0%} of the chips' published rates, without
reading data, compiling and what devices send each other; no accelerator was at
hand. "With other settings" means that the recipe's own settings of the executor
do not fit and the ones shown here do."""
  missing = set(recipes.names()) - known['cells'].keys()
  left = f'Not planned yet: {", ".join(sorted(missing))}.' if missing else ''
  sections = [head, left, page(known['cells']), _measured()]
  text = '\n\n'.join(section for section in sections if section)
  path.write_text(text + '\n')


def main() -> None:
  parser = argparse.ArgumentParser(description='Plans every recipe.')
  parser.add_argument('--again', nargs='*', default=[], help='recipes')
  parser.add_argument('--output', default='experiments/results/plan')
  args = parser.parse_args()
  path = pathlib.Path(f'{args.output}.json')
  known = records.read_json(path)['cells'] if path.exists() else {}
  for recipe in recipes.names():
    if recipe in known and recipe not in args.again:
      continue
    planned = {}
    for machine, (chip, num_devices) in MACHINES.items():
      planned[machine] = cell(recipe, chip, num_devices)
      print(recipe, machine, planned[machine], flush=True)
    known[recipe] = planned
    cells = {name: known[name] for name in recipes.names() if name in known}
    environment = devices_lib.environment()
    records.write_json(path, {'cells': cells, 'environment': environment})
    write_page(path.with_suffix('.md'), records.read_json(path))


if __name__ == '__main__':
  main()
