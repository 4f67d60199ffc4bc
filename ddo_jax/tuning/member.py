"""A member of a sweep: a round's phase played with numbers of its own."""

from collections.abc import Callable
import dataclasses
import logging
import math
import pathlib
import shutil
import time
from typing import Any

import numpy as np
from scipy.stats import qmc

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.method import likelihood
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import processes
from ddo_jax.runtime import records
from ddo_jax.training import evaluations as evaluations_lib
from ddo_jax.training import loop as loop_lib

_LOGGER = logging.getLogger(__name__)
_DONE = 'done.json'

# The numbers that members vary, and the part of a phase that holds each.
_PARTS = {
  'alpha': 'objective',
  'beta': 'objective',
  'learning_rate': 'optimizer',
  'p_std': 'noise',
}

Settings = dict[str, float]
Ranges = dict[str, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Member:
  """What one member is to try.

  Attributes:
    number: from 0.
    origin: where its numbers come from, such as 'probe' or 'sobol'.
    settings: its numbers by name: 'alpha', 'beta', 'learning_rate', 'p_std'.
  """

  number: int
  origin: str
  settings: Settings

  @property
  def name(self) -> str:
    """Its name, that of its folder."""
    return f'{self.number:03d}'


def names(phase: config_lib.Phase) -> list[str]:
  """Returns which numbers of a phase members may vary."""
  return [
    name for name, part in _PARTS.items() if hasattr(getattr(phase, part), name)
  ]


def value_of(phase: config_lib.Phase, name: str) -> float:
  """Returns one of the numbers of a phase at its round."""
  return float(getattr(getattr(phase, _PARTS[name]), name))


def phase_of(phase: config_lib.Phase, settings: Settings) -> config_lib.Phase:
  """Returns a phase, at its round, with a member's numbers in it."""
  for name, value in settings.items():
    part = _PARTS[name]
    changed = dataclasses.replace(getattr(phase, part), **{name: value})
    phase = dataclasses.replace(phase, **{part: changed})
  return phase


def _spread(ranges: Ranges, count: int, seed: int) -> list[Settings]:
  """Returns `count` points of a scrambled Sobol sequence, even in the log."""
  varied = [name for name, (low, high) in ranges.items() if low < high]
  points = np.zeros((count, 0))
  if varied and count:
    sobol = qmc.Sobol(len(varied), scramble=True, seed=seed)
    # All of a power of two, which is what the sequence is balanced for.
    points = sobol.random_base2(math.ceil(math.log2(count)))[:count]
  found = []
  for point in points:
    settings = {name: low for name, (low, _) in ranges.items()}
    for name, share in zip(varied, point, strict=True):
      low, high = ranges[name]
      settings[name] = float(low * (high / low) ** share)
    found.append(settings)
  return found


def plan(
  seed: int,
  stage: str,
  count: int,
  ranges: Ranges,
  first: list[tuple[str, Settings]],
) -> list[Member]:
  """Returns the members of a round: a pure function of its arguments.

  Args:
    seed: the run's.
    stage: the name of the round.
    count: the number of members.
    ranges: the lowest and highest value of each number.
    first: those that come first, each with its origin: the probe's proposal,
      the winner of the round before. What they lack is the middle of its
      range, and what they have beyond is left out.
  """
  middle = {name: math.sqrt(low * high) for name, (low, high) in ranges.items()}
  found = []
  for origin, settings in first[:count]:
    known = {name: settings.get(name, middle[name]) for name in ranges}
    if known not in [settings for _, settings in found]:
      found.append((origin, known))
  rest = _spread(
    ranges, count - len(found), rng.order_seed(seed, 'tune', stage)
  )
  found += [('sobol', settings) for settings in rest]
  return [
    Member(number, origin, settings)
    for number, (origin, settings) in enumerate(found)
  ]


def job_of(
  member: Member,
  round_job: loop_lib.Job,
  build: Callable[[Any], likelihood.LikelihoodModel],
  watch: Callable[..., str | None],
) -> loop_lib.Job:
  """Returns the training job of a member.

  Rows, noise, reference, pool and compiled step are the round's.

  Args:
    member: the member.
    round_job: the job that the round would play without a sweep.
    build: (noise law) -> model.
    watch: see `loop.Job`.
  """
  phase = phase_of(round_job.phase, member.settings)
  folder = round_job.folder / 'members' / member.name
  model = round_job.model
  if 'p_std' in member.settings:
    model = build(phase.noise)
  return dataclasses.replace(
    round_job,
    name=f'{round_job.name}/{member.name}',
    clock=round_job.clock or round_job.name,
    folder=folder,
    phase=phase,
    model=model,
    log=records.MetricsLog(folder),
    watch=watch,
  )


def result(folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns what a member left; None where it is not done, or not whole.

  Args:
    folder: the member's.

  Returns:
    {'number', 'origin', 'settings', 'step', 'images', 'profile', 'selection':
    of its best evaluation, 'params_sha256': of the params in its folder, None
    at step 0, 'evaluations', 'ended': why it ended before its last step, ''
    where it did not, 'trained': the steps up to its last evaluation,
    'seconds'}.
  """
  path = folder / _DONE
  if not path.exists():
    return None
  try:
    return records.unsealed(records.read_json(path))
  except (errors.UserError, ValueError) as error:
    _LOGGER.warning('%s is damaged (%s): playing it again', path, error)
    return None


def play(
  member: Member, job: loop_lib.Job, start: dict[str, Any]
) -> dict[str, Any]:
  """Plays a member to its end, from where an earlier call stopped.

  Args:
    member: the member.
    job: see `job_of`.
    start: the record of the evaluation of step 0, which is the reference for
      every member and is not made anew.

  Returns:
    Its result, see `result`.
  """
  begin = time.perf_counter()
  known = (job.folder / 'evaluations.json').exists
  if not processes.decide(f'start of {job.name}', known):
    record = {'stage': job.name} | start
    evaluations_lib.Evaluations(job.folder, job.name).add(record)
  promotion = loop_lib.run(job)
  sha256 = None
  if promotion.step:
    about = {'member': dataclasses.asdict(member)}
    sha256 = checkpoint.save_params(
      job.folder / 'params', promotion.params, about
    )
  ended = promotion.ended
  trained = job.phase.steps()
  if ended:
    trained = promotion.evaluations[-1]['step']
  made = dataclasses.asdict(member) | {
    'step': promotion.step,
    'images': promotion.step * job.phase.batch_size,
    'profile': promotion.profile,
    'selection': promotion.selection,
    'params_sha256': sha256,
    'evaluations': promotion.evaluations,
    'ended': ended,
    'trained': trained,
    'seconds': time.perf_counter() - begin,
  }
  records.write_json(job.folder / _DONE, records.sealed(made))
  if processes.is_main():
    shutil.rmtree(job.folder / 'checkpoints', ignore_errors=True)
  return made
