"""Which rows a step takes, in which order, and reading them ahead."""

import dataclasses
import threading
import time

import numpy as np
import pytest
import sets

from ddo_jax import errors
from ddo_jax.data import files
from ddo_jax.data import loader
from ddo_jax.data import sources


@pytest.fixture
def in_memory():
  images, labels = sets.make_images(10)
  return sources.ArraySource('memory', images, labels, num_classes=5)


def batches(source, batch_size, start, stop, process=0, processes=1):
  """The batches of seed 1."""
  return loader.batches(
    source,
    seed=1,
    batch_size=batch_size,
    start_step=start,
    stop_step=stop,
    process_index=process,
    process_count=processes,
  )


def joined(parts):
  """The batches of several processes, put together step by step."""
  return [
    {key: np.concatenate([part[key] for part in step]) for key in step[0]}
    for step in zip(*parts, strict=True)
  ]


def test_every_epoch_is_another_permutation():
  index = loader.order(3, np.arange(40), 10).reshape(4, 10)
  np.testing.assert_array_equal(np.sort(index), np.tile(np.arange(10), (4, 1)))
  assert len({tuple(epoch) for epoch in index}) == 4
  assert not np.array_equal(index[0], loader.order(4, np.arange(10), 10))


def test_order_depends_on_the_position_alone():
  loader._permutation.cache_clear()
  positions = np.array([[61, 5], [17, 5]])  # Any order, shape and repeats.
  alone = [loader.order(3, np.array(p), 10) for p in positions.ravel()]
  # This pushes the permutations out of the cache.
  loader.order(9, np.arange(99), 7)
  np.testing.assert_array_equal(loader.order(3, positions, 10).ravel(), alone)


def test_order_stays_the_same_for_good():
  # A resumed run relies on these numbers; they must survive any update.
  index = loader.order(0, np.arange(16), 8)
  assert index[:8].tolist() == [3, 7, 4, 0, 2, 6, 5, 1]
  assert index[8:].tolist() == [0, 5, 6, 1, 3, 2, 4, 7]


def test_a_batch_holds_what_its_ids_say(in_memory):
  steps = list(batches(in_memory, 4, 2, 5))
  assert len(steps) == 3
  for step, batch in zip((2, 3, 4), steps, strict=True):
    positions = step * 4 + np.arange(4)
    index = loader.order(1, positions, 10)
    np.testing.assert_array_equal(batch['id'], positions)
    np.testing.assert_array_equal(batch['stored'], in_memory.stored[index])
    np.testing.assert_array_equal(batch['label'], in_memory.classes[index])
    dtypes = {key: rows.dtype for key, rows in batch.items()}
    assert dtypes == {'stored': np.uint8, 'label': np.int32, 'id': np.uint32}


def test_resume_needs_the_step_only(in_memory):
  whole = batches(in_memory, 4, 0, 6)
  first = batches(in_memory, 4, 0, 3)
  second = batches(in_memory, 4, 3, 6)
  sets.assert_same(whole, [*first, *second])


def test_processes_share_out_the_rows(in_memory):
  parts = [batches(in_memory, 6, 0, 4, i, 3) for i in range(3)]
  sets.assert_same(batches(in_memory, 6, 0, 4), joined(parts))
  with pytest.raises(errors.UserError, match='6 must be a multiple of 4'):
    batches(in_memory, 6, 0, 4, 0, 4)


def test_ids_wrap_and_the_order_does_not(in_memory):
  last = 2**30 - 1
  before, after = batches(in_memory, 4, last, last + 2)
  assert before['id'].tolist() == [2**32 - n for n in (4, 3, 2, 1)]
  assert after['id'].tolist() == [0, 1, 2, 3]
  index = loader.order(1, 2**32 + np.arange(4), 10)
  np.testing.assert_array_equal(after['stored'], in_memory.stored[index])


@pytest.mark.parametrize('processes', [1, 2])
def test_other_labels_are_the_next_rows_of_the_whole_step(processes):
  source = sources.ArraySource(
    name='twelve classes',
    stored=np.zeros((12, 2, 2, 1), np.uint8),
    classes=np.arange(12),
    num_classes=12,
  )
  parts = [
    loader.batches(
      source,
      seed=0,
      batch_size=8,
      start_step=0,
      stop_step=3,
      process_index=i,
      process_count=processes,
      other_label=True,
    )
    for i in range(processes)
  ]
  steps = joined(parts)
  assert len(steps) == 3
  for step in steps:
    np.testing.assert_array_equal(
      step['other_label'], np.roll(step['label'], -1)
    )


def counted(path, bad=None):
  """A source on disk that notes what it reads and may fail at one image."""
  source = files.open_files(sets.write(path, sets.edm_files()))
  seen = []

  def fetch(index):
    seen.extend(index)
    if bad in index:
      raise errors.UserError('that one')
    return source.fetch(index)

  return dataclasses.replace(source, fetch=fetch), seen


def test_reading_ahead_changes_nothing(tmp_path):
  source, _ = counted(tmp_path / 'set.zip')
  images, labels = sets.read_all(source)
  memory = sources.ArraySource('memory', images, labels, num_classes=5)
  ahead = batches(source, 4, 0, 9)
  sets.assert_same(ahead, batches(memory, 4, 0, 9))


def test_reading_ahead_is_bounded_and_ends_with_the_iterator(tmp_path):
  source, seen = counted(tmp_path / 'set')
  _ = source.stored_shape
  seen.clear()
  before = threading.active_count()
  stream = batches(source, 1, 0, 10**9)
  next(stream)
  next(stream)
  limit = 2 + loader._AHEAD  # The two taken, and those ahead of them.
  for _ in range(2000):
    time.sleep(0.01 if len(seen) < limit else 1e-4)
  assert len(seen) == limit and threading.active_count() > before
  stream.close()
  assert threading.active_count() == before
  assert list(stream) == [] and len(seen) == limit


def test_a_failed_read_surfaces_at_its_step(tmp_path):
  step = 3
  bad = int(loader.order(1, np.array(step), 7))
  source, _ = counted(tmp_path / 'set', bad=bad)
  before = threading.active_count()
  stream = batches(source, 1, 0, 7)
  for _ in range(step):
    next(stream)
  with pytest.raises(errors.UserError, match='that one'):
    next(stream)
  assert threading.active_count() == before
