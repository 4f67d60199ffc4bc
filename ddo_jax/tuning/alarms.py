"""Alarms: when a member of a study has passed its best and may be ended.

Inside a round quality peaks and then degrades. Four signs tell that the peak
is past. None of them speaks before a few evaluations in a row were worse than
the best one: a member that still improves is left alone, whatever its other
records say.

All here is a pure function of records, so that a resumed member, and any
process that looks, comes to the same answer.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from ddo_jax import errors

Records = Sequence[dict[str, Any]]

_FEWEST = 3  # records that a mean is taken of
_SURE = 3.0  # standard errors by which a mean must have moved
# A score far below the reference's is not held to a share of itself alone:
# near zero its noise is no longer in proportion to it.
_SHARE_OF_START = 0.05


def _setting(default: Any) -> Any:
  """A field that may change inside one run's folder."""
  return dataclasses.field(default=default, metadata={'science': False})


@dataclasses.dataclass(unsafe_hash=True)
class Alarms:
  """The rules by which a member is ended; 0 turns a rule off.

  Attributes:
    noise: the standard deviation of the difference between two evaluations of
      a member, which draw from one stream of samples, as a share of the score.
      `experiments/cheap_scores.py` measures it: of 5,000 digits 0.009 where
      they are near, 0.09 between the reference and the best. It falls with the
      number of images.
    margin: the score is past its best where it is worse by so many times the
      noise.
    patience: how many evaluations in a row must be worse than the best one
      before there is any alarm; in all of them score or recall must be so.
    mle_rise: the share by which the MLE loss on real rows may have risen since
      the start of the round.
    recall_fall: by how much recall may have fallen from its best, where the
      selection scores hold it.
    saturated: the share of saturated logits, |βΔ| > 4, in late steps.
    window: how many of the log's records, each one step's, a mean is taken of,
      for the MLE loss and the saturated share of single batches are noisy.
  """

  noise: float = _setting(0.03)
  margin: float = _setting(4.0)
  patience: int = _setting(2)
  mle_rise: float = _setting(0.5)
  recall_fall: float = _setting(0.1)
  saturated: float = _setting(0.5)
  window: int = _setting(8)

  def check(self, name: str) -> None:
    """Raises UserError, naming the field, where a value makes no sense."""
    for field in ('noise', 'margin', 'mle_rise'):
      value = getattr(self, field)
      errors.require(0 <= value < math.inf, f'{name}.{field}', value, '0 or up')
    for field in ('recall_fall', 'saturated'):
      value = getattr(self, field)
      errors.require(0 <= value <= 1, f'{name}.{field}', value, 'in [0, 1]')
    errors.require_integer(f'{name}.patience', self.patience, 1)
    errors.require_integer(f'{name}.window', self.window, _FEWEST)


def _overshoot(evaluations: Records, train: Records, rules: Alarms) -> str:
  """The score is past its best by a margin."""
  del train
  best = min(evaluations, key=lambda record: record['selection'])
  late = evaluations[-rules.patience :]
  scale = max(
    abs(best['selection']), _SHARE_OF_START * abs(evaluations[0]['selection'])
  )
  limit = best['selection'] + rules.margin * rules.noise * scale
  if not rules.margin or any(record['selection'] <= limit for record in late):
    return ''
  times = 'evaluations' if rules.patience > 1 else 'evaluation'
  return (
    f'overshoot: the score is {late[-1]["selection"]:.4g}, and was above'
    f' {limit:.4g} in the last {rules.patience} {times}; its best is'
    f' {best["selection"]:.4g}, at step {best["step"]}'
  )


def series(train: Records, name: str) -> np.ndarray:
  """Returns a field of the log's records of good steps, in their order."""
  kept = [r[name] for r in train if name in r and not r.get('bad')]
  values = np.array(kept, float)
  return values[np.isfinite(values)]


def forgetting(evaluations: Records, train: Records, rules: Alarms) -> str:
  """The MLE loss on real rows has risen."""
  del evaluations
  values = series(train, 'mle_loss')
  count = min(rules.window, len(values) // 2)
  if not rules.mle_rise or count < _FEWEST:
    return ''
  first = values[:count]
  last = values[-count:]
  rise = last.mean() - first.mean()
  error = math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / count)
  allowed = rules.mle_rise * abs(first.mean())
  if rise <= allowed or rise <= _SURE * error:
    return ''
  return (
    f'forgetting: the MLE loss on real rows rose from {first.mean():.4g} to'
    f' {last.mean():.4g} (means of {count} records)'
  )


def narrowing(evaluations: Records, train: Records, rules: Alarms) -> str:
  """Recall has fallen."""
  del train
  values = [r['recall'] for r in evaluations if 'recall' in r]
  if not rules.recall_fall or len(values) < rules.patience:
    return ''
  limit = max(values) - rules.recall_fall
  if any(value >= limit for value in values[-rules.patience :]):
    return ''
  return f'narrowing: recall fell from {max(values):.3f} to {values[-1]:.3f}'


def _saturation(evaluations: Records, train: Records, rules: Alarms) -> str:
  """Most logits are saturated, and teach nothing any more."""
  del evaluations
  values = series(train, 'saturated')[-rules.window :]
  if not rules.saturated or len(values) < _FEWEST:
    return ''
  if values.mean() <= rules.saturated:
    return ''
  return (
    f'saturation: |βΔ| > 4 on {values.mean():.0%} of the rows in the last'
    f' {len(values)} records'
  )


def reason(evaluations: Records, train: Records, rules: Alarms) -> str | None:
  """Returns one line that says why a member should be ended, or None.

  Args:
    evaluations: what the member's evaluations found, in the order of their
      steps, that of step 0 included: `step`, `selection` (lower is better) and
      perhaps `recall`.
    train: its records of kind 'train' in metrics.jsonl, in the order of their
      steps: `mle_loss` and `saturated`; those of bad steps are left out.
    rules: the rules.
  """
  if not evaluations:
    return None
  scores = [record['selection'] for record in evaluations]
  if min(scores[-rules.patience :]) <= min(scores):
    return None
  for alarm in (_overshoot, forgetting, narrowing, _saturation):
    line = alarm(evaluations, train, rules)
    if line:
      return line
  return None
