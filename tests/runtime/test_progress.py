"""Progress without a terminal: a line a minute."""

import logging
import sys

import pytest
import tqdm

from ddo_jax.runtime import progress


class Clock:
  now = 1_000.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock(monkeypatch):
  made = Clock()
  monkeypatch.setattr(progress.time, 'monotonic', made)
  return made


@pytest.fixture
def lines(caplog):
  caplog.set_level(logging.INFO, 'ddo_jax')
  return lambda: [record.getMessage() for record in caplog.records]


def work(bar, clock, seconds, pieces, count):
  for _ in range(pieces):
    clock.now += seconds
    bar.update(count)


def test_a_line_a_minute(clock, lines):
  with progress.follow('pretrain', 2_000_000) as bar:
    work(bar, clock, 45, 1, 1_000)  # a compilation, of which no rate speaks
    work(bar, clock, 1, 14, 1_000)
    assert lines() == []
    bar.set_postfix_str('fd_train 0.12')
    work(bar, clock, 1, 1, 1_000)
    work(bar, clock, 1, 59, 1_000)
    assert len(lines()) == 1
    work(bar, clock, 1, 1, 1_000)
    work(bar, clock, 1, 60, 50_000)
  first, second, third = lines()
  assert first == (
    'pretrain: 16,000 of 2,000,000 images, 1,000/s, 33 min left, fd_train 0.12'
  )
  assert second.startswith('pretrain: 76,000 of 2,000,000 images, 1,000/s')
  rate = 3_075_000 / 135  # over the lines before, too
  assert third.startswith(
    f'pretrain: 3,076,000 of 2,000,000 images, {rate:,.0f}/s, 0 s left'
  )


def test_a_rate_forgets_what_is_ten_lines_old(clock, lines):
  bar = progress.follow('fake pool', 10_000, done=10)
  work(bar, clock, 60, 1, 10)
  work(bar, clock, 60, 1, 6_000)
  work(bar, clock, 60, 9, 6)
  assert '/s' not in lines()[0]
  assert lines()[0] == 'fake pool: 20 of 10,000 images'
  assert ', 100/s' in lines()[1]
  work(bar, clock, 60, 1, 6)
  assert (
    lines()[-1] == 'fake pool: 6,080 of 10,000 images, 0.1/s, 10 h 53 min left'
  )


def test_bytes_of_unknown_length(clock, lines):
  bar = progress.follow('edm.pkl', None, unit='B')
  work(bar, clock, 30, 3, 60_000_000)
  assert lines() == ['edm.pkl: 120MB, 2.00MB/s']


@pytest.mark.parametrize(
  ('seconds', 'wanted'),
  [(0.4, '0 s'), (89, '89 s'), (200, '3 min'), (7_500, '2 h 5 min')],
)
def test_time_left(seconds, wanted):
  assert progress._duration(seconds) == wanted


def test_a_bar_on_a_terminal(monkeypatch, capsys):
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
  with progress.follow('samples', 40, done=10) as bar:
    assert isinstance(bar, tqdm.tqdm)
    bar.update(30)
  assert 'samples' in capsys.readouterr().err
