"""The probe: which β, α and learning rate a few dozen steps ask for.

The first steps of a round all go the same way: Adam does not see the scale of
the loss, and where θ = θ_ref the gradient is −(β/2)[∇E log p(real) − α ∇E log
p(fake)], so that β is only a scale. `measure` takes that direction from a few
dozen steps that are thrown away, and then goes along it without training:
θ_ref + reach · d for ever longer reaches, of which each costs a forward pass.
There Δ = log p_θ − log p_ref of real and fake rows shows two things:

* the margin, E_real Δ − E_fake Δ, which is of first order, grows with the
  reach, and then falls behind: the direction has little more to tell;
* the fall, −E Δ of both kinds, which is of second order, for the reference
  had the best likelihood of its surroundings, overtakes it meanwhile.

β brakes: where |Δ| is some 1/β a row stops to pull. So `propose` takes β =
1/spread(Δ) of real rows where the margin has fallen behind its straight line by
half: there, and not before, a round is to be held. That does not hang on the
learning rate, for a round at a higher one is there sooner. A model with an
exact likelihood that has converged shows no margin: both of its gradients
vanish, and there is nothing to propose (`Proposal.fault`).
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.data import loader
from ddo_jax.method import likelihood
from ddo_jax.runtime import memory
from ddo_jax.training import loop as loop_lib
from ddo_jax.training import state as state_lib
from ddo_jax.training import step as step_lib

_LOGGER = logging.getLogger(__name__)

STEPS = 32  # that are taken and thrown away
ROWS = 1024  # real rows, and as many second ones, at each reach
_RATE = 1 / 128  # of the config's peak: the steps' learning rate
_BETA = 0.01  # of the steps: nothing brakes them
_FACTOR = math.sqrt(2)  # between one reach and the next
_REACHES = 40  # at most
_AGAIN = 4  # times that a direction is taken anew with smaller steps
_BEHIND = 0.5  # of its straight line, where a parabola has its summit
_LINEAR = 4.0  # first reaches: where it may do so, for the line to be seen
_FALL = 10.0  # margins: the farthest reach, where no margin ends before
_SIGNIFICANT = 4.0  # standard errors
_WIDTH = 3.0  # a range is from its centre/3 to its centre·3
# A round comes past every reach up to its last, so that its rate may be rough.
_RATE_WIDTH = 1.5
_RATE_OF_REACH = 0.15  # the learning rate, as a share of that reach
_SEPARATED = 0.5  # of the largest separation, for a noise level to tell much
_WIDEN = 1.25  # p_std, where high noise separates,
_WIDEST = 3.0  # up to the widest of the paper


@dataclasses.dataclass(frozen=True)
class Range:
  """A number to start from, and the lowest and highest worth a try."""

  centre: float
  low: float
  high: float

  @classmethod
  def around(cls, centre: float, width: float = _WIDTH) -> 'Range':
    """Returns the range from centre/width to centre·width."""
    return cls(centre, centre / width, centre * width)


_RANGES = ('alpha', 'beta', 'learning_rate')
# Near there both kinds of rows pull nearly alike at α = 1. A smaller α holds a
# round before that place; a larger one must be held by a larger β. The best
# members of full sweeps lay between 1.3 and 3.6.
_ALPHA = Range(centre=2.0, low=1.0, high=4.0)


@dataclasses.dataclass(frozen=True)
class Proposal:
  """What a probe proposes for a round.

  Attributes:
    alpha: of α.
    beta: of β at α = 1; at another α it is α times that, see `coupled`.
    learning_rate: of the peak learning rate.
    p_std: the standard deviation of ln σ, wider than the round's where high
      noise still separates; None where the noise law has none. A sweep takes it
      from its second round on.
    fault: '' where there is a signal; else why nothing can be proposed: the
      ranges are then the config's own numbers.
    images: what the probe cost, in forward passes of one row and their
      equivalents; a training step of a pair costs 8.
    measured: what it saw, as JSON values.
  """

  alpha: Range
  beta: Range
  learning_rate: Range
  p_std: float | None
  fault: str
  images: int
  measured: dict[str, Any]

  def ranges(self) -> dict[str, tuple[float, float]]:
    """Returns (lowest, highest) by name, as `centre` names them.

    β is at α = 1: what is drawn from the ranges goes through `coupled`.
    """
    ranges = {name: getattr(self, name) for name in _RANGES}
    found = {name: (r.low, r.high) for name, r in ranges.items()}
    if self.p_std is not None:
      found['p_std'] = (self.p_std, self.p_std)
    return found

  def centre(self) -> dict[str, float]:
    """Returns the setting to begin with: numbers of a phase by name."""
    found = {name: getattr(self, name).centre for name in _RANGES}
    if self.p_std is not None:
      found['p_std'] = self.p_std
    return coupled(found)

  def to_json(self) -> dict[str, Any]:
    """Returns the proposal as JSON values."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, value: dict[str, Any]) -> 'Proposal':
    """Returns the proposal that `to_json` wrote."""
    ranges = {name: Range(**value[name]) for name in _RANGES}
    return cls(**value | ranges)


def coupled(settings: dict[str, float]) -> dict[str, float]:
  """Returns settings whose β goes with their α.

  Args:
    settings: numbers of a phase by name; 'beta' is the one at α = 1.
  """
  return settings | {'beta': settings['alpha'] * settings['beta']}


@dataclasses.dataclass(frozen=True)
class Point:
  """What rows say of a place on the line.

  Attributes:
    reach: how far it is from θ_ref, in learning rates: steps of Adam at rate λ
      that all go the same way have gone n λ after n steps.
    real: [N] Δ of real rows, in nats.
    fake: [N] Δ of the second rows, the i-th under the i-th real row's noise.
    noise_bin: [N] int, the bin of each pair's noise level.
  """

  reach: float
  real: np.ndarray
  fake: np.ndarray
  noise_bin: np.ndarray

  @property
  def margin(self) -> float:
    """E_real Δ − E_fake Δ."""
    return float(np.mean(self.real - self.fake))

  @property
  def error(self) -> float:
    """The standard error of the margin."""
    return _error(self.real - self.fake)

  @property
  def significance(self) -> float:
    """The margin in standard errors; 0 where nothing moved."""
    return self.margin / self.error if self.error else 0.0

  @property
  def fall(self) -> float:
    """How far Δ has fallen for both kinds of rows, on average."""
    return -float(np.mean(self.real) + np.mean(self.fake)) / 2

  def to_json(self) -> dict[str, float]:
    """Returns the point's numbers."""
    return {
      'reach': self.reach,
      'margin': self.margin,
      'error': self.error,
      'real_mean': float(np.mean(self.real)),
      'real_std': float(np.std(self.real)),
      'fake_mean': float(np.mean(self.fake)),
      'fake_std': float(np.std(self.fake)),
    }

  def by_noise_level(self) -> list[dict[str, float]]:
    """Returns what each noise level that has rows says, from low to high."""
    levels = []
    for level in np.unique(self.noise_bin):
      rows = self.noise_bin == level
      difference = self.real[rows] - self.fake[rows]
      spread = float(
        np.sqrt((self.real[rows].var() + self.fake[rows].var()) / 2)
      )
      error = _error(difference)
      margin = float(np.mean(difference))
      levels.append(
        {
          'bin': int(level),
          'rows': int(np.sum(rows)),
          'margin': margin,
          'significance': margin / error if error else 0.0,
          'real_std': float(np.std(self.real[rows])),
          'fake_std': float(np.std(self.fake[rows])),
          'separation': margin / spread if spread else 0.0,
        }
      )
    return levels


def _error(values: np.ndarray) -> float:
  """Returns the standard error of a mean of values [N]."""
  if len(values) < 2:
    return 0.0
  return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def translate(beta: float, from_dim: int, to_dim: int) -> float:
  """Returns a β that is known at one resolution for another one.

  Δ is a sum over the dimensions of a row, and so β goes as 1/dim. It is a first
  guess for a model that is as good in each dimension; the probe measures.

  Args:
    beta: β at `from_dim`.
    from_dim: H · W · C of the rows that it is known for, or their tokens.
    to_dim: the same of the rows that it is wanted for.
  """
  return beta * from_dim / to_dim


def _between(points: Sequence[Point], reach: float) -> Point:
  """Returns the rows' Δ at a reach between the first and the last point's."""
  reaches = [point.reach for point in points]
  after = min(max(int(np.searchsorted(reaches, reach)), 1), len(points) - 1)
  near = points[after - 1]
  far = points[after]
  share = (reach - near.reach) / (far.reach - near.reach)
  return dataclasses.replace(
    near,
    reach=reach,
    real=near.real + share * (far.real - near.real),
    fake=near.fake + share * (far.fake - near.fake),
  )


def _is_behind(points: Sequence[Point]) -> list[bool]:
  """Says of each point whether the margin has fallen behind its line there.

  While it is of first order the margin over the reach stays what it is. (It
  may rise at first, and far out everything grows again.)
  """
  slopes = np.array([point.margin / point.reach for point in points])
  steepest = np.maximum.accumulate(slopes)
  falls = np.array([point.fall > _FALL * point.margin for point in points])
  return list((slopes < _BEHIND * steepest) | falls)


def _end(points: Sequence[Point]) -> float:
  """Returns the reach where the margin falls behind; 0 if it is too near."""
  behind = _is_behind(points)
  after = behind.index(True) if any(behind) else len(points) - 1
  if points[after].reach < _LINEAR * points[0].reach:
    return 0.0
  near = points[after - 1]
  far = points[after]
  steepest = max(point.margin / point.reach for point in points[: after + 1])
  wanted = _BEHIND * steepest
  before = near.margin / near.reach
  there = far.margin / far.reach
  if there >= wanted:  # it is the fall that decides
    return far.reach
  share = (before - wanted) / (before - there)
  return float(near.reach + share * (far.reach - near.reach))


def _widened(p_std: float, levels: list[dict[str, float]]) -> float:
  """Returns p_std, wider where high noise still tells real from fake.

  Args:
    p_std: the round's.
    levels: see `Point.by_noise_level`.
  """
  most = max(level['separation'] for level in levels)
  last = max(level['bin'] for level in levels)
  high = [level for level in levels if level['bin'] > last * 0.75]
  telling = [
    level['significance'] > _SIGNIFICANT
    and level['separation'] > _SEPARATED * most
    for level in high
  ]
  if not telling or not all(telling):
    return p_std
  return max(p_std, min(p_std * _WIDEN, _WIDEST))


def propose(
  points: Sequence[Point], phase: Any, images: int = 0
) -> Proposal | None:
  """Proposes settings from what was seen along the line.

  Args:
    points: by ascending reach.
    phase: the phase at its round, whose own numbers are proposed where there
      is no signal.
    images: what they cost.

  Returns:
    None where the first point is past the place that is looked for: shorter
    steps are wanted.
  """
  measured: dict[str, Any] = {'line': [point.to_json() for point in points]}
  significance = max(point.significance for point in points)
  measured['significance'] = significance
  p_std = getattr(phase.noise, 'p_std', None)
  p_std = None if p_std is None else float(p_std)
  if significance < _SIGNIFICANT:
    alpha = float(getattr(phase.objective, 'alpha', 1.0))
    return Proposal(
      alpha=Range.around(alpha, 1.0),
      beta=Range.around(float(phase.objective.beta) / alpha),
      learning_rate=Range.around(float(phase.optimizer.learning_rate)),
      p_std=p_std,
      fault=(
        'no first-order signal: real and fake rows move alike'
        f' ({significance:.1f} standard errors apart, wanted'
        f' {_SIGNIFICANT:.0f}), as those of a converged model with an exact'
        ' likelihood do: expect nothing of these rounds, or start from an'
        ' earlier checkpoint'
      ),
      images=images,
      measured=measured,
    )
  end = _end(points)
  if not end:
    return None
  there = _between(points, end)
  # Fakes may be anywhere: those that are far down pull no more. Nor do the few
  # real rows whose Δ is many times that of most, and so the spread is by
  # quartiles: of a normal law it is the standard deviation.
  spread = float(stats.iqr(there.real, scale='normal'))
  levels = there.by_noise_level()
  measured |= {
    'end': end,
    'spread': spread,
    'there': there.to_json(),
    'by_noise_level': levels,
  }
  return Proposal(
    alpha=_ALPHA,
    beta=Range.around(1 / spread),
    learning_rate=Range.around(_RATE_OF_REACH * end, _RATE_WIDTH),
    p_std=None if p_std is None else _widened(p_std, levels),
    fault='',
    images=images,
    measured=measured,
  )


def _numbers(job: loop_lib.Job, phase: Any) -> Any:
  """Puts the model's and a phase's numbers on the devices."""
  numbers = jax.tree.map(jnp.float32, (job.model, phase))
  return job.executor.replicate(numbers)


def _direction(job: loop_lib.Job, steps: int, rate: float) -> likelihood.Params:
  """Returns θ after some steps of a rate so small that Δ stays of first order.

  They are the loop's compiled steps, at another rate and another β.
  """
  phase = job.phase
  optimizer = phase.optimizer

  def create(params):
    state = state_lib.at_start(params, job.model.rules, phase)
    # A warm-up gives the step 0 no rate.
    return state_lib.at_step(state, jnp.int32(1))

  name = f'{job.name}/probe'
  rows = dataclasses.replace(
    job,
    name=name,
    clock=name,
    phase=dataclasses.replace(phase, images=steps * phase.batch_size),
  )
  step_fn = job.executor.compile_step(
    step_lib.train_step, sampler=job.sampler, accumulate=job.accumulate
  )
  state = job.executor.make_state(create, job.start())
  key = job.executor.replicate(rng.stream(job.seed, 'train', name))
  unbraked = {'beta': _BETA}
  if hasattr(phase.objective, 'alpha'):
    unbraked['alpha'] = 1.0
  objective: Any = phase.objective
  for step, (real, fake) in enumerate(loop_lib.batches(rows, 0), 1):
    seen = jnp.float32(step * phase.batch_size)
    factor = float(optimizer.factor(seen, phase.images))
    now = dataclasses.replace(
      phase,
      objective=dataclasses.replace(objective, **unbraked),
      optimizer=dataclasses.replace(optimizer, learning_rate=rate / factor),
    )
    model, now = _numbers(job, now)
    state, _ = step_fn(
      state, job.reference, job.frozen, real, fake, model, now, key
    )
  return state.params


@jax.jit
def _along(start: Any, moved: Any, reach: jax.Array) -> Any:
  """Returns start + reach · (moved − start)."""
  return jax.tree.map(lambda a, b: a + reach * (b - a), start, moved)


@functools.partial(jax.jit, static_argnames='sampler')
def _log_ratios(weights: Any, rows: Any, *, sampler: Any) -> jax.Array:
  """Returns [B,3]: Δ of real and of second rows, and the bin of their noise."""
  params, reference, frozen, model, phase, key = weights
  reference = memory.on_device(reference)
  keys = rng.per_example(key, rows['real']['id'])
  dropped = jnp.zeros(keys.shape, bool)
  microbatch = step_lib.Microbatch(
    rows['real'], rows.get('fake'), keys, dropped
  )
  pairs = step_lib.make_pairs(
    microbatch, reference, frozen, model, phase, sampler
  )
  batch = step_lib.interleave(pairs.real, pairs.other)
  keys = step_lib.interleave(pairs.keys, pairs.keys)
  log_ratio, info = model.log_ratio(params, reference, frozen, batch, keys)
  real, other = step_lib.split_pairs(log_ratio)
  noise_bin, _ = step_lib.split_pairs(info['noise_bin'])
  return jnp.stack([real, other, noise_bin.astype(real.dtype)], axis=1)


def _rows(job: loop_lib.Job) -> dict[str, Any]:
  """Returns the pairs of which Δ is taken, whole on every process."""
  count = max(ROWS // job.phase.batch_size, 1) * job.phase.batch_size
  needs_label = job.phase.used_negatives.needs_other_label
  rows = {}
  for name, source in (('real', job.real), ('fake', job.fake)):
    if source is None:
      continue
    seed = rng.order_seed(job.seed, f'{job.name}/probe', f'{name}/measured')
    stream = loader.batches(
      source, seed, count, 0, 1, other_label=needs_label, workers=0
    )
    rows[name] = next(iter(stream))
  return rows


def _line(
  job: loop_lib.Job, moved: likelihood.Params, unit: float
) -> Iterator[Point]:
  """Yields what rows say at ever longer reaches, from `moved` on.

  Args:
    job: the round's.
    moved: θ at the reach `unit`.
    unit: see `Point.reach`.
  """
  executor = job.executor
  start = job.start()
  rows = _rows(job)
  model, phase = _numbers(job, job.phase)
  key = executor.replicate(rng.stream(job.seed, 'probe', job.name))
  fn = functools.partial(_log_ratios, sampler=job.sampler)
  batch = job.phase.batch_size // job.accumulate
  reach = 1.0
  for _ in range(_REACHES):
    params = executor.make_state(
      _along, start, moved, executor.replicate(jnp.float32(reach))
    )
    weights = (params, job.reference, job.frozen, model, phase, key)
    found = np.concatenate(list(executor.map_rows(fn, weights, [rows], batch)))
    real, fake, noise_bin = found.astype(np.float64).T
    if not np.all(np.isfinite(found)):
      return
    yield Point(reach * unit, real, fake, noise_bin.astype(int))
    reach *= _FACTOR


def _is_past(points: Sequence[Point]) -> bool:
  """Whether the margin is surely behind its line: at the last two points."""
  return sum(_is_behind(points)[-2:]) == 2


def measure(job: loop_lib.Job) -> Proposal:
  """Probes a round: a few dozen steps that are thrown away, and forward passes.

  Args:
    job: the round's. Nothing of its folder is read or written.

  Returns:
    What it proposes. It is a pure function of the job.

  Raises:
    errors.UserError: the objective has no β, or the phase too few steps.
  """
  phase = job.phase
  if not phase.objective.contrastive or not hasattr(phase.objective, 'beta'):
    raise errors.UserError(
      f'config.ddo.objective is {phase.objective}, which has no β to probe: set'
      ' config.tune.members=0'
    )
  steps = min(STEPS, phase.steps() - 1)
  if steps < 1:
    raise errors.UserError(
      f'config.ddo.images is {phase.images}, one step of'
      f' {phase.batch_size}: a probe wants more'
    )
  rate = float(phase.optimizer.learning_rate) * _RATE
  images = 0
  for _ in range(_AGAIN):
    moved = _direction(job, steps, rate)
    images += 8 * steps * phase.batch_size
    points: list[Point] = []
    for point in _line(job, moved, steps * rate):
      points.append(point)
      images += 4 * len(point.real)
      if _is_past(points):
        break
    proposal = propose(points, phase, images) if points else None
    if proposal is not None:
      return proposal
    rate /= 16
  raise errors.UserError(
    f'{job.name}: the probe found no step that is small enough: lower'
    ' config.ddo.optimizer.learning_rate'
  )
