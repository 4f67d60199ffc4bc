"""Opens the evaluator that settings name, and measures a model with it."""

from collections.abc import Callable
from collections.abc import Iterator
import pathlib
from typing import Any

import jax
import numpy as np

from ddo_jax import rng
from ddo_jax.data import sources
from ddo_jax.evaluation import classifier_evaluator
from ddo_jax.evaluation import evaluator as evaluator_lib
from ddo_jax.evaluation import features
from ddo_jax.evaluation import fidelity
from ddo_jax.evaluation import rows as rows_lib
from ddo_jax.method import generate
from ddo_jax.method import likelihood
from ddo_jax.runtime import processes

# Rows of a set of images, and their labels [N]; None without labels.
Measured = tuple[rows_lib.Rows, np.ndarray | None]

# Takes (ids [b], images uint8 [b,H,W,C], labels [b]) of every chunk.
Keep = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


def open_evaluator(
  settings: evaluator_lib.Evaluation,
  seed: int,
  train: sources.Source | None,
  open_test: Callable[[], sources.Source],
  labels: str = 'data',
) -> evaluator_lib.Evaluator:
  """Opens a protocol's evaluator, or fits a classifier if none is named.

  Args:
    settings: the settings.
    seed: the run's.
    train: the training images; None will do under a protocol, where the
      settings ask for no real images.
    open_test: opens the held-out images, which a protocol does without where
      no fd_ratio is asked for.
    labels: how often each class is drawn, one of `labels.RULES`; a protocol has
      a rule of its own.

  Raises:
    errors.UserError: a setting makes no sense, a file is missing or damaged,
      or the data cannot be measured so.
  """
  evaluator_lib.check(settings)
  if settings.protocol:
    return fidelity.FidelityEvaluator(settings, seed, train, open_test)
  return classifier_evaluator.ClassifierEvaluator(
    train, open_test(), labels, evaluator_lib.extras(settings)
  )


def num_images(
  evaluator: evaluator_lib.Evaluator, settings: evaluator_lib.Evaluation
) -> int:
  """Returns the number of images in a reported block."""
  return settings.samples or evaluator.num_images


def final_images(
  evaluator: evaluator_lib.Evaluator, settings: evaluator_lib.Evaluation
) -> int:
  """Returns the number of images by which the last few are compared."""
  return max(num_images(evaluator, settings), settings.selection_samples)


def num_blocks(
  evaluator: evaluator_lib.Evaluator, settings: evaluator_lib.Evaluation
) -> int:
  """Returns the number of reported blocks."""
  return settings.seeds or evaluator.num_blocks


def draw(
  evaluator: evaluator_lib.Evaluator,
  generator: generate.Generator,
  params: likelihood.Params,
  key: jax.Array,
  ids: np.ndarray,
  folder: pathlib.Path | None = None,
  keep: Keep | None = None,
) -> Measured:
  """Draws images and measures them, a chunk at a time.

  Args:
    evaluator: measures the images, and settles their classes.
    generator: draws them.
    params: the model's weights, on the devices.
    key: the stream's key; an image's own key folds in its id.
    ids: [N] the images' ids, ascending.
    folder: where rows are kept; see `rows.gather`.
    keep: takes every chunk of images that is drawn, for example to write it.

  Returns:
    The rows and the classes, None for a model without classes.
  """
  num_classes = generator.model.num_classes
  labels = evaluator.labels(ids, num_classes)

  def images(places: np.ndarray) -> Iterator[np.ndarray]:
    mine = ids[places]
    classes = labels[places]
    done = 0
    for stored in generator.stream(
      params, key, mine, classes, set_size=len(ids)
    ):
      part = slice(done, done + len(stored))
      chunk = generator.render(stored)
      if keep:
        keep(mine[part], chunk, classes[part])
      done += len(stored)
      yield chunk

  rows = evaluator.embed(images, len(ids), 'evaluate', folder)
  return rows, labels if num_classes else None


def read(
  evaluator: evaluator_lib.Evaluator, source: sources.Source
) -> Measured:
  """Measures all images of a source.

  Returns:
    The rows and the source's labels, None if it has none.
  """
  images = features.of_source(source)
  rows = evaluator.embed(images, len(source), source.name)
  return rows, source.labels() if source.num_classes else None


def cut(
  measured: Measured, settings: evaluator_lib.Evaluation
) -> list[Measured]:
  """Cuts finished images into the disjoint blocks that settings state.

  A set stays whole unless both the number of images in a block and that of the
  blocks are stated, and there are as many images. A file may have them in the
  order of their classes: a block is drawn from all of the set, and keeps its
  images in their order.

  Args:
    measured: the rows of the set, and its labels.
    settings: say how many blocks of how many images.
  """
  rows, labels = measured
  total = len(next(iter(rows.values())))
  wanted = settings.samples * settings.seeds
  if not 0 < wanted <= total:
    return [measured]
  order = np.random.RandomState(0).permutation(total)[:wanted]
  blocks: list[Measured] = []
  for index in np.sort(order.reshape(settings.seeds, -1), axis=1):
    part = {kind: array[index] for kind, array in rows.items()}
    blocks.append((part, None if labels is None else labels[index]))
  return blocks


def selection_scores(
  evaluator: evaluator_lib.Evaluator,
  generator: generate.Generator,
  params: likelihood.Params,
  settings: evaluator_lib.Evaluation,
  seed: int,
  folder: pathlib.Path | None = None,
  final: bool = False,
) -> evaluator_lib.Scores:
  """Returns scores on the one fixed stream by which checkpoints are compared.

  Args:
    evaluator: measures the images.
    generator: draws them.
    params: the checkpoint's weights, on the devices.
    settings: say how many images are drawn.
    seed: the run's.
    folder: where rows are kept; see `rows.gather`.
    final: whether to score on a second stream of as many images as a report
      has, which compares the few that the first one chose.
  """
  key = rng.stream(seed, 'select')
  count = settings.selection_samples
  if final:
    key = rng.stream(seed, 'select', 'final')
    count = final_images(evaluator, settings)
  ids = evaluator.ids(0, count)
  rows, labels = draw(evaluator, generator, params, key, ids, folder)
  return scores(evaluator, rows, labels)


def scores(
  evaluator: evaluator_lib.Evaluator,
  rows: rows_lib.Rows,
  labels: np.ndarray | None,
  from_file: bool = False,
) -> evaluator_lib.Scores:
  """Returns an evaluator's scores of rows, which process 0 has, on all."""

  def compute():
    return evaluator.scores(rows, labels, from_file)

  return processes.decide('scores', compute)


def report_blocks(
  evaluator: evaluator_lib.Evaluator,
  generator: generate.Generator,
  params: likelihood.Params,
  settings: evaluator_lib.Evaluation,
  seed: int,
  folder: pathlib.Path | None = None,
  keep: Keep | None = None,
) -> Iterator[Measured]:
  """Draws and measures the blocks of a report, one after the other.

  The blocks' streams are disjoint, and none of them ever selects a checkpoint.

  Args:
    evaluator: measures the images.
    generator: draws them.
    params: the model's weights, on the devices.
    settings: say how many blocks of how many images are drawn.
    seed: the run's.
    folder: where the blocks' rows are kept, so that a later call goes on with
      them; None keeps them in memory.
    keep: takes the images of the first block; see `draw`.
  """
  count = num_images(evaluator, settings)
  for block in range(num_blocks(evaluator, settings)):
    yield draw(
      evaluator,
      generator,
      params,
      key=rng.stream(seed, 'report', block),
      ids=evaluator.ids(block, count),
      folder=folder / f'block_{block}' if folder else None,
      keep=keep if block == 0 else None,
    )


def report_scores(
  evaluator: evaluator_lib.Evaluator,
  generator: generate.Generator,
  params: likelihood.Params,
  settings: evaluator_lib.Evaluation,
  seed: int,
  folder: pathlib.Path | None = None,
) -> dict[str, Any]:
  """Returns the summary of a report's scores; see `report_blocks`."""
  blocks = [
    scores(evaluator, rows, labels)
    for rows, labels in report_blocks(
      evaluator, generator, params, settings, seed, folder
    )
  ]
  return summarize(blocks, evaluator.minima)


def summarize(
  blocks: list[evaluator_lib.Scores], minima: tuple[str, ...] = ()
) -> dict[str, Any]:
  """Summarizes the scores of blocks.

  Args:
    blocks: each block's scores by name.
    minima: the names of those whose published form is the minimum.

  Returns:
    {name: {'mean', 'sd', 'minimum', 'values', 'headline'}}. 'sd' is the sample
    standard deviation, None for a single block; 'headline' names the field
    that is printed first, 'mean' or 'minimum'.
  """
  summary = {}
  for name in blocks[0]:
    values = [block[name] for block in blocks]
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    summary[name] = {
      'mean': float(np.mean(values)),
      'sd': sd,
      'minimum': min(values),
      'values': values,
      'headline': 'minimum' if name in minima else 'mean',
    }
  return summary
