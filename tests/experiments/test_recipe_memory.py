"""The steps of each recipe fit the devices that its first lines state.

python -m pytest -m full_size tests/experiments/test_recipe_memory.py

compiles them, for minutes each.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from ddo_jax.runtime import layout as layout_lib
from ddo_jax.training import workspace
from experiments.bench import recipe_memory

ROOT = pathlib.Path(__file__).parents[2]
RECORDED = json.loads(
  (ROOT / 'experiments' / 'results' / 'memory_recipes.json').read_text()
)['recipes']


@pytest.mark.parametrize('name', recipe_memory.RECIPES)
def test_a_recipe_states_its_devices(name):
  config, num_devices = recipe_memory.load(name)
  assert num_devices in (1, 8)
  assert 1 <= config.executor.device_memory_gib <= 80


@pytest.mark.parametrize(
  'name',
  [
    name
    if name in recipe_memory.RECIPES
    else pytest.param(name, marks=pytest.mark.full_size)
    for name in sorted(RECORDED)
  ],
)
def test_what_is_counted_fits(name):
  """With the settings that 'auto' has found; and it is what was recorded."""
  config, num_devices = recipe_memory.load(name)
  recorded = RECORDED[name]
  wanted = (recorded['devices'], recorded['GiB stated'])
  assert (num_devices, config.executor.device_memory_gib) == wanted
  config.executor.accumulate = recorded['accumulate']
  config.executor.remat = recorded['remat']
  layout = layout_lib.Layout(config.executor, num_devices)
  found = workspace.Run(config, None, layout).fit
  counted = [phase['counted'] for phase in recorded['phases'].values()]
  assert found.counted / 2**30 == pytest.approx(max(counted), rel=0.02)
  assert found.counted <= 0.8 * found.room


@pytest.mark.full_size
@pytest.mark.parametrize('name', recipe_memory.RECIPES)
def test_what_xla_plans_fits(name, tmp_path):
  output = tmp_path / 'memory.json'
  subprocess.run(
    [
      *(sys.executable, '-m', 'experiments.bench.recipe_memory'),
      *('--recipe', name, '--output', str(output)),
    ],
    check=True,
    cwd=ROOT,
    env=os.environ | {'XLA_FLAGS': ''},
  )
  made = json.loads(output.read_text())['recipes'][name]
  for phase in made['phases'].values():
    assert 0 < phase['planned by XLA'] < made['GiB stated']
