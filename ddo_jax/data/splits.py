"""Splits: finding them, cutting held-out images, and comparing these."""

import dataclasses
import hashlib

import numpy as np

from ddo_jax import errors

# What the splits of a set are usually called.
_NAMES = ('train', 'test', 'val', 'valid', 'validation', 'dev')


@dataclasses.dataclass(frozen=True)
class Wanted:
  """Which split is wanted of a place that may hold several.

  Attributes:
    name: the split.
    train: the name of the training split.
    test: the name of the held-out one.
    alone: whether a place without splits is the split that is wanted. It is the
      training split, unless a setting says otherwise.
  """

  name: str
  train: str = 'train'
  test: str = 'test'
  alone: bool = True

  @property
  def known(self) -> tuple[str, ...]:
    """Names that are taken for those of splits."""
    return (self.train, self.test, *_NAMES)

  def choose(self, where: str, found: list[str]) -> str:
    """Returns the split that is wanted, '' in a place without splits.

    Args:
      where: the place, for errors.
      found: the splits that are there.

    Raises:
      errors.UserError: the split is not there.
    """
    cut = 'cut held-out images from it with --config.data.holdout=0.1'
    if not found and not self.alone:
      raise errors.UserError(
        f'{where} is the split {self.train!r}, not {self.name!r}: {cut}, name'
        ' others with --config.data.test_source, or put {split} into'
        ' config.data.source where the paths differ'
      )
    if found and self.name not in found:
      raise errors.UserError(
        f'{where} has no split {self.name!r}; it has {found}: set'
        f' config.data.train_split or test_split to one of these, or {cut}'
      )
    return self.name if found else ''


def held_out(labels: np.ndarray, share: float) -> np.ndarray:
  """Returns which rows of a set are held out, bool [N].

  It is the same share of every class, to a row, and always the same rows: they
  depend on the labels and the share, not on a run's seed.

  Args:
    labels: [N] the rows' classes.
    share: in (0, 1).
  """
  # NumPy promises that the numbers of RandomState never change.
  order = np.random.RandomState(0).permutation(len(labels))
  by_class = order[np.argsort(labels[order], kind='stable')]
  _, starts = np.unique(labels[by_class], return_index=True)
  held = np.zeros(len(labels), bool)
  for rows in np.split(by_class, starts[1:]):
    held[rows[: round(share * len(rows))]] = True
  return held


def _hashes(stored: np.ndarray) -> list[bytes]:
  rows = np.ascontiguousarray(stored)
  return [hashlib.blake2b(row.data, digest_size=16).digest() for row in rows]


def copies(train: np.ndarray, test: np.ndarray) -> np.ndarray:
  """Returns which rows of `test` also stand in `train`, bool [M].

  Args:
    train: [N,H,W,C].
    test: [M,H,W,C].
  """
  known = set(_hashes(train))
  return np.array([row in known for row in _hashes(test)], bool)
