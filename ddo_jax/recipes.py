"""Finds a recipe by the name of one of the package's own, or by its path.

The recipes lie in `configs/` at the root of the checkout. `ddo_jax/configs`
points there, so that they are installed with the package and are imported in
one way everywhere: `from ddo_jax.configs import digits`.
"""

import difflib
import pathlib

from ddo_jax import errors

_FOLDER = pathlib.Path(__file__).parent / 'configs'


def names() -> list[str]:
  """Returns the names of the package's recipes, sorted."""
  return sorted(path.stem for path in _FOLDER.glob('*.py'))


def find(given: str) -> str:
  """Returns the path of a recipe, with the argument that was given to it.

  Args:
    given: a path, or the name of one of the package's recipes. What stands
      behind a colon is the argument of its `get_config`: `digits:small`.

  Raises:
    errors.UserError: there is no such file and no such name.
  """
  recipe, colon, argument = given.partition(':')
  for path in (pathlib.Path(recipe).expanduser(), _FOLDER / f'{recipe}.py'):
    if path.is_file():
      return f'{path}{colon}{argument}'
  near = difflib.get_close_matches(pathlib.Path(recipe).stem, names(), n=1)
  if near:
    remedy = f'did you mean --config={near[0]}?'
  else:
    remedy = f'give a path, or one of {", ".join(names())}'
  raise errors.UserError(f'no recipe at {recipe}; {remedy}')
