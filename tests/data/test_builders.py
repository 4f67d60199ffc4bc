"""Sets that TFDS keeps: preparing them, reading them back, damage."""

from concurrent import futures
import dataclasses
import gzip
import hashlib
import io
import json
import shutil
import tarfile
import threading

import numpy as np
from PIL import Image
import pytest
import sets

from ddo_jax import errors
from ddo_jax.data import builders
from ddo_jax.data import encoded
from ddo_jax.data import sources

RNG = np.random.default_rng(0)
RECORDS = 'digits-train.array_record-00000-of-00001'


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  path = tmp_path_factory.mktemp('tfds')
  sets.open_set('digits', data_dir=str(path))
  return path


def test_a_known_name_is_no_folder(data_dir, tmp_path, monkeypatch):
  (tmp_path / 'digits').mkdir()
  monkeypatch.chdir(tmp_path)
  assert len(sets.open_set('digits', data_dir=str(data_dir))) == 1437


def test_digits_are_scikit_learns(data_dir):
  from sklearn import datasets as sklearn_datasets

  train = sets.open_set('digits', data_dir=str(data_dir))
  test = sets.open_set('digits', 'test', data_dir=str(data_dir))
  assert (len(train), len(test), train.pixel_values) == (1437, 360, 17)
  assert (train.stored_shape, train.num_classes) == ((8, 8, 1), 10)
  pixels, labels = sklearn_datasets.load_digits(return_X_y=True)
  both = sets.rows_of(*sets.read_all(train)) + sets.rows_of(
    *sets.read_all(test)
  )
  assert sorted(both) == sets.rows_of(pixels.astype(np.uint8), labels)
  shares = np.bincount(test.classes) / np.bincount(labels)
  np.testing.assert_allclose(shares, 360 / 1797, atol=0.005)


def test_a_slice_is_a_split(data_dir):
  whole = sets.open_set('digits', data_dir=str(data_dir))
  part = sets.open_set('digits', 'train[10:30]', data_dir=str(data_dir))
  np.testing.assert_array_equal(part.stored, whole.stored[10:30])


def test_a_large_set_stays_on_disk(data_dir, monkeypatch):
  whole = sets.open_set('digits', 'test', data_dir=str(data_dir))
  monkeypatch.setattr(sources, '_IN_MEMORY', 360 * 64 - 1)
  source = sets.open_set('digits', 'test', data_dir=str(data_dir))
  assert isinstance(source, encoded.EncodedSource)
  assert (source.pixel_values, source.num_classes, len(source)) == (17, 10, 360)
  index = np.array([359, 0, 7])
  for opened in (source, sets.sent(source)):
    stored, labels = opened.read(index)
    np.testing.assert_array_equal(stored, whole.stored[index])
    np.testing.assert_array_equal(labels, whole.classes[index])


def test_labels_are_read_without_decoding_images(data_dir, monkeypatch):
  whole = sets.open_set('digits', data_dir=str(data_dir))
  monkeypatch.setattr(sources, '_IN_MEMORY', 0)
  source = sets.open_set('digits', data_dir=str(data_dir))
  monkeypatch.setattr(builders, '_CHUNK', 1_000)
  labels = dataclasses.replace(source, open_row=None).labels()
  np.testing.assert_array_equal(labels, whole.classes)
  assert labels.dtype == np.int32
  wrong = dataclasses.replace(source, num_classes=9)
  with pytest.raises(errors.UserError, match=r'has label 9; wanted 0 \.\. 8'):
    wrong.labels()


def prepare_fields(data_dir, values, **features):
  """Prepares a set `fields` of black images and any other fields."""
  import tensorflow_datasets as tfds

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name = 'fields'
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      image = tfds.features.Image(shape=(2, 2, 1))
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict({'image': image, **features}),
      )

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples()}

    def _generate_examples(self):
      image = Image.new('L', (2, 2))
      for i, value in enumerate(values):
        yield i, {'image': image, **dict.fromkeys(features, value)}

  builder = Builder(data_dir=str(data_dir))
  builder.download_and_prepare(file_format='array_record')


def test_a_label_field_of_any_name(tmp_path):
  import tensorflow_datasets as tfds

  kinds = tfds.features.ClassLabel(names=['ant', 'bee', 'cow'])
  prepare_fields(tmp_path, [2, 0, 2], **{'class': kinds, 'width': np.int64})
  source = sets.open_set('fields', data_dir=str(tmp_path))
  assert sorted(source.labels()) == [0, 2, 2]
  assert (source.num_classes, source.class_names[1]) == (3, 'bee')
  width = sets.open_set('fields', data_dir=str(tmp_path), label_field='width')
  assert (width.num_classes, width.class_names) == (3, ())


def test_a_plain_integer_and_a_choice(tmp_path):
  prepare_fields(tmp_path / 'a', [1, 0, 4], target=np.int64)
  source = sets.open_set('fields', data_dir=str(tmp_path / 'a'))
  assert (source.num_classes, sorted(source.labels())) == (5, [0, 1, 4])
  prepare_fields(tmp_path / 'b', [1, 0], age=np.int64, size=np.int32)
  line = sets.refusal('fields', data_dir=str(tmp_path / 'b'))
  assert 'fields has several fields that may be its classes' in line
  assert 'age, size: choose with --config.data.label_field=age' in line


@pytest.mark.parametrize(
  ('source', 'split', 'words'),
  [
    ('digits', 'valid', "has no split 'valid'; it has ['train', 'test']"),
    ('digits', 'train[:0]', 'digits/train[:0] has 0 rows'),
    ('mnist', 'train', 'known: digits, fashion_mnist, cifar10'),
    ('no/such/folder', 'train', 'neither a file or folder nor a set prepared'),
  ],
)
def test_an_unknown_name_is_refused(data_dir, source, split, words):
  assert words in sets.refusal(source, split, data_dir=str(data_dir))


@pytest.fixture
def copied(data_dir, tmp_path):
  shutil.copytree(data_dir / 'digits', tmp_path / 'digits')
  return tmp_path / 'digits' / '1.0.0'


@pytest.mark.parametrize('damage', ['flip', 'cut', 'empty'])
def test_damaged_records_are_refused_by_name(copied, tmp_path, damage):
  path = copied / RECORDS
  content = bytearray(path.read_bytes())
  content[100_000] ^= 1
  length = {'flip': None, 'cut': 150_000, 'empty': 0}[damage]
  path.write_bytes(content[:length])
  line = sets.refusal('digits', data_dir=str(tmp_path))
  assert f'{path} is damaged' in line and 'delete its folder' in line


def test_the_missing_one_of_two_files_is_named(tmp_path):
  import tensorflow_datasets as tfds

  splits = {'train': (np.zeros((40, 8, 8, 1), np.uint8), np.zeros(40, int))}
  builder = builders._builder(builders.SPECS['digits'], splits, str(tmp_path))
  two = tfds.download.DownloadConfig(num_shards=2)
  builder.download_and_prepare(file_format='array_record', download_config=two)
  _, second = sorted(builder.data_path.glob('*train*'))
  second.unlink()
  assert f'{second} is damaged' in sets.refusal(
    'digits', data_dir=str(tmp_path)
  )


def test_a_set_in_tfrecord_is_refused(copied, tmp_path):
  path = copied / 'dataset_info.json'
  info = json.loads(path.read_text()) | {'fileFormat': 'tfrecord'}
  path.write_text(json.dumps(info))
  line = sets.refusal('digits', data_dir=str(tmp_path))
  assert f"{copied} is prepared as {{'tfrecord'}}; wanted array_record" in line


def test_a_damaged_description_is_refused(copied, tmp_path):
  (copied / 'dataset_info.json').write_text('{')
  line = sets.refusal('digits', data_dir=str(tmp_path))
  assert "the folder of the set 'digits' is damaged" in line
  (copied / 'dataset_info.json').unlink()
  (copied / 'features.json').unlink()
  line = sets.refusal('digits', data_dir=str(tmp_path))
  assert 'nor a set prepared, whole' in line


def prepare_small(name, images, labels, data_dir):
  """Prepares a set of given train images under the name of a known one."""
  splits = {'train': (images, labels)}
  spec = dataclasses.replace(builders.SPECS[name], read=lambda _: splits)
  builders.prepare(spec, str(data_dir))


def test_two_may_prepare_at_once(tmp_path):
  images = RNG.integers(0, 17, (30, 8, 8, 1), dtype=np.uint8)
  labels = np.arange(30) % 10
  meet = threading.Barrier(2)

  class Meeting(np.ndarray):
    """Rows that come when both threads are writing."""

    def __iter__(self):
      meet.wait(timeout=60)
      return iter(images)

  job = ('digits', images.view(Meeting), labels, tmp_path)
  with futures.ThreadPoolExecutor(2) as pool:
    for done in [pool.submit(prepare_small, *job) for _ in range(2)]:
      done.result()
  got = sets.read_all(sets.open_set('digits', data_dir=str(tmp_path)))
  assert sets.rows_of(*got) == sets.rows_of(images, labels)
  assert [path.name for path in (tmp_path / 'digits').iterdir()] == ['1.0.0']


def test_what_a_killed_process_left_is_not_read(tmp_path):
  left = tmp_path / 'digits/incomplete.ABCDEF_1.0.0' / RECORDS
  left.parent.mkdir(parents=True)
  left.write_bytes(b'half')
  assert len(sets.open_set('digits', 'test', data_dir=str(tmp_path))) == 360


def test_a_data_dir_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / 'file').write_bytes(b'')
  assert 'cannot write' in sets.refusal(
    'digits', data_dir=str(tmp_path / 'file')
  )


def idx(array):
  """An IDX file of bytes."""
  sizes = np.array(array.shape, '>u4')
  return bytes((0, 0, 8, array.ndim)) + sizes.tobytes() + array.tobytes()


def fashion_files(folder):
  """Writes four small files; returns their arrays and SHA-256."""
  arrays = []
  sha256 = []
  for part, count in (('train', 20), ('t10k', 5)):
    images = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = RNG.integers(0, 10, count, dtype=np.uint8)
    for kind, array in (('images-idx3', images), ('labels-idx1', labels)):
      path = folder / f'{part}-{kind}-ubyte.gz'
      path.write_bytes(gzip.compress(idx(array)))
      arrays.append(array)
      sha256.append(hashlib.sha256(idx(array)).hexdigest())
  return arrays, tuple(sha256)


def test_fashion_mnist_reads_idx(tmp_path):
  arrays, sha256 = fashion_files(tmp_path)
  splits = builders.fashion_mnist(str(tmp_path), sha256)
  got = [*splits['train'], *splits['test']]
  for array, expected in zip(got, arrays, strict=True):
    np.testing.assert_array_equal(array.squeeze(), expected)
  assert splits['train'][0].shape == (20, 28, 28, 1)


def test_wrong_fashion_mnist_files_are_refused(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  line = sets.refusal('fashion_mnist', data_dir=str(tmp_path))
  assert 'no network to http://127.0.0.1:9/train-images-idx3-ubyte.gz' in line
  assert f'{tmp_path}/.cache/ddo_jax/data/train-images-idx3-ubyte.gz' in line
  assert '--config.data.raw_dir' in line
  fashion_files(tmp_path)
  fields = {'data_dir': str(tmp_path), 'raw_dir': str(tmp_path)}
  # Not the real ones, as MNIST's files of the same names are not.
  path = tmp_path / 'train-images-idx3-ubyte.gz'
  assert f'{path} has SHA-256' in sets.refusal('fashion_mnist', **fields)
  path.write_bytes(path.read_bytes()[:-100])
  assert f'{path} cannot be decompressed' in sets.refusal(
    'fashion_mnist', **fields
  )
  (tmp_path / 't10k-labels-idx1-ubyte.gz').unlink()
  line = sets.refusal('fashion_mnist', **fields)
  assert line.startswith('t10k-labels-idx1-ubyte.gz is') and 'Debian' in line


def cifar_file(folder):
  """Writes a small tar.gz; returns images, labels and its SHA-256."""
  images = RNG.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
  labels = RNG.integers(0, 10, 12, dtype=np.uint8)
  rows = [  # a byte of label, then the planes R, G, B
    bytes([label]) + image.transpose(2, 0, 1).tobytes()
    for image, label in zip(images, labels, strict=True)
  ]
  path = folder / 'cifar-10-binary.tar.gz'
  names = [*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch']
  with tarfile.open(path, 'w:gz') as tar:
    for i, name in enumerate(names):
      member = tarfile.TarInfo(f'cifar-10-batches-bin/{name}.bin')
      member.size = 2 * 3073
      tar.addfile(member, io.BytesIO(rows[2 * i] + rows[2 * i + 1]))
  return images, labels, hashlib.sha256(path.read_bytes()).hexdigest()


def test_cifar10_is_the_set_that_stock_tfds_reads(tmp_path):
  import tensorflow_datasets as tfds

  images, labels, sha256 = cifar_file(tmp_path)
  splits = builders.cifar10(str(tmp_path), sha256)
  for split, rows in (('train', slice(10)), ('test', slice(10, 12))):
    np.testing.assert_array_equal(splits[split][0], images[rows])
    np.testing.assert_array_equal(splits[split][1], labels[rows])
  prepare_small('cifar10', images, labels, tmp_path)
  ours = sets.open_set('cifar10', data_dir=str(tmp_path))
  stock = tfds.image_classification.Cifar10(data_dir=str(tmp_path))
  rows = stock.as_data_source('train')
  # The order in which stock TFDS, given the same images, writes 12 of them.
  written = [int(row['id'][-5:]) for row in rows]
  assert written == [6, 5, 4, 10, 0, 8, 3, 1, 9, 7, 11, 2]
  np.testing.assert_array_equal(ours.stored, images[written])
  np.testing.assert_array_equal(ours.classes, labels[written])
  for row, image, label in zip(rows, ours.stored, ours.classes, strict=True):
    np.testing.assert_array_equal(row['image'], image)
    assert row['label'] == label
  features = tfds.builder_from_directory(stock.data_path).info.features
  fresh = tfds.image_classification.Cifar10(data_dir=str(tmp_path / 'none'))
  assert str(fresh.info.features) == str(features)


def test_wrong_cifar10_files_are_refused(tmp_path):
  fields = {'data_dir': str(tmp_path), 'raw_dir': str(tmp_path)}
  assert 'University of Toronto' in sets.refusal('cifar10', **fields)
  cifar_file(tmp_path)
  assert 'cifar-10-binary.tar.gz has SHA-256' in sets.refusal(
    'cifar10', **fields
  )
