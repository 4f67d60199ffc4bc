"""Some rows of a source, or all of them under other class numbers."""

import dataclasses
import typing

import numpy as np

from ddo_jax import errors

if typing.TYPE_CHECKING:  # `sources` opens with the help of this module.
  from ddo_jax.data import sources


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
  """Some rows of another source; a `sources.Source`.

  Attributes:
    source: the other source.
    name: what errors call the rows.
    rows: [N] their indices in the other source.
    renumbered: the class that each class of the other source becomes, int32;
      −1 for one that may not occur.
    num_classes: the number of classes; 0 for a set without labels.
    class_names: the names of the classes, by label; () where not known.
  """

  source: 'sources.Source'
  name: str
  rows: np.ndarray
  renumbered: np.ndarray
  num_classes: int
  class_names: tuple[str, ...]

  @property
  def stored_shape(self) -> tuple[int, int, int]:
    """The shape (H, W, C) of every stored row."""
    return self.source.stored_shape

  @property
  def pixel_values(self) -> int:
    """The number of values of a pixel."""
    return self.source.pixel_values

  def __len__(self) -> int:
    return len(self.rows)

  def _renumber(self, labels: np.ndarray) -> np.ndarray:
    renumbered = self.renumbered[labels]
    if (renumbered < 0).any():
      wrong = int(labels[np.argmin(renumbered)])
      names = self.source.class_names
      raise errors.UserError(
        f'{self.name} has images of class {names[wrong] if names else wrong!r};'
        ' the classes are those of the training images, from'
        ' config.data.first_label on'
      )
    return renumbered

  def labels(self) -> np.ndarray:
    """Returns the class of every row, as `sources.Source` says.

    Raises:
      errors.UserError: a class occurs that may not.
    """
    return self._renumber(self.source.labels()[self.rows])

  def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads the rows at `index` [B], as `sources.Source` says.

    Raises:
      errors.UserError: a row cannot be read, or is of a class that may not
        occur.
    """
    stored, labels = self.source.read(self.rows[index])
    return stored, self._renumber(labels)


def of_rows(source: 'sources.Source', rows: np.ndarray, name: str) -> Selection:
  """Returns some rows of a source under the classes that they have.

  Args:
    source: the source.
    rows: [N] their indices.
    name: what errors call them.
  """
  return Selection(
    source=source,
    name=name,
    rows=rows,
    renumbered=np.arange(max(source.num_classes, 1), dtype=np.int32),
    num_classes=source.num_classes,
    class_names=source.class_names,
  )


def from_first(source: 'sources.Source', first: int) -> 'sources.Source':
  """Returns a source whose labels begin at `first` under labels from 0.

  Raises:
    errors.UserError: `first` is beyond the labels.
  """
  if not first or not source.num_classes:
    return source
  errors.require(
    first < source.num_classes,
    'data.first_label',
    first,
    f'a label of {source.name}, whose last is {source.num_classes - 1}',
  )
  every = of_rows(source, np.arange(len(source)), source.name)
  return dataclasses.replace(
    every,
    renumbered=np.maximum(every.renumbered - first, -1).astype(np.int32),
    num_classes=source.num_classes - first,
    class_names=source.class_names[first:],
  )


def named_like(
  source: 'sources.Source', train: 'sources.Source'
) -> 'sources.Source':
  """Returns a source under the class numbers of the training images.

  Folders are numbered in each set by themselves, and held-out images need not
  have all classes. Sets that do not name their classes are left alone.
  """
  names = train.class_names
  if not source.class_names or not names or source.class_names == names:
    return source
  label_of = {name: label for label, name in enumerate(names)}
  every = of_rows(source, np.arange(len(source)), source.name)
  renumbered = [label_of.get(name, -1) for name in source.class_names]
  return dataclasses.replace(
    every,
    renumbered=np.array(renumbered, np.int32),
    num_classes=train.num_classes,
    class_names=names,
  )
