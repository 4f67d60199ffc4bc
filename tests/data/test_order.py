"""Which rows a step takes, in which order."""

import numpy as np
import pytest

from ddo_jax.data import sources


def test_every_epoch_is_another_permutation():
  index = sources.order(3, np.arange(40), 10).reshape(4, 10)
  np.testing.assert_array_equal(np.sort(index), np.tile(np.arange(10), (4, 1)))
  assert len({tuple(epoch) for epoch in index}) == 4
  assert not np.array_equal(index[0], sources.order(4, np.arange(10), 10))


def test_order_depends_on_the_position_alone():
  sources._permutation.cache_clear()
  positions = np.array([[61, 5], [17, 5]])  # any order, shape and repeats
  alone = [sources.order(3, np.array(p), 10) for p in positions.ravel()]
  sources.order(9, np.arange(99), 7)  # pushes the permutations from the cache
  np.testing.assert_array_equal(sources.order(3, positions, 10).ravel(), alone)


def test_order_stays_the_same_for_good():
  # A resumed run relies on these numbers; they must survive any update.
  assert sources.order(0, np.arange(8), 8).tolist() == [3, 7, 4, 0, 2, 6, 5, 1]
  assert sources.order(0, np.arange(8, 16), 8).tolist() == [
    0,
    5,
    6,
    1,
    3,
    2,
    4,
    7,
  ]


@pytest.mark.parametrize('processes', [1, 2])
def test_other_labels_are_the_next_rows_of_the_whole_step(processes):
  labels = np.arange(12)
  images = np.zeros((12, 2, 2, 1), np.uint8)
  source = sources.ArraySource('s', images, labels, 12, 17)
  parts = [
    list(sources.batches(source, 0, 8, 0, 3, i, processes, other_label=True))
    for i in range(processes)
  ]
  for step in range(3):
    both = [part[step] for part in parts]
    label = np.concatenate([b['label'] for b in both])
    other = np.concatenate([b['other_label'] for b in both])
    np.testing.assert_array_equal(other, np.roll(label, -1))
