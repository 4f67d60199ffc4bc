"""Classes: which field of a set holds them, and what is odd about them."""

from collections.abc import Sequence

import numpy as np

from ddo_jax import errors

_FEW = 10  # A class of fewer images is rare.
_SHARE = 20  # So is one of less than a 20th of the mean.
_SHOWN = 5  # Classes that a message lists.


def count_classes(where: str, labels: np.ndarray) -> int:
  """Returns the largest label plus one, and 0 for no labels.

  Args:
    where: the place of the labels, for errors.
    labels: [N].

  Raises:
    errors.UserError: a label is no integer, negative, or beyond int32.
  """
  low = labels.min() if labels.size else 0
  high = labels.max() if labels.size else -1
  whole = np.issubdtype(labels.dtype, np.integer)
  if not whole or low < 0 or high >= 2**31 - 1:
    raise errors.UserError(
      f'{where}: labels are {labels.dtype} {low} .. {high}; wanted ints from 0'
    )
  return int(high) + 1


def choose_field(
  where: str,
  class_fields: Sequence[str],
  other_fields: Sequence[str],
  asked: str,
) -> str:
  """Returns the field of a record that holds its class, '' if none does.

  Args:
    where: the set, for errors.
    class_fields: the fields that are declared as classes.
    other_fields: fields of plain integers, which may be classes.
    asked: the setting `data.label_field`: a field, 'none', or '' to take
      `label`, or else the only one there is.

  Raises:
    errors.UserError: the field that was asked for is not there, or several may
      be meant.
  """
  known = [*class_fields, *other_fields]
  if asked == 'none':
    return ''
  if asked:
    errors.require(
      asked in known,
      'data.label_field',
      asked,
      f'one of {known} of {where}, or none',
    )
    return asked
  if 'label' in known:
    return 'label'
  for fields in (class_fields, other_fields):
    if len(fields) > 1:
      raise errors.UserError(
        f'{where} has several fields that may be its classes,'
        f' {", ".join(fields)}: choose with --config.data.label_field='
        f'{fields[0]}, or none'
      )
    if fields:
      return fields[0]
  return ''


def describe(
  labels: np.ndarray, num_classes: int, names: Sequence[str] = ()
) -> str:
  """Returns what a trainer should know of the classes of a set; '' if nothing.

  Args:
    labels: [N], in 0 .. num_classes−1.
    num_classes: the number of classes.
    names: their names, if they are known.
  """
  counts = np.bincount(labels, minlength=num_classes)
  filled = np.flatnonzero(counts)
  empty = np.flatnonzero(counts == 0)
  limit = max(_FEW, counts[filled].mean() / _SHARE)
  rare = filled[counts[filled] < limit]

  def listed(classes: np.ndarray, with_counts: bool) -> str:
    words = []
    for k in classes[:_SHOWN]:
      name = f' {names[k]!r}' if names else ''
      words.append(f'{k}{name}' + (f' ({counts[k]})' if with_counts else ''))
    return ', '.join(words) + (', …' if len(classes) > _SHOWN else '')

  said = []
  if empty.tolist() == [0]:
    said.append(
      f'labels run from 1 to {num_classes - 1} and class 0 is empty (where'
      ' they are meant to begin at 1, set --config.data.first_label=1)'
    )
  elif empty.size:
    said.append(f'{empty.size} classes are empty: {listed(empty, False)}')
  if rare.size:
    said.append(f'{rare.size} are rare: {listed(rare, True)}')
  return '; '.join(said)
