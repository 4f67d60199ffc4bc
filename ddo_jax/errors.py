"""What a user's mistake becomes: one line, no traceback."""

import math
from typing import Any


class UserError(ValueError):
  """A mistake that the user can mend.

  Its message is one line: what was got, what was wanted, the usual remedy.
  `main` prints it in place of a traceback.
  """


def require(condition: bool, name: str, value: Any, wanted: str) -> None:
  """Raises UserError, naming a field of the config, unless a condition holds.

  Args:
    condition: what must hold.
    name: the dotted name of the field, without the leading "config.".
    value: what the field holds.
    wanted: what it must be, e.g. "a positive integer".
  """
  if not condition:
    raise UserError(f'config.{name} is {value!r}; it must be {wanted}')


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and math.isfinite(value)


def require_numbers(name: str, values: tuple[float, ...]) -> None:
  """Raises UserError unless a tuple holds finite numbers, one or more."""
  good = bool(values) and all(_is_number(value) for value in values)
  require(good, name, values, 'numbers, one a round')


def require_positive(name: str, values: tuple[float, ...]) -> None:
  """Raises UserError unless a tuple holds positive numbers, one or more."""
  good = bool(values)
  good = good and all(_is_number(value) and value > 0 for value in values)
  require(good, name, values, 'positive, one value a round')
