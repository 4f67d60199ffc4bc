"""What a run takes of each device, and the settings with which it fits.

All of it is counted from shapes, before anything is compiled. Neither setting
changes what a step computes beyond its rounding.
"""

import bisect
from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddo_jax import errors
from ddo_jax import rng
from ddo_jax import settings as settings_lib
from ddo_jax.data import codec
from ddo_jax.method import likelihood
from ddo_jax.runtime import layout as layout_lib
from ddo_jax.runtime import memory
from ddo_jax.training import state as state_lib
from ddo_jax.training import step as step_lib

# The share of a device's memory that 'auto' plans with, for a count may be a
# fifth below what XLA takes.
_PLANNED = 0.8
# Real rows of a device's microbatch below which blocks are recomputed.
_FEW = 4
_CALL = 1_000  # images a call of the sampler, where that many fit


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
  """What one phase trains.

  Stages of equal models are equal, so that what is counted of one, which takes
  seconds, is counted once for whatever devices and settings are tried.

  Attributes:
    name: the name of the phase in the config, such as 'ddo'.
    phase: the phase at its first round.
    build: which activations inside a block are recomputed -> the model.
    frozen: the shapes of the frozen weights.
    sampler: draws fakes inside the step; None where that is not needed.
  """

  name: str
  phase: Any
  build: Callable[[bool | str], Any]
  frozen: likelihood.Frozen
  sampler: Any

  @functools.cached_property
  def _key(self) -> tuple[Any, ...]:
    leaves, tree = jax.tree.flatten(self.frozen)
    model = self.build(False)
    return self.name, self.phase, model, self.sampler, tree, *leaves

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, Stage) and self._key == other._key

  def __hash__(self) -> int:
    return hash(self._key)


class Fit(NamedTuple):
  """How a run's steps fit into the devices.

  Attributes:
    accumulate: microbatches a step.
    remat: which activations inside a block are recomputed.
    counted: the most bytes that a step takes of a device; None where the
      devices' memory is not known, and nothing is counted.
    room: the bytes that there are; None where that is not known.
  """

  accumulate: int
  remat: bool | str
  counted: int | None = None
  room: int | None = None

  def __str__(self) -> str:
    """For example '16 microbatches a step, remat off: 61.0 of 80.0 GiB'."""
    remat = self.remat
    if isinstance(remat, bool):
      remat = 'on' if remat else 'off'
    parts = 'microbatch' if self.accumulate == 1 else 'microbatches'
    line = f'{self.accumulate} {parts} a step, remat {remat}'
    if self.counted is None or self.room is None:
      return line
    return f'{line}: {gib(self.counted)} of {gib(self.room)} GiB a device'


class DoesNotFit(errors.UserError):
  """These devices hold too little, whatever the microbatches and remat are."""


def gib(size: float) -> str:
  """Returns a number of bytes in GiB, such as '61.02'."""
  return f'{size / 2**30:.4g}'


def stored_dtype(model: likelihood.LikelihoodModel) -> Any:
  """Returns the type of a model's rows as they are stored."""
  return jnp.float32 if isinstance(model.codec, codec.Latents) else jnp.uint8


def make_rows(stage: Stage, model: Any, count: int) -> Any:
  """Returns the shapes of a `step.Microbatch` of `count` real rows."""
  shape = model.codec.stored_shape(model.example_shape)
  dtype = stored_dtype(model)
  phase = stage.phase
  # MLE on the pool reads it in the place of the real rows.
  pairs = phase.objective.contrastive and phase.used_negatives.needs_pool

  def make():
    label = jnp.zeros(count, jnp.int32)
    ids = jnp.zeros(count, jnp.uint32)
    stored = jnp.zeros((count, *shape), dtype)
    fake = {'stored': stored, 'label': label}
    return step_lib.Microbatch(
      real={**fake, 'id': ids, 'other_label': label},
      fake=fake if pairs else None,
      keys=rng.per_example(rng.stream(0), ids),
      dropped=jnp.zeros(count, jnp.bool_),
    )

  return jax.eval_shape(make)


@functools.lru_cache(maxsize=32)
def param_shapes(stage: Stage) -> likelihood.Params:
  """Returns the shapes of θ."""
  return jax.eval_shape(stage.build(False).init, rng.stream(0))


@functools.lru_cache(maxsize=32)
def reference_shapes(stage: Stage) -> likelihood.Params:
  """Returns the shapes of θ_ref, as a step takes it."""
  return jax.eval_shape(stage.build(False).rules.reduce, param_shapes(stage))


@functools.lru_cache(maxsize=32)
def state_shapes(stage: Stage) -> state_lib.TrainState:
  """Returns the shapes of a phase's training state."""
  model = stage.build(False)

  def create(params):
    return state_lib.at_start(params, model.rules, stage.phase)

  return jax.eval_shape(create, param_shapes(stage))


def _averages(stage: Stage, layout: layout_lib.Layout, params: Any) -> int:
  """Returns the bytes of the averages of params, on each device."""
  names = stage.phase.averages.names()
  return len(names) * layout.share(params, 'ema')


def standing(stage: Stage, layout: layout_lib.Layout) -> dict[str, int]:
  """Returns the bytes that stand on each device throughout a phase.

  Returns:
    Those of 'params' (what is trained), 'moments' (the optimizer's state and
    the number of the step), 'averages', 'reference' and 'frozen'. An offloaded
    reference counts: how early XLA brings it for a microbatch is not known.
  """
  state = state_shapes(stage)
  averages = 0
  if 'ema' not in layout.offload:
    averages = _averages(stage, layout, state.params)
  return {
    'params': layout.share(state.params, 'params'),
    'moments': layout.share(state.opt_state, 'opt_state')
    + layout.share(state.step, 'step'),
    'averages': averages,
    'reference': layout.share(reference_shapes(stage), 'reference'),
    'frozen': layout.share(stage.frozen),
  }


def standing_to_sample(
  stage: Stage, layout: layout_lib.Layout
) -> dict[str, int]:
  """Returns the bytes that stand on each device while candidates are drawn of.

  Beside what stands in any case, see `standing`, these are the 'merged' weights
  of what is trained in factors.
  """
  merged = 0
  if stage.phase.lora.rank:
    merged = layout.share(param_shapes(stage))
  return standing(stage, layout) | {'merged': merged}


@functools.lru_cache(maxsize=256)
def _gradient_bytes(stage: Stage, remat: bool | str, count: int) -> int:
  """Returns the most bytes that computing a gradient makes at once.

  Args:
    stage: what is trained.
    remat: which activations inside a block are recomputed.
    count: the real rows of a device.
  """
  model = stage.build(remat)
  rows = make_rows(stage, model, count)
  trained = state_shapes(stage).params
  reference = reference_shapes(stage)

  def gradient(trained, reference, frozen, rows):
    _, _, grads = step_lib.gradient_of(
      trained, reference, frozen, rows, model, stage.phase, stage.sampler
    )
    return grads

  return memory.peak(gradient, trained, reference, stage.frozen, rows)


def step_parts(
  stage: Stage, layout: layout_lib.Layout, accumulate: int, remat: bool | str
) -> dict[str, int]:
  """Returns the bytes that a training step takes of each device, by part.

  Args:
    stage: what is trained.
    layout: the devices.
    accumulate: microbatches a step.
    remat: which activations inside a block are recomputed.

  Returns:
    What stands, see `standing`, and beside it the 'gradient', with its sum over
    microbatches, and the 'activations', all else that computing the gradient of
    a device's rows holds at once.
  """
  parts = layout.num_devices * accumulate
  count = math.ceil(stage.phase.batch_size / parts)
  made = _gradient_bytes(stage, remat, count)
  params = state_shapes(stage).params
  # A gradient is made on every device, and kept as the moments are.
  share = layout.share(params, 'gradient')
  activations = made - memory.size_of(params)
  if 'ema' in layout.offload:
    # They come when the activations have gone.
    activations = max(activations, _averages(stage, layout, params))
  return standing(stage, layout) | {
    'gradient': share if accumulate == 1 else 2 * share,
    'activations': activations,
  }


def step_bytes(
  stage: Stage, layout: layout_lib.Layout, accumulate: int, remat: bool | str
) -> int:
  """Returns the bytes that a training step takes of each device in all.

  See `step_parts`.
  """
  return sum(step_parts(stage, layout, accumulate, remat).values())


def sample_call(
  stage: Stage, sampler: Any, rows: int
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """Returns a device's part of a call of the sampler, to be counted.

  Args:
    stage: the phase that trains the model.
    sampler: the sampler.
    rows: the number of images that the device draws.

  Returns:
    (the function, the shapes of its arguments).
  """
  model = stage.build(False)

  def draw(params, frozen, labels, ids):
    keys = rng.per_example(rng.stream(0), ids)
    return model.draw(params, frozen, labels, keys, sampler)

  labels = jax.ShapeDtypeStruct((rows,), jnp.int32)
  ids = jax.ShapeDtypeStruct((rows,), jnp.uint32)
  return draw, (param_shapes(stage), stage.frozen, labels, ids)


@functools.lru_cache(maxsize=64)
def sample_bytes(stage: Stage, sampler: Any, rows: int) -> int:
  """Returns the bytes that a call of the sampler takes of a device.

  What stands there is not counted.

  Args:
    stage: the phase that trains the model.
    sampler: the sampler.
    rows: the number of images that the device draws.
  """
  draw, shapes = sample_call(stage, sampler, rows)
  return memory.peak(draw, *shapes)


def _first(
  choices: Sequence[int], counted: Callable[[int], int], room: float
) -> int | None:
  """Returns the first of ever smaller choices that fits; None if none does."""

  def fits(choice):
    return counted(choice) <= room

  if choices and fits(choices[0]):
    return choices[0]
  index = bisect.bisect_left(choices, True, key=fits)
  return choices[index] if index < len(choices) else None


def _options(
  stages: Sequence[Stage],
  layout: layout_lib.Layout,
  accumulate: Any,
  remat: Any,
) -> list[tuple[bool | str, list[int]]]:
  """Returns (remat, numbers of microbatches) to try, the fastest ones first.

  Blocks are recomputed where less than a few rows would be left without, and
  their products with weights where less would be left with these.

  Args:
    stages: what is trained.
    layout: the devices.
    accumulate: the executor's setting.
    remat: the executor's setting.
  """
  remats = [remat]
  if remat == settings_lib.AUTO:
    remats = [False, settings_lib.DOTS, True]
  if accumulate != settings_lib.AUTO:
    return [(remat, [accumulate]) for remat in remats]
  rows = [stage.phase.batch_size // layout.num_devices for stage in stages]
  shared = math.gcd(*rows)
  counts = [n for n in range(1, shared + 1) if shared % n == 0]
  few = [n for n in counts if n == 1 or min(rows) // n >= _FEW]
  return [*((remat, few) for remat in remats), (remats[-1], counts)]


def plan(
  stages: Sequence[Stage],
  settings: layout_lib.ExecutorConfig,
  layout: layout_lib.Layout,
) -> Fit:
  """Returns the settings of a run's steps, found where they are 'auto'.

  Args:
    stages: what is trained, one or more.
    settings: the executor's.
    layout: the devices.

  Raises:
    errors.UserError: rows do not divide over devices and microbatches, or the
      devices are known to hold too little; `DoesNotFit` where no other setting
      of the two would do.
  """
  auto = settings.accumulate == settings_lib.AUTO
  given = 1 if auto else settings.accumulate
  problems = errors.Problems()
  for stage in stages:
    with problems.gather():
      name = f'config.{stage.name}.batch_size'
      layout.check_batch(stage.phase.batch_size, given, name)
  problems.raise_any()
  room = layout.room()
  if room is None:
    remat = settings.remat
    return Fit(given, False if remat == settings_lib.AUTO else remat)

  @functools.cache
  def counted(accumulate, remat):
    return max(step_bytes(stage, layout, accumulate, remat) for stage in stages)

  def search(options, share):
    for remat, choices in options:
      count = functools.partial(counted, remat=remat)
      found = _first(choices, count, share * room)
      if found:
        return Fit(found, remat, count(found), room)
    return None

  options = _options(stages, layout, settings.accumulate, settings.remat)
  fit = search(options, _PLANNED) or search(options, 1)
  if fit:
    return fit
  remat, choices = options[-1]
  least = Fit(choices[-1], remat, counted(choices[-1], remat=remat), room)
  free = _options(stages, layout, settings_lib.AUTO, settings_lib.AUTO)
  other = search(free, _PLANNED) or search(free, 1)
  needed = (
    f'a step needs {gib(least.counted or 0)} GiB a device of {gib(room)}'
    f' (executor.accumulate={least.accumulate}, remat={least.remat})'
  )
  if not other:
    raise DoesNotFit(
      f'{needed}: take more devices and executor.kind=fsdp, or a smaller model'
    )
  raise errors.UserError(
    f'{needed}: --config.executor.accumulate={other.accumulate}'
    f' --config.executor.remat={other.remat} would fit, with'
    f' {gib(other.counted or 0)} GiB'
  )


def call_size(
  stage: Stage,
  sampler: Any,
  settings: layout_lib.ExecutorConfig,
  layout: layout_lib.Layout,
) -> int:
  """Returns the number of images in a call of the sampler.

  Args:
    stage: the phase that trains the model; its state stands meanwhile.
    sampler: the sampler.
    settings: the executor's.
    layout: the devices.
  """
  if settings.sample_batch != settings_lib.AUTO:
    return settings.sample_batch
  room = layout.room()
  if room is None:
    return _CALL
  taken = sum(standing_to_sample(stage, layout).values())
  choices = [_CALL, *(2**k for k in range(9, -1, -1))]

  def counted(count):
    rows = math.ceil(count / layout.num_devices)
    return taken + sample_bytes(stage, sampler, rows)

  return _first(choices, counted, _PLANNED * room) or 1
