"""The Inception Score (Salimans et al. 2016, arXiv 1606.03498), in two forms.

The score is exp E KL(p(y|x) ‖ p(y)), where p(y) is the mean over a chunk of
samples and the class probabilities are those of the last layer without its
bias. Published numbers follow one of two conventions, which differ by percents,
so name the one you use.
"""

import itertools
from typing import NamedTuple

import numpy as np
from scipy import special

from ddo_jax import errors
from ddo_jax.evaluation.metrics import frechet

_SEED = 2020  # torch-fidelity shuffles by this seed
_OPENAI_CHUNK = 5_000
# More equal neighbours than this many standard deviations above the expected
# number mean that the samples are sorted.
_SORTED = 6.0


class InceptionScore(NamedTuple):
  """Mean and population standard deviation over the chunks; the mean is ≥ 1."""

  mean: float
  sd: float


def _score(probabilities: np.ndarray) -> float:
  """Returns the score of one chunk of probabilities [n, classes]."""
  marginal = probabilities.mean(axis=0, keepdims=True)
  # Softmax underflows to p = 0, where rel_entr is 0 as it should be.
  divergence = special.rel_entr(probabilities, marginal).sum(axis=1)
  return np.exp(divergence.mean())


def _summary(scores: list[float]) -> InceptionScore:
  return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def torch_fidelity(
  logits_unbiased: np.ndarray, splits: int = 10, shuffle: bool = True
) -> InceptionScore:
  """Returns torch-fidelity's score: ten equal splits of shuffled samples.

  Args:
    logits_unbiased: [N, classes], `inception.Taps.logits_unbiased` in the order
      of the ids.
    splits: the number of chunks.
    shuffle: whether samples are shuffled, by a fixed seed, so that sorted ones
      do no harm.

  Raises:
    UserError: the logits are not [N, classes], hold NaN or Inf, or are fewer
      than the splits.
  """
  logits = frechet.check_features('logits', logits_unbiased)
  n = len(logits)
  if not 1 <= splits <= n:
    raise errors.UserError(
      f'{splits} splits of {n} samples; wanted from 1 to the number of samples'
    )
  probabilities = special.softmax(logits.astype(np.float64), axis=1)
  if shuffle:
    order = np.random.RandomState(_SEED).permutation(n)
    probabilities = probabilities[order]
  edges = [i * n // splits for i in range(splits + 1)]
  return _summary(
    [_score(probabilities[a:b]) for a, b in itertools.pairwise(edges)]
  )


def openai(
  logits_unbiased: np.ndarray, chunk: int = _OPENAI_CHUNK
) -> InceptionScore:
  """Returns the score of OpenAI's evaluator: chunks of 5,000 in a file's order.

  OpenAI publishes the mean alone, and computes in float32, which makes a
  difference of 1e-7. A file that is sorted by class is refused: each of its
  chunks would know few classes, and the score would be far too low.

  Args:
    logits_unbiased: [N, classes], in the order of the file.
    chunk: the number of rows in a chunk; the last chunk may be shorter.

  Raises:
    UserError: the logits are not [N, classes], hold NaN or Inf, or are sorted
      by class.
  """
  logits = frechet.check_features('logits', logits_unbiased)
  if chunk < 1:
    raise errors.UserError(f'chunk is {chunk}; it must be 1 or more rows')
  if len(logits) > chunk:
    check_shuffled(logits.argmax(axis=1))
  probabilities = special.softmax(logits.astype(np.float64), axis=1)
  return _summary(
    [
      _score(probabilities[start : start + chunk])
      for start in range(0, len(logits), chunk)
    ]
  )


def check_shuffled(classes: np.ndarray) -> None:
  """Checks that samples are not sorted, or in runs, by class.

  Neighbours of one class are counted. In random order their expected number is
  (N − 1) Σ n_c (n_c − 1)/(N (N − 1)), with a standard deviation of about its
  square root.

  Args:
    classes: [N] labels or predicted classes, in the file's order.

  Raises:
    UserError: the samples are sorted.
  """
  n = len(classes)
  counts = np.unique(classes, return_counts=True)[1].astype(np.float64)
  expected = (counts * (counts - 1)).sum() / max(n, 1)
  found = int((classes[1:] == classes[:-1]).sum())
  if found > expected + _SORTED * np.sqrt(expected + 1):
    raise errors.UserError(
      f'{found} of {n} samples follow one of their own class, where shuffled '
      f'ones would be {expected:.0f}: the file is sorted by class, which '
      "ruins OpenAI's Inception Score; shuffle the samples before writing it"
    )
