"""Folders as classes and as splits, symlinks, and what dataset.json says."""

import json
import logging
import os

import numpy as np
import pytest
import sets

ANIMALS = ('cat/a.png', 'cat/deep/b.png', 'dog/a.png', 'eel/a.png', 'eel/z.png')
LABELS = [0, 0, 1, 2, 2]


def files_of(*names):
  images, _ = sets.make_images(len(names))
  return dict(zip(names, map(sets.encode, images), strict=True))


@pytest.mark.parametrize('name', ['set', 'set.zip'])
@pytest.mark.parametrize('above', ['', 'animals/'])
def test_folders_are_classes_by_name(tmp_path, name, above):
  files = files_of(*(above + animal for animal in ANIMALS))
  files |= {'.cache/x.png': b'', f'{above}eel/.z.png': b''}
  files['__MACOSX/cat/._a.png'] = b''
  source = sets.open_set(sets.write(tmp_path / name, files))
  assert source.class_names == ('cat', 'dog', 'eel')
  assert (source.num_classes, source.labels().tolist()) == (3, LABELS)
  got, labels = sets.read_all(source)
  np.testing.assert_array_equal(got, sets.make_images(5)[0])
  assert labels.tolist() == LABELS


def test_folders_and_files_may_be_symlinks(tmp_path):
  real = sets.write(tmp_path / 'real', files_of(*ANIMALS))
  path = tmp_path / 'set'
  (path / 'eel').mkdir(parents=True)
  for animal in ('cat', 'dog'):
    os.symlink(real / animal, path / animal)
  for file in ('a.png', 'z.png'):
    os.symlink(real / 'eel' / file, path / 'eel' / file)
  os.symlink(path, path / 'eel' / 'again')  # a loop
  os.symlink(path, real / 'cat' / 'up')  # and one through another folder
  source = sets.open_set(path)
  assert source.labels().tolist() == LABELS
  assert source.class_names == ('cat', 'dog', 'eel')
  os.symlink(tmp_path / 'gone.png', path / 'dog' / 'gone.png')
  assert 'dog/gone.png cannot be read' in sets.refusal(path)


@pytest.mark.parametrize(
  'names',
  [
    ('00000/img00000000.png', '00001/img00000001.png'),
    ('00000/00001.png', '01000/01002.png'),
    ('000000/000001.png', '001000/001002.png'),
    ('a.png', 'b.png'),
    ('cat/a.png', 'cat/b.png'),
  ],
)
def test_chunks_are_no_classes(tmp_path, names):
  source = sets.open_set(sets.write(tmp_path / 'set', files_of(*names)))
  assert (source.num_classes, source.class_names) == (0, ())
  assert source.labels().tolist() == [0, 0]


@pytest.mark.parametrize(
  'names', [('0/00001.png', '1/00002.png'), ('00000/a.png', '00001/a.png')]
)
def test_numbered_folders_of_named_images_are_classes(tmp_path, names):
  source = sets.open_set(sets.write(tmp_path / 'set', files_of(*names)))
  assert source.labels().tolist() == [0, 1]


def test_images_beside_folders_are_said(tmp_path, caplog):
  path = sets.write(tmp_path / 'set', files_of('a.png', 'cat/a.png'))
  assert sets.open_set(path).num_classes == 0
  assert 'a.png and 0 more images stand beside the folders' in caplog.text


@pytest.mark.parametrize(
  ('labels', 'names', 'said'),
  [
    (LABELS, ('cat', 'dog', 'eel'), False),
    ([2, 2, 0, 1, 1], ('dog', 'eel', 'cat'), False),
    ([4, 4, 0, 1, 1], ('dog', 'eel', '', '', 'cat'), False),
    ([0, 0, 1, 1, 1], (), True),
    ([0, 1, 2, 3, 3], (), True),
    (None, (), True),
  ],
)
def test_dataset_json_wins_over_folders(tmp_path, caplog, labels, names, said):
  files = files_of(*ANIMALS)
  entries = labels and list(zip(ANIMALS, labels, strict=True))
  files['dataset.json'] = json.dumps({'labels': entries}).encode()
  source = sets.open_set(sets.write(tmp_path / 'set', files))
  assert source.labels().tolist() == (labels or [0] * 5)
  assert source.class_names == names
  assert (
    'says other classes than the folders (cat, dog, eel)' in caplog.text
  ) == (said)


def test_edm_layout_says_nothing_of_folders(tmp_path, caplog):
  files = sets.edm_files()
  sets.open_set(sets.write(tmp_path / 'set', files))
  files['dataset.json'] = b'{"labels": null}'
  sets.open_set(sets.write(tmp_path / 'none', files))
  assert not caplog.records


@pytest.mark.parametrize('name', ['set', 'set.zip'])
def test_folders_of_splits(tmp_path, caplog, name):
  caplog.set_level(logging.INFO)
  names = [f'{split}/{n}' for split in ('train', 'val') for n in ANIMALS]
  names.remove('val/dog/a.png')
  path = sets.write(tmp_path / name, files_of(*names))
  train = sets.open_set(path)
  assert (len(train), train.labels().tolist()) == (5, LABELS)
  test = sets.open_set(path, 'val', test_split='val')
  # Its eels are the third class, though it has two.
  assert test.labels().tolist() == [0, 0, 2, 2]
  assert (test.num_classes, test.class_names) == (3, train.class_names)
  line = sets.refusal(path, 'test')
  assert "has no split 'test'; it has ['train', 'val']" in line
  assert 'config.data.holdout=0.1' in line


def test_splits_by_path(tmp_path):
  path = sets.write(
    tmp_path, files_of('train/cat/a.png', 'train/dog/a.png', 'test/dog/b.png')
  )
  test = sets.open_set(path / '{split}', 'test')
  assert test.name == str(tmp_path / 'test')
  # One folder of images names no class.
  assert test.num_classes == 0


def test_a_held_out_class_that_training_lacks_is_refused(tmp_path):
  train = sets.write(tmp_path / 'a', files_of('cat/a.png', 'dog/a.png'))
  test = sets.write(tmp_path / 'b', files_of('cat/a.png', 'elk/a.png'))
  line = sets.refusal(train, 'test', test_source=str(test))
  assert "has images of class 'elk'" in line
