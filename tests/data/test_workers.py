"""Processes that read rows: the same batches, and no process left behind."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import sets

from ddo_jax import errors
from ddo_jax import settings
from ddo_jax.data import files
from ddo_jax.data import loader
from ddo_jax.data import sources
from ddo_jax.data import workers

BAD = 3  # The row of the damaged image.


@pytest.fixture
def path(tmp_path):
  return sets.write(tmp_path / 'set.zip', sets.edm_files())


def batches(source, count, stop=9):
  return loader.batches(
    source,
    seed=1,
    batch_size=4,
    start_step=0,
    stop_step=stop,
    other_label=True,
    workers=count,
  )


def children():
  """The processes that this one has started and that have not ended."""
  listed = pathlib.Path(f'/proc/{os.getpid()}/task').glob('*/children')
  return {int(child) for file in listed for child in file.read_text().split()}


def is_alive(process):
  """Whether a process runs; one that ended and was not asked for does not."""
  try:
    status = pathlib.Path(f'/proc/{process}/stat').read_text()
  except FileNotFoundError:
    return False
  return status.rpartition(')')[2].split()[0] != 'Z'


def wait_for_end(processes, seconds=20):
  """Waits until the processes have ended; returns those that have not."""
  until = time.monotonic() + seconds
  left = set(processes)
  while left and time.monotonic() < until:
    left = set(filter(is_alive, left))
    time.sleep(0.01)
  return left


def test_processes_read_what_threads_read_and_end(path):
  source = files.open_files(path)
  before = children()
  stream = batches(source, 2)
  first = next(stream)
  own = children() - before
  assert len(own) == 2
  sets.assert_same([first, *stream], batches(source, 0))
  assert not children() & own
  first['stored'][:] = 0  # It belongs to nobody else.


def test_closing_a_stream_ends_its_processes(path):
  before = children()
  stream = batches(files.open_files(path), 1, stop=10**9)
  next(stream)
  own = children() - before
  assert len(own) == 1
  stream.close()
  assert not children() & own


def test_a_damaged_image_is_one_line_that_names_it(tmp_path):
  images = sets.edm_files()
  names = sorted(name for name in images if name.endswith('.png'))
  images[names[BAD]] = images[names[BAD]][:40]
  source = files.open_files(sets.write(tmp_path / 'set', images))
  before = children()
  lines = []
  for count in (0, 1):
    with pytest.raises(errors.UserError, match=names[BAD]) as caught:
      list(batches(source, count))
    lines.append(str(caught.value).partition(' (')[0])
    assert '\n' not in str(caught.value)
  assert lines[0] == lines[1]
  assert children() <= before


def test_a_process_that_dies_is_one_line(path):
  source = files.open_files(path)
  before = children()
  with workers.reading(source, 1) as read:
    read(np.arange(2))
    (own,) = children() - before
    os.kill(own, signal.SIGINT)  # The loop answers these, not the process.
    os.kill(own, signal.SIGTERM)
    read(np.arange(2))
    os.kill(own, signal.SIGKILL)
    with pytest.raises(errors.UserError, match=r'status -9.*workers') as caught:
      for _ in range(100):
        read(np.arange(2))
  assert '\n' not in str(caught.value)


PARENT = """
import pathlib, sys, time
import numpy as np
from ddo_jax.data import files, workers
source = files.open_files(pathlib.Path(sys.argv[1]))
with workers.reading(source, 2) as read:
  read(np.arange(2))
  print(pathlib.Path('/proc/self/task', str(__import__('os').getpid()),
                     'children').read_text(), flush=True)
  time.sleep(60)
"""


def test_processes_end_with_a_parent_that_is_killed(path):
  parent = subprocess.Popen(
    [sys.executable, '-c', PARENT, str(path)], stdout=subprocess.PIPE, text=True
  )
  own = [int(child) for child in parent.stdout.readline().split()]
  assert len(own) == 2 and all(map(is_alive, own))
  parent.kill()
  parent.communicate()
  assert not wait_for_end(own)


def test_a_process_that_reads_imports_no_jax():
  code = (
    'import sys, json, ddo_jax.data.workers, ddo_jax.data.sources;'
    ' print(json.dumps(sorted({"jax", "flax", "orbax"} & sys.modules.keys())))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert json.loads(done.stdout) == []


def test_a_source_that_cannot_be_sent_is_read_in_threads(path):
  opened = files.open_files(path)

  class Local(type(opened)):
    """A class that another process cannot find."""

  fields = vars(opened) | {'name': 'local'}
  before = children()
  with workers.reading(Local(**fields), 1) as read:
    stored, _ = read(np.arange(3))
    assert children() == before
  np.testing.assert_array_equal(stored, opened.read(np.arange(3))[0])


@pytest.mark.parametrize('place', ['set', 'set.zip'])
def test_some_rows_of_a_fitted_set_can_be_sent(tmp_path, monkeypatch, place):
  path = sets.write(tmp_path / place, sets.edm_files())
  monkeypatch.setattr(sources, '_IN_MEMORY', 0)
  source = sets.open_set(path, holdout=0.3, resize=2)
  assert len(source) < 7
  for one, other in zip(
    sets.read_all(sets.sent(source)), sets.read_all(source), strict=True
  ):
    np.testing.assert_array_equal(one, other)


def test_the_setting(monkeypatch):
  assert workers.count(0) == 0 and workers.count(3) == 3
  for cores, wanted in ((1, 0), (2, 1), (6, 3), (64, 8)):
    monkeypatch.setattr(
      os, 'sched_getaffinity', functools.partial(lambda n, _: range(n), cores)
    )
    assert workers.count(settings.AUTO) == wanted
  for wrong in (-1, True, 'many'):
    with pytest.raises(errors.UserError, match=r'config\.data\.workers is'):
      sources.Data(workers=wrong).check()
