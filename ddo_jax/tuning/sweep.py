"""The sweep of a round: its members are played, and the best is promoted.

What only one process may do, a round's preparation and its promotion, is done
in the process's turn. In between members are played, by as many processes as
have come (`study.Study`).
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import logging
import secrets
import shutil
from typing import Any

import numpy as np

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax.evaluation import measure
from ddo_jax.method import likelihood
from ddo_jax.runtime import manifest as manifest_lib
from ddo_jax.runtime import processes
from ddo_jax.runtime import records
from ddo_jax.training import loop as loop_lib
from ddo_jax.training import workspace
from ddo_jax.tuning import alarms
from ddo_jax.tuning import candidates
from ddo_jax.tuning import ledger
from ddo_jax.tuning import member as member_lib
from ddo_jax.tuning import signal
from ddo_jax.tuning import study as study_lib
from ddo_jax.tuning import tune as tune_lib

_LOGGER = logging.getLogger(__name__)
_PLAN = 'study.json'
_PROBE = 'probe.json'
# The share of a round that a member trains before it is judged. Under a warm-up
# over the whole round what was learned grows as the square of the steps, and
# sooner members of a low rate could not be told from the reference.
_FIRST_RUNG = 0.25


def _first_rung(phase: config_lib.Phase) -> int:
  """Returns the step of the evaluation where members are judged first."""
  period = max(1, round(phase.rhythm.eval_images / phase.batch_size))
  return period * max(1, round(_FIRST_RUNG * phase.steps() / period))


def _probed(
  job: loop_lib.Job, manifest: manifest_lib.Manifest
) -> signal.Proposal:
  """Returns what the probe proposes for a round, or what it proposed."""
  kept = manifest.read_json(_PROBE)
  if kept is None:
    proposal = signal.measure(job)
    manifest.write_json(_PROBE, proposal.to_json())
    kept = manifest.read_json(_PROBE)
  proposal = signal.Proposal.from_json(kept)
  if proposal.fault:
    _LOGGER.warning('%s: %s', job.name, proposal.fault)
  return proposal


def _kept_wide(
  run: workspace.Run,
  job: loop_lib.Job,
  winner: member_lib.Settings | None,
) -> loop_lib.Job:
  """Returns the round's job under noise as wide as the round before had."""
  p_std = (winner or {}).get('p_std')
  if p_std is None or p_std <= member_lib.value_of(job.phase, 'p_std'):
    return job
  phase = member_lib.phase_of(job.phase, {'p_std': p_std})
  model = run.training_model(phase.noise)
  return dataclasses.replace(job, phase=phase, model=model)


def _members(
  run: workspace.Run,
  job: loop_lib.Job,
  proposal: signal.Proposal | None,
  winner: member_lib.Settings | None,
) -> list[member_lib.Member]:
  """Returns what the round's members try.

  Args:
    run: the run.
    job: the job that the round would play without a sweep.
    proposal: the probe's, where the config leaves a range to it.
    winner: the settings that the round before promoted, if it had a sweep.

  Raises:
    errors.UserError: there is nothing to vary.
  """
  tune = run.config.tune
  given = tune.ranges()
  names = member_lib.names(job.phase)
  own = {name: member_lib.value_of(job.phase, name) for name in names}
  ranges = {name: (own[name], own[name]) for name in names if name != 'p_std'}
  if proposal:
    ranges |= proposal.ranges()
    # A rate says how far members are on much the same way, and so the fastest
    # would seem the best at every rung. Merges look farther for less.
    rate = proposal.learning_rate.centre
    ranges['learning_rate'] = (rate, rate)
    if winner is None:  # the noise widens in later rounds alone
      ranges.pop('p_std', None)
  ranges = {n: r for n, r in (ranges | given).items() if n in names}
  if tune.members > 1 and all(low == high for low, high in ranges.values()):
    raise errors.UserError(
      f'config.tune.members is {tune.members}, and nothing varies between them:'
      " give a range, such as --config.tune.beta='(0.01, 0.1)'"
    )
  first = [('probe', proposal.centre()) if proposal else ('config', own)]
  if winner:
    first.append(('winner', winner))

  def within(settings):
    """Holds settings to the ranges that the user gave."""
    held = dict(settings)
    for name, (low, high) in given.items():
      if name in held:
        held[name] = min(max(held[name], low), high)
    return held

  planned = member_lib.plan(
    seed=run.config.seed,
    stage=job.name,
    count=tune.members,
    ranges=ranges,
    first=[(origin, within(settings)) for origin, settings in first],
  )
  if proposal is None or 'beta' in given or 'alpha' not in names:
    return planned
  return [
    dataclasses.replace(member, settings=signal.coupled(member.settings))
    if member.origin == 'sobol'
    else member
    for member in planned
  ]


class Sweep:
  """The sweep of one round."""

  def __init__(
    self,
    run: workspace.Run,
    job: loop_lib.Job,
    manifest: manifest_lib.Manifest,
    winner: member_lib.Settings | None,
  ):
    """Prepares the sweep in this process's turn, or finds it prepared.

    Args:
      run: the run.
      job: the job that the round would play without a sweep.
      manifest: that of the round's folder.
      winner: see `_members`.

    Raises:
      errors.UserError: nothing is to be varied, or the storage is at fault.
    """
    self._run = run
    job = _kept_wide(run, job, winner)
    self._job = job
    self._proposal = None
    names = member_lib.names(job.phase)
    asked = [name for name in tune_lib.RANGES if name in names]
    if 'beta' in names and not set(asked) <= set(run.config.tune.given()):
      self._proposal = _probed(job, manifest)
    plan = manifest.read_json(_PLAN)
    if plan is None:
      plan = {
        # The storage may be that of many runs.
        'name': processes.decide('name', self._new_name),
        'members': [
          dataclasses.asdict(member)
          for member in _members(run, job, self._proposal, winner)
        ],
        'reference': self._score_reference(),
      }
      manifest.write_json(_PLAN, plan)
    self._start = plan['reference']
    self.members = [member_lib.Member(**member) for member in plan['members']]
    self._study: study_lib.Study | None = None
    first_rung = _first_rung(job.phase)

    def open_study():
      self._study = study_lib.Study(
        name=plan['name'],
        folder=job.folder,
        members=self.members,
        tune=run.config.tune,
        first_rung=first_rung,
      )

    processes.decide(f'study of {job.name}', open_study)

  def _new_name(self) -> str:
    name = self._run.config.name
    return f'{name}, {self._job.name}, {secrets.token_hex(4)}'

  def _score_reference(self) -> dict[str, Any]:
    """Returns the record of every member's step 0."""
    folder = self._job.folder / 'selection' / 'reference'
    scores = self._job.evaluate(self._job.start(), folder=folder)
    selection = {'selection': scores[self._job.metric]}
    record = {'kind': 'eval', 'step': 0, 'images': 0, 'profile': 'params'}
    return record | selection | scores

  def play_members(self) -> None:
    """Plays members until all are finished, beside other processes."""
    while True:
      with contextlib.ExitStack() as held:
        claim = functools.partial(self._claim, held)
        number = processes.decide(f'claim in {self._job.name}', claim)
        if number is None:
          return
        self._play(self.members[number])

  def _claim(self, held: contextlib.ExitStack) -> int | None:
    return self._study.claim(held)

  def _play(self, member: member_lib.Member) -> None:
    """Plays a member that this process has claimed, unless it is done."""
    job = self._job_of(member)
    found = functools.partial(member_lib.result, job.folder)
    result = processes.decide(f'result of {job.name}', found)
    if result is None:
      settings = ', '.join(f'{n} {v:.4g}' for n, v in member.settings.items())
      _LOGGER.info('%s: %s', job.name, settings)
      result = member_lib.play(member, job, self._start)
      _LOGGER.info(
        '%s: %s %.4g at step %d%s',
        job.name,
        job.metric,
        result['selection'],
        result['step'],
        f', ended by {result["ended"]}' if result['ended'] else '',
      )

    def finish():
      self._study.finish(member.number, result)

    processes.decide(f'finish {job.name}', finish)

  def _job_of(self, member: member_lib.Member) -> loop_lib.Job:
    tune = self._run.config.tune

    def watch(evaluations, train):
      last = evaluations[-1]['step'] == self._job.phase.steps()
      reason = self._study.judge(member.number, evaluations, last)
      if reason or last:
        return reason
      return alarms.reason(evaluations, train, tune.alarms)

    round_job = dataclasses.replace(self._job, keep_averages=bool(tune.widths))
    build = self._run.training_model
    return member_lib.job_of(member, round_job, build, watch)

  def _results(self) -> list[dict[str, Any]]:
    """Returns what the members left.

    Raises:
      errors.UserError: one of them is not whole.
    """

    def read():
      found = []
      for member in self.members:
        folder = self._job.folder / 'members' / member.name
        result = member_lib.result(folder)
        if result is None:
          raise errors.UserError(
            f'{folder} was changed while the round was played: run the same'
            ' command again'
          )
        found.append(result)
      return found

    return processes.decide(f'results of {self._job.name}', read)

  def promote(
    self, manifest: manifest_lib.Manifest, hashes: dict[str, str]
  ) -> loop_lib.Promotion:
    """Scores the finalists once more, writes the ledger and returns the best.

    It is done in a process's turn, when all members are finished, and may be
    done again.

    Args:
      manifest: that of the round's folder.
      hashes: that of the reference, by name, for the ledger.

    Returns:
      The promotion; its `about` says which member it is.
    """
    results = self._results()
    ranked = sorted(results, key=lambda result: result['selection'])
    finalists = [result for result in ranked if result['step']]
    finalists = finalists[: self._run.config.tune.finalists]
    finals = []
    best = None
    for final, params in self._candidates(finalists):
      final['rescored'] = self._rescore(final, params)
      finals.append(final)
      if best is None or final['rescored'] < best[0]['rescored']:
        best = (final, params)
      del params
    chosen, params = best
    promotion = loop_lib.Promotion(
      params=params,
      step=chosen['step'],
      profile=chosen['profile'],
      selection=chosen['selection'],
      about={
        name: chosen[name]
        for name in ('member', 'settings', 'candidate', 'rescored')
      },
    )
    manifest.write_json(
      'ledger.json', self._ledger(results, finals, chosen, hashes)
    )
    shown = ranked[0] if chosen['member'] is None else results[chosen['member']]
    self._copy_log(self.members[shown['number']])
    if processes.is_main():
      shutil.rmtree(self._job.folder / 'finals', ignore_errors=True)
      for averages in self._job.folder.glob('members/*/averages'):
        shutil.rmtree(averages, ignore_errors=True)
    return promotion

  def _candidates(
    self, finalists: list[dict[str, Any]]
  ) -> Iterator[tuple[dict[str, Any], likelihood.Params]]:
    """Yields what may be promoted with its params, the reference first."""
    reference = {
      'candidate': 'reference',
      'member': None,
      'settings': {},
      'step': 0,
      'profile': 'params',
      'selection': self._start['selection'],
    }
    yield reference, self._job.start()
    for result in finalists:
      member = self.members[result['number']]
      params = self._params_of(member)
      about = {
        'member': member.number,
        'settings': member.settings,
        'step': result['step'],
        'profile': result['profile'],
        'selection': result['selection'],
      }
      yield about | {'candidate': 'member'}, params
      for name, other in self._others(member, result, params):
        yield about | {'candidate': name}, other

  def _others(
    self,
    member: member_lib.Member,
    result: dict[str, Any],
    params: likelihood.Params,
  ) -> Iterator[candidates.Candidate]:
    """Yields what is made of a member without training."""
    run = self._run
    tune = run.config.tune
    yield from candidates.merges(
      reference=self._job.start(),
      params=params,
      weights=tune.merges,
      rules=self._job.model.rules,
      executor=run.executor,
    )
    yield from candidates.posthoc(
      job=self._job_of(member),
      evaluated=[record['step'] for record in result['evaluations']],
      step=result['step'],
      widths=tune.widths,
      target=workspace.params_target(run.model, run.executor),
    )

  def _params_of(self, member: member_lib.Member) -> likelihood.Params:
    folder = self._job.folder / 'members' / member.name
    try:
      params, _ = workspace.load_params(
        folder / 'params', self._run.model, self._run.executor
      )
    except errors.UserError as error:
      raise errors.UserError(
        f'{error}; or delete {folder}, and the same command plays that member'
        ' again'
      ) from error
    return params

  def _rescore(self, final: dict[str, Any], params: likelihood.Params) -> float:
    """Returns the selection metric on images that have chosen nothing."""
    run = self._run
    name = f'{final["member"]}_{final["candidate"]}'
    scores = measure.selection_scores(
      evaluator=run.evaluator,
      generator=run.generator(),
      params=params,
      settings=run.config.evaluation,
      seed=run.config.seed,
      folder=self._job.folder / 'finals' / name,
      final=True,
    )
    return scores[self._job.metric]

  def _copy_log(self, member: member_lib.Member) -> None:
    """Has the run's log tell of this member where it would of the round."""
    run = self._run
    own = self._job.folder / 'members' / member.name

    def read():
      return [
        record | {'stage': self._job.name} for record in records.read_log(own)
      ]

    run.log.rewind(self._job.name, 0, [])
    for record in processes.decide(f'log of {own}', read):
      run.log.write(record)

  def _ledger(
    self,
    results: list[dict[str, Any]],
    finals: list[dict[str, Any]],
    chosen: dict[str, Any],
    hashes: dict[str, str],
  ) -> dict[str, Any]:
    run = self._run
    job = self._job
    stored, _ = run.real.read(np.arange(1))
    draw = ledger.forwards_an_image(
      job.model, run.frozen, stored, run.config.sampler
    )
    samples = run.config.evaluation.selection_samples
    profiles = len(job.phase.averages.names()) or 1
    costs = [
      ledger.member_cost(result, job.phase, profiles, samples, draw)
      for result in results
    ]
    final_samples = measure.final_images(run.evaluator, run.config.evaluation)
    probe = None
    if self._proposal:
      probe = {
        'centre': self._proposal.centre(),
        'ranges': self._proposal.ranges(),
        'fault': self._proposal.fault,
        'forwards': self._proposal.images,
      }
    return ledger.make(
      round_index=int(job.name.removeprefix('round_')),
      hashes=hashes,
      results=results,
      costs=costs,
      finals=finals,
      promoted=chosen,
      phase=job.phase,
      probe=probe,
      shared_images=samples + len(finals) * final_samples,
      draw=draw,
    )
