"""What a hostile file may cost: seconds, and memory at its peak."""

from collections.abc import Iterator
import contextlib
import pathlib
import signal
import time

_SECONDS = 10  # of the processor, which other processes do not lengthen
_PATIENCE = 5  # times as long until what waits is interrupted
_BYTES = 10**9
_STATUS = pathlib.Path('/proc/self/status')
_CLEAR = pathlib.Path('/proc/self/clear_refs')


class TooLong(BaseException):
  """Not an Exception, which the code under test may catch."""


def _resident(field: str) -> int:
  """Bytes that this process holds: 'VmRSS' now, 'VmHWM' at its peak."""
  for line in _STATUS.read_text().splitlines():
    if line.startswith(field):
      return int(line.split()[1]) * 1024
  raise AssertionError(field)


def _ring(*_: object) -> None:
  raise TooLong


@contextlib.contextmanager
def kept(seconds: float = _SECONDS, most: int = _BYTES) -> Iterator[None]:
  """Fails where the body takes longer, or more memory than before it.

  What waits for ever, as for a FIFO, is interrupted.
  """
  counted = _CLEAR.exists()
  if counted:
    _CLEAR.write_text('5')  # the peak is now
    before = _resident('VmRSS')
  former = signal.signal(signal.SIGALRM, _ring)
  signal.setitimer(signal.ITIMER_REAL, _PATIENCE * seconds)
  began = time.process_time()
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, former)
  took = time.process_time() - began
  assert took < seconds, f'{took:.1f} s'
  if counted:
    grew = _resident('VmHWM') - before
    assert grew < most, f'{grew / 1e6:.0f} MB'
