"""Signals that ask a run to end: Ctrl-C (SIGINT), SIGTERM and SIGHUP.

Most of a run may end at once, since its stages are whole on disk or absent.
Where there is something to save first, a signal is only noted, and the loop
that is running asks for it between its steps.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import os
import signal
import threading
from typing import Any
from typing import NoReturn

EX_TEMPFAIL = 75  # exit status after SIGTERM and SIGHUP: run it again
EX_INTERRUPT = 130  # exit status after Ctrl-C, as shells have it
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def leave(signum: int) -> NoReturn:
  """Ends the run as a signal asked.

  Raises:
    KeyboardInterrupt: for SIGINT.
    SystemExit: for the others, with status EX_TEMPFAIL.
  """
  if signum == signal.SIGINT:
    raise KeyboardInterrupt
  raise SystemExit(EX_TEMPFAIL)


def _say(signum: int, text: str) -> None:
  """Writes a line; a logger might be in the middle of one of its own."""
  line = f'\n{signal.Signals(signum).name}: {text}\n'
  with contextlib.suppress(OSError):  # after SIGHUP the terminal is gone
    os.write(2, line.encode())


def _leave_at_once(signum: int, frame: Any) -> NoReturn:
  del frame
  _say(signum, 'run the same command again to continue')
  leave(signum)


@contextlib.contextmanager
def _handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
  """Handles the signals, save those that are ignored: nohup ignores SIGHUP."""
  before = {}
  if threading.current_thread() is threading.main_thread():  # it alone may
    for signum in _SIGNALS:
      if signal.getsignal(signum) not in (signal.SIG_IGN, None):
        before[signum] = signal.signal(signum, handler)
  try:
    yield
  finally:
    for signum, earlier in before.items():
      signal.signal(signum, earlier)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
  """Inside, processes are started that never hear the signals.

  Those that come to this process meanwhile are answered at the end.
  """
  before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def handled() -> Iterator[None]:
  """Inside, a signal ends the program: with a line, and without a traceback.

  Raises:
    SystemExit: with status EX_INTERRUPT after Ctrl-C, else EX_TEMPFAIL.
  """
  try:
    with _handling(_leave_at_once):
      yield
  except KeyboardInterrupt:
    # While the interpreter winds up, another Ctrl-C ends it without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise SystemExit(EX_INTERRUPT) from None


class Deferral:
  """Notes signals until what is at stake is saved; see `deferred`.

  Attributes:
    signum: the first signal that came; None before. Who finds one saves, and
      calls `leave` with it.
  """

  def __init__(self) -> None:
    """Nothing came yet."""
    self.signum: int | None = None
    self._saved = False

  def hear(self, signum: int, frame: Any) -> None:
    """Takes a signal. A second Ctrl-C leaves at once."""
    if self._saved or signum == self.signum == signal.SIGINT:
      _leave_at_once(signum, frame)
    self.signum = signum
    again = '; Ctrl-C again leaves at once' if signum == signal.SIGINT else ''
    _say(signum, f'saving before leaving{again}')

  @contextlib.contextmanager
  def saved(self) -> Iterator[None]:
    """Inside, everything is saved: signals act at once."""
    self._saved = True
    try:
      if self.signum is not None:
        leave(self.signum)
      yield
    finally:
      self._saved = False


@contextlib.contextmanager
def deferred() -> Iterator[Deferral]:
  """Yields a Deferral that hears the signals until the end of the block.

  A signal that nobody acted on is acted on at the end.
  """
  deferral = Deferral()
  with _handling(deferral.hear):
    yield deferral
  if deferral.signum is not None:
    leave(deferral.signum)
