"""Shortcuts: what tells real rows from fake ones without a look at the image.

Where rows are stored, resized or rounded differently, the discriminator learns
that difference in place of the images. No generator is perfect, and its samples
always differ from the data somehow: twelve trivial statistics together tell an
honest pool of the digits from the data with an AUC of 0.97, as they would a
spoiled one. What is looked for is therefore a single statistic that by itself
all but decides which row is real. `experiments/doctor_runs.py` measures both.
"""

from collections.abc import Callable
import dataclasses
import math

import numpy as np
from scipy import ndimage
from scipy import stats

from ddo_jax.tuning import findings

Encode = Callable[[np.ndarray], np.ndarray]

# A statistic that sorts pairs of a real and a fake row so well is a shortcut.
# The honest pools that were measured reach 0.78, what was spoiled 0.97.
LIMIT = 0.9
# Classes whose shares differ by so much, half the sum of all differences,
# beyond what chance would give.
LABEL_LIMIT = 0.05
_LACKED_BY_REAL = 'values that real rows lack'
_LACKED_BY_FAKE = 'values that fake rows lack'
_ADVICE = (
  'draw the pool anew; if it is so again, the weights were trained on images'
  ' prepared in another way than these, so leave out --config.init_from'
)
_STRETCHED = (
  'the images hold few of the pixel values that they may have: store those that'
  ' occur as 0, 1, 2, …, and set --config.model.pixel_values to their number'
)
_CLASSES = 'draw each class as often as the data has it'
_LEVEL = 1e-3  # of the tests, divided by their number


@dataclasses.dataclass(frozen=True)
class Difference:
  """How much one statistic differs between real and fake rows.

  Attributes:
    name: what it is of a row, in words.
    separability: the probability that it sorts a real and a fake row rightly,
      the larger of AUC and 1 − AUC, in [0.5, 1]; of labels, the distance of the
      two histograms beyond chance, in [0, 1].
    p_value: of the test that there is no difference.
    real: its median over the real rows.
    fake: its median over the fake rows.
    limit: from where on the difference counts.
  """

  name: str
  separability: float
  p_value: float
  real: float
  fake: float
  limit: float = LIMIT

  def decides(self, tests: int) -> bool:
    """Whether it is a shortcut, being one of so many tests."""
    return self.separability >= self.limit and self.p_value * tests < _LEVEL

  def __str__(self) -> str:
    return f'{self.name} {self.separability:.2f}'


def statistics(x: np.ndarray) -> dict[str, np.ndarray]:
  """Returns trivial statistics [N] of rows, by their names.

  Args:
    x: [N,H,W,C] in model units, H and W at least 3.
  """
  rows = x.reshape(len(x), -1)
  inside = np.zeros(x.shape[1:3], bool)
  inside[1:-1, 1:-1] = True
  border = x[:, ~inside].reshape(len(x), -1)
  found = {
    'mean': rows.mean(axis=1),
    'standard deviation': rows.std(axis=1),
    'lowest value': rows.min(axis=1),
    'highest value': rows.max(axis=1),
    'mean of the border': border.mean(axis=1),
    'standard deviation of the border': border.std(axis=1),
  }
  edges = {
    'top': x[:, 0],
    'bottom': x[:, -1],
    'left': x[:, :, 0],
    'right': x[:, :, -1],
  }
  for name, edge in edges.items():
    found[f'mean of the {name} edge'] = edge.reshape(len(x), -1).mean(axis=1)
  # Resizing once too often takes the finest detail away.
  fine = ndimage.laplace(x.astype(np.float32), axes=(1, 2))[:, 1:-1, 1:-1]
  energy = np.square(fine).reshape(len(x), -1).mean(axis=1)
  found['finest detail'] = energy / (rows.var(axis=1) + 1e-6)
  if x.shape[3] > 1:
    channels = x.mean(axis=(1, 2))
    for channel in range(x.shape[3]):
      found[f'mean of channel {channel}'] = channels[:, channel]
    found['difference of channels'] = np.ptp(x, axis=3).mean(axis=(1, 2))
  return found


def _strange(stored: np.ndarray, known: np.ndarray) -> np.ndarray:
  """Returns the share [N] of each row's pixels whose value is not known."""
  rows = stored.reshape(len(stored), -1)
  return 1 - np.isin(rows, known).mean(axis=1)


def _grids(
  real: np.ndarray, fake: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns how many pixels have values that the other rows never have.

  One half of the rows says which values occur, the other half is looked at, so
  that rare values are as strange in rows of the same kind.

  Args:
    real: uint8 [N,H,W,C], N at least 2.
    fake: uint8 [M,H,W,C], M at least 2.

  Returns:
    Statistics of the second halves, (real, fake), by name.
  """
  late_real = real[1::2]
  late_fake = fake[1::2]
  grids = {
    _LACKED_BY_REAL: np.unique(real[::2]),
    _LACKED_BY_FAKE: np.unique(fake[::2]),
  }
  return {
    name: (_strange(late_real, known), _strange(late_fake, known))
    for name, known in grids.items()
  }


def _difference(name: str, real: np.ndarray, fake: np.ndarray) -> Difference:
  """Compares a statistic of real rows [N] and of fake rows [M]."""
  test = stats.mannwhitneyu(real, fake, method='asymptotic')
  auc = test.statistic / (len(real) * len(fake))
  return Difference(
    name=name,
    separability=float(max(auc, 1 - auc)),
    p_value=float(test.pvalue),
    real=float(np.median(real)),
    fake=float(np.median(fake)),
  )


def compare_labels(real: np.ndarray, fake: np.ndarray) -> Difference:
  """Compares how often each class occurs, in labels [N] and [M].

  `real` and `fake` of what is returned are the shares of the class that
  differs most.
  """
  classes = int(max(real.max(), fake.max())) + 1
  counts = np.stack(
    [np.bincount(labels, minlength=classes) for labels in (real, fake)]
  )
  counts = counts[:, counts.any(axis=0)]
  occurring = np.unique(np.concatenate([real, fake]))
  shares = counts / counts.sum(axis=1, keepdims=True)
  apart = np.abs(shares[0] - shares[1])
  p_value = 1.0
  if len(occurring) > 1:
    p_value = stats.chi2_contingency(counts).pvalue
  distance = apart.sum() / 2
  # By chance each difference is about normal, and adds to a true one squared.
  pooled = counts.sum(axis=0) / counts.sum()
  variance = pooled * (1 - pooled) * (1 / len(real) + 1 / len(fake))
  by_chance = np.sqrt(2 * variance / np.pi).sum() / 2
  most = int(apart.argmax())
  return Difference(
    name=f'share of class {occurring[most]}',
    separability=math.sqrt(max(distance**2 - by_chance**2, 0)),
    p_value=float(p_value),
    real=float(shares[0, most]),
    fake=float(shares[1, most]),
    limit=LABEL_LIMIT,
  )


def compare(
  real: np.ndarray, fake: np.ndarray, encode: Encode
) -> list[Difference]:
  """Compares real and fake rows by trivial statistics.

  Args:
    real: [N,H,W,C] as stored.
    fake: [M,H,W,C] as stored.
    encode: turns stored rows into model units.

  Returns:
    The statistics, the one that separates best first.
  """
  pairs = {}
  if real.dtype == np.uint8:
    pairs |= _grids(real, fake)
  real_statistics = statistics(encode(real))
  fake_statistics = statistics(encode(fake))
  for name, values in real_statistics.items():
    pairs[name] = (values, fake_statistics[name])
  found = [_difference(name, *pair) for name, pair in pairs.items()]
  return sorted(found, key=_separability, reverse=True)


def _tells(difference: Difference) -> str:
  """Says what a difference is, with its numbers."""
  return (
    f'{difference.name} {difference.separability:.2f} (real'
    f' {difference.real:.3g}, fake {difference.fake:.3g})'
  )


def finding(
  differences: list[Difference], labels: Difference | None
) -> findings.Finding:
  """Returns what differences say of a round.

  Args:
    differences: of the rows, see `compare`.
    labels: of the labels, see `compare_labels`; None without classes.
  """
  every = differences
  if labels:
    every = [*differences, labels]
  telling = [each for each in every if each.decides(len(every))]
  if not telling:
    most = differences[0]
    evidence = (
      f'the most telling of {len(differences)} trivial statistics sorts real'
      f' from fake rows rightly in {most.separability:.0%} of the pairs:'
      f' {most.name} ({LIMIT:.0%} would be a shortcut)'
    )
    if labels:
      evidence += f'; the shares of classes are {labels.separability:.1%} apart'
    return findings.Finding('shortcut', False, evidence)
  said = ', '.join(_tells(each) for each in telling[:3])
  advice = _ADVICE
  flags: tuple[str, ...] = ()
  if telling[0].name == _LACKED_BY_REAL:
    advice = _STRETCHED
  elif telling[0] is labels:
    advice = _CLASSES
    flags = ('--config.labels=data',)
  return findings.Finding(
    'shortcut', True, f'real and fake rows differ: {said}', advice, flags
  )


def _separability(difference: Difference) -> float:
  return difference.separability
