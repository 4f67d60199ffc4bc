"""Shortcuts between real digits and real digits that were spoiled."""

import numpy as np
import pytest

from ddo_jax.data import builders
from ddo_jax.tuning import shortcut


@pytest.fixture(scope='module')
def rows():
  """(real images, their labels, other real images, their labels)."""
  splits = builders.digits()
  return *splits['train'], *splits['test']


def encode(stored):
  return stored.astype(np.float32) / 8 - 1


def look(real, fake, labels=None):
  differences = shortcut.compare(real, fake, encode)
  return shortcut.finding(differences, labels)


def framed(images):
  inside = np.zeros_like(images)
  inside[:, 1:-1, 1:-1] = images[:, 1:-1, 1:-1]
  return inside


def blurred(images):
  halves = images.reshape(len(images), 4, 2, 4, 2, 1).mean((2, 4))
  return np.repeat(np.repeat(halves, 2, 1), 2, 2).astype(np.uint8)


def test_real_images_do_not_differ_from_real_images(rows):
  real, real_labels, other, other_labels = rows
  labels = shortcut.compare_labels(real_labels, other_labels)
  found = look(real, other, labels)
  assert found.found is False
  assert '(90% would be a shortcut)' in found.evidence
  assert 'the shares of classes are 0.0% apart' in found.evidence
  differences = shortcut.compare(real, other, encode)
  assert differences[0].separability < 0.6
  assert all(0 < each.p_value <= 1 for each in differences)


@pytest.mark.parametrize(
  ('spoil', 'name'),
  [
    (lambda images: np.minimum(images + 1, 16), 'values that fake rows lack'),
    (lambda images: images // 2 * 2, 'values that fake rows lack'),
    (framed, 'mean of the border'),
    (blurred, 'finest detail'),
  ],
)
def test_a_spoiled_image_is_told(rows, spoil, name):
  real, _, other, _ = rows
  found = look(real, spoil(other).astype(np.uint8))
  assert found.found
  assert name in found.evidence
  assert 'draw the pool anew' in found.advice


def test_statistics_of_a_frame():
  frame = np.ones((1, 5, 4, 1))
  frame[:, 1:-1, 1:-1] = 0
  frame[:, -1] = 2
  found = {name: row[0] for name, row in shortcut.statistics(frame).items()}
  assert (found['lowest value'], found['highest value']) == (0, 2)
  np.testing.assert_allclose(found['mean'], 18 / 20)
  np.testing.assert_allclose(found['mean of the border'], 18 / 14)
  assert found['mean of the top edge'] == 1
  assert found['mean of the bottom edge'] == 2


def test_rare_values_are_no_grid():
  """Each occurs in few rows, of either kind."""
  pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 3, 3, 1), np.uint8)
  assert look(*pixels).found is False


def test_few_rows_tell_little(rows):
  real, _, other, _ = rows
  found = look(real, other[:4] // 2 * 2)
  assert found.found is False
  assert 'in 100% of the pairs: values that fake rows lack' in found.evidence


def test_a_grid_of_grey_levels_is_told(rows):
  """Data that holds 17 of 256 values, and fakes that hold all."""
  real, _, other, _ = rows
  noise = np.random.default_rng(0).integers(-3, 4, other.shape)
  fake = np.clip(other * 15 + noise, 0, 240).astype(np.uint8)
  found = look(real * 15, fake)
  assert 'values that real rows lack' in found.evidence
  assert '--config.model.pixel_values' in found.advice
  assert not look(real * 15, other * 15).found


def test_classes_drawn_too_often_are_told(rows):
  real, real_labels, other, labels = rows
  often = np.where(labels == 1, 7, labels)
  found = look(real, other, shortcut.compare_labels(real_labels, often))
  assert found.found
  assert 'share of class 1' in found.evidence or 'class 7' in found.evidence
  assert found.flags == ('--config.labels=data',)
  few = shortcut.compare_labels(real_labels, often[:10])
  assert not look(real, other, few).found
  same = shortcut.compare_labels(np.zeros(9, int), np.zeros(9, int))
  assert (same.separability, same.p_value) == (0, 1)


def test_colours_are_told():
  numbers = np.random.default_rng(0)
  red = np.array([3, 0, 0])
  real = (numbers.integers(0, 9, (200, 4, 4, 3)) + red).astype(np.uint8)
  swapped = real[..., ::-1]
  assert 'mean of channel' in look(real, swapped).evidence
  grey = np.repeat(real[..., :1], 3, axis=3)
  assert 'difference of channels' in look(real, grey).evidence


def test_latents_have_no_grid():
  numbers = np.random.default_rng(0)
  real, fake = numbers.normal(size=(2, 200, 4, 4, 4)).astype(np.float32)
  assert look(real, fake).found is False
  assert look(real, fake + 5).found
  names = [each.name for each in shortcut.compare(real, fake, encode)]
  assert not [name for name in names if name.startswith('values')]
