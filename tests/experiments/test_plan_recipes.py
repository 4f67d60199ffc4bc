"""The table of recipes and machines is what the planner says."""

import importlib.util
import pathlib

import pytest

from ddo_jax.runtime import records

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
  ('recipe', 'machine'), [('digits', '1 H100'), ('digits', 'v5e-8')]
)
def test_a_cell_still_holds(recipe, machine, monkeypatch):
  for variable in ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'):
    monkeypatch.delenv(variable, raising=False)
  path = ROOT / 'experiments' / 'plan_recipes.py'
  spec = importlib.util.spec_from_file_location('plan_recipes', path)
  script = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(script)
  known = records.read_json(path.parent / 'results' / 'plan.json')['cells']
  made = script.cell(recipe, *script.MACHINES[machine])
  recorded = known[recipe][machine]
  assert made['settings'] == recorded['settings']
  for number in ('gib', 'hours'):
    assert made[number] == pytest.approx(recorded[number], rel=0.05)
