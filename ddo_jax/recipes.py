"""Finds a recipe by the name of one of the package's own, or by its path.

The recipes lie in `configs/` at the root of the checkout. `ddo_jax/configs`
points there, so that they are installed with the package and are imported in
one way everywhere: `from ddo_jax.configs import digits`.
"""

from collections.abc import Iterator
import contextlib
import pathlib
import sys
import traceback

from ddo_jax import errors

_FOLDER = pathlib.Path(__file__).parent / 'configs'


@contextlib.contextmanager
def neighbours(found: str) -> Iterator[None]:
  """Inside, a recipe imports the modules beside it, as a script would.

  Args:
    found: see `find`.
  """
  folder = str(pathlib.Path(found.partition(':')[0]).absolute().parent)
  sys.path.insert(0, folder)
  try:
    yield
  finally:
    sys.path.remove(folder)


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
  near = errors.nearest(pathlib.Path(recipe).stem, names())
  if near:
    remedy = f'did you mean --config={near[0]}?'
  else:
    remedy = f'give a path, or one of {", ".join(names())}'
  raise errors.UserError(f'no recipe at {recipe}; {remedy}')


def fault(given: str, error: BaseException) -> str:
  """Returns one line on why a recipe cannot be loaded.

  Args:
    given: what named the recipe, see `find`.
    error: what came of loading it.
  """
  recipe = given.partition(':')[0]
  # config_flags makes text of an error, but keeps it beside.
  if error.__context__ and 'whilst parsing config file' in str(error):
    error = error.__context__
  if isinstance(error, errors.UserError):
    return str(error)
  if isinstance(error, ModuleNotFoundError) and error.name == 'configs':
    return (
      f'the recipe {recipe} imports `configs`, which is found only by `python'
      ' -m ddo_jax.main` from the root of a checkout; `from ddo_jax.configs'
      ' import digits` works everywhere'
    )
  if 'get_config() takes 0' in str(error):
    return f'the recipe {recipe} takes no argument; give --config={recipe}'
  path = find(recipe)
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == path]
  if isinstance(error, SyntaxError) and error.filename == path:
    lines.append(error.lineno)
  where = f', line {lines[-1]}' if lines else ''
  reason = str(error).partition('\n')[0]
  return f'the recipe {recipe}{where}: {type(error).__name__}: {reason}'
