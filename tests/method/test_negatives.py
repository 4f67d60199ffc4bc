"""The offline pool: identity, balance, and being cut off."""

import numpy as np
import pytest

from ddo_jax import errors
from ddo_jax.data import labels as labels_lib
from ddo_jax.method import negatives

IDENTITY = {'reference': 'abc', 'sampler': {'num_steps': 3}, 'stream': [0, 'a']}


def open_pool(folder, size=10, shard_size=4, **identity):
  return negatives.FakePool(folder, size, shard_size, IDENTITY | identity)


def draw(ids):
  """Stands for a generator: image and label follow from the id alone."""
  images = (
    np.zeros((len(ids), 2, 2, 1), np.uint8)
    + ids.astype(np.uint8)[:, None, None, None]
  )
  return images, ids.astype(np.int32) % 3


def fill(pool, shards=None):
  for shard in pool.missing() if shards is None else shards:
    pool.write(shard, *draw(pool.ids(shard)))


def test_a_pool_is_read_back_whole(tmp_path):
  pool = open_pool(tmp_path)
  fill(pool)
  source = pool.source(num_classes=3, pixel_values=17)
  assert (len(source), source.num_classes, source.pixel_values) == (10, 3, 17)
  images, labels = source.read(np.arange(10))
  expected = draw(np.arange(10))
  np.testing.assert_array_equal(images, expected[0])
  np.testing.assert_array_equal(labels, expected[1])


def test_a_pool_cut_off_goes_on_with_what_is_missing(tmp_path):
  pool = open_pool(tmp_path)
  assert pool.missing() == [0, 1, 2]
  fill(pool, [0, 2])
  (tmp_path / '000001.npz.partial').write_bytes(b'half a shard')
  again = open_pool(tmp_path)
  assert again.missing() == [1]
  fill(again)
  images, _ = again.source(3, 17).read(np.arange(10))
  np.testing.assert_array_equal(images, draw(np.arange(10))[0])


def test_the_shards_partition_the_pool(tmp_path):
  pool = open_pool(tmp_path)
  ids = [pool.ids(shard) for shard in pool.missing()]
  np.testing.assert_array_equal(np.concatenate(ids), np.arange(10))


def test_a_pool_that_lacks_shards_is_refused(tmp_path):
  pool = open_pool(tmp_path)
  fill(pool, [0])
  with pytest.raises(errors.UserError, match='lacks 2 shards'):
    pool.source(3, 17)


def test_a_damaged_shard_is_refused_by_name(tmp_path):
  pool = open_pool(tmp_path)
  fill(pool)
  path = tmp_path / '000001.npz'
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(errors.UserError, match=r'000001\.npz'):
    pool.source(3, 17)


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def swap(path, other):
  content = path.read_bytes()
  path.write_bytes(other.read_bytes())
  other.write_bytes(content)


@pytest.mark.parametrize(
  'damage, missing',
  [
    (lambda folder: flip(folder / '000001.npz'), [1]),
    (lambda folder: (folder / '000001.npz').write_bytes(b''), [1]),
    (lambda folder: (folder / '000001.npz').unlink(), [1]),
    (lambda folder: swap(folder / '000000.npz', folder / '000001.npz'), [0, 1]),
    (lambda folder: (folder / 'pool.json').write_text('[]'), []),
    (lambda folder: flip(folder / 'pool.json'), []),
    (lambda folder: (folder / 'pool.json').unlink(), []),
  ],
)
def test_what_does_not_hold_is_drawn_again(tmp_path, caplog, damage, missing):
  fill(open_pool(tmp_path))
  damage(tmp_path)
  pool = open_pool(tmp_path)
  assert pool.missing() == missing
  names = [f'00000{shard}.npz' for shard in missing] or ['pool.json']
  assert all(str(tmp_path / name) in caplog.text for name in names)
  fill(pool)
  images, _ = pool.source(3, 17).read(np.arange(10))
  np.testing.assert_array_equal(images, draw(np.arange(10))[0])
  caplog.clear()
  assert not open_pool(tmp_path).missing() and not caplog.records


def test_shards_without_their_record_are_those_of_the_same_one(tmp_path):
  fill(open_pool(tmp_path))
  (tmp_path / 'pool.json').unlink()
  assert open_pool(tmp_path, reference='abd').missing() == [0, 1, 2]


def test_a_pool_of_an_earlier_version(tmp_path, caplog):
  fill(open_pool(tmp_path))
  (tmp_path / 'manifest.json').unlink()
  flip(tmp_path / '000001.npz')
  np.savez(tmp_path / '000002.npz', image=draw(np.arange(3))[0])
  pool = open_pool(tmp_path)
  assert pool.missing() == [1]
  assert 'manifest.json is missing' in caplog.text
  fill(pool)
  with pytest.raises(errors.UserError, match='3 images, and shard 2 2: delete'):
    pool.source(3, 17)


@pytest.mark.parametrize('size', [None, 0, '4', 4.0])
def test_a_record_of_another_form_is_one_line(tmp_path, size):
  pool = open_pool(tmp_path)
  pool._manifest.write_json('pool.json', IDENTITY | {'shard_size': size})
  with pytest.raises(errors.UserError, match=r'pool\.json has shard_size'):
    open_pool(tmp_path)


def test_a_failed_write_leaves_no_shard(tmp_path, monkeypatch):
  pool = open_pool(tmp_path)

  def savez(file, **arrays):
    file.write(b'half a shard')
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(np, 'savez', savez)
  with pytest.raises(errors.UserError, match='disk full while writing'):
    fill(pool)
  assert open_pool(tmp_path).missing() == [0, 1, 2]


@pytest.mark.parametrize(
  'other',
  [
    {'reference': 'abd'},
    {'sampler': {'num_steps': 4}},
    {'stream': [1, 'a']},
    {'size': 11},
  ],
)
def test_the_pool_of_another_identity_is_refused(tmp_path, other):
  fill(open_pool(tmp_path))
  (name,) = other
  with pytest.raises(errors.UserError) as caught:
    open_pool(tmp_path, **other)
  line = str(caught.value)
  assert f'was drawn with {name} = ' in line and str(tmp_path) in line
  open_pool(tmp_path)  # the refusal left it as it was


def test_a_pool_that_was_begun_keeps_its_shards(tmp_path):
  fill(open_pool(tmp_path))
  again = open_pool(tmp_path, shard_size=5)
  assert again.shard_size == 4 and not again.missing()


def test_a_pool_that_does_not_say_its_labels_has_all_classes_equally(tmp_path):
  """As earlier versions drew them."""
  open_pool(tmp_path)
  open_pool(tmp_path, labels=labels_lib.EQUAL)
  with pytest.raises(errors.UserError, match='every class equally often'):
    open_pool(tmp_path, labels=str(labels_lib.Shares((1, 3))))
