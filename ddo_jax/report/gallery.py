"""The images that a round leaves for its report.

The same seeds are drawn from the weights before and after; beside them stand
real images of the same classes, and the training images nearest to samples.
"""

from collections.abc import Callable
import math
import pathlib
from typing import Any

import numpy as np

from ddo_jax.data import loader
from ddo_jax.data import sources
from ddo_jax.report import grid

COUNT = 80  # images of a sheet
_SHOWN = 10  # of them, those shown with their neighbours
_NEIGHBOURS = 3  # of each
_SEARCHED = 50_000  # training images among which neighbours are looked for, …
_SEARCHED_NUMBERS = 2**31  # … unless they have more pixels than this together
_CHUNK_NUMBERS = 2**24  # pixels that are read at once

# Turns stored rows [N,...] into images uint8 [N,H,W,C].
Render = Callable[[np.ndarray], np.ndarray]


def real_rows(
  source: sources.Source, labels: np.ndarray | None, count: int, seed: int
) -> np.ndarray:
  """Picks real images, of given classes if there are any.

  Args:
    source: the real images.
    labels: [count] the classes asked for, which the source has; None takes
      images of any.
    count: the number of images.
    seed: the stream's seed; see `loader.order`.

  Returns:
    int64 [count] rows of the source, none twice before all of its class have
    come.
  """
  wanted = np.zeros(count, np.int32) if labels is None else labels
  classes = np.zeros(len(source), np.int32)
  if labels is not None:
    classes = source.labels()
  index = np.empty(count, np.int64)
  for label in np.unique(wanted):
    places = np.flatnonzero(wanted == label)
    rows = np.flatnonzero(classes == label)
    index[places] = rows[loader.order(seed, np.arange(len(places)), len(rows))]
  return index


def _flat(stored: np.ndarray) -> np.ndarray:
  """Returns rows [N, D] float64: pixels, or the means of latents."""
  if stored.dtype != np.uint8:
    stored = np.split(stored, 2, axis=-1)[0]
  return stored.reshape(len(stored), -1).astype(np.float64)


def searched_rows(source: sources.Source, seed: int) -> np.ndarray:
  """Returns the rows [M] of a source that neighbours are looked for among.

  They are all rows, or of a large source a random part.
  """
  limit = _SEARCHED_NUMBERS // math.prod(source.stored_shape)
  count = min(len(source), _SEARCHED, max(limit, COUNT))
  return np.sort(loader.order(seed, np.arange(count), len(source)))


def nearest(
  stored: np.ndarray,
  own: np.ndarray,
  source: sources.Source,
  searched: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """Finds the training images that are nearest to stored rows.

  Distances are Euclidean, between pixels as they are stored, or between the
  means of latents.

  Args:
    stored: the rows [N,...], stored as those of the source are.
    own: [N] the row of the source that each of them is, which does not count
      as its neighbour; −1 for a row that is not from the source.
    source: the training images.
    searched: [M] the rows of the source that are looked at, M > 3.

  Returns:
    (rows of the source int64, their distances float64), each [N, 3], from near
    to far.
  """
  queries = _flat(stored)
  best = np.zeros((len(stored), _NEIGHBOURS), np.int64)
  squared = np.full(best.shape, np.inf)
  chunk = max(1, _CHUNK_NUMBERS // math.prod(source.stored_shape))
  for start in range(0, len(searched), chunk):
    index = searched[start : start + chunk]
    rows = _flat(source.read(index)[0])
    # |a − b|² = |a|² + |b|² − 2 a·b, which is exact for pixels.
    found = queries @ (-2 * rows.T)
    found += np.square(queries).sum(axis=1)[:, None]
    found += np.square(rows).sum(axis=1)
    found[own[:, None] == index] = np.inf
    candidates = np.concatenate([squared, found], axis=1)
    owners = np.broadcast_to(index, found.shape)
    owners = np.concatenate([best, owners], axis=1)
    order = np.argsort(candidates, axis=1, kind='stable')[:, :_NEIGHBOURS]
    squared = np.take_along_axis(candidates, order, axis=1)
    best = np.take_along_axis(owners, order, axis=1)
  return best, np.sqrt(np.maximum(squared, 0))


def _write_neighbours(
  path: pathlib.Path,
  source: sources.Source,
  render: Render,
  samples: np.ndarray,
  real: np.ndarray,
  seed: int,
) -> dict[str, Any]:
  """Writes the sheet of samples and the training images nearest to them.

  Args:
    path: the sheet's.
    source: the training images.
    render: makes images of stored rows.
    samples: the stored samples [N,...].
    real: [N] rows of the source to compare the distances of samples with.
    seed: of the choice among many training images.

  Returns:
    See `write`; {} where the source is too small.
  """
  searched = searched_rows(source, seed)
  if len(searched) <= _NEIGHBOURS + 1:
    return {}
  nobody = np.full(len(samples), -1)
  rows, distances = nearest(samples, nobody, source, searched)
  real_stored, _ = source.read(real)
  _, real_distances = nearest(real_stored, real, source, searched)
  shown = np.argsort(distances[:, 0], kind='stable')[:_SHOWN]
  neighbours, _ = source.read(rows[shown].T.ravel())
  images = render(np.concatenate([samples[shown], neighbours]))
  grid.save(path, images, source.pixel_values)
  return {
    'space': 'pixels' if samples.dtype == np.uint8 else 'latents',
    'searched': len(searched),
    'training': len(source),
    'samples': distances[:, 0].round(4).tolist(),
    'real': real_distances[:, 0].round(4).tolist(),
    'shown': shown.tolist(),
  }


def write(
  folder: pathlib.Path,
  source: sources.Source,
  render: Render,
  labels: np.ndarray | None,
  drawn: dict[str, np.ndarray],
  seed: int,
) -> dict[str, Any]:
  """Writes the sheets of a round.

  Every drawn set becomes `<name>.png`. Beside the samples `before`, which a
  run's first round has, there is `real.png`: real images of the same classes.
  `neighbours.png` has the ten images of `after` that are nearest to a training
  image, and in the three rows below the training images nearest to each.

  Args:
    folder: the round's.
    source: the training images.
    render: makes images of stored rows.
    labels: [N] the classes that samples were drawn for; None without classes.
    drawn: stored samples [N,...] by name: 'after', and perhaps 'before'.
    seed: of the choice of real images.

  Returns:
    What is on the sheets, as JSON values: {'labels': [N] or None, 'height': of
    an image, in pixels, 'neighbours': {'space': 'pixels' or 'latents', where
    distances are measured, 'searched': how many of the 'training' images were
    looked at, 'samples' and 'real': [N] the distances of all samples, and of as
    many real images, to the nearest (other) training image, 'shown': the ten
    samples on the sheet}}.
  """
  real = real_rows(source, labels, len(drawn['after']), seed)
  sheets = {name: render(stored) for name, stored in drawn.items()}
  if 'before' in drawn:
    stored, _ = source.read(real)
    sheets['real'] = render(stored)
  for name, images in sheets.items():
    grid.save(folder / f'{name}.png', images, source.pixel_values)
  return {
    'labels': None if labels is None else labels.tolist(),
    'height': sheets['after'].shape[1],
    'neighbours': _write_neighbours(
      folder / 'neighbours.png', source, render, drawn['after'], real, seed
    ),
  }
