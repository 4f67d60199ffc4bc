"""Held-out images: cut, named, and compared with the training images."""

import logging

import numpy as np
import pytest
import sets

from ddo_jax import errors
from ddo_jax.data import sources
from ddo_jax.data import splits


def test_a_cut_is_fixed_stratified_and_disjoint(tmp_path, caplog):
  caplog.set_level(logging.INFO)
  labels = np.repeat([0, 1, 2], [20, 30, 50])
  images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1)
  path = tmp_path / 'set.npz'
  np.savez(path, image=images, label=labels)
  train = sets.open_set(path, holdout=0.1)
  assert (
    '10 of 100 images are held out (config.data.holdout=0.1)' in caplog.text
  )
  test = sets.open_set(path, 'test', holdout=0.1)
  assert np.bincount(test.labels()).tolist() == [2, 3, 5]
  both = np.concatenate([train.stored, test.stored]).ravel()
  assert sorted(both) == list(range(100))
  for source in (train, test):
    np.testing.assert_array_equal(
      labels[source.stored.ravel()], source.labels()
    )
    assert source.num_classes == 3
  # These stay the same for good: a run that goes on relies on them.
  assert test.stored.ravel().tolist() == [2, 16, 22, 26, 30, 55, 73, 75, 86, 93]


def test_an_image_is_not_held_out_where_its_copy_is_not(tmp_path):
  path = tmp_path / 'set.npz'
  images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1) // 2
  np.savez(path, image=images)
  train = sets.open_set(path, holdout=0.5)
  test = sets.open_set(path, 'test', holdout=0.5)
  assert len(train) + len(test) == 100 and len(test) > 10
  assert not set(train.stored.ravel()) & set(test.stored.ravel())


def test_without_labels_any_image_is_held_out():
  held = splits.held_out(np.zeros(1_000, np.int32), 0.25)
  assert held.sum() == 250 and 80 < held[:500].sum() < 170
  np.testing.assert_array_equal(
    held, splits.held_out(np.zeros(1_000, np.int32), 0.25)
  )


def test_a_cut_of_nothing_is_refused(tmp_path):
  np.savez(tmp_path / 'a.npz', image=np.zeros((4, 2, 2, 1), np.uint8))
  line = sets.refusal(tmp_path / 'a.npz', holdout=0.1)
  assert 'of the 4 images' in line and '0 are' in line
  assert 'a share in [0, 1)' in sets.refusal(tmp_path / 'a.npz', holdout=1.0)
  line = sets.refusal(tmp_path / 'a.npz', holdout=0.5, test_source='b.npz')
  assert "config.data.test_source is 'b.npz'" in line


@pytest.mark.parametrize('name', ['a.npz', 'set', 'set.zip'])
def test_one_set_has_no_held_out_split(tmp_path, name):
  path = tmp_path / name
  if name == 'a.npz':
    np.savez(path, image=np.zeros((4, 2, 2, 1), np.uint8))
  else:
    sets.write(path, sets.edm_files())
  line = sets.refusal(path, 'test')
  assert f"{path} is the split 'train', not 'test'" in line
  for remedy in ('holdout=0.1', 'test_source', '{split}'):
    assert remedy in line


def test_held_out_images_may_stand_elsewhere(tmp_path):
  train = sets.write(tmp_path / 'train', sets.edm_files())
  np.savez(tmp_path / 'b.npz', image=np.zeros((4, *sets.SHAPE), np.uint8))
  fields = {'test_source': str(tmp_path / 'b.npz')}
  assert len(sets.open_set(train, 'test', **fields)) == 4
  assert len(sets.open_set(train, 'train', **fields)) == 7


def test_large_sets_are_cut_where_they_are(tmp_path, monkeypatch):
  path = sets.write(tmp_path / 'set', sets.edm_files(40))
  whole = sets.read_all(sets.open_set(path, 'test', holdout=0.3))
  monkeypatch.setattr(sources, '_IN_MEMORY', 0)
  source = sets.open_set(path, 'test', holdout=0.3)
  assert not isinstance(source, sources.ArraySource)
  for got, wanted in zip(sets.read_all(source), whole, strict=True):
    np.testing.assert_array_equal(got, wanted)
  np.testing.assert_array_equal(source.labels(), whole[1])


def test_labels_may_begin_at_one(tmp_path):
  path = tmp_path / 'a.npz'
  np.savez(path, image=np.zeros((3, 2, 2, 1), np.uint8), label=[1, 2, 3])
  source = sets.open_set(path, first_label=1)
  assert (source.labels().tolist(), source.num_classes) == ([0, 1, 2], 3)
  assert 'has images of class 1' in sets.refusal(path, first_label=2)
  assert 'whose last is 3' in sets.refusal(path, first_label=4)


def array(images, name):
  return sources.ArraySource(name, images, np.zeros(len(images), np.int32))


def test_copies_of_training_images_are_counted(caplog):
  images, _ = sets.make_images(9)
  train = array(images, 'these')
  sources.compare(train, array(sets.make_images(12)[0][9:], 'others'))
  assert not caplog.records
  sources.compare(train, array(sets.make_images(12)[0][7:], 'some'))
  assert '2 of the 5 held-out images of some are copies' in caplog.text
  with pytest.raises(errors.UserError, match='all 4 held-out images of those'):
    sources.compare(train, array(images[::-1][:4], 'those'))
