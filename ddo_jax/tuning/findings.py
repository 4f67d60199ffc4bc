"""What the log of a round says of its health, and what would mend it.

All here is a pure function of a round's records and numbers. A round says it of
itself when it ends, the report says it of each round, and the doctor of a run
that is still going. What counts as too much is `alarms.Alarms`' to say, which
ends the members of a sweep by the same rules.
"""

import dataclasses
import os
from typing import Any

import numpy as np

from ddo_jax.tuning import alarms

_RULES = alarms.Alarms()
_FEWEST = 4  # records of training, and evaluations less one, that are judged
# The spread of logits, β · std(Δ), below which σ(βΔ) is a straight line and the
# loss tells nothing. Healthy rounds on the digits have 0.1 to 0.6, one of a β
# ten thousand times too small 0.003.
_FLAT = 0.02
_CHANCE = 0.505  # the accuracy up to which a discriminator guesses
_NEAR = 0.05  # the share by which a loss differs from that at chance, and is it
_UNMOVED = 0.05  # nats: std(Δ) where the weights have hardly moved
_RUINED = 0.25  # the share by which a score may be worse than the reference's
_WAITING = 0.5  # the share of the time that devices may wait for rows


@dataclasses.dataclass(frozen=True)
class Finding:
  """What one look at a round found.

  Attributes:
    kind: what was looked for, such as 'saturated'.
    found: whether it is so; None where that cannot be told.
    evidence: the numbers, or why it cannot be told.
    advice: what to do about it, in words; '' where nothing is ill.
    flags: those of a command that does it.
    afresh: whether the round has to be played afresh, in another folder; else
      the same command goes on where the run stands.
  """

  kind: str
  found: bool | None
  evidence: str
  advice: str = ''
  flags: tuple[str, ...] = ()
  afresh: bool = True

  def __str__(self) -> str:
    return f'{self.kind}: {self.evidence}'

  @property
  def warning(self) -> str:
    """What it is and what to do about it, in one line."""
    return ' '.join([f'{self}: {self.advice}', *self.flags])


def _told(number: float) -> str:
  """Returns a number as it is put on a command line, in one digit."""
  return f'{float(f"{number:.1g}"):g}'


def _train(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns the records of a round's good steps, less that of its start."""
  return [
    record
    for record in log
    if record['kind'] == 'train'
    and record['step'] > 0
    and not record.get('bad')
  ]


def _spread(train: list[dict[str, Any]]) -> np.ndarray:
  """Returns std(Δ) of each record, the larger of real and fake rows."""
  real = alarms.series(train, 'log_ratio_real_std')
  fake = alarms.series(train, 'log_ratio_fake_std')
  count = min(len(real), len(fake))
  return np.maximum(real[:count], fake[:count])


def _beta_for(train: list[dict[str, Any]]) -> tuple[str, ...]:
  """Returns the flag of the β that brings βΔ to the order of one."""
  beta = _told(1 / max(np.median(_spread(train)), 1e-6))
  return (f'--config.ddo.objective.beta={beta}',)


def _rate(numbers: dict[str, float], factor: float) -> tuple[str, ...]:
  """Returns the flag of another learning rate."""
  rate = _told(numbers['learning_rate'] * factor)
  return (f'--config.ddo.optimizer.learning_rate={rate}',)


def _saturated(
  train: list[dict[str, Any]], numbers: dict[str, float]
) -> Finding:
  """Whether most logits are so large that their rows teach nothing more."""
  del numbers
  shares = alarms.series(train, 'saturated')
  share = shares[len(shares) // 2 :].mean()
  evidence = f'|βΔ| > 4 on {share:.0%} of the rows of its second half'
  if share <= _RULES.saturated:
    return Finding('saturated', False, evidence)
  late = train[len(train) // 2 :]
  return Finding(
    'saturated', True, evidence, 'bring βΔ to the order of one', _beta_for(late)
  )


def _dead(train: list[dict[str, Any]], numbers: dict[str, float]) -> Finding:
  """Whether the discriminator tells nothing: logits at zero, or guesses."""
  beta = numbers.get('beta', 1.0)
  half = len(train) // 2
  spread = _spread(train)
  logit = beta * float(np.median(spread))
  accuracy = alarms.series(train, 'accuracy')[half:].mean()
  loss = alarms.series(train, 'loss')[half:].mean()
  chance = alarms.series(train, 'chance_loss')[half:].mean()
  evidence = (
    f'logits spread by {logit:.2g} (β {beta:g} · std(Δ)'
    f' {np.median(spread):.2g} nats), accuracy {accuracy:.3f}, loss'
    f' {loss:.4g} where chance is {chance:.4g}'
  )
  # Where α drives all rows one way, half of them are still sorted rightly.
  guesses = accuracy < _CHANCE and abs(loss / chance - 1) < _NEAR
  if logit >= _FLAT and not guesses:
    return Finding('dead', False, evidence)
  if np.median(spread) < _UNMOVED:
    advice = 'the weights have hardly moved: raise the learning rate'
    return Finding('dead', True, evidence, advice, _rate(numbers, 10))
  # Without a brake Δ grows without end: early on it still tells of a scale.
  early = train[: max(1, len(train) // 4)]
  advice = 'bring βΔ to the order of one, where it is told real from fake'
  return Finding('dead', True, evidence, advice, _beta_for(early))


def _overshooting(
  evaluations: list[dict[str, Any]],
  train: list[dict[str, Any]],
  numbers: dict[str, float],
  dead: Finding,
) -> Finding:
  """Whether the round left what it had, and not only passed its best."""
  scores = [record['selection'] for record in evaluations]
  start = scores[0]
  best = min(evaluations, key=lambda record: record['selection'])
  worst = max(evaluations, key=lambda record: record['selection'])
  evidence = (
    f'the score is {start:.4g} at the start, {best["selection"]:.4g} at best'
    f' (step {best["step"]}), {worst["selection"]:.4g} at worst (step'
    f' {worst["step"]}) and {scores[-1]:.4g} at last'
  )
  signs = []
  for count in range(2, len(evaluations) + 1):
    seen = evaluations[:count]
    until = [log for log in train if log['step'] < seen[-1]['step']]
    for alarm in (alarms.forgetting, alarms.narrowing):
      signs.append(alarm(seen, until, _RULES).partition(': ')[2])
  signs = [sign for sign in signs if sign]
  if signs:
    evidence += f'; {signs[-1]}'
  ruined = worst['selection'] > start + _RUINED * abs(start)
  nothing = best['step'] == 0 and scores[-1] > start + (
    _RULES.margin * _RULES.noise * abs(start)
  )
  if not (signs or ruined or nothing):
    return Finding('overshooting', False, evidence)
  if dead.found and dead.flags:
    return Finding(
      'overshooting', True, evidence, 'nothing brakes it', dead.flags
    )
  flags = _rate(numbers, 1 / 4)
  if numbers.get('alpha', 1) > 1:
    flags = ('--config.ddo.objective.alpha=1', *flags)
  advice = 'go on in smaller steps, and see more of them'
  return Finding('overshooting', True, evidence, advice, flags)


def _starved(train: list[dict[str, Any]]) -> Finding:
  """Whether the devices wait for rows."""
  waiting = alarms.series(train, 'waiting')
  if len(waiting) < _FEWEST:
    return Finding('starved', None, 'the log does not say how long rows took')
  share = float(np.median(waiting))
  speed = float(np.median(alarms.series(train, 'images_per_second')))
  evidence = (
    f'the devices wait for rows for up to {share:.0%} of the time, at'
    f' {speed:,.0f} images/s'
  )
  if share <= _WAITING:
    return Finding('starved', False, evidence)
  cores = os.cpu_count() or 1
  return Finding(
    kind='starved',
    found=True,
    evidence=evidence,
    advice='read with more processes, or keep the images resized and near',
    flags=(f'--config.data.workers={cores}',),
    afresh=False,
  )


def of_log(
  log: list[dict[str, Any]], numbers: dict[str, float]
) -> list[Finding]:
  """Returns what the log of a round says of it.

  Args:
    log: the round's records of metrics.jsonl, so far.
    numbers: 'alpha' and 'beta' of its objective, where it has them, and its
      peak 'learning_rate'.

  Returns:
    A finding for each thing that was looked for, the most decisive first.
  """
  train = _train(log)
  by_step = {r['step']: r for r in log if 'selection' in r}
  evaluations = [by_step[step] for step in sorted(by_step)]
  found = []
  judged = [log for log in train if 'accuracy' in log]
  for kind, look in (('saturated', _saturated), ('dead', _dead)):
    if len(judged) < _FEWEST:
      why = f'too early to tell: {len(judged)} records of training'
      found.append(Finding(kind, None, why))
    else:
      found.append(look(judged, numbers))
  if len(evaluations) < 3:
    why = f'too early to tell: {len(evaluations)} evaluations'
    found.append(Finding('overshooting', None, why))
  else:
    found.append(_overshooting(evaluations, judged, numbers, found[-1]))
  return [*found, _starved(train)]


def warnings(log: list[dict[str, Any]], numbers: dict[str, float]) -> list[str]:
  """Returns a line for each thing that is ill; see `of_log`."""
  return [each.warning for each in of_log(log, numbers) if each.found]
