"""Do samples lie closer to the training images than unseen images do?

A Fréchet distance to the training set rewards copies of it; the two numbers
here reveal them. Distances are Euclidean, between raw pixels.
"""

from typing import NamedTuple

import numpy as np

from ddo_jax import errors
from ddo_jax.evaluation.metrics import prdc

# A sample counts as memorised if it is nearer to the training set than this
# share of the held-out images is.
QUANTILE = 0.02


class HeldOut(NamedTuple):
  """How near held-out images are to the training set.

  Attributes:
    mean: the mean distance to the nearest training image, in pixel units.
    near: the distance below which a sample counts as memorised: the 2 %
      quantile over the held-out images; > 0.
  """

  mean: float
  near: float


class Memorisation(NamedTuple):
  """How near samples are to the training set.

  Attributes:
    nn_ratio: the samples' mean distance to their nearest training image,
      divided by the same mean over held-out images; > 0, and 1 means that
      samples are as far away as held-out images.
    memorised: the share in [0, 1] of samples that are nearer to a training
      image than the 2 % quantile of held-out images; held-out images
      themselves have about 0.02.
  """

  nn_ratio: float
  memorised: float


def nearest_distance(
  images: np.ndarray, train: np.ndarray, tile: int = prdc.TILE
) -> np.ndarray:
  """Returns the pixel distance of each image to its nearest training image.

  Args:
    images: [N, ...] of any real type.
    train: [M, ...] of the same type and image shape.
    tile: the number of images compared at once; see `prdc.kth_distance`.

  Returns:
    [N] float64, Euclidean, in units of the pixels.

  Raises:
    UserError: the types or image shapes differ, or there are no images.
  """
  images = np.asarray(images)
  train = np.asarray(train)
  kind = (images.dtype.name, images.shape[1:])
  train_kind = (train.dtype.name, train.shape[1:])
  if kind != train_kind:
    raise errors.UserError(
      f'images are {kind} and training images {train_kind}; both must have '
      'one type and shape: compare raw pixels as the source stores them'
    )
  if not (images.size and train.size):
    raise errors.UserError(
      f'{len(images)} images and {len(train)} training images; both sets '
      'must have some'
    )
  images = images.reshape(len(images), -1)
  train = train.reshape(len(train), -1)
  return np.sqrt(prdc.kth_distance(images, train, k=1, tile=tile))


def describe_held_out(distance: np.ndarray) -> HeldOut:
  """Describes held-out images by their distances to the training set.

  Args:
    distance: [L], as `nearest_distance` gives them.

  Raises:
    UserError: so many held-out images are copies of training images that no
      sample could be nearer than they are.
  """
  near = np.quantile(distance, QUANTILE)
  if near == 0:
    copies = (distance == 0).mean()
    raise errors.UserError(
      f'{copies:.0%} of the held-out images are copies of training images, '
      f'so nothing can be nearer than they are; at most {QUANTILE:.0%} may '
      'be: use a split without duplicates'
    )
  return HeldOut(mean=float(distance.mean()), near=float(near))


def compare(distance: np.ndarray, held_out: HeldOut) -> Memorisation:
  """Compares samples with held-out images.

  Args:
    distance: [N] distances of samples to their nearest training image, as
      `nearest_distance` gives them. Samples must be rounded and clipped as the
      data is.
    held_out: the held-out images of the same data source.
  """
  return Memorisation(
    nn_ratio=float(distance.mean() / held_out.mean),
    memorised=float((distance < held_out.near).mean()),
  )
