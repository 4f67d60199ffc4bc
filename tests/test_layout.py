"""The shape of the code: import floors, seams, sizes, light imports."""

import ast
import pathlib
import subprocess
import sys

import pytest

import ddo_jax

PACKAGE = pathlib.Path(ddo_jax.__file__).parent
FILES = sorted(PACKAGE.rglob('*.py'))

# Imports go downward, from a floor to lower ones; the members of a floor and of
# a folder may import each other, which Python keeps free of cycles.
FLOORS = (
  ('errors', 'precision', 'recipes', 'rng', 'settings'),
  ('runtime',),
  ('assets',),
  ('data', 'samplers', 'evaluation.metrics', 'evaluation.networks'),
  ('method',),
  ('models',),
  (
    'training.averages',
    'training.bad_numbers',
    'training.first_steps',
    'training.lora',
    'training.state',
    'training.step',
    'tuning.alarms',
    'tuning.tune',
  ),
  ('weights', 'evaluation'),
  ('config',),
  ('report', 'training', 'tuning', 'evaluation.score'),
  ('main', '__main__'),
)


def name_of(path):
  """'models.toy' of ddo_jax/models/toy.py; 'models' of its __init__.py."""
  parts = path.relative_to(PACKAGE).with_suffix('').parts
  return '.'.join(parts).removesuffix('.__init__').removesuffix('__init__')


MODULES = {name_of(path): path for path in FILES}


def floor_of(name):
  """The floor of a module, by its own name or by its folder's."""
  while name:
    for floor, members in enumerate(FLOORS):
      if name in members:
        return floor
    name = name.rpartition('.')[0]
  raise AssertionError(f'{name} stands on no floor')


def imports_of(path):
  """Full names of what a file imports, at its top or inside functions."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: a relative import'
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def internal(path):
  """The modules of the package that a file imports, as in MODULES."""
  inside = (n for n in imports_of(path) if n.startswith('ddo_jax.'))
  for name in inside:
    name = name.removeprefix('ddo_jax.')
    # `from ddo_jax import rng` and, were it used, `from ddo_jax.rng import f`.
    yield name if name in MODULES else name.rsplit('.', 1)[0]


@pytest.mark.parametrize('name', [name for name in MODULES if name])
def test_imports_go_downward(name):
  for other in internal(MODULES[name]):
    assert floor_of(other) <= floor_of(name), f'{name} imports {other}'


def users_of(library):
  """The modules that import a library or a part of it."""
  return {
    name
    for name, path in MODULES.items()
    if any(f'{n}.'.startswith(f'{library}.') for n in imports_of(path))
  }


def test_orbax_is_known_to_checkpoint_alone():
  assert users_of('orbax') == {'runtime.checkpoint'}


def test_devices_are_known_to_parallel_alone():
  words = {'pmap', 'Mesh', 'make_mesh', 'NamedSharding', 'shard_map'}

  def speaks(path):
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    said = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    return words & (said | {n.id for n in nodes if isinstance(n, ast.Name)})

  assert {name for name, path in MODULES.items() if speaks(path)} == {
    'runtime.devices'
  }


@pytest.mark.parametrize('library', ['torch', 'tensorflow'])
def test_no_other_framework(library):
  assert users_of(library) == set()


def test_importing_a_run_is_light():
  heavy = ['tensorflow', 'torch', 'tensorflow_datasets']
  code = (
    'import sys, ddo_jax.training.round;'
    f' print(sorted(set({heavy}) & sys.modules.keys()))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout == '[]\n'
