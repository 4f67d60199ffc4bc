"""The study of a sweep: Optuna keeps who plays which member, and who goes on.

Optuna's journal, a file that any number of processes append to, or another
storage that it knows, says of each member whether it waits, runs or is
finished. What a member found lies in its own folder: without the journal the
members that are done are still done.
"""

import contextlib
import logging
import os
import pathlib
from typing import Any

from ddo_jax import errors
from ddo_jax.runtime import lock
from ddo_jax.tuning import member as member_lib
from ddo_jax.tuning import tune as tune_lib

_LOGGER = logging.getLogger(__name__)
_GRACE = 10  # seconds after which the journal's lock of a dead process ends


def _storage(address: str, folder: pathlib.Path) -> Any:
  """Opens what the processes of a sweep meet in.

  Args:
    address: one that Optuna knows; '' is a journal in the folder.
    folder: the round's.

  Raises:
    errors.UserError: Optuna cannot open it.
  """
  import optuna
  from optuna.storages import journal

  if address:
    try:
      return optuna.storages.get_storage(address)
    except Exception as error:  # each kind of storage has errors of its own
      reason = ' '.join(str(error).split())[:200]
      raise errors.UserError(
        f'config.tune.storage {address!r} cannot be opened ({reason}); wanted'
        " an address that Optuna knows, or '' for a file in the run's folder"
      ) from error
  path = folder / 'study.journal'
  shared = journal.JournalFileOpenLock(str(path), grace_period=_GRACE)
  _mend(path, shared)
  return optuna.storages.JournalStorage(
    journal.JournalFileBackend(str(path), lock_obj=shared)
  )


def _mend(path: pathlib.Path, shared: Any) -> None:
  """Cuts off a line of the journal that a power cut left unfinished."""
  if not path.exists():
    return
  shared.acquire()
  try:
    content = path.read_bytes()
    whole = content.rfind(b'\n') + 1
    if whole < len(content):
      _LOGGER.warning('%s: a line that was cut off is left out', path)
      os.truncate(path, whole)
  finally:
    shared.release()


class Study:
  """Which members there are, who plays them, and which go on.

  Of several processes of one run, process 0 alone calls it. Any number of runs
  may share it: what one of them did not finish, another one takes up.
  """

  def __init__(
    self,
    name: str,
    folder: pathlib.Path,
    members: list[member_lib.Member],
    tune: tune_lib.Tune,
    first_rung: int,
  ):
    """Opens the study, and makes of it what is missing.

    Where several processes share it, only one does so at a time.

    Args:
      name: that of the study in its storage.
      folder: the round's.
      members: what is to be tried.
      tune: the knobs.
      first_rung: the step of the evaluation where a member is judged first.

    Raises:
      errors.UserError: the storage cannot be opened, or is damaged.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    self._folder = folder / 'members'
    self._members = members
    self._turn = lock.Turn(self._folder)
    self._pruner = None
    if tune.reduction > 1:
      self._pruner = optuna.pruners.SuccessiveHalvingPruner(
        min_resource=first_rung, reduction_factor=tune.reduction
      )
    try:
      self._study = optuna.create_study(
        study_name=name,
        storage=_storage(tune.storage, folder),
        sampler=optuna.samplers.RandomSampler(seed=0),  # it is never asked
        load_if_exists=True,
      )
      known = len(self._study.get_trials(deepcopy=False))
    except errors.UserError:
      raise
    except Exception as error:  # a damaged journal makes Optuna raise no less
      reason = ' '.join(f'{type(error).__name__} {error}'.split())[:200]
      raise errors.UserError(
        f'the study {name} cannot be read of'
        f' {tune.storage or folder / "study.journal"} ({reason}); delete it:'
        ' members that are done stay done'
      ) from error
    for member in members[known:]:
      self._study.enqueue_trial(
        member.settings, user_attrs={'origin': member.origin}
      )

  def _trials(self, *states: str) -> list[Any]:
    """Returns the trials in one of the states; all where none is named."""
    import optuna

    wanted = tuple(optuna.trial.TrialState[state] for state in states)
    return self._study.get_trials(deepcopy=False, states=wanted or None)

  def claim(self, held: contextlib.ExitStack) -> int | None:
    """Returns the number of a member to play; None once all are finished.

    First come those that a process left unfinished, then those that wait.
    Where others still play, this waits for them.

    Args:
      held: keeps the lock of the member.
    """
    waited = False
    while True:
      with self._turn.taken():
        number = self._next(held)
      if number is not None:
        return number
      busy = [trial.number for trial in self._trials('RUNNING')]
      busy += self._lost()
      if not busy:
        return None
      if not waited:
        _LOGGER.info(
          '%s: waiting for %s, which other processes play',
          self._folder,
          ', '.join(self._members[number].name for number in busy),
        )
      waited = True
      lock.wait(self._folder / self._members[busy[0]].name)

  def _lost(self) -> list[int]:
    """The members that were finished, and are not whole any more."""
    return [
      trial.number
      for trial in self._trials('COMPLETE', 'PRUNED')
      if not self._result(trial.number)
    ]

  def _result(self, number: int) -> dict[str, Any] | None:
    return member_lib.result(self._folder / self._members[number].name)

  def _next(self, held: contextlib.ExitStack) -> int | None:
    """Claims a member that nobody plays, if there is one."""
    left = [trial.number for trial in self._trials('RUNNING')]
    for number in left + self._lost():
      folder = self._folder / self._members[number].name
      with contextlib.ExitStack() as stack:
        if stack.enter_context(lock.tried(folder)):
          held.enter_context(stack.pop_all())
          return number
    if not self._trials('WAITING'):
      return None
    number = self._study.ask().number
    held.enter_context(lock.held(self._folder / self._members[number].name))
    return number

  def judge(
    self, number: int, evaluations: list[dict[str, Any]], last: bool
  ) -> str | None:
    """Returns why a member ends after its newest evaluation; None: it goes on.

    Optuna's pruner writes down which rungs a member has passed, and would count
    it twice if it were asked twice. So it is asked on a copy of the study, and
    what it says and writes is kept in one entry of the storage, which a later
    call gives again.

    Args:
      number: the member's.
      evaluations: the records of all its evaluations.
      last: whether there will be no other.
    """
    trial = self._report(number, evaluations)
    step = evaluations[-1]['step']
    if self._pruner is None or last or step == 0:
      return None
    entry = f'judged at {step}'
    judged = trial.user_attrs.get(entry)
    if judged is None:
      judged = self._ask_pruner(number)
      trial.set_user_attr(entry, judged)
    return judged['reason'] or None

  def _trial(self, number: int) -> Any:
    """Returns the trial of a member that runs, to write to."""
    import optuna

    return optuna.trial.Trial(self._study, self._trials()[number]._trial_id)

  def _report(self, number: int, evaluations: list[dict[str, Any]]) -> Any:
    """Tells Optuna what it does not know yet; returns the trial."""
    trial = self._trial(number)
    known = self._trials()[number].intermediate_values
    for record in evaluations:
      if record['step'] and record['step'] not in known:
        trial.report(record['selection'], record['step'])
    return trial

  def _ask_pruner(self, number: int) -> dict[str, Any]:
    """Returns {'reason', 'rungs': those that the member has come to}."""
    import optuna

    copy = optuna.create_study(pruner=self._pruner)
    for trial in self._trials():
      copy.add_trial(
        optuna.trial.create_trial(
          state=optuna.trial.TrialState.RUNNING,
          intermediate_values=trial.intermediate_values,
          system_attrs=_rungs(trial),
        )
      )
    before = _rungs(self._trials()[number])
    ends = self._pruner.prune(copy, copy.trials[number])
    rungs = copy.trials[number].system_attrs
    if not ends:
      return {'reason': '', 'rungs': rungs}
    # The rung at which it ended is the one it came to last.
    rung = max(rungs.keys() - before.keys())
    there = sorted(
      trial.system_attrs[rung]
      for trial in copy.trials
      if rung in trial.system_attrs
    )
    place = there.index(rungs[rung]) + 1
    reason = f'halving: {place} of the {len(there)} that came so far'
    return {'reason': reason, 'rungs': rungs}

  def finish(self, number: int, result: dict[str, Any]) -> None:
    """Notes that a member is finished; once it is, a second call does nothing.

    Args:
      number: the member's.
      result: see `member.result`.
    """
    import optuna

    if self._trials()[number].state.is_finished():
      return
    trial = self._report(number, result['evaluations'])
    # So that Optuna's own pages know what was varied.
    for name, value in result['settings'].items():
      trial.suggest_float(name, value, value)
    complete = not result['ended']
    state = optuna.trial.TrialState[('PRUNED', 'COMPLETE')[complete]]
    self._study.tell(
      number,
      values=result['selection'] if complete else None,
      state=state,
    )


def _rungs(trial: Any) -> dict[str, Any]:
  """Returns which rungs a trial has come to, as the pruner writes them."""
  rungs = {}
  for name, entry in trial.user_attrs.items():
    if name.startswith('judged at '):
      rungs |= entry['rungs']
  return rungs
