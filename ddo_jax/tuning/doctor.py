"""The doctor: reads a run and says what it is, with the numbers and a remedy.

It only reads, and takes no lock, so that a run that is going may be looked at.
"""

from collections.abc import Callable
from collections.abc import Container
import dataclasses
import functools
import pathlib
import shlex
from typing import Any

import jax.numpy as jnp
import numpy as np

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import models
from ddo_jax import recipes
from ddo_jax import rng
from ddo_jax.data import loader
from ddo_jax.data import sources
from ddo_jax.report import run_folder
from ddo_jax.runtime import processes
from ddo_jax.runtime import records
from ddo_jax.tuning import findings
from ddo_jax.tuning import shortcut

ROWS = 2_000  # of each kind that are compared


@dataclasses.dataclass(frozen=True)
class Stage:
  """What was found of one round, or of a member of its sweep.

  Attributes:
    name: its folder's, in the run's folder.
    findings: what was looked for, the most decisive first.
    commands: for each finding, the command that mends it, or ''.
    members: of its sweep; () for a round without one.
  """

  name: str
  findings: list[findings.Finding]
  commands: list[str]
  members: tuple['Stage', ...] = ()

  @property
  def ill(self) -> list[str]:
    """What was found, the most decisive first."""
    return [each.kind for each in self.findings if each.found]

  @property
  def is_ill(self) -> bool:
    """Whether something was found of it, or of every member of its sweep.

    Members try what may be too much: some of them are meant to be ill.
    """
    every = bool(self.members) and all(each.ill for each in self.members)
    return bool(self.ill) or every

  @property
  def verdict(self) -> str:
    """What it is, in words."""
    known = [each for each in self.findings if each.found is False]
    return ', '.join(self.ill) or ('healthy' if known else 'too early to tell')

  def __str__(self) -> str:
    lines = [f'{self.name}: {self.verdict}']
    for finding, command in zip(self.findings, self.commands, strict=True):
      mark = {True: '!', False: ' ', None: '?'}[finding.found]
      lines.append(f'{mark} {finding}')
      if finding.found:
        lines.append(f'    {finding.advice}:')
        lines.append(f'    {command}')
    lines += [f'  {each.name}: {each.verdict}' for each in self.members]
    return '\n'.join(lines)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
  """What was found of a run: a stage for each of its rounds."""

  stages: list[Stage]

  @property
  def is_ill(self) -> bool:
    """Whether anything was found."""
    return any(stage.is_ill for stage in self.stages)

  def __str__(self) -> str:
    return '\n'.join(str(stage) for stage in self.stages)


def _read(workdir: pathlib.Path) -> run_folder.Run:
  """Reads a run that has begun a round.

  Raises:
    errors.UserError: there is none.
  """
  if not workdir.is_dir():
    raise errors.UserError(
      f'there is no folder {workdir}; wanted the --workdir of a run'
    )
  if not (workdir / 'config.json').exists():
    raise errors.UserError(
      f'{workdir} holds no run, for it has no config.json; wanted the --workdir'
      ' of a run'
    )
  run = run_folder.read(workdir)
  if run.objective.lower() == 'mle':
    raise errors.UserError(
      f'{workdir} is a control, trained by MLE: it has no discriminator to look'
      ' at; wanted a run of rounds'
    )
  return run


def _stages(run: run_folder.Run) -> list[str]:
  """Returns the names of the rounds that have begun.

  Raises:
    errors.UserError: there is none.
  """
  folders = [
    path.parent.name
    for part in ('fakes', 'members')
    for path in run.folder.glob(f'round_*/{part}')
  ]
  names = sorted({*folders, *run.stages})
  if not names:
    trained = run.pretrain[-1]['images'] if run.pretrain else 0
    raise errors.UserError(
      f'{run.folder} has begun no round yet, and has trained {trained:,} images'
      ' of its pretraining: there is no discriminator to look at'
    )
  return names


class _Rows:
  """Real and fake rows of a run, by the road that training reads them."""

  def __init__(self, run: run_folder.Run, recipe: config_lib.Config | None):
    """Opens nothing yet.

    Args:
      run: the run.
      recipe: where data and model are to be taken from; None takes what the run
        recorded.
    """
    self._run = run
    self._recipe = recipe

  @functools.cached_property
  def _real(self) -> sources.Source:
    if self._recipe:
      data = self._recipe.data
    else:
      known = {}
      for field in dataclasses.fields(sources.Data):
        name = f'data.{field.name}'
        if name in self._run.config:
          known[field.name] = self._run.config[name]
      data = sources.Data(**known)
    return sources.open_source(data, data.train_split)

  @functools.cached_property
  def _encode(self) -> Callable[[np.ndarray], np.ndarray]:
    """Stored rows to model units, as the step has them."""
    if self._recipe:
      config = self._recipe.model
    else:
      config = models.from_json(self._run.config)
    codec = config.build().codec

    def encode(stored):
      ids = jnp.arange(len(stored), dtype=jnp.uint32)
      keys = rng.per_example(rng.stream(0, 'doctor'), ids)
      return np.asarray(codec.encode({}, jnp.asarray(stored), keys))

    return encode

  def _fake(self, stage: str) -> sources.ArraySource | None:
    """Opens as many shards of a pool as hold the rows; None: there are none."""
    shards: list[sources.ArraySource] = []
    for path in sorted((self._run.folder / stage / 'fakes').glob('*.npz')):
      known = sum(len(shard) for shard in shards)
      if path.stem.isdigit() and known < ROWS:
        shards.append(sources.open_npz(path))
    if not shards:
      return None
    return sources.ArraySource(
      name=f'{stage}/fakes',
      stored=np.concatenate([shard.stored for shard in shards]),
      classes=np.concatenate([shard.classes for shard in shards]),
      num_classes=self._real.num_classes,
      pixel_values=self._real.pixel_values,
    )

  def _first(self, source: sources.Source, stage: str, kind: str) -> np.ndarray:
    """Returns the rows that training reads first."""
    seed = rng.order_seed(self._run.config.get('seed', 0), stage, kind)
    count = min(ROWS, len(source))
    with_labels = next(loader.batches(source, seed, count, 0, 1))
    return with_labels['stored']

  def look(self, stage: str) -> findings.Finding:
    """Looks for what tells the real rows of a round from its fakes."""
    try:
      fake = self._fake(stage)
      if fake is None:
        why = 'there is no fake pool here to look at'
        return findings.Finding('shortcut', None, why)
      found = shortcut.compare(
        self._first(self._real, stage, 'real'),
        self._first(fake, stage, 'fake'),
        self._encode,
      )
      labels = None
      if self._real.num_classes:
        labels = shortcut.compare_labels(self._real.labels(), fake.labels())
    except errors.UserError as error:
      why = f'the rows cannot be read: {error}'
      return findings.Finding('shortcut', None, why)
    return shortcut.finding(found, labels)


# Where a config holds what a member of a sweep has settings of its own for.
_FIELDS = {
  'alpha': 'ddo.objective.alpha',
  'beta': 'ddo.objective.beta',
  'learning_rate': 'ddo.optimizer.learning_rate',
  'p_std': 'ddo.noise.p_std',
}


def _members(run: run_folder.Run, stage: str) -> dict[str, dict[str, float]]:
  """Returns the settings of the members that have begun, by their names.

  Raises:
    errors.UserError: the record of the sweep is damaged.
  """
  folder = run.folder / stage
  begun = sorted(folder.glob('members/*/metrics.jsonl'))
  plan: list[dict[str, Any]] = []
  if begun:
    plan = records.read_json(folder / 'study.json')['members']
  settings = {member['number']: member['settings'] for member in plan}
  return {
    path.parent.name: settings.get(int(path.parent.name), {}) for path in begun
  }


def _origin(run: run_folder.Run, stage: str) -> str:
  """Returns where the params are that a round started from; '' if unknown."""
  index = _index(stage)
  if index:
    return str(run.path(index - 1, 'promoted'))
  params = run.folder / 'pretrain' / 'params'
  return str(params) if params.exists() else run.config.get('init_from', '')


def _index(stage: str) -> int:
  return int(stage.removeprefix('round_'))


def _without(given: list[str], names: Container[str]) -> list[str]:
  """Returns a command line less some flags, --name=value or --name value."""
  kept = []
  values = iter(given)
  for part in values:
    name, equals, _ = part.partition('=')
    if name not in names:
      kept.append(part)
    elif not equals:
      next(values, '')
  return kept


def _command(
  run: run_folder.Run,
  stage: str,
  settings: dict[str, float],
  finding: findings.Finding,
) -> str:
  """Returns the command line that mends what was found; '' if nothing was.

  Args:
    run: the run.
    stage: the name of the round.
    settings: those of a member of its sweep; {} without one.
    finding: what was found.
  """
  if not finding.found:
    return ''
  given = shlex.split(run.summary.get('command') or '')
  if not given:  # the run has not ended, or was not begun on a command line
    name = run.config.get('name', '')
    recipe = name if name in recipes.names() else 'RECIPE'
    given = ['ddo-jax', f'--config={recipe}']
  changed = {'--workdir': str(run.folder)}
  if finding.afresh:
    changed['--workdir'] = f'{run.folder}_again'
    changed['--config.rounds'] = '1'
    if _origin(run, stage):
      changed['--config.init_from'] = _origin(run, stage)
    if settings:
      changed |= {'--mode': 'selfplay', '--config.tune.members': '0'}
    for name, value in settings.items():
      changed[f'--config.{_FIELDS[name]}'] = f'{value:.4g}'
  changed |= dict(flag.split('=', 1) for flag in finding.flags)
  flags = [f'{name}={value}' for name, value in changed.items()]
  return shlex.join([*_without(given, changed), *flags])


def _look(
  run: run_folder.Run,
  stage: str,
  member: str,
  settings: dict[str, float],
  seen: list[findings.Finding],
) -> Stage:
  """Looks at the log of a round, or of a member of its sweep.

  Args:
    run: the run.
    stage: the name of the round.
    member: the member's name; '' for the round itself.
    settings: the member's.
    seen: what was found of it without its log.
  """
  name = stage
  log = run.stages.get(stage, [])
  if member:
    name = f'{stage}/members/{member}'
    log = records.read_log(run.folder / name)
  numbers = run.numbers(_index(stage)) | settings
  found = [*seen, *findings.of_log(log, numbers)]
  commands = [_command(run, stage, settings, finding) for finding in found]
  return Stage(name, found, commands)


def examine(
  workdir: pathlib.Path, recipe: config_lib.Config | None = None
) -> Diagnosis:
  """Looks at all rounds of a run, finished or not, of this version or before.

  Args:
    workdir: the folder of a run, or of one member of a sweep in it.
    recipe: where data and model are to be taken from, if what the run recorded
      is not at hand; of its other settings none is read.

  Raises:
    errors.UserError: the folder holds no round, or a file of it is damaged.
  """
  if processes.count() > 1:
    raise errors.UserError(
      'the doctor works alone, also beside a run of several processes: give'
      ' --num_processes=1'
    )
  one = workdir.absolute()
  if one.parent.name == 'members' and one.is_dir():
    run = _read(one.parents[2])
    stage = one.parents[1].name
    settings = _members(run, stage).get(one.name, {})
    seen = [_Rows(run, recipe).look(stage)]
    return Diagnosis([_look(run, stage, one.name, settings, seen)])
  run = _read(workdir)
  rows = _Rows(run, recipe)
  stages = []
  for name in _stages(run):
    members = [
      _look(run, name, member, settings, [])
      for member, settings in _members(run, name).items()
    ]
    found = _look(run, name, '', {}, [rows.look(name)])
    stages.append(dataclasses.replace(found, members=tuple(members)))
  return Diagnosis(stages)
