"""Which class each drawn image is of: as often as in the data, or all alike.

Real and fake images that differ in how often each class occurs tell each other
apart by that alone, and a distance between them measures it. Fake pools and
scores therefore follow the training images unless the settings, or a protocol,
say otherwise.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import heapq
import itertools

import numpy as np

# 'data': as often as in the training images. 'balanced': every class that
# occurs in them equally often.
RULES = ('data', 'balanced')

EQUAL = 'every class equally often'

# Data whose rarest class has this share of the commonest one's images, or more,
# counts as balanced: splits that are cut from balanced data differ by as much.
_NEARLY_EQUAL = 0.9


def _spread(counts: Sequence[int]) -> Iterator[int]:
  """Yields classes for ever, such that every prefix follows the proportions.

  The j-th image of a class with share p may stand from place (j − 1)/p on and
  must stand before place j/p. To take the earliest deadline first meets all of
  them, so that among the first t images each class occurs t·p times to within
  less than one. Equal shares give 0, 1, …, 0, 1, … .
  """
  total = sum(counts)
  taken = [0] * len(counts)
  ready: list[tuple[int, int]] = []  # (deadline, class)
  waiting = [(0, label) for label, count in enumerate(counts) if count]
  for place in itertools.count():
    while waiting and waiting[0][0] <= place:
      _, label = heapq.heappop(waiting)
      deadline = -(-(taken[label] + 1) * total // counts[label])
      heapq.heappush(ready, (deadline, label))
    _, label = heapq.heappop(ready)
    taken[label] += 1
    release = taken[label] * total // counts[label]
    heapq.heappush(waiting, (release, label))
    yield label


class Shares:
  """How often each class is drawn; an image's class depends on its id alone.

  Attributes:
    counts: the shares of classes 0, 1, …, as integers without a common divisor;
      () without classes.
  """

  def __init__(self, counts: Sequence[int]):
    """Takes the number of images of each class; () where there are none."""
    divisor = int(np.gcd.reduce(np.asarray(counts, int))) if counts else 1
    self.counts = tuple(int(count) // max(divisor, 1) for count in counts)
    self._places = _spread(self.counts)
    self._order: list[int] = []  # the classes of ids 0, 1, … asked for so far

  @classmethod
  def of(cls, rule: str, labels: np.ndarray) -> 'Shares':
    """Returns the shares that a rule gives to data.

    Args:
      rule: one of `RULES`.
      labels: [N] the classes of the data's images, N > 0.
    """
    counts = np.bincount(labels)
    occurring = counts[counts > 0]
    if occurring.min() >= _NEARLY_EQUAL * occurring.max():
      rule = 'balanced'
    if rule == 'balanced':
      counts = np.sign(counts)
    return cls(counts.tolist())

  def labels(self, ids: np.ndarray) -> np.ndarray:
    """Returns the classes int32 [B] of ids [B]; all 0 without classes."""
    if not self.counts:
      return np.zeros(len(ids), np.int32)
    places = np.asarray(ids, np.int64) % sum(self.counts)
    needed = int(places.max(initial=-1)) + 1 - len(self._order)
    self._order += itertools.islice(self._places, max(needed, 0))
    return np.asarray(self._order, np.int32)[places]

  def __str__(self) -> str:
    """Says in words how often each class is drawn."""
    drawn = [count for count in self.counts if count]
    if drawn and min(drawn) < max(drawn):
      low = min(drawn) / sum(drawn)
      high = max(drawn) / sum(drawn)
      return (
        f'{len(drawn)} classes as often as in the training images, each'
        f' {low:.3g} to {high:.3g} of all'
      )
    if len(drawn) < len(self.counts):
      return f'the {len(drawn)} classes that the data has, equally often'
    return EQUAL
