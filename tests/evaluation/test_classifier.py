"""The small classifier on the digits."""

import dataclasses

import jax
import numpy as np
import pytest
from sklearn import datasets
from sklearn import model_selection

from ddo_jax import errors
from ddo_jax.evaluation.networks import classifier


@pytest.fixture(scope='module')
def digits():
  """(train images, test images, train labels, test labels), raw 0 .. 16."""
  bunch = datasets.load_digits()
  images = bunch.images.astype(np.uint8)[..., None]
  return model_selection.train_test_split(
    images,
    bunch.target,
    test_size=360,
    stratify=bunch.target,
    random_state=0,
  )


@pytest.fixture(scope='module')
def fitted(digits):
  return classifier.fit(digits[0], digits[2], num_classes=10, pixel_values=17)


def test_it_learns_the_digits(digits, fitted):
  _, test_images, _, test_labels = digits
  features, predicted = fitted.apply(test_images)
  assert features.shape == (360, 32) and features.dtype == np.float32
  assert predicted.shape == (360,) and predicted.dtype == np.int32
  # 0.97 leaves 11 errors of 360; nearest centroids make about 38.
  assert (predicted == test_labels).mean() > 0.97


def test_features_have_unit_variance_on_the_training_split(digits, fitted):
  features, _ = fitted.apply(digits[0])
  variance = features.var(axis=0, ddof=1, dtype=np.float64)
  np.testing.assert_allclose(variance, 1, rtol=1e-5)


def test_features_tell_classes_apart(digits, fitted):
  # They must carry what the logits need: classes are linearly separable.
  features, _ = fitted.apply(digits[1])
  centres = fitted.apply(digits[0])[0]
  centres = np.stack([centres[digits[2] == c].mean(axis=0) for c in range(10)])
  offset = features[:, None, :] - centres[None, :, :]
  nearest = np.square(offset).sum(axis=2).argmin(axis=1)
  assert (nearest == digits[3]).mean() > 0.95


def test_the_same_bits_again_and_others_for_another_seed(digits, fitted):
  train_images, test_images, train_labels, _ = digits
  features, predicted = fitted.apply(test_images)
  again = classifier.fit(train_images, train_labels, 10, 17).apply(test_images)
  np.testing.assert_array_equal(again[0], features)
  np.testing.assert_array_equal(again[1], predicted)
  other = classifier.fit(train_images, train_labels, 10, 17, seed=1)
  assert np.abs(other.apply(test_images)[0] - features).max() > 0.1


def test_any_number_of_images_without_retracing(digits, fitted):
  images = digits[0]
  whole, classes = fitted.apply(images)  # more than one chunk
  with jax.no_tracing(), jax.transfer_guard('disallow'):
    for n in (1, 360, 1_024, 1_025):
      features, predicted = fitted.apply(images[-n:])
      np.testing.assert_array_equal(features, whole[-n:])
      np.testing.assert_array_equal(predicted, classes[-n:])


def test_the_number_of_pixel_values_sets_the_scale(digits, fitted):
  # x = 2 raw/(pixel_values − 1) − 1: 15 times the values of 241 are the same.
  images = digits[1]
  finer = dataclasses.replace(fitted, pixel_values=241)
  features, predicted = fitted.apply(images)
  same, same_predicted = finer.apply(images * 15)
  np.testing.assert_allclose(same, features, atol=1e-5)
  np.testing.assert_array_equal(same_predicted, predicted)
  inputs = classifier._inputs(images, 17)
  assert inputs.min() == -1 and inputs.max() == 1


def test_mistakes_raise(digits, fitted):
  images, _, labels, _ = digits
  fit = classifier.fit
  with pytest.raises(errors.UserError, match='float32'):
    fit(images.astype(np.float32), labels, 10, 17)
  with pytest.raises(
    errors.UserError, match=r'value 16; raw pixels are 0 \.\. 15'
  ):
    fit(images, labels, 10, 16)
  with pytest.raises(errors.UserError, match=r'labels are int64 \(9,\)'):
    fit(images, labels[:9], 10, 17)
  with pytest.raises(errors.UserError, match='labels are float64'):
    fit(images, labels / 2, 10, 17)
  with pytest.raises(errors.UserError, match='labels run from 0 to 9'):
    fit(images, labels, 9, 17)
  with pytest.raises(errors.UserError, match='num_classes is 1'):
    fit(images, labels, 1, 17)
  with pytest.raises(errors.UserError, match=r'images are uint8 \(0, 8'):
    fitted.apply(images[:0])
  with pytest.raises(
    errors.UserError, match=r'value 255; raw pixels are 0 \.\. 16'
  ):
    fitted.apply(images * 15 + 15)
  with pytest.raises(errors.UserError, match=r'have shape \(8, 7, 1\)'):
    fitted.apply(images[:, :, :7])
  with pytest.raises(errors.UserError, match='all alike'):
    fit(np.full_like(images, 3), labels, 10, 17)
