"""What a user's mistake becomes: one line, no traceback."""

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
    name: dotted name of the field, without the leading "config.".
    value: what the field holds.
    wanted: what it must be, e.g. "a positive integer".
  """
  if not condition:
    raise UserError(f'config.{name} is {value!r}; it must be {wanted}')
