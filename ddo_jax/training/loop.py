"""The loop of one phase: the pretraining, or one round."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import logging
import math
import pathlib
import signal
import threading
import time
from typing import Any

import jax
import numpy as np
import tqdm

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.data import loader
from ddo_jax.data import sources
from ddo_jax.method import likelihood
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import state as state_lib
from ddo_jax.training import step as step_lib

_LOGGER = logging.getLogger(__name__)
EX_TEMPFAIL = 75  # exit status: interrupted, run the same command again
_TOLERANCE = 1e-3  # of |βΔ| at step 0: what rounding may leave


@dataclasses.dataclass(frozen=True)
class Job:
  """All that one phase needs.

  Attributes:
    name: of the stage and its folder: 'pretrain', 'round_000', …
    folder: the stage's folder.
    seed: the run's seed.
    phase: its knobs.
    round_index: which of the per-round values hold.
    model: the family.
    start: gives the params where θ starts, on the devices; they are let go
      once the state is made of them.
    reference: the same function as `start`'s, the frozen θ_ref of the step.
    frozen: weights that are neither trained nor the reference.
    real: the data.
    fake: samples of the reference; None unless the phase wants a pool.
    sampler: draws fakes inside the step; None unless the phase wants them.
    executor: the devices.
    accumulate: microbatches a step.
    log: metrics.jsonl.
    evaluate: params -> scores for choosing a checkpoint; None keeps the last.
    metric: the score that chooses, lower is better.
  """

  name: str
  folder: pathlib.Path
  seed: int
  phase: config_lib.Phase
  round_index: int
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
  evaluate: Callable[[likelihood.Params], dict[str, float]] | None
  metric: str


@dataclasses.dataclass(frozen=True)
class Promotion:
  """The checkpoint that leaves a phase.

  Attributes:
    params: its weights.
    step: optimizer steps of this phase behind it; 0 is the reference itself.
    profile: which average of the weights ('params' is θ).
    selection: its selection score; None where nothing was evaluated.
  """

  params: likelihood.Params
  step: int
  profile: str
  selection: float | None


@contextlib.contextmanager
def _termination() -> Iterator[threading.Event]:
  """Yields an event that SIGTERM sets, in place of ending the process."""
  event = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield event  # only the main thread hears signals
    return
  before = signal.signal(signal.SIGTERM, lambda *_: event.set())
  try:
    yield event
  finally:
    signal.signal(signal.SIGTERM, before)


def batches(job: Job, start: int) -> Iterator[Any]:
  """Yields (real, fake) on the devices, from step `start` on."""
  phase, steps = job.phase, job.phase.steps()

  def rows(source, name):
    return loader.batches(
      source,
      rng.order_seed(job.seed, job.name, name),
      phase.batch_size,
      start,
      steps,
      jax.process_index(),
      jax.process_count(),
      other_label=phase.contrasts,
    )

  place = job.executor.place_batch
  if job.fake is None:
    with contextlib.closing(rows(job.real, 'real')) as reals:
      yield from ((place(real), None) for real in reals)
    return
  with (
    contextlib.closing(rows(job.real, 'real')) as reals,
    contextlib.closing(rows(job.fake, 'fake')) as fakes,
  ):
    for real, fake in zip(reals, fakes, strict=True):
      del fake['id']  # a fake takes the identity of its real partner
      yield place(real), place(fake)


class _Logger:
  """Fetches a step's metrics while the device computes the next one."""

  def __init__(self, job: Job):
    self._job = job
    self._pending = None
    self.restart_clock()

  def restart_clock(self) -> None:
    """Leaves what came before out of images/s."""
    self._time, self._images = time.perf_counter(), 0

  def push(self, step: int, metrics: step_lib.Metrics, log: bool) -> None:
    """Takes the metrics of a step just begun; writes the one to log before."""
    if self._pending and self._pending[2]:
      self.flush()
    self._images += self._job.phase.batch_size
    self._pending = (step, metrics, log)

  def flush(self) -> None:
    """Checks the newest metrics, waiting for the device; logs them if due.

    Raises:
      errors.UserError: the loss or the gradient is not finite, or step 0 of
        a round is not at chance.
    """
    if self._pending is None:
      return
    step, metrics, log = self._pending
    self._pending = None
    metrics = devices_lib.fetch(metrics)
    seconds = time.perf_counter() - self._time
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
    rate = {'images_per_second': self._images / seconds}
    self._job.log.write(record | metrics | rate)
    self.restart_clock()

  def _check(self, step: int, metrics: dict[str, Any]) -> None:
    where = f'{self._job.name} step {step}'
    for name in ('loss', 'grad_norm'):
      if not np.isfinite(metrics[name]):
        folder = self._job.folder / 'checkpoints'
        kept = sorted(int(p.name) for p in folder.glob('[0-9]*'))
        raise errors.UserError(
          f'{where}: {name} is {metrics[name]}; last good checkpoint:'
          f' {folder / str(kept[-1]) if kept else "none"}; lower the learning'
          ' rate or set clip_norm'
        )
    if step == 0 and 'chance_loss' in metrics:
      loss, chance = metrics['loss'], metrics['chance_loss']
      logit = metrics['max_abs_logit']
      # |d loss / d logit| ≤ the weights, and chance = log 2 · their mean.
      away = abs(loss - chance) / max(chance, 1)
      if away > 2 * _TOLERANCE or logit > _TOLERANCE:
        raise errors.UserError(
          f'{where}: loss {loss:.6f}, expected {chance:.6f} where θ = θ_ref,'
          f' largest |βΔ| {logit:.2g}; the two passes differ: try'
          ' --config.executor.remat=True, and check that dropout is off'
        )


def _evaluate(
  job: Job, state: state_lib.TrainState, step: int
) -> dict[str, Any]:
  """Scores every candidate; logs and returns the best one's record."""
  best = None
  for profile, params in state.candidates().items():
    scores = job.evaluate(params)
    selection = scores[job.metric]
    if not np.isfinite(selection):
      raise errors.UserError(
        f'{job.name} step {step}: {job.metric} of {profile} is {selection}'
      )
    if best is None or selection < best['selection']:
      best = {'profile': profile, 'selection': selection} | scores
  images = step * job.phase.batch_size
  record = {'stage': job.name, 'kind': 'eval', 'step': step, 'images': images}
  job.log.write(record | best)
  return best


def _due(step: int, images: int, batch: int) -> bool:
  """Whether a multiple of `images` falls on this step; 0 is never."""
  return images > 0 and step % max(1, round(images / batch)) == 0


def _promote(
  job: Job, checkpoints: checkpoint.Checkpoints, target: Any, last: int
) -> Promotion:
  """The best evaluated checkpoint, step 0 included, else the last one."""
  evaluations = [r for r in job.log.read(job.name) if r['kind'] == 'eval']
  if job.evaluate is None:
    candidates = checkpoints.restore(last, target).candidates()
    profile, params = next(iter(candidates.items()))
    return Promotion(params, last, profile, None)
  best = min(evaluations, key=lambda r: r['selection'])
  step, profile = best['step'], best['profile']
  if step == 0:
    return Promotion(job.start(), 0, 'params', best['selection'])
  state = checkpoints.restore(step, target)
  params = state.candidates()[profile]
  return Promotion(params, step, profile, best['selection'])


def run(job: Job) -> Promotion:
  """Trains a phase to its end, resuming where an earlier call stopped.

  Raises:
    SystemExit: with status EX_TEMPFAIL after SIGTERM; the state is saved.
    errors.UserError: see `_Logger.flush`; or the data is at fault.
  """
  phase, executor, steps = job.phase, job.executor, job.phase.steps()
  executor.check_batch(phase.batch_size, job.accumulate)
  step_fn = executor.compile_step(
    step_lib.train_step,
    model=job.model,
    phase=phase.static(),
    sampler=job.sampler,
    accumulate=job.accumulate,
  )
  create = functools.partial(state_lib.create, phase=phase)
  fresh = lambda key: create(job.model.init(key))
  shapes = jax.eval_shape(fresh, rng.stream(0))
  target = checkpoint.abstract(shapes, executor.state_shardings(shapes))
  hyper, key = executor.replicate(
    (
      state_lib.Hyper.of(phase, job.round_index),
      rng.stream(job.seed, 'train', job.name),
    )
  )
  with (
    checkpoint.Checkpoints(job.folder / 'checkpoints') as checkpoints,
    _termination() as terminated,
  ):
    start = checkpoints.latest_step() or 0
    if not start:
      state = executor.make_state(create, job.start())
    else:
      state = checkpoints.restore(start, target)
      _LOGGER.info('%s resumes at step %d of %d', job.name, start, steps)
    job.log.rewind(job.name, start)
    evals = [r for r in job.log.read(job.name) if r['kind'] == 'eval']
    evaluated = {r['step']: r['selection'] for r in evals}
    logger = _Logger(job)
    bar = tqdm.tqdm(
      total=steps * phase.batch_size,
      initial=start * phase.batch_size,
      desc=job.name,
      unit='img',
      unit_scale=True,
      disable=None,
    )
    rows = batches(job, start)
    with bar, contextlib.closing(rows):
      for step in range(start, steps + 1):
        last, metric, rank = step == steps, None, None
        due = last or _due(step, phase.eval_images, phase.batch_size)
        if job.evaluate and due and step not in evaluated:
          logger.flush()
          metric = _evaluate(job, state, step)['selection']
          if metric < min(evaluated.values(), default=math.inf):
            rank = metric  # of equals the first one is kept
          evaluated[step] = metric
          bar.set_postfix({job.metric: f'{metric:.4g}'})
        save = last or _due(step, phase.save_images, phase.batch_size)
        if (save or metric is not None or terminated.is_set()) and step > start:
          logger.flush()
          checkpoints.save(state, step, rank)
          logger.restart_clock()
        if terminated.is_set():
          checkpoints.wait()
          _LOGGER.warning('%s: SIGTERM; saved step %d', job.name, step)
          raise SystemExit(EX_TEMPFAIL)
        if last:
          break
        with executor.no_implicit_transfers():
          real, fake = next(rows)
          state, metrics = step_fn(
            state, job.reference, job.frozen, real, fake, hyper, key
          )
        log = _due(step, phase.log_images, phase.batch_size)
        logger.push(step, metrics, log)
        bar.update(phase.batch_size)
    checkpoints.wait()
    return _promote(job, checkpoints, target, steps)
