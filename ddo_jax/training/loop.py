"""The loop of one phase: the pretraining, or one round."""

from collections.abc import Callable
from collections.abc import Generator
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import logging
import pathlib
import shutil
import signal
import time
from typing import Any
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.data import loader
from ddo_jax.data import sources
from ddo_jax.method import likelihood
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import disk
from ddo_jax.runtime import interruption
from ddo_jax.runtime import processes
from ddo_jax.runtime import progress
from ddo_jax.runtime import records
from ddo_jax.training import evaluations as evaluations_lib
from ddo_jax.training import first_steps
from ddo_jax.training import lora as lora_lib
from ddo_jax.training import state as state_lib
from ddo_jax.training import step as step_lib

_LOGGER = logging.getLogger(__name__)
_TOLERANCE = 1e-3  # of |βΔ| at step 0: what rounding may leave
_REMEDY = 'lower the learning rate or set clip_norm'
_Record = dict[str, Any]  # of metrics.jsonl
Records = list[_Record]


class BadNumbersError(errors.UserError):
  """A phase cannot go on, because of what its numbers have become."""


@dataclasses.dataclass(frozen=True)
class Job:
  """All that one phase needs.

  Attributes:
    name: the name of the stage and of its folder: 'pretrain', 'round_000', …
    folder: the stage's folder.
    seed: the run's seed.
    phase: the phase's knobs at this round, see `config.at_round`.
    model: the family, with its noise law at this round.
    start: returns the params where θ starts, on the devices. They are let go
      once the state is made of them.
    reference: the frozen θ_ref of the step: the same function as `start`'s.
    frozen: weights that are neither trained nor the reference.
    real: the real images.
    fake: the fake pool; None unless the negatives need one.
    sampler: draws fakes inside the step; None unless the negatives need that.
    executor: the devices.
    accumulate: the number of microbatches a step.
    log: metrics.jsonl.
    evaluate: (params, folder=...) -> scores that choose a checkpoint; None
      keeps the last. In the folder a call that is cut off leaves what the next
      one goes on with.
    metric: the score that chooses; lower is better.
    workers: the processes that read images on disk; 0 reads in threads.
    clock: the name under which noise and the order of rows are drawn; None:
      the stage's. Phases that are to be compared share it.
    watch: (evaluations, train records, each so far) -> why the phase ends here,
      in a line; None: it goes on. It is asked after each evaluation, on process
      0, and after an interruption perhaps once more: with equal arguments it
      gives equal answers.
    keep_averages: whether the power-function averages of every evaluated state
      are kept, of which others can be made after the training; see
      `averages_folder`.
  """

  name: str
  folder: pathlib.Path
  seed: int
  phase: config_lib.Phase
  model: likelihood.LikelihoodModel
  start: Callable[[], likelihood.Params]
  reference: likelihood.Params
  frozen: likelihood.Frozen
  real: sources.Source
  fake: sources.Source | None
  sampler: Any
  executor: devices_lib.Executor
  accumulate: int
  log: records.MetricsLog
  evaluate: Callable[..., dict[str, float]] | None
  metric: str
  workers: int = 0
  clock: str | None = None
  watch: Callable[[Records, Records], str | None] | None = None
  keep_averages: bool = False


@dataclasses.dataclass(frozen=True)
class Promotion:
  """The checkpoint that leaves a phase.

  Attributes:
    params: its weights.
    step: the optimizer steps of this phase behind it; 0 is the reference.
    profile: which average of the weights it is ('params' is θ itself).
    selection: its selection score; None where nothing was evaluated.
    evaluations: the records of all evaluations of the phase.
    ended: why the phase ended before its last step; '' where it did not.
    about: JSON values that are kept with it.
  """

  params: likelihood.Params
  step: int
  profile: str
  selection: float | None
  evaluations: Records = dataclasses.field(default_factory=list)
  ended: str = ''
  about: _Record = dataclasses.field(default_factory=dict)


def batches(job: Job, start: int) -> Generator[Any, None, None]:
  """Yields (real, fake) on the devices, from step `start` on."""
  phase = job.phase

  def rows(source, name):
    stream = loader.batches(
      source,
      rng.order_seed(job.seed, job.clock or job.name, name),
      phase.batch_size,
      start,
      phase.steps(),
      processes.index(),
      processes.count(),
      other_label=phase.used_negatives.needs_other_label,
      workers=job.workers,
    )
    return contextlib.closing(stream)

  place = job.executor.place_batch
  if job.fake is None:
    with rows(job.real, 'real') as reals:
      for real in reals:
        yield place(real), None
    return
  with rows(job.real, 'real') as reals, rows(job.fake, 'fake') as fakes:
    for real, fake in zip(reals, fakes, strict=True):
      del fake['id']  # a fake takes the identity of its real partner
      yield place(real), place(fake)


class _GoneBad(Exception):
  """The numbers of a step are bad, and the phase is to go back.

  Attributes:
    bad: the records of the phase's bad steps, of which it is the last.
  """

  def __init__(self, bad: list[_Record]):
    super().__init__()
    self.bad = bad


class _Logger:
  """Fetches a step's metrics while the device computes the next one."""

  def __init__(
    self, job: Job, checkpoints: checkpoint.Checkpoints, bad: list[_Record]
  ):
    """Of a phase whose bad steps so far are `bad`, to which others come."""
    self._job = job
    self._checkpoints = checkpoints
    self._bad = bad
    self._pending: tuple[int, step_lib.Metrics, bool] | None = None
    # What of steps the policy for bad numbers is still to be told.
    self._unjudged: list[tuple[int, step_lib.Metrics]] = []
    self._warned = False
    self.restart_clock()

  def restart_clock(self) -> None:
    """Leaves what came before out of images/s."""
    self._time = time.perf_counter()
    self._images = 0
    self._waited = 0.0

  def next(self, rows: Iterator[Any]) -> Any:
    """Returns the next rows; counts the time that the devices wait for them.

    They do where the step before is done by the time that the rows are there,
    which is asked without waiting for it. They may have begun to wait later
    than the loop did, so that the time counted is an upper bound.
    """
    begin = time.perf_counter()
    found = next(rows)
    seconds = time.perf_counter() - begin
    if self._pending is None or devices_lib.are_done(self._pending[1]):
      self._waited += seconds
    return found

  def push(self, step: int, metrics: step_lib.Metrics, log: bool) -> None:
    """Takes the metrics of a step just begun; writes those due before it."""
    if self._pending and self._pending[2]:
      self.flush()
    # Until a step is good θ is θ_ref, which is checked.
    log = log or step == len(self._bad)
    self._images += self._job.phase.batch_size
    self._pending = (step, metrics, log)
    if 'bad' in metrics:
      kept = {name: metrics[name] for name in ('bad', 'loss', 'grad_norm')}
      self._unjudged.append((step, kept))

  def flush(self) -> None:
    """Checks the newest metrics, waiting for the device; logs them if due.

    Raises:
      errors.UserError: the loss or the gradient is not finite, step 0 of a
        round is not at chance, or its first steps are hopeless.
      _GoneBad: numbers are bad, and the policy is to go back.
    """
    if self._pending is None:
      return
    step, metrics, log = self._pending
    self._pending = None
    metrics, unjudged = devices_lib.fetch((metrics, self._unjudged))
    self._unjudged = []
    seconds = time.perf_counter() - self._time
    for judged, numbers in unjudged:
      self._judge(judged, numbers)
    self._check(step, metrics)
    if not log:
      return
    batch = self._job.phase.batch_size
    record = {
      'stage': self._job.name,
      'kind': 'train',
      'step': step,
      'images': step * batch,
    }
    rate = {
      'images_per_second': self._images / seconds,
      'waiting': self._waited / seconds,
    }
    self._job.log.write(record | metrics | rate)
    self._look(step, metrics)
    self.restart_clock()

  def _look(self, step: int, metrics: dict[str, Any]) -> None:
    """Ends a phase, or warns, where its first steps say that it is hopeless."""
    if self._bad:  # less was learned than the schedule says
      return
    fault = first_steps.fault(step, metrics, self._job.phase)
    if not fault:
      return
    if self._job.phase.if_hopeless == 'stop':
      remedy = 'to go on in any case, --config.ddo.if_hopeless=warn'
      self._stop(step, fault, remedy)
    if not self._warned:
      self._warned = True
      _LOGGER.warning('%s step %d: %s', self._job.name, step, fault)

  def _stop(self, step: int, reason: str, remedy: str) -> NoReturn:
    """Ends the run for its numbers."""
    self._checkpoints.wait()
    kept = self._checkpoints.steps()
    good = self._checkpoints.folder / str(kept[-1]) if kept else 'none'
    raise BadNumbersError(
      f'{self._job.name} step {step}: {reason}; last good checkpoint: {good};'
      f' {remedy}'
    )

  def _judge(self, step: int, numbers: dict[str, Any]) -> None:
    """Counts and records a bad step, of which nothing was learned."""
    if not numbers['bad']:
      return
    rule = self._job.phase.bad_numbers
    reason = rule.reason(numbers['loss'], numbers['grad_norm'])
    if rule.policy == 'stop':
      self._stop(step, reason, _REMEDY)
    record = {
      'stage': self._job.name,
      'kind': 'bad',
      'step': step,
      'images': step * self._job.phase.batch_size,
      'reason': reason,
      'policy': rule.policy,
    }
    self._bad.append(record)
    count = len(self._bad)
    _LOGGER.warning(
      '%s step %d: %s; %s, %d of at most %d',
      self._job.name,
      step,
      reason,
      rule.policy,
      count,
      rule.limit,
    )
    self._job.log.write(record)
    if count >= rule.limit:
      reason += f', and the number of bad steps, {count}, is at its limit'
      self._stop(step, reason, f'{_REMEDY}, or raise bad_numbers.limit')
    if rule.policy == 'rollback':
      raise _GoneBad(self._bad)

  def _check(self, step: int, metrics: dict[str, Any]) -> None:
    where = f'{self._job.name} step {step}'
    if metrics.get('bad'):
      return  # judged, and nothing was learned
    for name in ('loss', 'grad_norm'):
      if not np.isfinite(metrics[name]):
        remedy = f'{_REMEDY}, or set bad_numbers.policy=skip'
        self._stop(step, f'{name} is {metrics[name]}', remedy)
    if step == len(self._bad) and 'chance_loss' in metrics:
      loss = metrics['loss']
      chance = metrics['chance_loss']
      logit = metrics['max_abs_logit']
      # |d loss / d logit| ≤ the weights, and chance = log 2 · their mean.
      distance = abs(loss - chance) / max(chance, 1)
      if distance > 2 * _TOLERANCE or logit > _TOLERANCE:
        raise errors.UserError(
          f'{where}: loss {loss:.6f}, expected {chance:.6f} where θ = θ_ref,'
          f' largest |βΔ| {logit:.2g}; the two passes differ: try'
          ' --config.executor.remat=True, and check that dropout is off'
        )


def _plain(job: Job, trained: likelihood.Params) -> likelihood.Params:
  """Returns what is trained, or its average, as weights of the model."""
  lora = job.phase.lora
  if not lora.rank:
    return trained
  shapes = jax.eval_shape(job.model.init, rng.stream(0))
  dtypes = tuple(leaf.dtype for leaf in jax.tree.leaves(shapes))
  merge = lora_lib.plain(lora, job.model.rules, dtypes)
  parts = devices_lib.from_host((job.reference, trained))
  return job.executor.make_state(merge, *parts)


def _evaluate(
  job: Job, state: state_lib.TrainState, step: int
) -> dict[str, Any]:
  """Scores every candidate; returns the best one's record."""
  best: dict[str, Any] | None = None
  folder = _evaluation_folder(job, step)
  for profile, trained in state.candidates().items():
    params = _plain(job, trained)
    scores = job.evaluate(params, folder=folder / profile)
    selection = scores[job.metric]
    if not np.isfinite(selection):
      raise BadNumbersError(
        f'{job.name} step {step}: {job.metric} of {profile} is {selection}'
      )
    if best is None or selection < best['selection']:
      best = {'profile': profile, 'selection': selection} | scores
  images = step * job.phase.batch_size
  record = {'stage': job.name, 'kind': 'eval', 'step': step, 'images': images}
  return records.plain(record | best)


def _ask(job: Job, evaluations: evaluations_lib.Evaluations) -> None:
  """Asks whether the phase is to go on after its newest evaluation."""

  def ask():
    logged = job.log.read(job.name)
    train = [record for record in logged if record['kind'] == 'train']
    return job.watch(evaluations.all(), train)

  reason = processes.decide(f'watch {job.name}', ask)
  if reason:
    evaluations.end(reason)


def _evaluation_folder(job: Job, step: int) -> pathlib.Path:
  """Where an evaluation keeps what it has until it is done."""
  return job.folder / 'selection' / str(step)


def averages_folder(folder: pathlib.Path, step: int) -> pathlib.Path:
  """Returns where the averages of an evaluated state are kept.

  Args:
    folder: the stage's.
    step: the state's. Each of its power-function averages is a folder of
      params there, by its name.
  """
  return folder / 'averages' / str(step)


def _keep_averages(job: Job, state: state_lib.TrainState, step: int) -> None:
  """Keeps the averages of a state that is about to be evaluated."""
  folder = averages_folder(job.folder, step)
  for name in job.phase.averages.power_names():
    params = _plain(job, state.ema[name])
    checkpoint.save_params(folder / name, params, {'step': step})


def _forget_evaluations(job: Job, start: int) -> None:
  """Drops what is left of evaluations of states that were not saved.

  On some devices the state of a step does not come again to the bit.
  """
  if not processes.is_main():
    return
  kept = _evaluation_folder(job, start)
  for folder in kept.parent.glob('*'):
    if folder != kept:
      with disk.guarded(folder):
        shutil.rmtree(folder)


def _due(step: int, images: int, batch: int) -> bool:
  """Whether a multiple of `images` falls on this step; 0 is never."""
  return images > 0 and step % max(1, round(images / batch)) == 0


def evaluations(phase: config_lib.Phase) -> int:
  """Returns how often a phase is evaluated, from its first step to its last."""
  steps = phase.steps()
  images = phase.rhythm.eval_images
  due = [_due(step, images, phase.batch_size) for step in range(steps)]
  return sum(due) + 1


def _anchor(job: Job, step: int) -> int:
  """Returns the last step up to this one that was due to be saved, or 0.

  It goes by the step alone, not by the clock, and so a run goes back to the
  same state whenever it was interrupted.
  """
  rhythm = job.phase.rhythm
  if not rhythm.save_images:
    return 0
  period = max(1, round(rhythm.save_images / job.phase.batch_size))
  return step // period * period


def _save(
  job: Job,
  checkpoints: checkpoint.Checkpoints,
  evaluations: evaluations_lib.Evaluations,
  bad: list[_Record],
  state: state_lib.TrainState,
  step: int,
) -> None:
  """Starts to save a state, and says what stays beside it."""
  best = evaluations.best()
  rolls_back = job.phase.bad_numbers.policy == 'rollback'
  checkpoints.save(
    state,
    step,
    notes={'evaluations': evaluations.all(), 'bad': list(bad)},
    best=best['step'] if best else None,
    anchor=_anchor(job, step) if rolls_back else None,
  )


def _go_back(
  job: Job,
  checkpoints: checkpoint.Checkpoints,
  evaluations: evaluations_lib.Evaluations,
  bad: list[_Record],
  target: Any,
) -> None:
  """Saves the state before the last bad step's anchor as the one after it.

  Training goes on from there as from any checkpoint, see
  `bad_numbers.BadNumbers`.
  """
  checkpoints.wait()
  bad_step = bad[-1]['step']
  anchor = _anchor(job, bad_step)
  found = 0
  for step in reversed([at for at in checkpoints.steps() if at <= anchor]):
    try:
      state, _ = checkpoints.restore(step, target)
      found = step
      break
    except checkpoint.DamagedError as damage:
      checkpoints.set_aside(step, damage)
  else:
    state = _fresh_state(job)
  after = bad_step + 1
  state = state_lib.at_step(state, job.executor.replicate(np.int32(after)))
  _save(job, checkpoints, evaluations, bad, state, after)
  checkpoints.wait()
  _LOGGER.warning(
    '%s: back at the state of step %d, steps %d to %d are left out',
    job.name,
    found,
    found,
    bad_step,
  )


def _promote(
  job: Job,
  checkpoints: checkpoint.Checkpoints,
  evaluations: evaluations_lib.Evaluations,
  target: Any,
) -> Promotion | None:
  """The best evaluated checkpoint, step 0 included, else the last one.

  Nothing else is promoted in the place of one that is damaged: the phase goes
  back to the state before it, and makes it again.

  Returns:
    None where the phase is to be trained again.
  """
  best = evaluations.best()
  history = (evaluations.all(), evaluations.ended)
  if best and best['step'] == 0:
    return Promotion(job.start(), 0, 'params', best['selection'], *history)
  step = best['step'] if best else job.phase.steps()
  try:
    state, _ = checkpoints.restore(step, target)
  except checkpoint.DamagedError as damage:
    checkpoints.set_aside(step, damage)
    checkpoints.drop_after(step)
    _LOGGER.warning(
      '%s: step %d is to be promoted and is made again', job.name, step
    )
    return None
  candidates = state.candidates()
  profile = best['profile'] if best else next(iter(candidates))
  selection = best['selection'] if best else None
  params = _plain(job, candidates[profile])
  return Promotion(params, step, profile, selection, *history)


def _abstract_state(job: Job) -> Any:
  """Returns the shapes and placement of a state, for a restore."""

  def fresh(key):
    params = job.model.init(key)
    return state_lib.at_start(params, job.model.rules, job.phase)

  shapes = jax.eval_shape(fresh, rng.stream(0))
  return checkpoint.abstract(shapes, job.executor.state_shardings(shapes))


def _fresh_state(job: Job) -> state_lib.TrainState:
  """Returns the state of step 0, on the devices."""
  key = rng.stream(job.seed, 'lora', job.clock or job.name)

  def create(params):
    return state_lib.at_start(params, job.model.rules, job.phase, key)

  # Of factors nothing but shapes is taken of the params, which stand there.
  start = job.reference if job.phase.lora.rank else job.start()
  return job.executor.make_state(create, start)


def _leave(job: Job, signum: int, step: int) -> NoReturn:
  """Says that the state of a step is saved, and ends the run as asked."""
  _LOGGER.warning(
    '%s: %s; saved step %d of %d, run the same command again to go on',
    job.name,
    signal.Signals(signum).name,
    step,
    job.phase.steps(),
  )
  interruption.leave(signum)


def _compile_step(job: Job) -> Callable[..., Any]:
  """Returns (state, real, fake) -> (state, metrics)."""
  executor = job.executor
  step_fn = executor.compile_step(
    step_lib.train_step, sampler=job.sampler, accumulate=job.accumulate
  )
  # What is traced goes to the devices once: the numbers of the round.
  numbers = jax.tree.map(jnp.float32, (job.model, job.phase))
  key = rng.stream(job.seed, 'train', job.clock or job.name)
  model, phase, key = executor.replicate((*numbers, key))

  def step(state, real, fake):
    frozen = (job.reference, job.frozen)
    return step_fn(state, *frozen, real, fake, model, phase, key)

  return step


def _notes(job: Job, step: int, carried: Any) -> dict[str, list[_Record]]:
  """Returns what the checkpoint of a step says of the steps before it.

  Earlier versions kept the bad ones in the log alone, and the first ones the
  evaluations, too.
  """
  if isinstance(carried, dict):
    return carried
  logged = processes.decide('log', functools.partial(job.log.read, job.name))
  if carried is None:
    carried = [record for record in logged if record['kind'] == 'eval']
  bad = [record for record in logged if record['kind'] == 'bad']
  bad = [record for record in bad if record['step'] < step]
  return {'evaluations': carried, 'bad': bad}


def _resume(
  job: Job,
  checkpoints: checkpoint.Checkpoints,
  evaluations: evaluations_lib.Evaluations,
  target: Any,
) -> tuple[int, state_lib.TrainState, list[_Record]]:
  """Returns the step to go on from, its state and the bad steps before it.

  The records go back to that step.
  """
  newest = checkpoints.restore_newest(target)
  if newest is None:
    start = 0
    state = _fresh_state(job)
    notes = {'evaluations': [], 'bad': []}
  else:
    start, state, carried = newest
    notes = _notes(job, start, carried)
  evaluations.resume(start, notes['evaluations'])
  bad = notes['bad']
  job.log.rewind(job.name, start, evaluations.all() + bad)
  _forget_evaluations(job, start)
  _LOGGER.info('%s: from step %d of %d', job.name, start, job.phase.steps())
  return start, state, bad


def _train(
  job: Job,
  step_fn: Callable[..., Any],
  checkpoints: checkpoint.Checkpoints,
  evaluations: evaluations_lib.Evaluations,
  target: Any,
) -> None:
  """Trains to the end, so that the last step is saved and evaluated.

  Numbers that go bad end a phase that is watched where it was last evaluated.
  """
  with interruption.deferred() as deferral:
    while True:
      try:
        _train_on(job, step_fn, checkpoints, evaluations, target, deferral)
        return
      except _GoneBad as gone_bad:
        bad = gone_bad.bad
      except BadNumbersError as error:
        if job.watch is None or not evaluations.all():
          raise
        evaluations.end(str(error))
        return
      # Here nothing holds the state that went bad any more.
      _go_back(job, checkpoints, evaluations, bad, target)


def _train_on(
  job: Job,
  step_fn: Callable[..., Any],
  checkpoints: checkpoint.Checkpoints,
  evaluations: evaluations_lib.Evaluations,
  target: Any,
  deferral: interruption.Deferral,
) -> None:
  """Trains from the newest checkpoint on.

  Raises:
    _GoneBad: numbers are bad, and the policy is to go back.
  """
  phase = job.phase
  rhythm = phase.rhythm
  batch_size = phase.batch_size
  steps = phase.steps()
  with deferral.saved():
    start, state, bad = _resume(job, checkpoints, evaluations, target)
  if evaluations.ended:
    return
  logger = _Logger(job, checkpoints, bad)
  bar = progress.follow(
    job.name, steps * batch_size, done=start * batch_size, leave=True
  )
  rows = batches(job, start)
  saved_at = time.monotonic()
  agree = devices_lib.Agreement(job.executor)
  with bar, contextlib.closing(rows):
    for step in range(start, steps + 1):
      last = step == steps
      evaluate = last or _due(step, rhythm.eval_images, batch_size)
      evaluate = job.evaluate and evaluate and step not in evaluations

      # Save.
      overdue = 0 < 60 * rhythm.save_minutes <= time.monotonic() - saved_at
      signum, must_save = agree(deferral.signum or 0, overdue)
      save = last or _due(step, rhythm.save_images, batch_size)
      if (save or must_save or evaluate or signum) and step > start:
        logger.flush()
        _save(job, checkpoints, evaluations, bad, state, step)
        saved_at = time.monotonic()
        logger.restart_clock()
      if signum:
        checkpoints.wait()
        _leave(job, signum, step)

      # Evaluate what is saved, so that this may be cut off.
      if evaluate:
        with deferral.saved():
          if job.keep_averages and step:
            _keep_averages(job, state, step)
          record = _evaluate(job, state, step)
          evaluations.add(record)
          job.log.write(record)
          if processes.is_main():
            rows_seen = _evaluation_folder(job, step).parent
            shutil.rmtree(rows_seen, ignore_errors=True)
        bar.set_postfix_str(f'{job.metric} {record["selection"]:.4g}')
        saved_at = time.monotonic()  # nothing was trained since
        logger.restart_clock()
      if job.watch and step in evaluations:
        _ask(job, evaluations)
      if last or evaluations.ended:
        break

      # Train.
      with job.executor.no_implicit_transfers():
        real, fake = logger.next(rows)
        state, metrics = step_fn(state, real, fake)
      log = _due(step, rhythm.log_images, batch_size)
      logger.push(step, metrics, log)
      bar.update(batch_size)
  checkpoints.wait()


def run(job: Job) -> Promotion:
  """Trains a phase to its end, resuming where an earlier call stopped.

  Raises:
    KeyboardInterrupt: after Ctrl-C; the state is saved. A second Ctrl-C does
      not wait for that.
    SystemExit: after SIGTERM or SIGHUP; the state is saved.
    errors.UserError: a loss or gradient is not finite, step 0 of a round is not
      at chance, or the data is at fault.
  """
  job.executor.check_batch(job.phase.batch_size, job.accumulate)
  step_fn = _compile_step(job)
  target = _abstract_state(job)
  evaluations = evaluations_lib.Evaluations(job.folder, job.name)
  with checkpoint.Checkpoints(job.folder / 'checkpoints') as checkpoints:
    for _ in range(2):
      _train(job, step_fn, checkpoints, evaluations, target)
      promotion = _promote(job, checkpoints, evaluations, target)
      if promotion is not None:
        checkpoints.forget_damaged()
        return promotion
  raise errors.UserError(
    f'{job.name}: a checkpoint was damaged soon after it was saved in'
    f' {checkpoints.folder}, twice; see whether that disk keeps what is written'
  )
