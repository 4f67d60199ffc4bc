"""Times the calls of a run on the devices at hand, on rows of zeros."""

from collections.abc import Callable
from collections.abc import Iterator
import functools
import itertools
import sys
import time
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import rng
from ddo_jax.data import loader
from ddo_jax.data import sources
from ddo_jax.evaluation import evaluator as evaluator_lib
from ddo_jax.evaluation import features
from ddo_jax.evaluation import protocols
from ddo_jax.evaluation.networks import extract
from ddo_jax.method import generate
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import processes
from ddo_jax.training import fit as fit_lib
from ddo_jax.training import state as state_lib
from ddo_jax.training import step as step_lib
from ddo_jax.training import workspace

_STEPS = 10  # that are timed
_LEAST = 2.0  # seconds that calls are repeated for, if they are fast


class Times(NamedTuple):
  """The time of a call.

  Attributes:
    seconds: of one call.
    first: what the first call takes beside, to trace and compile [s].
  """

  seconds: float
  first: float


def _timed(call: Callable[[], Any], count: int) -> Times:
  """Times a call, the median of blocks of `count` of them."""

  def block(calls):
    start = time.perf_counter()
    for _ in range(calls):
      result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls

  first = block(1)
  found = [block(count)]
  while sum(found) * count < _LEAST:
    found.append(block(count))
  seconds = float(np.median(found))
  return Times(seconds, max(first - seconds, 0.0))


def _zeros(shapes: Any, executor: devices_lib.Executor) -> Any:
  """Makes arrays of some shapes on the devices."""

  def make():
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

  return executor.make_state(make)


def _batches(
  stage: fit_lib.Stage, executor: devices_lib.Executor, rows: Any
) -> Iterator[Any]:
  """Yields batches of zeros, shuffled and placed as the loop does it.

  Args:
    stage: what is trained.
    executor: the devices.
    rows: the shapes of the rows as stored; None yields None.
  """
  if rows is None:
    return itertools.repeat(None)
  size = stage.phase.batch_size
  shape = rows['stored']
  source = sources.ArraySource(
    name='rows of zeros',
    stored=np.zeros((size, *shape.shape[1:]), shape.dtype),
    classes=np.zeros(size, np.int64),
  )
  stream = loader.batches(
    source,
    seed=0,
    batch_size=size,
    start_step=0,
    stop_step=sys.maxsize,
    process_index=processes.index(),
    process_count=processes.count(),
    other_label=stage.phase.used_negatives.needs_other_label,
  )
  return map(executor.place_batch, stream)


def step(
  stage: fit_lib.Stage, executor: devices_lib.Executor, fit: fit_lib.Fit
) -> Times:
  """Times the training step of a phase, with reading and placing its rows.

  Args:
    stage: what is trained.
    executor: the devices.
    fit: its settings.
  """
  model = stage.build(fit.remat)
  params = executor.make_state(model.init, rng.stream(0))
  reference = executor.make_state(model.rules.reduce, params, part='reference')
  frozen = _zeros(stage.frozen, executor)

  def create(params):
    return state_lib.at_start(params, model.rules, stage.phase)

  rows = fit_lib.make_rows(stage, model, 1)
  reals = _batches(stage, executor, rows.real)
  fakes = _batches(stage, executor, rows.fake)
  numbers = jax.tree.map(jnp.float32, (model, stage.phase))
  traced = executor.replicate((*numbers, rng.stream(0)))
  call = executor.compile_step(
    step_lib.train_step, sampler=stage.sampler, accumulate=fit.accumulate
  )
  state = executor.make_state(create, params)
  del params

  def train():
    nonlocal state
    real = next(reals)
    fake = next(fakes)
    if fake is not None:
      del fake['id']
    state, metrics = call(state, reference, frozen, real, fake, *traced)
    return metrics

  return _timed(train, _STEPS)


def _generator(run: workspace.Run, sampler: Any) -> generate.Generator:
  """Returns what draws images, with frozen weights of zeros."""
  frozen = _zeros(run.stage('ddo').frozen, run.executor)
  return generate.Generator(
    run.model, frozen, sampler, run.executor, run.sample_batch
  )


def sample(run: workspace.Run, sampler: Any) -> Times:
  """Times a call of a sampler, of `run.sample_batch` images."""
  generator = _generator(run, sampler)
  params = run.executor.make_state(run.model.init, rng.stream(0))
  ids = np.arange(run.sample_batch)
  labels = np.zeros(len(ids), np.int32)

  def draw():
    return list(generator.stream(params, rng.stream(0), ids, labels))

  return _timed(draw, 1)


def render(run: workspace.Run) -> Times:
  """Times the rendering of `generate.RENDERED` stored rows."""
  generator = _generator(run, run.config.sampler)
  shape = run.model.codec.stored_shape(run.model.example_shape)
  stored = np.zeros((generate.RENDERED, *shape), np.float32)
  return _timed(lambda: generator.render(stored), 1)


def networks(
  settings: evaluator_lib.Evaluation, image: jax.ShapeDtypeStruct
) -> Times:
  """Times a protocol's feature networks on a block of images a device.

  Args:
    settings: they name the protocol.
    image: the shape of an image [1,H,W,C].
  """
  kinds = evaluator_lib.kinds(settings)
  protocol = protocols.get(settings.protocol)
  shapes = features.param_shapes(kinds)
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
  apply = jax.jit(
    functools.partial(features.apply, protocol=protocol, kept=kinds)
  )
  ids = np.arange(extract.ROWS * jax.local_device_count())

  def images(ids):
    return np.zeros((len(ids), *image.shape[1:]), np.uint8)

  def embed():
    return list(extract.by_blocks(apply, params, images, ids))

  return _timed(embed, 1)


def scores(run: workspace.Run) -> Times:
  """Times the scores of a set of `selection_samples` images, once they are
  drawn, where a classifier of the training images makes them.

  Raises:
    errors.UserError: the images are not there.
  """
  evaluator = run.evaluator
  count = run.config.evaluation.selection_samples
  shape = run.real.stored_shape
  random = np.random.default_rng(0)
  drawn = random.integers(0, run.real.pixel_values, (count, *shape), np.uint8)
  labels = evaluator.labels(np.arange(count), run.model.num_classes)

  def images(ids: np.ndarray) -> Iterator[np.ndarray]:
    yield drawn[ids]

  def score():
    rows = evaluator.embed(images, count, 'scores')
    return evaluator.scores(rows, labels)

  return _timed(score, 1)


def most_bytes() -> int | None:
  """Returns the most bytes that were taken of a device; None if not known."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get('peak_bytes_in_use')
