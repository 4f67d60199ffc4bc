"""When rounds end: after a number of them, or by themselves.

Under `config.rounds='auto'` rounds go on while they gain. A round's gain is the
fall of the selection metric from its reference to its result, both measured on
the report's blocks of fresh seeds, none of which chose anything. Its noise is
twice the standard error of that difference, √((sd² + sd'²)/n) from the spread
of the n blocks before and after. The blocks before and after share their seeds,
which makes the true error smaller: the rule is rather too early than too late,
and what it leaves lying is what nobody could tell from chance.
"""

import functools
import math
import pathlib
from typing import Any

from ddo_jax import config as config_lib
from ddo_jax import settings
from ddo_jax.report import run_folder
from ddo_jax.runtime import processes

ERRORS = 2.0  # standard errors of the gain that count as noise


def ceiling(config: config_lib.Config) -> int:
  """Returns the number of rounds that are played at most."""
  if config.rounds == settings.AUTO:
    return config.tune.max_rounds
  number = config.rounds
  # What is no number is said by the check of the config.
  return math.ceil(number) if isinstance(number, int | float) else 0


def gain(result: dict[str, Any], metric: str) -> tuple[float, float]:
  """Returns a round's gain in a metric and its noise, see the module.

  Args:
    result: of `round.play_round`.
    metric: the selection metric; lower is better.
  """
  before = result['before'][metric]
  after = result['after'][metric]
  variance = (before['sd'] or 0.0) ** 2 + (after['sd'] or 0.0) ** 2
  error = math.sqrt(variance / len(after['values']))
  return before['mean'] - after['mean'], ERRORS * error


def _within_noise(result: dict[str, Any], metric: str) -> str:
  """Returns a line where a round gained no more than its noise, else ''."""
  gained, noise = gain(result, metric)
  if gained > noise:
    return ''
  blocks = len(result['after'][metric]['values'])
  return (
    f'round {result["round"]} gained {gained:.3g} in {metric}, within the noise'
    f' of its {blocks} seeds, {noise:.2g}'
  )


def why(config: config_lib.Config, results: list[dict[str, Any]]) -> str:
  """Returns why no round is to be begun after some; '' where one is.

  Args:
    config: the run's.
    results: of the rounds that were played, in their order.
  """
  most = ceiling(config)
  metric = config.evaluation.metric
  if config.rounds != settings.AUTO:
    if len(results) < most:
      return ''
    return f'all of the {most} rounds that were asked for are played'
  line = _within_noise(results[-1], metric) if results else ''
  if line or len(results) < most:
    return line
  return (
    f'config.tune.max_rounds, {most}, is reached: the last round still gained'
  )


def _is_done(workdir: pathlib.Path, index: int) -> bool:
  return (workdir / f'round_{index:03d}' / 'done.json').exists()


def goes_on(
  config: config_lib.Config,
  workdir: pathlib.Path,
  results: list[dict[str, Any]],
) -> bool:
  """Whether a run has a round after those that it has played.

  One that is there already counts, whatever the one before it gained: somebody
  asked for it.

  Args:
    config: the run's.
    workdir: its folder.
    results: of the rounds that were played, in their order.
  """
  if len(results) >= ceiling(config):
    return False
  there = processes.decide(
    f'is round {len(results)} there',
    functools.partial(_is_done, workdir, len(results)),
  )
  return there or not why(config, results)


def planned(
  config: config_lib.Config, workdir: pathlib.Path | None
) -> list[int]:
  """Returns the rounds that may still be played, up to the ceiling.

  Args:
    config: the run's.
    workdir: its folder; None for a run that is only planned.
  """
  indices = list(range(ceiling(config)))
  if workdir is None:
    return indices
  left = [index for index in indices if not _is_done(workdir, index)]
  if config.rounds != settings.AUTO or not left or not left[0]:
    return left
  path = workdir / f'round_{left[0] - 1:03d}' / 'done.json'
  last = run_folder.read_round(path)
  return [] if _within_noise(last, config.evaluation.metric) else left
