"""What a user's mistake becomes: one line, no traceback."""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import difflib
import math
import reprlib
from typing import Any
from typing import TypeVar

_Entry = TypeVar('_Entry')
_LONGEST = 160  # characters of a value inside a line


class UserError(ValueError):
  """A mistake that the user can mend.

  Its message is one line: what was got, what was wanted, the usual remedy.
  Where several mistakes were gathered it has a line for each. `main` prints it
  in place of a traceback.
  """


class Problems:
  """Gathers mistakes, so that a user hears of all of them at once.

  Attributes:
    lines: one for each mistake; each mistake is told once.
  """

  def __init__(self):
    """Begins without any."""
    self.lines: list[str] = []

  @contextlib.contextmanager
  def gather(self) -> Iterator[None]:
    """Takes the UserError that ends its body; what follows it goes on."""
    try:
      yield
    except UserError as error:
      for line in str(error).splitlines():
        if line not in self.lines:
          self.lines.append(line)

  def raise_any(self) -> None:
    """Raises one UserError with all lines, if there are any."""
    if self.lines:
      raise UserError('\n'.join(self.lines))


def brief(value: Any) -> str:
  """Returns a value as a short part of a line, however large or nested it is.

  Shared containers are not walked again and again, and no long number is
  written out.
  """
  return ' '.join(_BRIEF.repr(value).split())[:_LONGEST]


class _Brief(reprlib.Repr):
  """Writes few levels of few entries."""

  def __init__(self):
    super().__init__()
    self.maxlevel = 2
    self.maxdict = 3
    self.maxother = 60

  def repr_int(self, value: int, level: int) -> str:
    if value.bit_length() > 200:
      return f'a number of {value.bit_length():,} bits'
    return super().repr_int(value, level)


_BRIEF = _Brief()


def nearest(name: str, known: Iterable[str], most: int = 1) -> list[str]:
  """Returns the known names that are nearly this one, the nearest first."""
  by_folded = {each.casefold(): each for each in known}
  close = difflib.get_close_matches(name.casefold(), by_folded, n=most)
  return [by_folded[folded] for folded in close]


def near_miss(name: str, known: Iterable[str], most: int = 1) -> str:
  """Returns '; did you mean ...?' where known names are close, else ''."""
  close = nearest(name, known, most)
  return f'; did you mean {" or ".join(close)}?' if close else ''


def look_up(name: str, known: Mapping[str, _Entry], kind: str) -> _Entry:
  """Returns the entry of a name.

  Args:
    name: the name.
    known: the entries by name.
    kind: what they are, e.g. "released model".

  Raises:
    UserError: there is none of that name; it lists those there are.
  """
  if name not in known:
    raise UserError(
      f'no {kind} is called {name!r}; known: {", ".join(known)}'
      f'{near_miss(name, known)}'
    )
  return known[name]


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


def require_choice(name: str, value: Any, known: Iterable[str]) -> None:
  """Raises UserError unless a field holds one of the known names.

  Args:
    name: the dotted name of the field, without the leading "config.".
    value: what the field holds.
    known: the names that it may hold.
  """
  known = tuple(known)
  near = near_miss(value, known) if isinstance(value, str) else ''
  require(value in known, name, value, f'one of {known}{near}')


def require_integer(name: str, value: Any, lowest: int) -> None:
  """Raises UserError unless a field holds an integer, `lowest` or more."""
  good = isinstance(value, int) and not isinstance(value, bool)
  wanted = (
    'a positive integer' if lowest == 1 else f'an integer, {lowest} or up'
  )
  require(good and value >= lowest, name, value, wanted)


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
