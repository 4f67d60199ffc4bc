"""How often each class is drawn."""

import numpy as np
import pytest

from configs import digits
from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax.data import labels as labels_lib


def data_of(*counts):
  """The labels of a set with so many images of each class, in no order."""
  labels = np.repeat(np.arange(len(counts)), counts)
  return np.random.default_rng(0).permutation(labels).astype(np.int32)


def drawn(rule, *counts, size=200):
  shares = labels_lib.Shares.of(rule, data_of(*counts))
  return np.bincount(shares.labels(np.arange(size)), minlength=len(counts))


def test_fakes_follow_the_data():
  assert drawn('data', 0, 100, 100, 100).tolist() == [0, 67, 67, 66]
  assert drawn('data', 1_500, 30, 0, 470).tolist() == [150, 3, 0, 47]
  assert drawn('balanced', 1_500, 30, 0, 470).tolist() == [67, 67, 0, 66]


@pytest.mark.parametrize(
  'counts',
  [
    (7, 1, 0, 3, 89),
    (500, *[1] * 500),  # one class of half the images, and many rare ones
    tuple(np.random.default_rng(1).integers(0, 40, 60)),
  ],
)
def test_every_prefix_follows_to_within_one_image(counts):
  shares = labels_lib.Shares(counts)
  labels = shares.labels(np.arange(2 * sum(counts)))
  seen = np.cumsum(labels[:, None] == np.arange(len(counts)), axis=0)
  share = np.array(counts) / sum(counts)
  wanted = np.arange(1, len(labels) + 1)[:, None] * share
  assert np.abs(seen - wanted).max() < 1
  np.testing.assert_array_equal(seen[sum(counts) - 1], counts)


def test_a_class_is_a_function_of_the_id():
  counts = (30, 4, 11)
  whole = labels_lib.Shares(counts).labels(np.arange(300))
  ids = np.array([299, 3, 3, 140])
  np.testing.assert_array_equal(
    labels_lib.Shares(counts).labels(ids), whole[ids]
  )
  assert whole.dtype == np.int32
  assert not labels_lib.Shares(()).labels(ids).any()


def test_nearly_equal_classes_are_drawn_in_turn():
  """Bit for bit what a balanced set always had, and the digits."""
  ids = np.arange(5_000)
  for counts in (
    [143] * 10,
    [142, 146, 142, 146, 145, 145, 145, 143, 139, 144],
  ):
    shares = labels_lib.Shares.of('data', data_of(*counts))
    np.testing.assert_array_equal(shares.labels(ids), ids % 10)
    assert str(shares) == labels_lib.EQUAL
  shares = labels_lib.Shares.of('data', data_of(100, 89, 100))
  assert shares.counts == (100, 89, 100)
  assert '3 classes as often as in the training images' in str(shares)
  assert '0.308 to 0.346' in str(shares)
  empty = labels_lib.Shares.of('data', data_of(0, 100, 100))
  assert str(empty) == 'the 2 classes that the data has, equally often'


def test_a_rule_that_is_none():
  config = digits.get_config()
  config.labels = 'uniform'
  with pytest.raises(errors.UserError, match=r"config.labels is 'uniform'"):
    config_lib.validate(config)
