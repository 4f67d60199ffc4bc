"""Sets of raw latents: EDM2's folders and zips, arrays, and the fake pool."""

import io
import json
import pickle

import numpy as np
import pytest
import sets

from ddo_jax import errors
from ddo_jax.data import loader
from ddo_jax.data import sources
from ddo_jax.method import negatives

SHAPE = (2, 6, 8)  # H, W, and four means before four standard deviations


def make_latents(count=5):
  rng = np.random.default_rng(0)
  latents = rng.standard_normal((count, *SHAPE)).astype(np.float32)
  latents[..., 4:] = np.abs(latents[..., 4:])
  return latents, rng.integers(0, 3, count)


def encode(latents):
  """The bytes of a .npy."""
  file = io.BytesIO()
  np.save(file, latents)
  return file.getvalue()


def name_of(index):
  return f'00000/img-mean-std-{index:08d}.npy'


def edm2_files():
  """File name -> bytes in EDM2's layout, [8,H,W]."""
  latents, labels = make_latents()
  names = [name_of(i) for i in range(len(labels))]
  entries = [*zip(names, labels.tolist(), strict=True)]
  planes = np.moveaxis(latents, -1, 1)
  files = dict(zip(names, map(encode, planes), strict=True))
  return files | {'dataset.json': json.dumps({'labels': entries}).encode()}


@pytest.mark.parametrize('name', ['set', 'set.zip'])
def test_folder_and_zip_give_latents_and_labels_back(tmp_path, name):
  latents, labels = make_latents()
  source = sets.open_set(sets.write(tmp_path / name, edm2_files()))
  got, got_labels = sets.read_all(source)
  assert (got.dtype, got_labels.dtype) == (np.float32, np.int32)
  np.testing.assert_array_equal(got, latents)
  np.testing.assert_array_equal(got_labels, labels)
  assert (len(source), source.stored_shape) == (5, SHAPE)
  assert (source.num_classes, source.pixel_values) == (labels.max() + 1, 256)
  (batch,) = loader.batches(
    source, seed=1, batch_size=4, start_step=3, stop_step=4
  )
  index = loader.order(1, 12 + np.arange(4), 5)
  np.testing.assert_array_equal(batch['stored'], latents[index])


def test_the_order_in_memory_does_not_matter(tmp_path):
  files = edm2_files()
  planes = np.load(io.BytesIO(files[name_of(0)]))
  files[name_of(0)] = encode(np.asfortranarray(planes))
  source = sets.open_set(sets.write(tmp_path / 'set', files))
  np.testing.assert_array_equal(sets.read_all(source)[0], make_latents()[0])


PLANES = np.moveaxis(make_latents(1)[0][0], -1, 0)


def with_value(index, value):
  planes = PLANES.copy()
  planes[index] = value
  return encode(planes)


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    (encode(PLANES)[:-1], 'is no whole .npy of plain numbers'),
    (b'', 'is no whole .npy of plain numbers'),
    (b'\x93NUMPY\x01\x00', 'is no whole .npy of plain numbers'),
    (pickle.dumps(PLANES), 'is no whole .npy of plain numbers'),
    (encode(np.array([{}])), 'is no whole .npy of plain numbers'),
    (encode(PLANES.astype(np.float64)), 'is float64 [8, 2, 6]; wanted raw'),
    (encode(PLANES.astype(np.uint8)), 'is uint8 [8, 2, 6]; wanted raw'),
    (encode(PLANES[:7]), 'is float32 [7, 2, 6]; wanted raw'),
    (encode(PLANES[:, 0]), 'is float32 [8, 6]; wanted raw'),
    (encode(PLANES[:0]), 'is float32 [0, 2, 6]; wanted raw'),
    (encode(PLANES[:, :1]), 'is [1, 6, 8], label'),
    (with_value((0, 1, 5), np.nan), 'holds NaN or Inf'),
    (with_value((7, 0, 0), np.inf), 'holds NaN or Inf'),
    (with_value((4, 1, 5), -1e-3), 'holds standard deviations below 0'),
  ],
)
def test_a_wrong_latent_is_refused_by_its_name(tmp_path, content, words):
  path = sets.write(tmp_path / 'set.zip', edm2_files() | {name_of(3): content})
  line = sets.refusal(path)
  assert words in line and f'{path}/{name_of(3)}' in line


def test_an_npz_for_a_latent_is_refused(tmp_path):
  file = io.BytesIO()
  np.savez(file, PLANES)
  files = edm2_files() | {name_of(3): file.getvalue()}
  path = sets.write(tmp_path / 'set', files)
  assert '00000003.npy is no whole' in sets.refusal(path)


def test_images_and_latents_in_one_set_are_refused(tmp_path):
  path = sets.write(tmp_path / 'set', edm2_files() | {'a.png': b''})
  with pytest.raises(errors.UserError, match='holds 1 images and 5 latents'):
    sets.open_set(path)


def test_labels_must_be_those_of_the_latents(tmp_path):
  files = edm2_files()
  del files[name_of(4)]
  path = sets.write(tmp_path / 'set', files)
  with pytest.raises(errors.UserError, match='missing files'):
    sets.open_set(path)


def test_latents_in_memory():
  latents, labels = make_latents()
  source = sources.ArraySource('pool', latents, labels, num_classes=3)
  got, got_labels = sets.read_all(source)
  np.testing.assert_array_equal(got, latents)
  np.testing.assert_array_equal(got_labels, labels)
  assert got.dtype == np.float32


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (lambda x: x[..., :3], r'images are float32 \[5, 2, 6, 3\]'),
    (lambda x: x[0], r'images are float32 \[2, 6, 8\]'),
    (lambda x: x.astype(np.float64), 'images are float64'),
    (lambda x: -x, 'pool holds standard deviations below 0'),
    (lambda x: x + np.float32(np.nan), 'pool holds NaN or Inf'),
  ],
)
def test_wrong_latents_in_memory_are_refused(change, words):
  latents, labels = make_latents()
  with pytest.raises(errors.UserError, match=words):
    sources.ArraySource('pool', change(latents), labels, num_classes=3)


def test_labels_of_latents_keep_to_their_classes():
  latents, labels = make_latents()
  with pytest.raises(errors.UserError, match='wanted at most'):
    sources.ArraySource('pool', latents, labels, num_classes=2)


def test_a_pool_keeps_latents_to_the_bit(tmp_path):
  pool = negatives.FakePool(tmp_path, 5, 2, {})
  latents, _ = make_latents()
  latents[0, 0, 0, :4] = np.float32([1e-38, -0.0, 1 / 3, 1e30])
  for shard in pool.missing():
    ids = pool.ids(shard)
    pool.write(shard, latents[ids], ids.astype(np.int32) % 3)
  source = pool.source(num_classes=3, pixel_values=256)
  got, labels = sets.read_all(source)
  assert got.dtype == np.float32 and got.tobytes() == latents.tobytes()
  assert labels.tolist() == [0, 1, 2, 0, 1]
  assert source.stored_shape == SHAPE


def test_a_pool_names_the_shard_of_a_diverged_latent(tmp_path):
  pool = negatives.FakePool(tmp_path, 4, 2, {})
  latents, labels = make_latents(4)
  latents[3, 0, 0, 0] = np.nan
  for shard in pool.missing():
    ids = pool.ids(shard)
    pool.write(shard, latents[ids], labels[ids])
  with pytest.raises(errors.UserError, match=r'000001\.npz holds NaN'):
    pool.source(num_classes=3, pixel_values=256)
