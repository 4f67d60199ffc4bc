"""The evaluator of data that no protocol is about, such as the digits."""

from collections.abc import Iterator
import hashlib
import logging
import pathlib
from typing import Any

import numpy as np

from ddo_jax import errors
from ddo_jax.data import labels as labels_lib
from ddo_jax.data import sources
from ddo_jax.evaluation import evaluator
from ddo_jax.evaluation import rows as rows_lib
from ddo_jax.evaluation.metrics import frechet
from ddo_jax.evaluation.metrics import memorisation
from ddo_jax.evaluation.metrics import prdc
from ddo_jax.evaluation.metrics import statistics
from ddo_jax.evaluation.metrics import uncertainty
from ddo_jax.evaluation.networks import classifier

_LOGGER = logging.getLogger(__name__)
_CHUNK = 1_024  # images that are embedded at once
_KINDS = {
  'features': rows_lib.Kind(classifier.FEATURES),
  'predicted': rows_lib.Kind(1),
  # The distance to the nearest training image; a ratio of means of it is a
  # score, to float64's digits.
  'nearest': rows_lib.Kind(1, np.float64),
}


def doubt(accuracy: float, commonest: float) -> str:
  """Returns a line where a classifier is too poor to measure with, else ''.

  The score `accuracy` of perfect samples would be the classifier's own, and
  its features see what tells classes apart to it. It reaches 0.97 on the
  digits. Where a fifth of real images go wrong, or it makes more than half the
  mistakes of one that always answers with the commonest class, neither says
  much of the images.

  Args:
    accuracy: its share of right answers on held-out images.
    commonest: the share of the commonest class among them.
  """
  if accuracy >= 0.8 and 1 - accuracy <= (1 - commonest) / 2:
    return ''
  return (
    f'the classifier is right on {accuracy:.0%} of held-out images, where'
    f' always answering with one class is on {commonest:.0%}: too poor to'
    ' measure with; take Inception features, by --mode=fid_stats and'
    ' --config.evaluation.protocol'
  )


def _hash(images: np.ndarray) -> str:
  return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()


class ClassifierEvaluator:
  """Measures images in a classifier's features; an `evaluator.Evaluator`.

  The classifier is trained on the training split, always to the same weights.
  The scores are `fd_train` and `fd_test` (Fréchet distances to both splits),
  `accuracy` (the share of samples classified as their own label), `precision`,
  `recall`, `nn_ratio` and `memorised` (see `metrics`).

  Attributes:
    num_images: 5,000.
    num_blocks: 3.
    minima: (), as every score is reported by its mean.
    label_rule: how often each class is drawn, in words.
  """

  num_images = 5_000
  num_blocks = 3
  minima: tuple[str, ...] = ()

  def __init__(
    self, train: sources.Source, test: sources.Source, rule: str = 'data'
  ):
    """Reads both splits whole and fits the classifier.

    Args:
      train: the training images.
      test: the held-out images.
      rule: how often each class is drawn, one of `labels.RULES`.

    Raises:
      errors.UserError: the data has no labels, or the held-out images are
        copies of the training images.
    """
    if train.num_classes < 2:
      raise errors.UserError(
        f'{train.name} has {train.num_classes} classes; evaluation fits a'
        ' classifier and wants 2 or more: give the images labels'
      )
    sources.compare(train, test)
    self._train, labels = train.read(np.arange(len(train)))
    test_images, test_labels = test.read(np.arange(len(test)))
    self._identity: dict[str, Any] = {
      'classifier': {
        'train': train.name,
        'train_sha256': _hash(self._train),
        'test': test.name,
        'test_sha256': _hash(test_images),
      }
    }
    self._shares = labels_lib.Shares.of(rule, labels)
    self.label_rule = str(self._shares)
    self._classifier = classifier.fit(
      self._train, labels, train.num_classes, train.pixel_values
    )
    self._features, _ = self._classifier.apply(self._train)
    test_features, predicted = self._classifier.apply(test_images)
    accuracy = float(np.mean(predicted == test_labels))
    self._identity['classifier']['held_out_accuracy'] = accuracy
    self._identity['classifier']['held_out_images'] = len(test)
    _LOGGER.info(
      'scores are measured with a classifier of accuracy %.3f on %d held-out'
      ' images',
      accuracy,
      len(test),
    )
    self._doubt = doubt(accuracy, np.bincount(test_labels).max() / len(test))
    if self._doubt:
      _LOGGER.warning('%s', self._doubt)
    self._statistics = {
      'fd_train': frechet.Statistics.of(self._features),
      'fd_test': frechet.Statistics.of(test_features),
    }
    self._held_out = memorisation.describe_held_out(
      memorisation.nearest_distance(test_images, self._train)
    )

  def identity(self) -> dict[str, Any]:
    """Returns the splits' names and hashes, and the classifier's accuracy."""
    return self._identity

  def ids(self, block: int, count: int) -> np.ndarray:
    """Returns 0 .. count−1 for every block: blocks differ by their keys."""
    del block
    return np.arange(count)

  def labels(self, ids: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns classes as often as `label_rule` says."""
    if not num_classes:
      return np.zeros(len(ids), np.int32)
    return self._shares.labels(ids)

  def _embed(
    self, take: rows_lib.Take, ids: np.ndarray
  ) -> Iterator[tuple[np.ndarray, rows_lib.Rows]]:
    for start in range(0, len(ids), _CHUNK):
      mine = ids[start : start + _CHUNK]
      images = take(mine)
      features, predicted = self._classifier.apply(images)
      nearest = memorisation.nearest_distance(images, self._train)
      rows = {
        'features': features,
        'predicted': predicted[:, None],
        'nearest': nearest[:, None],
      }
      yield mine, rows

  def embed(
    self,
    images: rows_lib.Images,
    count: int,
    name: str,
    folder: pathlib.Path | None = None,
  ) -> rows_lib.Rows:
    """Returns features, predicted class and distance to the training set."""
    return rows_lib.gather(self._embed, _KINDS, images, count, name, folder)

  def scores(
    self,
    rows: rows_lib.Rows,
    labels: np.ndarray | None = None,
    from_file: bool = False,
  ) -> evaluator.Scores:
    """Returns all scores of a set of images; no `accuracy` without labels."""
    del from_file
    features = rows['features']
    sums = frechet.Statistics.of(features)
    scores = {
      name: frechet.distance(sums, real)
      for name, real in self._statistics.items()
    }
    if labels is not None:
      scores['accuracy'] = float(np.mean(rows['predicted'][:, 0] == labels))
    scores |= prdc.precision_recall(self._features, features)._asdict()
    near = memorisation.compare(rows['nearest'][:, 0], self._held_out)
    return scores | near._asdict()

  def uncertainty(self, rows: rows_lib.Rows) -> dict[str, Any]:
    """Returns the sampling errors of both Fréchet distances."""
    return {
      name: uncertainty.of_distance(rows['features'], real)
      for name, real in self._statistics.items()
    }

  def notes(
    self, count: int, num_blocks: int, file_rows: rows_lib.Rows | None = None
  ) -> list[str]:
    """Returns where the classifier is poor, or the images are too few."""
    del num_blocks, file_rows
    note = statistics.rank_note('these images', count, classifier.FEATURES)
    return [line for line in (self._doubt, note) if line]
