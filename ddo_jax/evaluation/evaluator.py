"""What a run asks of its evaluator, and the settings that choose one.

Two evaluators implement the contract. `fidelity.FidelityEvaluator` measures
under a published protocol, in Inception's or DINOv2's features.
`classifier_evaluator.ClassifierEvaluator` serves data that no protocol is
about: it fits a small classifier and measures in its features.
`measure.open_evaluator` opens the one that the settings name.

A third one is a class with the members of `Evaluator`: it turns images into
rows of numbers, one row an image, and the rows of a set into scores.
"""

import dataclasses
import pathlib
from typing import Any
from typing import Protocol

import numpy as np

from ddo_jax import errors
from ddo_jax.evaluation import protocols
from ddo_jax.evaluation import rows as rows_lib
from ddo_jax.evaluation.metrics import uncertainty
from ddo_jax.evaluation.networks import classifier
from ddo_jax.weights import fid_stats

Scores = dict[str, float]

# Those scores of the classifier that may choose a checkpoint.
CLASSIFIER_METRICS = ('fd_train', 'fd_test')

# What is added to a Fréchet distance's name where it is extrapolated.
LIMIT = '_inf'
MIND = 'mind'
FD_RATIO = 'fd_ratio'
DENSITY = 'density'
COVERAGE = 'coverage'
# Spatial features are of the same network as those of FID.
_ONE_A_NETWORK = ('fid', 'fd_dinov2')


def _not_science(default: Any) -> Any:
  """Makes a field that may change inside one run's folder."""
  return dataclasses.field(default=default, metadata={'science': False})


@dataclasses.dataclass
class Evaluation:
  """How checkpoints are compared, and what a reported number is made from.

  Attributes:
    protocol: a named protocol (see `protocols`), or the path of one's own, as
      --mode=fid_stats writes it, under which Inception's or DINOv2's features
      are compared with statistics; '' fits a small
      classifier to the training split and measures in its features.
    metric: the score that selects checkpoints; lower is better.
    extra: scores that are measured only where they are named here or as the
      metric: the limit of infinitely many images of a Fréchet distance,
      'fd_train_inf' or 'fid_inf', 'mind', 'fd_ratio', 'density' and
      'coverage'; see `metrics`. Beside the metric they are a second opinion on
      every checkpoint. The last two choose none, as more is not always better.
    selection_samples: the number of images a checkpoint is selected by, drawn
      from one fixed seed that no report uses.
    samples: the number of images in each block of a report; 0 takes the
      protocol's number, or 5,000 without a protocol.
    seeds: the number of blocks in a report, each drawn from its own seed, over
      which mean and standard deviation are taken; 0 takes the protocol's
      number, or 3 without a protocol. Finished images are cut into blocks
      where `samples` is stated, too, and stay whole elsewhere.
    features: the kinds of the protocol's features that are compared; () takes
      all of them.
    real_images: under a protocol, the number of training images embedded for
      kid, mind, precision, recall, density and coverage; 0 leaves these
      scores out.
    fid_stats: the file of published statistics, by its path or by the name of
      an asset; '' takes the protocol's, which is fetched where it is missing.
    inception: the file of Inception's weights, likewise.
    dinov2: the file of DINOv2's weights, likewise.
  """

  protocol: str = ''
  metric: str = 'fd_train'
  extra: tuple[str, ...] = ()
  selection_samples: int = 5_000
  samples: int = 0
  seeds: int = 0
  features: tuple[str, ...] = ()
  real_images: int = 0
  fid_stats: str = _not_science('')
  inception: str = _not_science('')
  dinov2: str = _not_science('')


def kinds(settings: Evaluation) -> tuple[str, ...]:
  """Returns the protocol's kinds of features that the settings ask for."""
  features = tuple(settings.features)
  return features or protocols.get(settings.protocol).features


def stated_blocks(settings: Evaluation) -> int:
  """Returns the number of reported blocks that settings state.

  It is 0 where they leave it to the classifier's evaluator, or to a protocol
  that is not there.
  """
  if settings.seeds or not protocols.is_there(settings.protocol):
    return settings.seeds
  return protocols.get(settings.protocol).num_blocks


def networks(settings: Evaluation) -> tuple[str, ...]:
  """Returns a kind of features for each network of a protocol."""
  return tuple(kind for kind in kinds(settings) if kind in _ONE_A_NETWORK)


def _distances(settings: Evaluation) -> dict[str, int]:
  """Returns the Fréchet distances that are measured, with their features."""
  if not settings.protocol:
    return dict.fromkeys(CLASSIFIER_METRICS, classifier.FEATURES)
  return {kind: fid_stats.WIDTHS[kind] for kind in kinds(settings)}


def _selecting_extras(settings: Evaluation) -> tuple[str, ...]:
  """Returns the scores that are asked for, and may choose a checkpoint."""
  distances = _distances(settings)
  known = [f'{name}{LIMIT}' for name in distances]
  if not settings.protocol or 'fid' in distances:
    known.append(MIND)
  if not settings.protocol or networks(settings):
    known.append(FD_RATIO)
  return tuple(known)


def _known_extras(settings: Evaluation) -> tuple[str, ...]:
  """Returns the scores that are measured only where they are asked for."""
  known = _selecting_extras(settings)
  return (*known, DENSITY, COVERAGE) if MIND in known else known


def extras(settings: Evaluation) -> tuple[str, ...]:
  """Returns those of them that are asked for, as the metric or beside it."""
  asked = (settings.metric, *settings.extra)
  return tuple(name for name in _known_extras(settings) if name in asked)


def _check_metrics(settings: Evaluation) -> None:
  """Raises UserError unless metric and extras are measured, and can be."""
  distances = _distances(settings)
  known = _known_extras(settings)
  metrics = (*distances, *_selecting_extras(settings))
  errors.require(
    settings.metric in metrics,
    'evaluation.metric',
    settings.metric,
    f'one of {metrics}, which these settings measure'
    f'{errors.near_miss(settings.metric, metrics)}',
  )
  errors.require(
    all(name in known for name in settings.extra),
    'evaluation.extra',
    settings.extra,
    f'() or some of {known}, which these settings can measure',
  )
  for name in extras(settings):
    if not name.endswith(LIMIT):
      continue
    least = uncertainty.least_images(distances[name.removesuffix(LIMIT)])
    for field in ('selection_samples', 'samples'):
      count = getattr(settings, field)
      errors.require(
        not count or count >= least,
        f'evaluation.{field}',
        count,
        f'{least} or more: {name} is extrapolated from parts of these images',
      )


def _check_features(settings: Evaluation) -> None:
  """Raises UserError unless the protocol has the features asked for."""
  if not settings.protocol:
    errors.require(
      not settings.features,
      'evaluation.features',
      settings.features,
      '() without config.evaluation.protocol, as only a protocol has a choice',
    )
    return
  known = protocols.get(settings.protocol).features
  errors.require(
    all(kind in known for kind in settings.features),
    'evaluation.features',
    settings.features,
    f'() or some of {known}, which protocol {settings.protocol} has',
  )


def check(settings: Evaluation) -> None:
  """Checks the settings before anything is drawn or loaded.

  Raises:
    errors.UserError: a value makes no sense, or protocol, features and metric
      do not go together; the line names the field, its value and the choices.
  """
  names = ('', *protocols.PROTOCOLS)
  errors.require(
    not settings.protocol or protocols.is_there(settings.protocol),
    'evaluation.protocol',
    settings.protocol,
    f'one of {names}, or a folder that --mode=fid_stats wrote'
    f'{errors.near_miss(settings.protocol, names)}',
  )
  _check_features(settings)
  value = settings.selection_samples
  errors.require_integer('evaluation.selection_samples', value, 1)
  for field in ('samples', 'seeds', 'real_images'):
    value = getattr(settings, field)
    errors.require_integer(f'evaluation.{field}', value, 0)
  _check_metrics(settings)


class Evaluator(Protocol):
  """Measures sets of images.

  Attributes:
    num_images: the number of images in a reported block, unless the settings
      say otherwise.
    num_blocks: the number of reported blocks, likewise.
    minima: the names of those scores whose published form is the minimum over
      the blocks; of all other scores it is the mean.
    label_rule: how often each class is drawn, in words.
  """

  num_images: int
  num_blocks: int
  minima: tuple[str, ...]
  label_rule: str

  def check_images(self, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Raises UserError unless images of this type and shape are measured.

    Args:
      dtype: the images' type.
      shape: the shape [H,W,C] of one of them.
    """

  def identity(self) -> dict[str, Any]:
    """Returns what a number hangs on besides the images, as JSON values.

    Numbers can be compared if their evaluators' identities are equal.
    """

  def ids(self, block: int, count: int) -> np.ndarray:
    """Returns the ids [count] of a block's images.

    With the block's key, the ids determine the images.
    """

  def labels(self, ids: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the classes [N] int32 that images of these ids are drawn for.

    Args:
      ids: [N].
      num_classes: the model's; 0 for a model without classes, which gets 0.
    """

  def embed(
    self,
    images: rows_lib.Images,
    count: int,
    name: str,
    folder: pathlib.Path | None = None,
  ) -> rows_lib.Rows:
    """Makes the rows of images 0 .. count−1 in one pass; see `rows.gather`.

    Args:
      images: gives the uint8 images [b,H,W,C] of ascending ids, in chunks.
      count: the number of images.
      name: a word for the progress bar.
      folder: where rows are kept, so that a later call goes on with them; None
        keeps them in memory.

    Raises:
      errors.UserError: the images are not of the kind that is measured.
    """

  def scores(
    self,
    rows: rows_lib.Rows,
    labels: np.ndarray | None = None,
    from_file: bool = False,
  ) -> Scores:
    """Returns all scores of a set of images by name; see `meanings`.

    Args:
      rows: the rows of the whole set.
      labels: [N] the classes that the images were drawn for; None if there are
        none, or they are not known.
      from_file: whether the rows stand in the order of a file that was given,
        and not in that of ids, which says nothing.
    """

  def uncertainty(self, rows: rows_lib.Rows) -> dict[str, Any]:
    """Returns {score: {estimate: its fields}} as JSON values.

    Only scores of which one set of images gives a sampling error are in it;
    see `metrics.uncertainty`.
    """

  def notes(
    self, count: int, num_blocks: int, file_rows: rows_lib.Rows | None = None
  ) -> list[str]:
    """Returns lines on how a number was made, and what it cannot be put beside.

    Args:
      count: the number of images in each block.
      num_blocks: the number of blocks.
      file_rows: the rows of images that were given in a file, in its order.
    """
