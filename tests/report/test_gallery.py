"""The images beside the samples: of the same classes, and the nearest."""

import numpy as np
import pytest

from ddo_jax.data import sources
from ddo_jax.report import gallery

LABELS = np.array([2, 0, 0, 1, 2, 0, 0], np.int32)


@pytest.fixture(scope='module')
def source():
  images = np.random.RandomState(0).randint(0, 256, (40, 4, 4, 1), np.uint8)
  classes = np.arange(40, dtype=np.int32) % 8 // 2  # 3 is not asked for
  return sources.ArraySource('set', images, classes, num_classes=4)


def test_real_images_are_of_the_same_classes(source):
  index = gallery.real_rows(source, LABELS, len(LABELS), seed=1)
  np.testing.assert_array_equal(source.labels()[index], LABELS)
  assert len(set(index)) == len(LABELS)
  other = gallery.real_rows(source, LABELS, len(LABELS), seed=2)
  assert (index != other).any()
  free = gallery.real_rows(source, None, 20, seed=1)
  assert len(set(free)) == 20
  assert len(set(source.labels()[free])) == 4


def test_nearest_images_are_those_of_a_plain_search(source, monkeypatch):
  monkeypatch.setattr(gallery, '_CHUNK_NUMBERS', 7 * 16)  # six chunks
  samples = source.stored[:5].copy()
  samples[:, 0, 0] ^= 1
  searched = np.arange(1, 40)  # without row 0
  nobody = np.full(5, -1)
  rows, distances = gallery.nearest(samples, nobody, source, searched)
  flat = source.stored.reshape(40, -1).astype(float)
  plain = np.linalg.norm(samples.reshape(5, 1, -1) - flat, axis=-1)
  plain[:, 0] = np.inf
  np.testing.assert_array_equal(rows, plain.argsort(axis=1)[:, :3])
  np.testing.assert_allclose(distances, np.sort(plain, axis=1)[:, :3])
  assert rows[1:, 0].tolist() == [1, 2, 3, 4]
  np.testing.assert_array_equal(distances[1:, 0], 1)
  # A training image is not its own neighbour.
  own, far = gallery.nearest(samples, np.arange(5), source, searched)
  assert (own[:, 0] != np.arange(5)).all()
  assert (far[1:, 0] > 1).all()


def test_latents_are_compared_by_their_means():
  rows = np.random.RandomState(0).rand(6, 2, 2, 4).astype(np.float32)
  source = sources.ArraySource('latents', rows, np.zeros(6, np.int32))
  samples = rows[:1].copy()
  samples[..., 2:] = 0  # the deviations
  found, distances = gallery.nearest(
    samples, np.array([-1]), source, np.arange(6)
  )
  assert found[0, 0] == 0
  np.testing.assert_allclose(distances[0, 0], 0, atol=1e-6)


def test_a_large_set_is_searched_in_part(source, monkeypatch):
  assert gallery.searched_rows(source, 0).tolist() == list(range(40))
  monkeypatch.setattr(gallery, '_SEARCHED', 30)
  part = gallery.searched_rows(source, 0)
  assert len(set(part)) == 30
  assert part.tolist() == sorted(part)


def test_sheets_say_what_is_on_them(source, tmp_path):
  drawn = {'after': source.stored[:7], 'before': source.stored[7:14]}

  def render(stored):
    return stored

  result = gallery.write(tmp_path, source, render, LABELS, drawn, seed=0)
  assert result['labels'] == LABELS.tolist()
  assert result['height'] == 4
  near = result['neighbours']
  assert (near['space'], near['searched'], near['training']) == (
    'pixels',
    40,
    40,
  )
  assert near['samples'] == [0] * 7
  assert min(near['real']) > 0
  written = {path.stem for path in tmp_path.iterdir()}
  assert written == {'before', 'after', 'real', 'neighbours'}
  del drawn['before']
  again = tmp_path / 'again'
  again.mkdir()
  gallery.write(again, source, render, None, drawn, seed=0)
  written = {path.stem for path in again.iterdir()}
  assert written == {'after', 'neighbours'}


def test_too_few_images_have_no_neighbours(tmp_path):
  images = np.zeros((4, 2, 2, 1), np.uint8)
  source = sources.ArraySource('few', images, np.zeros(4, np.int32))
  result = gallery.write(
    tmp_path, source, np.asarray, None, {'after': images}, seed=0
  )
  assert result['labels'] is None and result['neighbours'] == {}
