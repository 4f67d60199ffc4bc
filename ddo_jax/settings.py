"""Settings: how dataclasses are written down, compared and typed in.

Each group of settings is a dataclass beside the code that it sets; `config`
composes them. A field's metadata may say {'science': False}: it may then change
inside one run's folder.
"""

import ast
from collections.abc import Iterator
import dataclasses
import inspect
import json
import types
import typing
from typing import Any

from ddo_jax import errors

# A number that may differ from round to round: in a config a tuple with one
# entry a round, or a number that holds in all; in the step one traced scalar.
# The command line parses the first form.
if typing.TYPE_CHECKING:
  PerRound = Any
else:
  PerRound = tuple[float, ...]

# A whole number, or yes or no, or a word: 'auto' for what the run finds out, or
# 'dots' (see `runtime.layout`).
if typing.TYPE_CHECKING:
  OrAuto = Any
else:

  class OrAuto:
    """The type of such a field, by which the command line finds its parser."""


AUTO = 'auto'
DOTS = 'dots'


def _default_of(field: dataclasses.Field) -> Any:
  """Returns a field's default; MISSING where it has none."""
  if field.default_factory is not dataclasses.MISSING:
    return field.default_factory()
  return field.default


def flatten(
  config: Any, prefix: str = ''
) -> Iterator[tuple[str, Any, bool, Any]]:
  """Yields (dotted name, value, is science, default) of every leaf.

  In a group that is no science, no leaf is.
  """
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    name = prefix + field.name
    if dataclasses.is_dataclass(value):
      science = field.metadata.get('science', True)
      default = type(_default_of(field)).__name__
      yield f'{name}.type', type(value).__name__, science, default
      for inner, leaf, inner_science, default in flatten(value, name + '.'):
        yield inner, leaf, science and inner_science, default
    else:
      science = field.metadata.get('science', True)
      yield name, value, science, _default_of(field)


def to_json(config: Any) -> dict[str, Any]:
  """Returns a config, or a group of it, as JSON values by dotted name."""
  leaves = {name: value for name, value, _, _ in flatten(config)}
  return json.loads(json.dumps(leaves))


def changed(config: Any, standard: Any) -> list[str]:
  """Returns the dotted names of leaves whose value somebody chose.

  Args:
    config: a config.
    standard: one with the defaults. A leaf that it lacks, because the config
      holds an object in its place, counts as chosen unless it has the default
      of its own field.
  """
  plain = to_json(standard)
  now = to_json(config)
  names = []
  for name, _, _, default in flatten(config):
    if default is not dataclasses.MISSING:
      default = json.loads(json.dumps(default, default=repr))
    if now[name] != plain.get(name, default):
      names.append(name)
  return names


def science_changes(config: Any, recorded: dict[str, Any]) -> list[str]:
  """Returns lines 'name: recorded -> now' for science fields that differ.

  A field that is new since the record was made counts as recorded at its
  default, so that an upgrade does not orphan a run.
  """
  now = to_json(config)
  lines = []
  for name, _, science, default in flatten(config):
    if default is not dataclasses.MISSING:
      default = json.loads(json.dumps(default, default=repr))
    before = recorded.get(name, default)
    if science and before != now[name]:
      lines.append(f'{name}: {before!r} -> {now[name]!r}')
  gone = [name for name in recorded if name not in now]
  lines += [f'{name}: {recorded[name]!r} -> gone' for name in gone]
  return lines


# What the numbers, texts and tuples of a recorded config may reach, unless a
# field says otherwise.
_LARGEST = 2**20
_LONGEST = 100  # characters, or entries


def at_most(most: int, default: Any) -> Any:
  """Declares a field whose numbers `check_recorded` bounds by `most`."""
  return dataclasses.field(default=default, metadata={'most': most})


def check_recorded(config: Any, name: str) -> None:
  """Checks a config that a file records, before anything is built from it.

  Every value must be of its field's type, and of a size that is cheap to build,
  so that a hostile file costs neither time nor memory.

  Args:
    config: a dataclass.
    name: what the error calls it.

  Raises:
    errors.UserError: a value is of another type, negative or too large.
  """
  kinds = typing.get_type_hints(type(config))
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    kind = kinds[field.name]
    most = field.metadata.get('most', _LARGEST)
    if not _fits(value, kind, most):
      wanted = kind.__name__ if isinstance(kind, type) else str(kind)
      raise errors.UserError(
        f'{name}.{field.name} is {errors.brief(value)}; wanted {wanted}, no'
        f' number above {most:,} or below 0'
      )
    if dataclasses.is_dataclass(value):
      check_recorded(value, f'{name}.{field.name}')


def _fits(value: Any, kind: Any, most: int) -> bool:
  """Whether a value is of a type, and no part of it is large."""
  parts = typing.get_args(kind)
  if isinstance(kind, types.UnionType):
    return any(_fits(value, part, most) for part in parts)
  if typing.get_origin(kind) is tuple:
    if not isinstance(value, tuple) or len(value) > _LONGEST:
      return False
    if parts[-1] is ...:
      return all(_fits(entry, parts[0], most) for entry in value)
    return len(value) == len(parts) and all(
      _fits(entry, part, most) for entry, part in zip(value, parts, strict=True)
    )
  if kind in (int, float):
    number = type(value) is int or (kind is float and type(value) is float)
    return number and 0 <= value <= most
  if kind is str:
    return isinstance(value, str) and len(value) <= _LONGEST
  return isinstance(value, kind)


def _classes(base: type) -> dict[str, type]:
  """Returns the classes below a base, also those outside of the package."""
  found = {}
  for kind in base.__subclasses__():
    if not inspect.isabstract(kind):
      found[kind.__name__] = kind
    found |= _classes(kind)
  return found


def parse_or_auto(text: str) -> int | bool | str:
  """Returns what a command line says of an `OrAuto` field.

  Raises:
    ValueError: it says neither a known word, yes or no, nor a whole number.
  """
  words: dict[str, Any] = {
    'auto': AUTO,
    'dots': DOTS,
    'true': True,
    'false': False,
  }
  word = text.strip().lower()
  if word in words:
    return words[word]
  number = float(word)
  if not number.is_integer():
    raise ValueError(f'{text!r} is no whole number')
  return int(number)


def parse_object(base: type, text: str) -> Any:
  """Returns the object that a command line names, e.g. 'mle'.

  Args:
    base: a class such as `objective.Objective`; any class below it that the
      recipe has imported may be named, in any case and with underscores.
    text: a name, or a call whose arguments are literals given by keyword, such
      as 'FDivergence(kind="hellinger", beta=(0.1,))'. Nothing is executed.

  Raises:
    errors.UserError: no such class, or no such arguments.
  """
  known = _classes(base)
  by_name = {name.lower(): kind for name, kind in known.items()}
  try:
    node = ast.parse(text.strip(), mode='eval').body
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if call.args:
      raise ValueError('arguments go by keyword')
    if not isinstance(call.func, ast.Name):
      raise ValueError('no name')
    name = call.func.id.replace('_', '').lower()
    arguments = {
      keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords
    }
    return by_name[name](**arguments)
  except (SyntaxError, ValueError, AttributeError, KeyError, TypeError) as e:
    near = errors.near_miss(text.partition('(')[0].strip(), known)
    raise errors.UserError(
      f'{text!r} is no {base.__name__} ({e}); wanted one of'
      f' {", ".join(sorted(known))}, as a name or as a call with keywords, e.g.'
      f' {min(known)}(){near}'
    ) from e
