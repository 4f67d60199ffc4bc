"""Small sets of images, written into folders, zips and arrays."""

import io
import json
import pickle
import zipfile

import numpy as np
from PIL import Image
import pytest

from ddo_jax import errors
from ddo_jax.data import sources

SHAPE = (4, 6, 3)


def save(image, kind='PNG'):
  """The bytes of an image file."""
  file = io.BytesIO()
  image.save(file, kind)
  return file.getvalue()


def encode(pixels, kind='PNG'):
  """The bytes of an image file, of uint8 pixels [H,W,C]."""
  return save(Image.fromarray(pixels.squeeze()), kind)


def make_images(count, shape=SHAPE):
  """Random images uint8 [count,H,W,C] and labels [count] of five classes."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
  return images, rng.integers(0, 5, count)


def edm_files(count=7, shape=SHAPE):
  """File name -> bytes in EDM's layout; labels are listed in reverse order."""
  images, labels = make_images(count, shape)
  names = [f'{i % 2:05d}/img{i:08d}.png' for i in range(count)]
  files = dict(zip(names, map(encode, images), strict=True))
  entries = list(zip(names, labels.tolist(), strict=True))
  entries.reverse()
  files['dataset.json'] = json.dumps({'labels': entries}).encode()
  return files


def write(path, files):
  """Writes `files` into a folder, or into a zip if the path says so."""
  if path.suffix == '.zip':
    with zipfile.ZipFile(path, 'w') as archive:
      for name, content in files.items():
        archive.writestr(name, content)
  else:
    for name, content in files.items():
      (path / name).parent.mkdir(parents=True, exist_ok=True)
      (path / name).write_bytes(content)
  return path


def open_set(source, split='train', **fields):
  """Opens a source by its name or path, with any other settings."""
  return sources.open_source(sources.Data(source=str(source), **fields), split)


def read_all(source):
  """All rows of a source and their labels."""
  return source.read(np.arange(len(source)))


def sent(source):
  """A source as another process gets it."""
  return pickle.loads(pickle.dumps(source))


def refusal(source, split='train', **fields):
  """The one line that refuses a source, when it is opened or when read."""
  with pytest.raises(errors.UserError) as caught:
    read_all(open_set(source, split, **fields))
  line = str(caught.value)
  assert '\n' not in line
  return line


def rows_of(images, labels):
  """The rows as a sorted list, because TFDS stores them shuffled."""
  return sorted(zip(map(bytes, images), labels.tolist(), strict=True))


def assert_same(some, others):
  """Compares two streams of batches, to the bit."""
  some = list(some)
  others = list(others)
  assert len(some) == len(others) > 0
  for one, other in zip(some, others, strict=True):
    assert one.keys() == other.keys()
    for key in one:
      assert one[key].dtype == other[key].dtype
      np.testing.assert_array_equal(one[key], other[key])
