"""Sources on disk and in memory, the order, the batches."""

from concurrent import futures
import dataclasses
import io
import json
import threading
import time
import zipfile

import numpy as np
from PIL import Image
import pytest

from ddo_jax import config
from ddo_jax import errors
from ddo_jax.data import sources

SHAPE = (4, 6, 3)


def save(image, kind='PNG'):
  """The bytes of an image file."""
  file = io.BytesIO()
  image.save(file, kind)
  return file.getvalue()


def encode(pixels, kind='PNG'):
  return save(Image.fromarray(pixels.squeeze()), kind)


def make_images(count, shape=SHAPE):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
  return images, rng.integers(0, 5, count)


def edm_files(count=7, shape=SHAPE):
  """File name -> bytes in EDM's layout; labels are listed in reverse order."""
  images, labels = make_images(count, shape)
  names = [f'{i % 2:05d}/img{i:08d}.png' for i in range(count)]
  files = dict(zip(names, map(encode, images), strict=True))
  entries = [*zip(names, labels.tolist(), strict=True)][::-1]
  files['dataset.json'] = json.dumps({'labels': entries}).encode()
  return files


def write(path, files):
  """Writes `files` into a folder, or a zip if the path says so."""
  if path.suffix == '.zip':
    with zipfile.ZipFile(path, 'w') as archive:
      for name, content in files.items():
        archive.writestr(name, content)
  else:
    for name, content in files.items():
      (path / name).parent.mkdir(parents=True, exist_ok=True)
      (path / name).write_bytes(content)
  return path


def open_path(path):
  return sources.open_source(config.Data(source=str(path)), 'train')


def read_all(source):
  return source.read(np.arange(len(source)))


def refusal(path, read=True):
  """The one line that refuses `path`."""
  with pytest.raises(errors.UserError) as caught:
    source = open_path(path)
    if read:
      read_all(source)
  line = str(caught.value)
  assert '\n' not in line and str(path) in line
  return line


@pytest.fixture
def in_memory():
  images, labels = make_images(10)
  return sources.ArraySource('memory', images, labels, num_classes=5)


def assert_same(some, others):
  some, others = list(some), list(others)
  assert len(some) == len(others) > 0
  for one, other in zip(some, others, strict=True):
    assert one.keys() == other.keys()
    for key in one:
      assert one[key].dtype == other[key].dtype
      np.testing.assert_array_equal(one[key], other[key])


def test_a_batch_holds_what_its_ids_say(in_memory):
  steps = list(sources.batches(in_memory, 1, 4, 2, 5))
  assert len(steps) == 3
  for step, batch in zip((2, 3, 4), steps, strict=True):
    positions = step * 4 + np.arange(4)
    index = sources.order(1, positions, 10)
    np.testing.assert_array_equal(batch['id'], positions)
    np.testing.assert_array_equal(batch['image'], in_memory.images[index])
    np.testing.assert_array_equal(batch['label'], in_memory.labels[index])
    dtypes = [batch[key].dtype for key in ('image', 'label', 'id')]
    assert dtypes == [np.uint8, np.int32, np.uint32]


def test_resume_needs_the_step_only(in_memory):
  whole = sources.batches(in_memory, 1, 4, 0, 6)
  first = sources.batches(in_memory, 1, 4, 0, 3)
  second = sources.batches(in_memory, 1, 4, 3, 6)
  assert_same(whole, [*first, *second])


def test_processes_share_out_the_rows(in_memory):
  parts = [sources.batches(in_memory, 1, 6, 0, 4, i, 3) for i in range(3)]
  joined = [
    {key: np.concatenate([part[key] for part in step]) for key in step[0]}
    for step in zip(*parts, strict=True)
  ]
  assert_same(sources.batches(in_memory, 1, 6, 0, 4), joined)
  with pytest.raises(errors.UserError, match='6 must be a multiple of 4'):
    sources.batches(in_memory, 1, 6, 0, 4, 0, 4)


def test_ids_wrap_and_the_order_does_not(in_memory):
  step = 2**30 + 1
  (batch,) = sources.batches(in_memory, 1, 4, step, step + 1)
  assert batch['id'].tolist() == [4, 5, 6, 7]
  index = sources.order(1, step * 4 + np.arange(4), 10)
  np.testing.assert_array_equal(batch['image'], in_memory.images[index])


def counted(path, bad=None):
  """A source on disk that notes what it reads and may fail at one image."""
  source, seen = open_path(write(path, edm_files())), []

  def fetch(index):
    seen.extend(index)
    if bad in index:
      raise errors.UserError('that one')
    return source.fetch(index)

  return dataclasses.replace(source, fetch=fetch), seen


def test_reading_ahead_changes_nothing(tmp_path):
  source, _ = counted(tmp_path / 'set.zip')
  memory = sources.ArraySource('memory', *read_all(source), num_classes=5)
  ahead = sources.batches(source, 1, 4, 0, 9)
  assert_same(ahead, sources.batches(memory, 1, 4, 0, 9))


def test_reading_ahead_is_bounded_and_ends_with_the_iterator(tmp_path):
  source, seen = counted(tmp_path / 'set')
  _ = source.image_shape
  seen.clear()
  before = threading.active_count()
  stream = sources.batches(source, 1, 1, 0, 10**9)
  next(stream)
  next(stream)
  for _ in range(2000):  # the two taken, and those ahead of them
    time.sleep(0.01 if len(seen) < 2 + sources._AHEAD else 1e-4)
  assert len(seen) == 2 + sources._AHEAD and threading.active_count() > before
  stream.close()
  assert threading.active_count() == before
  assert list(stream) == [] and len(seen) == 2 + sources._AHEAD


def test_a_failed_read_surfaces_at_its_step(tmp_path):
  step = 3
  source, _ = counted(tmp_path / 'set', bad=sources.order(1, np.array(step), 7))
  before = threading.active_count()
  stream = sources.batches(source, 1, 1, 0, 7)
  for _ in range(step):
    next(stream)
  with pytest.raises(errors.UserError, match='that one'):
    next(stream)
  assert threading.active_count() == before


@pytest.mark.parametrize('name', ['set', 'set.zip'])
@pytest.mark.parametrize('shape', [SHAPE, (5, 4, 1)])
def test_folder_and_zip_give_pixels_and_labels_back(tmp_path, name, shape):
  images, labels = make_images(7, shape)
  source = open_path(write(tmp_path / name, edm_files(shape=shape)))
  order = [0, 2, 4, 6, 1, 3, 5]  # sorted by folder, then by name
  got, got_labels = read_all(source)
  np.testing.assert_array_equal(got, images[order])
  np.testing.assert_array_equal(got_labels, labels[order])
  assert (got.dtype, got_labels.dtype) == (np.uint8, np.int32)
  assert (len(source), source.image_shape, source.pixel_values) == (
    7,
    shape,
    256,
  )
  assert source.num_classes == labels.max() + 1
  again = source.read(np.array([5, 5, 0]))[0]
  np.testing.assert_array_equal(again, got[[5, 5, 0]])


@pytest.mark.parametrize('manifest', [b'{"labels": null}', None])
def test_a_set_without_labels(tmp_path, manifest):
  files = edm_files() | {'dataset.json': manifest}
  if manifest is None:
    del files['dataset.json']
  source = open_path(write(tmp_path / 'set', files))
  assert source.num_classes == 0
  assert read_all(source)[1].tolist() == [0] * 7


def test_jpeg_is_data_too(tmp_path):
  files = {'a.JPG': encode(make_images(1)[0][0], 'JPEG'), 'notes.txt': b''}
  source = open_path(write(tmp_path / 'set', files))
  expected = np.asarray(Image.open(io.BytesIO(files['a.JPG'])))
  np.testing.assert_array_equal(read_all(source)[0], expected[None])


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
  files = edm_files()
  files |= labels_of(files, change)
  line = refusal(write(tmp_path / 'set', files), read=False)
  assert words in line and 'dataset.json' in line


@pytest.mark.parametrize(
  'content', [b'{', b'[]', b'{}', b'{"labels": 3}', b'\xff']
)
def test_a_broken_dataset_json_is_refused(tmp_path, content):
  files = edm_files() | {'dataset.json': content}
  assert 'dataset.json is not' in refusal(write(tmp_path / 'set.zip', files))


def test_a_dataset_json_out_of_place_is_refused(tmp_path):
  files = {f'cifar/{name}': content for name, content in edm_files().items()}
  line = refusal(write(tmp_path / 'set.zip', files))
  assert 'cifar/dataset.json must be at the top' in line


GOOD = encode(make_images(4)[0][3])
BLANK = Image.new('RGB', (6, 4))


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    (save(Image.new('RGB', (4, 6))), 'is [6, 4, 3]'),
    (save(BLANK.convert('L')), 'is [4, 6, 1]'),
    (save(BLANK.convert('P')), "PIL mode 'P'"),
    (save(BLANK.convert('RGBA')), "PIL mode 'RGBA'"),
    (save(Image.new('I;16', (6, 4))), "PIL mode 'I;16'"),
    (GOOD[: len(GOOD) // 2], 'damaged or cut off'),
    (GOOD[:60] + bytes([GOOD[60] ^ 1]) + GOOD[61:], 'damaged or cut off'),
    (b'', 'damaged or cut off'),
    (encode(make_images(1)[0][0], 'JPEG')[:-40], 'damaged or cut off'),
  ],
)
def test_a_wrong_image_is_refused_by_its_name(tmp_path, content, words):
  files = edm_files() | {'00001/img00000003.png': content}
  path = write(tmp_path / 'set.zip', files)
  line = refusal(path)
  assert words in line and f'{path}/00001/img00000003.png' in line


def test_a_damaged_zip_is_refused(tmp_path):
  path = write(tmp_path / 'set.zip', edm_files())
  content = path.read_bytes()
  path.write_bytes(content[:-50])
  assert 'is no readable zip' in refusal(path)
  middle = content.index(b'IDAT') + 8  # in the first image
  path.write_bytes(
    content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
  )
  assert '00000/img00000000.png cannot be read' in refusal(path)


def test_a_folder_without_images_is_refused(tmp_path):
  path = write(tmp_path / 'set', {'a.txt': b''})
  assert 'holds 0 images and 0 latents' in refusal(path)


def test_a_file_that_vanished_is_named(tmp_path):
  path = write(tmp_path / 'set', edm_files())
  source = open_path(path)
  (path / '00001/img00000005.png').unlink()
  with pytest.raises(
    errors.UserError, match=r'img00000005\.png cannot be read'
  ):
    read_all(source)


def test_a_zip_is_read_by_one_thread_at_a_time(tmp_path, monkeypatch):
  source = open_path(write(tmp_path / 'set.zip', edm_files(20)))
  images, _ = read_all(source)
  read, busy = zipfile.ZipFile.read, threading.Lock()

  def alone(*args):
    assert busy.acquire(blocking=False)
    time.sleep(1e-3)
    busy.release()
    return read(*args)

  monkeypatch.setattr(zipfile.ZipFile, 'read', alone)
  rows = [np.random.default_rng(i).permutation(20) for i in range(8)]
  with futures.ThreadPoolExecutor(8) as pool:
    for row, (got, _) in zip(rows, pool.map(source.read, rows), strict=True):
      np.testing.assert_array_equal(got, images[row])


def test_images_are_padded_with_black(tmp_path):
  images, labels = make_images(2, (4, 6, 1))
  np.savez(tmp_path / 'a.npz', image=images, label=labels)
  settings = config.Data(source=str(tmp_path / 'a.npz'), pad_to=9)
  source = sources.open_source(settings, 'train')
  assert source.image_shape == (9, 9, 1)
  got, _ = read_all(source)
  np.testing.assert_array_equal(got[:, 2:6, 1:7], images)
  assert got.sum() == images.sum()
  settings.pad_to = 5
  with pytest.raises(errors.UserError, match='pad_to=5'):
    sources.open_source(settings, 'train')
  settings.pad_to = 0
  assert sources.open_source(settings, 'train').image_shape == (4, 6, 1)
