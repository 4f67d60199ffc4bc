"""The sample mode: images of chosen classes and seeds, and a sheet of them."""

from collections.abc import Sequence
import json
import pathlib

import numpy as np

from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.data import labels as labels_lib
from ddo_jax.report import grid
from ddo_jax.runtime import disk
from ddo_jax.training import workspace

_COLUMNS = 32  # images of a class that the sheet shows
_SEEDS = 2**32
_MOST = 10**7  # numbers in a span


def parse_numbers(flag: str, text: str) -> tuple[int, ...]:
  """Returns the numbers that a flag lists, such as '0-15,20'.

  Raises:
    errors.UserError: the text is no such list, or names a number twice.
  """
  numbers: list[int] = []
  try:
    for part in text.split(','):
      first, dash, last = part.strip().partition('-')
      span = range(int(first), int(last if dash else first) + 1)
      if len(span) > _MOST:
        raise ValueError('a slip of the keyboard')
      numbers += span
  except ValueError:
    numbers = []
  if not numbers or len(set(numbers)) < len(numbers):
    raise errors.UserError(
      f'--{flag} is {text!r}; it must list different numbers from 0, such as'
      ' 3,7 or 0-15'
    )
  return tuple(numbers)


def _check(name: str, values: Sequence[int], limit: int) -> None:
  """Raises UserError unless all values are in 0 .. limit−1."""
  wrong = [value for value in values if not 0 <= value < limit]
  if wrong:
    raise errors.UserError(
      f'{name} {wrong[0]} is not there; wanted from 0 to {limit - 1}'
    )


def check(
  run: workspace.Run, seeds: Sequence[int], classes: Sequence[int]
) -> None:
  """Raises UserError where a model has no such class, or there is no such seed.

  Args:
    run: the run whose model is asked.
    seeds: see `draw`.
    classes: see `draw`.
  """
  num_classes = run.model.num_classes
  if classes and not num_classes:
    raise errors.UserError(
      f'the model has no classes, and --classes names {list(classes)}: leave'
      ' that flag out'
    )
  _check('class', classes, num_classes)
  _check('seed', seeds, _SEEDS)


def draw(
  run: workspace.Run,
  params: pathlib.Path,
  output: pathlib.Path,
  seeds: Sequence[int],
  classes: Sequence[int] = (),
) -> pathlib.Path:
  """Draws an image of each class for each seed: samples.npz and samples.png.

  An image is a function of the run's seed, its class and its own seed. The
  array `image` of samples.npz lists the seeds of the first class, then those of
  the next; `label` and `seed` stand beside it. The sheet has a row for each
  class, of its first seeds.

  Args:
    run: the run whose model and sampler are used.
    params: a folder of params.
    output: the folder of both files.
    seeds: numbers from 0; see `check`.
    classes: of the model's; () draws one image for each seed, and the classes
      that the params were trained on take turns.

  Returns:
    The path of samples.png.
  """
  num_classes = run.model.num_classes
  weights, meta = workspace.load_params(params, run.model, run.executor)
  ids = np.tile(np.asarray(seeds, np.int64), max(len(classes), 1))
  if classes:
    labels = np.repeat(np.asarray(classes, np.int32), len(seeds))
  else:
    known = meta.get('class_shares') or [1] * num_classes
    labels = labels_lib.Shares(np.sign(known).tolist()).labels(ids)
  key = rng.stream(run.config.seed, 'sample')
  images = run.generator().images(weights, key, ids, labels)
  with disk.whole(output / 'samples.npz') as file:
    np.savez(
      file,
      image=images,
      label=labels,
      seed=ids,
      provenance=json.dumps(meta.get('provenance', {})),
    )
  columns = 10
  if classes:
    shown = np.arange(len(images)) % len(seeds) < _COLUMNS
    images = images[shown]
    columns = min(len(seeds), _COLUMNS)
  path = output / 'samples.png'
  grid.save(path, images, run.model.codec.pixel_values, columns)
  return path
