"""Folders and zips of images."""

from concurrent import futures
import io
import json
import threading
import time

import numpy as np
from PIL import Image
import pytest
import sets

from ddo_jax import errors
from ddo_jax.data import files as image_files
from ddo_jax.runtime import reading


def refusal(path):
  """The one line that refuses the set at `path`, and names it."""
  line = sets.refusal(path)
  assert str(path) in line
  return line


@pytest.mark.parametrize('name', ['set', 'set.zip'])
@pytest.mark.parametrize('shape', [sets.SHAPE, (5, 4, 1)])
def test_folder_and_zip_give_pixels_and_labels_back(tmp_path, name, shape):
  images, labels = sets.make_images(7, shape)
  source = sets.open_set(
    sets.write(tmp_path / name, sets.edm_files(shape=shape))
  )
  order = [0, 2, 4, 6, 1, 3, 5]  # sorted by folder, then by name
  got, got_labels = sets.read_all(source)
  np.testing.assert_array_equal(got, images[order])
  np.testing.assert_array_equal(got_labels, labels[order])
  assert (got.dtype, got_labels.dtype) == (np.uint8, np.int32)
  np.testing.assert_array_equal(source.labels(), got_labels)
  assert source.labels().dtype == np.int32
  assert len(source) == 7 and source.stored_shape == shape
  assert source.pixel_values == 256
  assert source.num_classes == labels.max() + 1
  again = source.read(np.array([5, 5, 0]))[0]
  np.testing.assert_array_equal(again, got[[5, 5, 0]])


@pytest.mark.parametrize('manifest', [b'{"labels": null}', None])
def test_a_set_without_labels(tmp_path, manifest):
  files = sets.edm_files() | {'dataset.json': manifest}
  if manifest is None:
    del files['dataset.json']
  source = sets.open_set(sets.write(tmp_path / 'set', files))
  assert source.num_classes == 0 and source.labels().tolist() == [0] * 7
  assert sets.read_all(source)[1].tolist() == [0] * 7


def test_jpeg_is_data_too(tmp_path):
  files = {
    'a.JPG': sets.encode(sets.make_images(1)[0][0], 'JPEG'),
    'notes.txt': b'',
  }
  source = sets.open_set(sets.write(tmp_path / 'set', files))
  expected = np.asarray(Image.open(io.BytesIO(files['a.JPG'])))
  np.testing.assert_array_equal(sets.read_all(source)[0], expected[None])


def labels_of(files, change):
  entries = json.loads(files['dataset.json'])['labels']
  change(entries)
  return {'dataset.json': json.dumps({'labels': entries}).encode()}


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (
      lambda e: e.append(['00009/no.png', 1]),
      "missing files: ['00009/no.png']",
    ),
    (lambda e: e.pop(0), "not listed: ['00000/img00000006.png']"),
    (lambda e: e.append(e[0]), 'lists 8 images of 7'),
    (lambda e: e[3].__setitem__(1, -1), "'00001/img00000003.png' is -1"),
    (lambda e: e[3].__setitem__(1, 2**31), f'is {2**31}'),
    (lambda e: e[3].__setitem__(1, 1.0), 'is 1.0'),
    (lambda e: e[3].__setitem__(1, True), 'is True'),
    (lambda e: e[3].__setitem__(1, [0, 1]), 'is [0, 1]'),
    (lambda e: e[3].append(2), 'is not {"labels": [[name, class], ...]}'),
  ],
)
def test_a_wrong_list_of_labels_is_refused(tmp_path, change, words):
  files = sets.edm_files()
  files |= labels_of(files, change)
  line = refusal(sets.write(tmp_path / 'set', files))
  assert words in line and 'dataset.json' in line


@pytest.mark.parametrize(
  'content', [b'{', b'[]', b'{}', b'{"labels": 3}', b'\xff']
)
def test_a_broken_dataset_json_is_refused(tmp_path, content):
  files = sets.edm_files() | {'dataset.json': content}
  assert 'dataset.json is not' in refusal(
    sets.write(tmp_path / 'set.zip', files)
  )


def test_a_dataset_json_out_of_place_is_refused(tmp_path):
  files = {
    f'cifar/{name}': content for name, content in sets.edm_files().items()
  }
  line = refusal(sets.write(tmp_path / 'set.zip', files))
  assert 'cifar/dataset.json must be at the top' in line


GOOD = sets.encode(sets.make_images(4)[0][3])
BLANK = Image.new('RGB', (6, 4))


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    (sets.save(Image.new('RGB', (4, 6))), 'is [6, 4, 3]'),
    (sets.save(BLANK.convert('L')), 'is [4, 6, 1]'),
    (sets.save(BLANK.convert('P')), "PIL mode 'P'"),
    (sets.save(BLANK.convert('RGBA')), "PIL mode 'RGBA'"),
    (sets.save(Image.new('I;16', (6, 4))), "PIL mode 'I;16'"),
    (GOOD[: len(GOOD) // 2], 'damaged or cut off'),
    (GOOD[:60] + bytes([GOOD[60] ^ 1]) + GOOD[61:], 'damaged or cut off'),
    (b'', 'damaged or cut off'),
    (
      sets.encode(sets.make_images(1)[0][0], 'JPEG')[:-40],
      'damaged or cut off',
    ),
  ],
)
def test_a_wrong_image_is_refused_by_its_name(tmp_path, content, words):
  files = sets.edm_files() | {'00001/img00000003.png': content}
  path = sets.write(tmp_path / 'set.zip', files)
  line = refusal(path)
  assert words in line and f'{path}/00001/img00000003.png' in line


def test_a_damaged_zip_is_refused(tmp_path):
  path = sets.write(tmp_path / 'set.zip', sets.edm_files())
  content = path.read_bytes()
  path.write_bytes(content[:-50])
  assert 'is no readable zip' in refusal(path)
  middle = content.index(b'IDAT') + 8  # in the first image
  path.write_bytes(
    content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
  )
  assert '00000/img00000000.png cannot be read' in refusal(path)


def test_a_folder_without_images_is_refused(tmp_path):
  path = sets.write(tmp_path / 'set', {'a.txt': b''})
  assert 'holds 0 images and 0 latents' in refusal(path)


def test_a_file_that_vanished_is_named(tmp_path):
  path = sets.write(tmp_path / 'set', sets.edm_files())
  source = image_files.open_files(path)
  (path / '00001/img00000005.png').unlink()
  with pytest.raises(
    errors.UserError, match=r'img00000005\.png cannot be read'
  ):
    sets.read_all(source)


def test_a_zip_is_read_by_one_thread_at_a_time(tmp_path, monkeypatch):
  path = sets.write(tmp_path / 'set.zip', sets.edm_files(20))
  source = image_files.open_files(path)
  images, _ = sets.read_all(source)
  read = reading.read_member
  busy = threading.Lock()

  def alone(*args):
    assert busy.acquire(blocking=False)
    time.sleep(1e-3)
    busy.release()
    return read(*args)

  monkeypatch.setattr(reading, 'read_member', alone)
  rows = [np.random.default_rng(i).permutation(20) for i in range(8)]
  with futures.ThreadPoolExecutor(8) as pool:
    for row, (got, _) in zip(rows, pool.map(source.read, rows), strict=True):
      np.testing.assert_array_equal(got, images[row])
