"""A whole run: pretraining, rounds, summary and report.

Each stage leaves its result on disk and returns at once if it is there, so that
resuming a run, and adding a round to it, are running the same command again.
"""

import functools
import logging
import pathlib
import time
from typing import Any

import numpy as np

from ddo_jax import config as config_lib
from ddo_jax import rng
from ddo_jax import settings
from ddo_jax.method import likelihood
from ddo_jax.report import cost
from ddo_jax.report import page
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import lock
from ddo_jax.runtime import manifest as manifest_lib
from ddo_jax.runtime import processes
from ddo_jax.training import check
from ddo_jax.training import ending
from ddo_jax.training import loop as loop_lib
from ddo_jax.training import round as round_lib
from ddo_jax.training import workspace

_LOGGER = logging.getLogger(__name__)


def _learn(
  run: workspace.Run,
  name: str,
  phase: config_lib.Phase,
  model: likelihood.LikelihoodModel,
  frozen: likelihood.Frozen,
) -> pathlib.Path:
  """Trains a model by MLE from scratch; returns the folder of its params."""
  folder = run.workdir / name
  params_folder = folder / 'params'
  manifest = workspace.open_manifest(folder)
  following = 'pretrain' if name == 'tokenizer' else 'round_000'
  if workspace.is_done(manifest, 'params', run.workdir / following):
    return params_folder
  begin = time.perf_counter()
  if not manifest.holds('params'):
    workspace.check_source(manifest, 'params', phase.steps())
    sha256 = _train(run, folder, phase, model, frozen)
    manifest.add_params('params', sha256)
  seconds = time.perf_counter() - begin
  manifest.holds('done.json')
  manifest.write_json('done.json', {'seconds': seconds})
  return params_folder


def _train(
  run: workspace.Run,
  folder: pathlib.Path,
  phase: config_lib.Phase,
  model: likelihood.LikelihoodModel,
  frozen: likelihood.Frozen,
) -> str:
  """Trains by MLE from scratch, or goes on; returns the hash of its params."""
  key = rng.stream(run.config.seed, 'init')
  init = functools.partial(run.executor.make_state, model.init, key)
  job = run.job(
    folder=folder,
    phase=phase,
    model=model,
    frozen=frozen,
    start=init,
    reference=init(),
    fake=None,
  )
  promotion = loop_lib.run(job)
  meta = {
    'stage': folder.name,
    'class_shares': run.shares.counts,
    'config': settings.to_json(run.config),
  }
  return checkpoint.save_params(folder / 'params', promotion.params, meta)


def _pretrain(run: workspace.Run) -> pathlib.Path:
  """Trains by MLE from scratch, unless `init_from` names weights.

  The tokenizer of a model of tokens is trained before, unless `tokenizer_from`
  names one.

  Returns:
    The folder of the params that the first round starts from.
  """
  config = run.config
  learner = config.model.build_tokenizer()
  if learner and not config.tokenizer_from:
    phase = config_lib.at_round(config.tokenizer, 0)
    _learn(run, 'tokenizer', phase, learner, frozen={})
  if config.init_from:
    return run.start_folder
  phase = config_lib.at_round(config.pretrain, 0)
  model = run.training_model(phase.noise)
  return _learn(run, 'pretrain', phase, model, run.frozen)


def pretrain(run: workspace.Run) -> pathlib.Path:
  """Checks and does the pretraining alone; see `_pretrain`.

  Raises:
    errors.UserError: something that it needs is missing or wrong.
  """
  for line in check.training(run, rounds=False):
    _LOGGER.info('%s', line)
  with workspace.claimed(run.config, run.workdir):
    return _pretrain(run)


def _seconds(
  workdir: pathlib.Path, rounds: list[dict[str, Any]]
) -> dict[str, float]:
  """Returns the seconds that each stage took, and their total."""
  seconds = {}
  for result in rounds:
    name = f'round_{result["round"]:03d}'
    seconds[name] = sum(result['seconds'].values())
  for name in ('tokenizer', 'pretrain'):
    done = workdir / name / 'done.json'
    if done.exists():
      seconds[name] = manifest_lib.read_json(done)['seconds']
  seconds['total'] = sum(seconds.values())
  return seconds


def _cost(run: workspace.Run) -> dict[str, int]:
  """Returns what the run's model costs; see `cost.describe`."""
  phase = config_lib.at_round(run.config.ddo, 0)
  model = workspace.build_model(run.config, phase.noise)
  stored, _ = run.real.read(np.arange(1))
  return cost.describe(model, run.frozen, stored)


def play(
  config: config_lib.Config,
  workdir: pathlib.Path,
  command: str = '',
  peers: bool = False,
) -> dict[str, Any]:
  """Checks all, pretrains and plays all rounds.

  Writes summary.json and report.html.

  Args:
    config: the run's.
    workdir: its folder.
    command: the command line that asked for it, for the report; '' for none.
    peers: whether other processes may come to play the same run beside this
      one, each by the same call.

  Returns:
    The summary: {'name', 'rounds': [see `round.play_round`], 'ended': why
    there is no further round, 'seconds',
    'model': see `cost.describe`, 'command', 'changed': the fields that differ
    from their defaults}.

  Raises:
    errors.UserError: something that the run needs is missing or wrong.
  """
  turn = lock.Turn(workdir) if peers else None
  run = workspace.Run(config, workdir, turn=turn)
  for line in check.training(run):
    _LOGGER.info('%s', line)
  with workspace.claimed(config, workdir, turn):
    return _play(run, command)


def _play(run: workspace.Run, command: str) -> dict[str, Any]:
  """Plays what `play` has checked; writes and returns the summary."""
  config = run.config
  workdir = run.workdir
  metric = config.evaluation.metric
  origin = _pretrain(run)
  previous = None
  rounds: list[dict[str, Any]] = []
  while ending.goes_on(config, workdir, rounds):
    index = len(rounds)
    result = round_lib.play_round(run, index, origin, previous)
    rounds.append(result)
    origin = workdir / f'round_{index:03d}' / 'promoted'
    previous = result
    _LOGGER.info(
      'round %d: %s %.4g -> %.4g (step %d promoted)',
      index,
      metric,
      result['before'][metric]['mean'],
      result['after'][metric]['mean'],
      result['promoted']['step'],
    )
  ended = ending.why(config, rounds)
  _LOGGER.info('%s', ended)
  summary = {
    'name': config.name,
    'rounds': rounds,
    'ended': ended,
    'seconds': processes.decide(
      'seconds', functools.partial(_seconds, workdir, rounds)
    ),
    'model': _cost(run),
    'command': command,
    'changed': settings.changed(config, config_lib.Config()),
  }
  manifest = workspace.top_manifest(workdir)
  manifest.holds('summary.json')  # of an earlier call; it says so if not
  manifest.write_json('summary.json', summary)
  if processes.is_main():
    page.write(workdir)
  return summary
