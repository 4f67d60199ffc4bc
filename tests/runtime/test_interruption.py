"""Signals: which are heard, what they leave, and when."""

import signal

import pytest

from ddo_jax.runtime import interruption

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers():
  """Nothing of ours handles a signal after it."""
  before = [signal.getsignal(s) for s in SIGNALS]
  yield
  after = [signal.getsignal(s) for s in SIGNALS]
  signal.signal(signal.SIGINT, before[0])
  assert after in (before, [signal.SIG_DFL, *before[1:]])


@pytest.mark.parametrize(
  ('signum', 'status'),
  [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75)],
)
def test_a_command_ends_with_a_line_and_a_status(signum, status, capfd):
  with pytest.raises(SystemExit) as left, interruption.handled():
    signal.raise_signal(signum)
    raise AssertionError('went on')
  assert left.value.code == status
  if signum == signal.SIGINT:  # another one ends the program without a word
    assert signal.getsignal(signum) == signal.SIG_DFL
  line = f'{signum.name}: run the same command again to continue'
  assert capfd.readouterr().err.strip() == line


def test_a_deferral_notes_the_first_signal():
  with pytest.raises(SystemExit) as left, interruption.deferred() as deferral:
    assert deferral.signum is None
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGTERM)
    assert deferral.signum == signal.SIGTERM
  assert left.value.code == 75


def test_a_second_interrupt_leaves_at_once():
  with pytest.raises(KeyboardInterrupt), interruption.deferred():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    raise AssertionError('went on')


def test_nothing_waits_for_what_is_saved():
  with pytest.raises(SystemExit), interruption.deferred() as deferral:
    with deferral.saved():
      signal.raise_signal(signal.SIGTERM)
      raise AssertionError('went on')
  with pytest.raises(KeyboardInterrupt), interruption.deferred() as deferral:
    signal.raise_signal(signal.SIGINT)
    with deferral.saved():  # what came just before counts
      raise AssertionError('went on')


def test_nohup_is_respected():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with interruption.handled(), interruption.deferred() as deferral:
      signal.raise_signal(signal.SIGHUP)
    assert deferral.signum is None
  finally:
    signal.signal(signal.SIGHUP, before)
