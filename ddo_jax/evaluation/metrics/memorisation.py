"""Do samples sit closer to the training images than unseen images do?

A Fréchet distance to the training set rewards copies of it; these two numbers
show them. Distances are Euclidean, between raw pixels.
"""

from typing import NamedTuple

import numpy as np

from ddo_jax import errors
from ddo_jax.evaluation.metrics import prdc

# Held-out images nearer to the training set than this share of them are
# the measure of "too near".
QUANTILE = 0.02


class Memorisation(NamedTuple):
  """How near samples are to the training set.

  Attributes:
    nn_ratio: mean distance of samples to their nearest training image over
      the same mean of held-out images; > 0, and 1 means like held-out images.
    memorised: share in [0, 1] of samples nearer to a training image than the
      2 % quantile of held-out images; about 0.02 means like held-out images.
  """

  nn_ratio: float
  memorised: float


def nearest_distance(
  images: np.ndarray, train: np.ndarray, tile: int = prdc.TILE
) -> np.ndarray:
  """The pixel distance of each image to its nearest training image.

  Args:
    images: [N, ...] of any real type.
    train: [M, ...] of the same type and image shape.
    tile: images compared at once (`prdc.kth_distance`).

  Returns:
    [N] float64, Euclidean, in units of the pixels.

  Raises:
    UserError: if type or image shape differ, or there are no images.
  """
  images, train = np.asarray(images), np.asarray(train)
  kinds = [(x.dtype.name, x.shape[1:]) for x in (images, train)]
  if kinds[0] != kinds[1]:
    raise errors.UserError(
      f'images are {kinds[0]} and training images {kinds[1]}; both must have '
      'one type and shape: compare raw pixels as the source stores them'
    )
  if not (images.size and train.size):
    raise errors.UserError(
      f'{len(images)} images and {len(train)} training images; both sets '
      'must have some'
    )
  images = images.reshape(len(images), -1)
  train = train.reshape(len(train), -1)
  return np.sqrt(prdc.kth_distance(images, train, 1, tile))


def compare(
  samples: np.ndarray,
  train: np.ndarray,
  held_out: np.ndarray,
  tile: int = prdc.TILE,
) -> Memorisation:
  """Compares samples with held-out images by their distance to `train`.

  Args:
    samples: [N, ...] generated images, rounded and clipped as the data is.
    train: [M, ...] the images the model was trained on.
    held_out: [L, ...] images of the same source that it never saw.
    tile: images compared at once (`prdc.kth_distance`).

  Returns:
    (nn_ratio, memorised), python floats.

  Raises:
    UserError: if the images differ in type or shape, a set is empty, or so
      many held-out images are copies of training images that none is "nearer".
  """
  sample_distance = nearest_distance(samples, train, tile)
  held_out_distance = nearest_distance(held_out, train, tile)
  near = np.quantile(held_out_distance, QUANTILE)
  if near == 0:
    copies = (held_out_distance == 0).mean()
    raise errors.UserError(
      f'{copies:.0%} of the held-out images are copies of training images, '
      f'so nothing can be nearer than they are; at most {QUANTILE:.0%} may '
      'be: use a split without duplicates'
    )
  return Memorisation(
    nn_ratio=float(sample_distance.mean() / held_out_distance.mean()),
    memorised=float((sample_distance < near).mean()),
  )
