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
CHUNK = 5_000  # rows of OpenAI's chunks
# A shuffled file lies within so many standard deviations.
_SHUFFLED = 6.0


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
    probabilities = probabilities[permutation(n)]
  edges = [i * n // splits for i in range(splits + 1)]
  return _summary(
    [_score(probabilities[a:b]) for a, b in itertools.pairwise(edges)]
  )


def openai(logits_unbiased: np.ndarray, chunk: int = CHUNK) -> InceptionScore:
  """Returns the score of OpenAI's evaluator: chunks of 5,000 in a file's order.

  OpenAI publishes the mean alone, and computes in float32, which makes a
  difference of 1e-7. The order of the file should be that of chance: see
  `is_shuffled`.

  Args:
    logits_unbiased: [N, classes], in the order of the file.
    chunk: the number of rows in a chunk; the last chunk may be shorter.

  Raises:
    UserError: the logits are not [N, classes], or hold NaN or Inf.
  """
  logits = frechet.check_features('logits', logits_unbiased)
  if chunk < 1:
    raise errors.UserError(f'chunk is {chunk}; it must be 1 or more rows')
  probabilities = special.softmax(logits.astype(np.float64), axis=1)
  return _summary(
    [
      _score(probabilities[start : start + chunk])
      for start in range(0, len(logits), chunk)
    ]
  )


def permutation(count: int) -> np.ndarray:
  """Returns the order [count] that images drawn here are taken in.

  Their classes follow from their ids, often in turn, and a chunk in which every
  class occurs equally often scores higher than one of a shuffled file.
  """
  return np.random.RandomState(_SEED).permutation(count)


def is_shuffled(classes: np.ndarray, chunk: int = CHUNK) -> bool:
  """Says whether chunks of a file hold classes as those of a shuffled one do.

  In a sorted file a chunk knows few classes, and where classes take turns it
  holds all of them equally often; the score is too low, or too high. Pearson's
  statistic of the chunks' classes is compared with what shuffling gives it, by
  the cube root of Wilson and Hilferty, which is nearly normal.

  Args:
    classes: [N] predicted classes, in the file's order.
    chunk: the number of rows in a chunk.
  """
  n = len(classes)
  # The last chunk may be shorter; a very short one tells nothing.
  starts = range(0, n - chunk // 2, chunk)
  chunks = [classes[start : start + chunk] for start in starts]
  if len(chunks) < 2:
    return True  # the order is of no account
  width = classes.max() + 1
  counts = np.stack([np.bincount(part, minlength=width) for part in chunks])
  sizes = counts.sum(axis=1, keepdims=True)
  expected = sizes * counts.sum(axis=0) / sizes.sum()
  often = expected.min(axis=0) >= 1  # Pearson's statistic wants no rare ones
  freedom = (len(chunks) - 1) * (often.sum() - 1)
  if freedom < 1:
    return True  # one class alone
  expected = expected[:, often]
  pearson = np.square(counts[:, often] - expected) / expected
  spread = 2 / (9 * freedom)
  deviation = np.cbrt(pearson.sum() / freedom) - (1 - spread)
  return bool(abs(deviation) < _SHUFFLED * np.sqrt(spread))
