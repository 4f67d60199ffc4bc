"""Sources held in memory, padding, and which source a setting names."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import sets

from ddo_jax import errors
from ddo_jax.data import sources

X = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
Y = np.array([0, 3, 1])


def npz(path, **arrays):
  np.savez(path, **arrays)
  return path


@pytest.mark.parametrize(
  ('image', 'label'),
  [('image', 'label'), ('images', 'labels'), ('arr_0', 'arr_1')],
)
def test_npz_gives_pixels_and_labels_back(tmp_path, image, label):
  arrays = {image: X, label: Y}
  source = sets.open_set(npz(tmp_path / 'set.npz', **arrays))
  assert isinstance(source, sources.ArraySource)
  assert (source.num_classes, source.pixel_values) == (4, 256)
  for got, expected in zip(sets.read_all(source), (X, Y), strict=True):
    np.testing.assert_array_equal(got, expected)
  assert source.labels().tolist() == Y.tolist()
  assert source.labels().dtype == np.int32
  plain = sets.open_set(npz(tmp_path / 'plain.npz', image=X))
  assert plain.num_classes == 0 and not sets.read_all(plain)[1].any()


@pytest.mark.parametrize(
  ('arrays', 'words'),
  [
    ({'image': X / 255}, 'images are float64 [3, 4, 6, 3]'),
    ({'image': X[0]}, 'images are uint8 [4, 6, 3]'),
    ({'image': X[:0], 'label': Y[:0]}, 'images are uint8 [0, 4, 6, 3]'),
    ({'image': X, 'label': Y[:2]}, 'labels [2]; wanted'),
    ({'image': X, 'label': Y[:0]}, 'labels [0]; wanted'),
    ({'image': X, 'label': Y - 1}, 'labels are int64 -1 .. 2'),
    ({'image': X, 'label': Y.astype(np.float32)}, 'labels are float32'),
    ({'image': X, 'label': Y > 1}, 'labels are bool'),
    ({'image': X, 'label': Y + 2**31}, 'wanted ints from 0'),
    ({'image': np.moveaxis(X, -1, 1)}, 'looks like [N,C,H,W]'),
    ({'pixels': X}, 'has no array `image`'),
    ({'image': np.array([X, None], object)}, 'no whole .npz of plain arrays'),
  ],
)
def test_a_wrong_npz_is_refused(tmp_path, arrays, words):
  path = npz(tmp_path / 'set.npz', **arrays)
  assert words in (line := sets.refusal(path)) and str(path) in line


def test_a_damaged_or_missing_npz_is_refused(tmp_path):
  path = tmp_path / 'set.npz'
  assert f'no file {path}' in sets.refusal(path)
  npz(path, image=X)
  path.write_bytes(path.read_bytes()[:-30])
  assert f'{path} is no whole .npz' in sets.refusal(path)


def test_arrays_keep_to_their_classes_and_pixel_values():
  source = sources.ArraySource(
    'pool', X % 17, Y, num_classes=4, pixel_values=17
  )
  for wrong in ({'pixel_values': 16}, {'num_classes': 3}, {'num_classes': 0}):
    with pytest.raises(errors.UserError, match=r'pool: .* wanted at most'):
      dataclasses.replace(source, **wrong)


def test_a_path_may_name_the_split(tmp_path):
  for split, count in (('train', 3), ('test', 2)):
    npz(tmp_path / f'set-{split}.npz', image=X[:count])
    assert len(sets.open_set(tmp_path / 'set-{split}.npz', split)) == count
  path = tmp_path / 'set-train.npz'
  assert f"{path} is the split 'train', not 'test'" in sets.refusal(
    path, 'test'
  )


def test_imports_are_light():
  heavy = "{'PIL', 'sklearn', 'tensorflow', 'tensorflow_datasets', 'torch'}"
  code = f'import sys, ddo_jax.data.sources; print({heavy} & set(sys.modules))'
  assert subprocess.check_output([sys.executable, '-c', code]) == b'set()\n'


def test_images_are_padded_with_black(tmp_path):
  images, labels = sets.make_images(2, (4, 6, 1))
  path = npz(tmp_path / 'a.npz', image=images, label=labels)
  source = sets.open_set(path, pad_to=9)
  assert source.stored_shape == (9, 9, 1)
  got, _ = sets.read_all(source)
  np.testing.assert_array_equal(got[:, 2:6, 1:7], images)
  assert got.sum() == images.sum()
  assert 'pad_to=5' in sets.refusal(path, pad_to=5)
  assert sets.open_set(path, pad_to=0).stored_shape == (4, 6, 1)
