"""Scores of images against the training and the held-out data."""

from typing import Any
from typing import Protocol

import jax
import numpy as np

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.data import sources
from ddo_jax.evaluation.metrics import frechet
from ddo_jax.evaluation.metrics import memorisation
from ddo_jax.evaluation.metrics import prdc
from ddo_jax.evaluation.networks import classifier
from ddo_jax.method import generate
from ddo_jax.method import likelihood

Scores = dict[str, float]


class Measures(Protocol):
  """What a run asks of its evaluator."""

  num_images: int  # of a reported block, where the config does not say
  num_blocks: int

  def measure(
    self,
    generator: generate.Generator,
    params: likelihood.Params,
    key: jax.Array,
    block: int,
    count: int,
  ) -> Scores:
    """Scores of `count` images drawn with the key, for block `block`."""


class Evaluator:
  """Measures images in the features of a small classifier.

  The classifier is trained on the training split, always to the same weights.
  Scores: `fd_train`, `fd_test` (Fréchet distances to both splits), `accuracy`
  (samples classified as their own label), `precision`, `recall`, `nn_ratio`
  and `memorised` (see `metrics`).
  """

  num_images, num_blocks = 5_000, 3

  def __init__(self, train: sources.Source, test: sources.Source):
    """Reads both splits whole and fits the classifier.

    Raises:
      errors.UserError: the data has no labels.
    """
    if train.num_classes < 2:
      raise errors.UserError(
        f'{train.name} has {train.num_classes} classes; evaluation fits a'
        ' classifier and wants 2 or more: give the images labels'
      )
    self._train, labels = train.read(np.arange(len(train)))
    self._test, _ = test.read(np.arange(len(test)))
    self._classifier = classifier.fit(
      self._train, labels, train.num_classes, train.pixel_values
    )
    self._features, _ = self._classifier.apply(self._train)
    test_features, _ = self._classifier.apply(self._test)
    self._statistics = {
      'fd_train': frechet.Statistics.of(self._features),
      'fd_test': frechet.Statistics.of(test_features),
    }

  def scores(self, images: np.ndarray, labels: np.ndarray | None) -> Scores:
    """Scores of images uint8 [N,H,W,C] drawn for the labels [N].

    Without labels (an unconditional model) there is no `accuracy`.
    """
    features, predicted = self._classifier.apply(images)
    statistics = frechet.Statistics.of(features)
    scores = {
      name: frechet.distance(statistics, real)
      for name, real in self._statistics.items()
    }
    if labels is not None:
      scores['accuracy'] = float(np.mean(predicted == labels))
    scores |= prdc.precision_recall(self._features, features)._asdict()
    near = memorisation.compare(images, self._train, self._test)
    return scores | near._asdict()

  def measure(
    self,
    generator: generate.Generator,
    params: likelihood.Params,
    key: jax.Array,
    block: int,
    count: int,
  ) -> Scores:
    """Scores of `count` images of the key; the block is in the key alone."""
    del block
    images, labels = generator.images(params, key, count, 'evaluate')
    conditional = generator.model.num_classes > 0
    return self.scores(images, labels if conditional else None)


def selection_scores(
  evaluator: Measures,
  generator: generate.Generator,
  params: likelihood.Params,
  config: config_lib.Config,
) -> Scores:
  """Scores on the one fixed seed by which checkpoints are compared."""
  key = rng.stream(config.seed, 'select')
  count = config.evaluation.selection_samples
  return evaluator.measure(generator, params, key, 0, count)


def report_scores(
  evaluator: Measures,
  generator: generate.Generator,
  params: likelihood.Params,
  config: config_lib.Config,
) -> dict[str, Any]:
  """Scores over disjoint fresh seeds, see `summarize`.

  No seed here ever selects a checkpoint; sd is the sample deviation, None
  for a single seed.
  """
  blocks, (count, num_blocks) = [], sizes(evaluator, config)
  for block in range(num_blocks):
    key = rng.stream(config.seed, 'report', block)
    blocks.append(evaluator.measure(generator, params, key, block, count))
  return summarize(blocks)


def sizes(evaluator: Measures, config: config_lib.Config) -> tuple[int, int]:
  """(images of a reported block, blocks)."""
  evaluation = config.evaluation
  return (
    evaluation.samples or evaluator.num_images,
    evaluation.seeds or evaluator.num_blocks,
  )


def summarize(blocks: list[Scores]) -> dict[str, Any]:
  """{name: {'mean', 'sd', 'minimum', 'values'}} of the blocks' scores."""
  summary = {}
  for name in blocks[0]:
    values = [block[name] for block in blocks]
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    summary[name] = {
      'mean': float(np.mean(values)),
      'sd': sd,
      'minimum': min(values),
      'values': values,
    }
  return summary
