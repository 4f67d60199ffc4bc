"""The Inception Score (Salimans et al. 2016, arXiv 1606.03498), two ways.

exp E KL(p(y|x) ‖ p(y)), with p(y) the mean over a chunk of samples. The class
probabilities are those of the last layer without its bias. Published numbers
come by either convention; they differ by percents, so name the one you use.
"""

import itertools
from typing import NamedTuple

import numpy as np
from scipy import special

from ddo_jax import errors
from ddo_jax.evaluation.metrics import frechet

_SEED = 2020  # of torch-fidelity's shuffle
_OPENAI_CHUNK = 5_000
_SORTED = 6.0  # standard deviations of the count of equal neighbours


class InceptionScore(NamedTuple):
  """Mean and population standard deviation over the chunks; from 1 upward."""

  mean: float
  sd: float


def _score(probabilities: np.ndarray) -> float:
  """The score of one chunk of rows [n, classes]."""
  marginal = probabilities.mean(axis=0, keepdims=True)
  # rel_entr is 0 where p is, which softmax reaches by underflow.
  divergence = special.rel_entr(probabilities, marginal).sum(axis=1)
  return np.exp(divergence.mean())


def _summary(scores: list[float]) -> InceptionScore:
  return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def torch_fidelity(
  logits_unbiased: np.ndarray, splits: int = 10, shuffle: bool = True
) -> InceptionScore:
  """As torch-fidelity: shuffled, ten equal splits, float64.

  Args:
    logits_unbiased: [N, classes], `inception.Taps.logits_unbiased`, id order.
    splits: chunks.
    shuffle: by its fixed seed, so that sorted samples do no harm.

  Raises:
    UserError: not [N, classes], NaN or Inf, or fewer rows than splits.
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
  """As OpenAI's evaluator: contiguous chunks of 5,000 in the file's order.

  It publishes the mean alone, and computes in float32 (a difference of 1e-7).
  A file sorted by class gives a score that is far too low, since a chunk then
  knows few classes: that is refused.

  Args:
    logits_unbiased: [N, classes], in the order of the file.
    chunk: rows of a chunk; the last may be shorter.

  Raises:
    UserError: not [N, classes], NaN or Inf, or sorted by class.
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
  """Raises UserError if samples stand sorted, or in runs, by class.

  Neighbours of one class are counted; in random order they number
  (N - 1) Σ n_c (n_c - 1)/(N (N - 1)), give or take a square root.

  Args:
    classes: [N] labels or predicted classes, in the file's order.
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
