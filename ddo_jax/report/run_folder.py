"""What a run's folder holds, as a report reads it."""

import collections
import dataclasses
import pathlib
import re
from typing import Any

from ddo_jax import errors
from ddo_jax import settings
from ddo_jax.runtime import manifest
from ddo_jax.runtime import records
from ddo_jax.tuning import findings

# Records of a stage, by the name of its folder.
Stages = dict[str, list[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run's folder holds, finished or not, of this version or before.

  Attributes:
    folder: the workdir.
    config: the recorded config, by dotted names.
    summary: summary.json; {} while the run is unfinished.
    rounds: the results of the rounds that are done; see `round.play_round`.
      Earlier versions recorded fewer fields.
    stages: the records of each round, done or not.
    pretrain: the records of the pretraining.
  """

  folder: pathlib.Path
  config: dict[str, Any]
  summary: dict[str, Any]
  rounds: list[dict[str, Any]]
  stages: Stages
  pretrain: list[dict[str, Any]]

  @property
  def columns(self) -> list[dict[str, Any]]:
    """The scores of the first reference, then those after each round."""
    columns = [result['before'] for result in self.rounds[:1]]
    return columns + [result['after'] for result in self.rounds]

  @property
  def is_finished(self) -> bool:
    """Whether no round is to come."""
    if not self.summary:
      return False
    if self.config['rounds'] == settings.AUTO:
      # A summary from before rounds that were added later knows fewer.
      return len(self.rounds) == len(self.summary['rounds'])
    return len(self.rounds) >= self.config['rounds']

  @property
  def progress(self) -> str:
    """How many of the rounds are done, in words."""
    wanted = self.config['rounds']
    if wanted == settings.AUTO:
      return f'{len(self.rounds)} rounds done, until one gains nothing'
    return f'{len(self.rounds)} of {wanted} rounds done'

  @property
  def metric(self) -> str:
    """The score that chooses checkpoints."""
    return self.config['evaluation.metric']

  @property
  def objective(self) -> str:
    """The name of the rounds' objective."""
    # Earlier versions recorded a word, such as 'ddo', in the place of an
    # object.
    return self.config.get('ddo.objective.type') or self.config['ddo.objective']

  def numbers(self, index: int) -> dict[str, float]:
    """Returns the numbers that a round is played with, by name.

    They are those of the objective, and the peak learning rate. A config
    records one entry a round, of which the last repeats; a sweep's round has
    those of the member that it promoted.
    """
    config = self.config
    names = [name for name in config if name.startswith('ddo.objective.')]
    names.append('ddo.optimizer.learning_rate')
    # Earlier versions recorded all numbers of a phase side by side.
    if config.get('ddo.objective') == 'ddo':
      names += ['ddo.alpha', 'ddo.beta']
    names.append('ddo.learning_rate')
    numbers = {}
    for name in names:
      values = config.get(name)
      if isinstance(values, list):
        last = len(values) - 1
        numbers[name.split('.')[-1]] = values[min(index, last)]
    for result in self.rounds:
      if result['round'] == index:
        numbers |= result['promoted'].get('settings', {})
    return numbers

  def warnings(self) -> dict[int, list[str]]:
    """Returns what is ill with each round, done or not, by its number."""
    found = {}
    for stage, log in self.stages.items():
      index = int(stage.removeprefix('round_'))
      found[index] = findings.warnings(log, self.numbers(index))
    for result in self.rounds:  # whose log may be lost
      index = result['round']
      found[index] = found.get(index) or result['warnings']
    return found

  def path(self, index: int, name: str) -> pathlib.Path:
    """Returns where a file of a round is."""
    return self.folder / f'round_{index:03d}' / name


_ROUND = re.compile(r'round_\d+')
_NUMBERS = ('fakes', 'train', 'evaluate')


def _is_scores(value: Any) -> bool:
  """Whether a JSON value is what `measure.summarize` returns."""
  return isinstance(value, dict) and all(
    isinstance(score, dict)
    and 'mean' in score
    and isinstance(score['mean'], int | float | None)
    for score in value.values()
  )


def _is_round(result: dict[str, Any]) -> bool:
  """Whether a record is the result of a round, of this version or before."""
  promoted = result.get('promoted')
  seconds = result.get('seconds')
  return (
    type(result.get('round')) is int
    and isinstance(promoted, dict)
    and type(promoted.get('step')) is int
    and isinstance(seconds, dict)
    and all(isinstance(seconds.get(n), int | float) for n in _NUMBERS)
    and _is_scores(result.get('before'))
    and _is_scores(result.get('after'))
  )


def read_round(path: pathlib.Path) -> dict[str, Any]:
  """Reads the done.json of a round.

  Raises:
    errors.UserError: it is damaged, or of another form.
  """
  result = manifest.read_json(path)
  if not _is_round(result):
    raise errors.UserError(
      f'{path} is not what a round leaves: delete it, and run the same command'
      ' again to make it anew'
    )
  return result


def read(workdir: pathlib.Path) -> Run:
  """Reads a run's folder.

  Raises:
    errors.UserError: the folder holds no run, or a file of it is damaged.
  """
  config = manifest.read_json(workdir / 'config.json')
  if 'evaluation.metric' not in config:
    raise errors.UserError(
      f'{workdir}/config.json is not that of a run; name the --workdir of one'
    )
  path = workdir / 'summary.json'
  summary = manifest.read_json(path) if path.exists() else {}
  rounds = {}
  for result in summary.get('rounds', []):
    if not isinstance(result, dict) or not _is_round(result):
      raise errors.UserError(
        f'{path} is not the summary of a run: delete it, and run the same'
        ' command again to make it anew'
      )
    rounds[result['round']] = result
  # A run in progress, or one that plays further rounds, has news here.
  for path in workdir.glob('round_*/done.json'):
    result = read_round(path)
    rounds[result['round']] = result
  stages = collections.defaultdict(list)
  for record in records.read_log(workdir):
    stages[record['stage']].append(record)
  pretrain = stages.pop('pretrain', [])
  return Run(
    folder=workdir,
    config=config,
    summary=summary,
    rounds=[rounds[index] for index in sorted(rounds)],
    stages={n: log for n, log in stages.items() if _ROUND.fullmatch(n)},
    pretrain=pretrain,
  )
