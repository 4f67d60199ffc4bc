"""Progress: a bar on a terminal, and where there is none a line a minute."""

import collections
import logging
import sys
import time
from typing import Any
from typing import Protocol
from typing import Self

import tqdm

from ddo_jax.runtime import processes

_LOGGER = logging.getLogger(__name__)
_PAUSE = 60.0  # seconds between lines
_WINDOW = 10  # lines that a rate looks back on


class Progress(Protocol):
  """What `follow` returns: a context manager, closed at the end of the work."""

  def __enter__(self) -> Self:
    """Returns itself."""

  def __exit__(self, *exception: Any) -> None:
    """Clears the bar."""

  def update(self, count: int) -> Any:
    """Counts what was done since the last call."""

  def set_postfix_str(self, text: str) -> Any:
    """Sets what is said behind the numbers from now on, such as a score."""


def follow(
  name: str,
  total: int | None,
  unit: str = 'images',
  done: int = 0,
  leave: bool = False,
) -> Progress:
  """Returns what tells of the progress of a piece of work.

  Args:
    name: what is done.
    total: how much there is to do; None where that is not known.
    unit: what is counted; 'B' are bytes.
    done: how much was done before.
    leave: whether a finished bar stays on the terminal.
  """
  if not processes.is_main():
    return _Silence()
  if not sys.stderr.isatty():
    return _Lines(name, total, unit, done)
  return tqdm.tqdm(
    total=total,
    initial=done,
    desc=name,
    unit=unit if unit == 'B' else f' {unit}',
    unit_scale=True,
    leave=leave,
  )


class _Silence:
  """Says nothing: of several processes, one speaks."""

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: Any) -> None:
    pass

  def update(self, count: int) -> None:
    pass

  def set_postfix_str(self, text: str) -> None:
    pass


class _Lines:
  """Logs a line a minute; nothing of work that takes less than that."""

  def __init__(self, name: str, total: int | None, unit: str, done: int):
    self._name = name
    self._total = total
    self._unit = unit
    self._done = done
    self._postfix = ''
    self._last = time.monotonic()
    # (time, done) of the lines before. The first mark is made when the first
    # piece is done, so that no rate counts a compilation.
    self._marks: collections.deque[tuple[float, int]] = collections.deque(
      maxlen=_WINDOW
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: Any) -> None:
    pass

  def set_postfix_str(self, text: str) -> None:
    self._postfix = text

  def update(self, count: int) -> None:
    self._done += count
    now = time.monotonic()
    if not self._marks:
      self._marks.append((now, self._done))
    if now - self._last >= _PAUSE:
      _LOGGER.info('%s', self._line(now))
      self._marks.append((now, self._done))
      self._last = now

  def _line(self, now: float) -> str:
    """Such as 'pretrain: 1,000 of 3,000 images, 20/s, 2 min left'."""
    before, done_before = self._marks[0]
    text = f'{self._name}: {self._amount(self._done)}'
    if self._total is not None:
      text += f' of {self._amount(self._total)}'
    if self._unit != 'B':
      text += f' {self._unit}'
    parts = [text]
    if now > before and self._done > done_before:
      rate = (self._done - done_before) / (now - before)
      parts.append(f'{self._amount(rate)}/s')
      if self._total is not None:
        left = max(self._total - self._done, 0) / rate
        parts.append(f'{_duration(left)} left')
    if self._postfix:
      parts.append(self._postfix)
    return ', '.join(parts)

  def _amount(self, number: float) -> str:
    if self._unit == 'B':
      return tqdm.tqdm.format_sizeof(number, suffix='B')
    return f'{number:,.0f}' if number >= 10 else f'{number:.2g}'


def _duration(seconds: float) -> str:
  """Such as '40 s', '3 min' or '2 h 5 min'."""
  if seconds < 90:
    return f'{seconds:.0f} s'
  minutes = round(seconds / 60)
  if minutes < 90:
    return f'{minutes} min'
  return f'{minutes // 60} h {minutes % 60} min'
