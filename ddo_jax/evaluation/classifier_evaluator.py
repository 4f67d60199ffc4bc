"""The evaluator of data that no protocol is about, such as the digits."""

from collections.abc import Iterator
from collections.abc import Sequence
import functools
import hashlib
import logging
import pathlib
from typing import Any
from typing import NamedTuple

import numpy as np

from ddo_jax import errors
from ddo_jax.data import labels as labels_lib
from ddo_jax.data import sources
from ddo_jax.evaluation import evaluator
from ddo_jax.evaluation import rows as rows_lib
from ddo_jax.evaluation.metrics import fd_ratio
from ddo_jax.evaluation.metrics import frechet
from ddo_jax.evaluation.metrics import memorisation
from ddo_jax.evaluation.metrics import mind
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


class _Fitted(NamedTuple):
  """What a fitted classifier says of the real images.

  Attributes:
    classifier: the classifier.
    accuracy: its share of right answers on the held-out images.
    doubt: see `doubt`.
    features: of the training images.
    held_out_features: of the held-out images.
    radii: see `prdc.radii`, of the training images' features.
    statistics: of both splits' features, by score.
    held_out: how near the held-out images are to the training images.
    copies: how many of them are copies of training images.
  """

  classifier: classifier.Classifier
  accuracy: float
  doubt: str
  features: np.ndarray
  held_out_features: np.ndarray
  radii: np.ndarray
  statistics: dict[str, frechet.Statistics]
  held_out: memorisation.HeldOut
  copies: int


class ClassifierEvaluator:
  """Measures images in a classifier's features; an `evaluator.Evaluator`.

  The classifier is trained on the training split, always to the same weights.
  The scores are `fd_train` and `fd_test` (Fréchet distances to both splits),
  `accuracy` (the share of samples classified as their own label), `precision`,
  `recall`, `nn_ratio` and `memorised` (see `metrics`). Where they are asked
  for, there are also `fd_train_inf` and `fd_test_inf`, of infinitely many
  images, `mind`, `fd_ratio`, `density` and `coverage`.

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
    self,
    train: sources.Source,
    test: sources.Source,
    rule: str = 'data',
    extra: Sequence[str] = (),
  ):
    """Takes both splits; the classifier is fitted when it is first needed.

    Args:
      train: the training images.
      test: the held-out images.
      rule: how often each class is drawn, one of `labels.RULES`.
      extra: what else is measured; see `evaluator.extras`.

    Raises:
      errors.UserError: the data has no labels, or the held-out images are of
        another shape than the training images, or copies of them.
    """
    if train.num_classes < 2:
      raise errors.UserError(
        f'{train.name} has {train.num_classes} classes; evaluation fits a'
        ' classifier and wants 2 or more: give the images labels'
      )
    copied = sources.compare(train, test)
    if copied is not None:  # else it is known once all is measured
      memorisation.describe_held_out(1.0 - copied)
    self._sources = (train, test)
    self._extra = tuple(extra)
    self._shares = labels_lib.Shares.of(rule, train.labels())
    self.label_rule = str(self._shares)

  @functools.cached_property
  def _train(self) -> np.ndarray:
    """The training images."""
    train, _ = self._sources
    images, _ = train.read(np.arange(len(train)))
    return images

  @functools.cached_property
  def _test(self) -> np.ndarray:
    """The held-out images."""
    _, test = self._sources
    images, _ = test.read(np.arange(len(test)))
    return images

  @functools.cached_property
  def _fitted(self) -> _Fitted:
    """What is measured with."""
    train, test = self._sources
    network = classifier.fit(
      self._train, train.labels(), train.num_classes, train.pixel_values
    )
    features, _ = network.apply(self._train)
    test_features, predicted = network.apply(self._test)
    labels = test.labels()
    accuracy = float(np.mean(predicted == labels))
    _LOGGER.info(
      'scores are measured with a classifier of accuracy %.3f on %d held-out'
      ' images',
      accuracy,
      len(test),
    )
    doubted = doubt(accuracy, np.bincount(labels).max() / len(test))
    if doubted:
      _LOGGER.warning('%s', doubted)
    distance = memorisation.nearest_distance(self._test, self._train)
    return _Fitted(
      classifier=network,
      accuracy=accuracy,
      doubt=doubted,
      features=features,
      held_out_features=test_features,
      radii=prdc.radii(features),
      statistics={
        'fd_train': frechet.Statistics.of(features),
        'fd_test': frechet.Statistics.of(test_features),
      },
      held_out=memorisation.describe_held_out(distance),
      copies=int((distance == 0).sum()),
    )

  def check_images(self, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Raises UserError unless images are of the training images' shape."""
    wanted = self._sources[0].stored_shape
    if dtype != np.uint8 or tuple(shape) != wanted:
      raise errors.UserError(
        f'images are {dtype} {list(shape)}; the training images that they are'
        f' measured against are uint8 {list(wanted)}: set'
        ' config.evaluation.protocol, or config.data.source to such images'
      )

  def identity(self) -> dict[str, Any]:
    """Returns the splits' names and hashes, and the classifier's accuracy.

    Also how many held-out images are copies of training images.
    """
    train, test = self._sources
    return {
      'classifier': {
        'train': train.name,
        'train_sha256': _hash(self._train),
        'test': test.name,
        'test_sha256': _hash(self._test),
        'held_out_accuracy': self._fitted.accuracy,
        'held_out_images': len(test),
        'held_out_copies': self._fitted.copies,
      }
    }

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
      features, predicted = self._fitted.classifier.apply(images)
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
      for name, real in self._fitted.statistics.items()
    }
    if labels is not None:
      scores['accuracy'] = float(np.mean(rows['predicted'][:, 0] == labels))
    scores |= prdc.precision_recall(
      self._fitted.features, features, real_radii=self._fitted.radii
    )._asdict()
    near = memorisation.compare(rows['nearest'][:, 0], self._fitted.held_out)
    return scores | near._asdict() | self._extras(features)

  def _extras(self, features: np.ndarray) -> evaluator.Scores:
    """Returns what else is measured of the features [N, D] of the images."""
    scores = {}
    for name, real in self._fitted.statistics.items():
      limit = name + evaluator.LIMIT
      if limit in self._extra:
        scores[limit] = uncertainty.limit_of_distance(features, real).value
    if evaluator.MIND in self._extra:
      scores[evaluator.MIND] = mind.mind(self._fitted.features, features)
    if evaluator.FD_RATIO in self._extra:
      scores[evaluator.FD_RATIO] = self._fd_ratio(features)
    asked = {evaluator.DENSITY, evaluator.COVERAGE}.intersection(self._extra)
    if asked:
      found = prdc.density_coverage(
        self._fitted.features, features, real_radii=self._wide_radii
      )._asdict()
      scores |= {name: found[name] for name in sorted(asked)}
    return scores

  @functools.cached_property
  def _fd_ratio(self) -> fd_ratio.FdRatio:
    """Divides a distance to the training images by the held-out images'."""
    return fd_ratio.FdRatio(
      held_out=self._fitted.held_out_features,
      real=self._fitted.statistics['fd_train'],
    )

  @functools.cached_property
  def _wide_radii(self) -> np.ndarray:
    """The radii of density and coverage, of the training images' features."""
    return prdc.radii(self._fitted.features, prdc.COVERED_BY)

  def uncertainty(self, rows: rows_lib.Rows) -> dict[str, Any]:
    """Returns the sampling errors of both Fréchet distances."""
    return {
      name: uncertainty.of_distance(rows['features'], real)
      for name, real in self._fitted.statistics.items()
    }

  def notes(
    self, count: int, num_blocks: int, file_rows: rows_lib.Rows | None = None
  ) -> list[str]:
    """Returns where the classifier is poor, or the images are too few."""
    del num_blocks, file_rows
    note = statistics.rank_note('these images', count, classifier.FEATURES)
    return [line for line in (self._fitted.doubt, note) if line]
