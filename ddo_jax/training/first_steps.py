"""What the first steps of a round say of its settings.

A round whose discriminator saturates at once, or will not have told anything
apart by its end, is hopeless from the start: nothing that comes later mends it.
Both are read off the records that the loop logs anyway.
"""

from typing import Any

import numpy as np

POLICIES = ('stop', 'warn')

_FIRST = 0.25  # of the steps: where saturation counts, and where logits are due
_MOST = 0.75  # of the rows
_LEAST = 0.05  # of |βΔ|: below it the sigmoid is a straight line to a percent


def _gone(phase: Any, step: int) -> float:
  """Returns the share of a phase's learning rates that lie before a step."""
  images = phase.batch_size * np.arange(phase.steps(), dtype=np.float32)
  rates = np.asarray(phase.optimizer.factor(images, phase.images), np.float64)
  return float(rates[:step].sum() / rates.sum())


def fault(step: int, metrics: dict[str, Any], phase: Any) -> str:
  """Returns why a phase is hopeless, with the remedy; '' where it is not.

  Δ grows at most as the square of what θ has moved, and θ moves as the learning
  rates add up: that bounds the logits of the phase's end.

  Args:
    step: the steps before this one.
    metrics: those of this step; of a phase without a discriminator they say
      nothing.
    phase: a `config.Phase` at its round.
  """
  steps = phase.steps()
  if 'saturated' not in metrics or not step:
    return ''
  if step <= _FIRST * steps:
    if metrics['saturated'] <= _MOST:
      return ''
    return (
      f'the discriminator saturates in the first steps (|βΔ| > 4 on'
      f' {metrics["saturated"]:.0%} of the rows): lower'
      ' config.ddo.objective.beta or config.ddo.optimizer.learning_rate'
    )
  gone = _gone(phase, step)
  most = float(metrics['max_abs_logit']) / gone**2 if gone else np.inf
  if most >= _LEAST:
    return ''
  now = metrics['max_abs_logit']
  return (
    f'the discriminator does nothing: its largest |βΔ| is {now:.1g} after'
    f' {step} of {steps} steps, and will be {most:.1g} at most, where 1 is'
    ' wanted: raise config.ddo.objective.beta or'
    ' config.ddo.optimizer.learning_rate'
  )
