"""The only file that knows devices: meshes, pmap, shardings, processes."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from ddo_jax import errors
from ddo_jax import settings
from ddo_jax.runtime import memory

AXIS = 'batch'
KINDS = ('pmap', 'fsdp')

# Under FSDP a leaf of fewer elements than this stays whole on every device.
# Each split leaf is gathered in every pass, which takes some ten microseconds
# whatever its size, and what the split of a small leaf saves is nothing: of
# EDM's 417 leaves, 284 are smaller than this and hold 0.2 % of its params, and
# the small leaves of all the published networks take less than 0.4 MB a copy.
SMALLEST_SPLIT = 2**14


@dataclasses.dataclass
class ExecutorConfig:
  """How a step runs on the devices; never changes what it computes."""

  # 'pmap': data parallelism; 'fsdp': the state is split over the devices too.
  kind: str = dataclasses.field(default='pmap', metadata={'science': False})
  # Microbatches a step; 'auto' takes as few as fit into the devices' memory.
  accumulate: settings.OrAuto = dataclasses.field(
    default=settings.AUTO, metadata={'science': False}
  )
  # Whether the activations inside a block of the network are recomputed in the
  # backward pass; 'auto' does so where hardly a row fits without.
  remat: settings.OrAuto = dataclasses.field(
    default=settings.AUTO, metadata={'science': False}
  )
  # Images a call of the sampler; 'auto' takes 1,000, or as many as fit.
  sample_batch: settings.OrAuto = dataclasses.field(
    default=settings.AUTO, metadata={'science': False}
  )
  # GiB of each device that may be taken; 0 asks the device. What a CPU may take
  # is not known: there 'auto' takes everything at once.
  device_memory_gib: float = dataclasses.field(
    default=0.0, metadata={'science': False}
  )

  def check(self, name: str = 'executor') -> None:
    """Raises UserError, naming the field, where a value makes no sense.

    Args:
      name: where this stands in the config, without the leading "config.".
    """
    errors.require_choice(f'{name}.kind', self.kind, KINDS)
    for field in ('accumulate', 'sample_batch'):
      value = getattr(self, field)
      whole = isinstance(value, int) and not isinstance(value, bool)
      errors.require(
        value == settings.AUTO or (whole and value > 0),
        f'{name}.{field}',
        value,
        "a positive integer or 'auto'",
      )
    errors.require(
      self.remat in (True, False, settings.AUTO),
      f'{name}.remat',
      self.remat,
      "True, False or 'auto'",
    )
    errors.require(
      self.device_memory_gib >= 0,
      f'{name}.device_memory_gib',
      self.device_memory_gib,
      '0 or more',
    )


class Executor:
  """Places arrays and compiles the pure step, in one of two ways.

  'pmap' is data parallelism: the state is whole on every device. 'fsdp' is jit
  with NamedSharding: the state and the reference are split over the devices.
  Both hold a state in ordinary global arrays, so what was saved under one
  resumes under the other.

  Attributes:
    kind: 'pmap' or 'fsdp'.
    num_devices: the number of devices, over all processes.
  """

  def __init__(self, config: ExecutorConfig, num_devices: int = 0):
    """Takes the first `num_devices` devices; 0 takes all."""
    devices = jax.devices()[: num_devices or None]
    self.kind = config.kind
    self._device_memory_gib = config.device_memory_gib
    self.num_devices = len(devices)
    self._mesh = jax.make_mesh(
      (len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices
    )
    self._split = NamedSharding(self._mesh, PartitionSpec(AXIS))
    self._whole = NamedSharding(self._mesh, PartitionSpec())
    self._compiled = {}

  def check_batch(
    self, batch_size: int, accumulate: int, name: str = 'batch_size'
  ) -> None:
    """Raises UserError unless every microbatch divides over the devices.

    Args:
      batch_size: real rows a step, over all devices.
      accumulate: microbatches a step.
      name: what the error calls the batch size, e.g. 'config.ddo.batch_size'.
    """
    unit = self.num_devices * accumulate
    if batch_size % unit:
      near = max(unit, round(batch_size / unit) * unit)
      raise errors.UserError(
        f'{name} {batch_size} is not divisible by {self.num_devices} devices'
        f' × {accumulate} microbatches = {unit}; try {near}'
      )

  def _state_sharding(self, leaf: Any) -> NamedSharding:
    """How one leaf of a state, or of params, lies on the devices.

    Under FSDP a large leaf is split along its largest axis that divides over
    the devices. A small one, and one without such an axis, stays whole.
    """
    if self.kind != 'fsdp' or math.prod(leaf.shape) < SMALLEST_SPLIT:
      return self._whole
    divisible = [
      axis
      for axis, size in enumerate(leaf.shape)
      if size % self.num_devices == 0
    ]
    if not divisible:
      return self._whole
    largest = max(divisible, key=lambda axis: leaf.shape[axis])
    spec: list[str | None] = [None] * len(leaf.shape)
    spec[largest] = AXIS
    return NamedSharding(self._mesh, PartitionSpec(*spec))

  def state_shardings(self, tree: Any) -> Any:
    """Returns the sharding of each leaf of a state, or of params."""
    return jax.tree.map(self._state_sharding, tree)

  def share(self, tree: Any) -> int:
    """Returns the bytes that each device holds of a state, or of params."""
    shares = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        self._state_sharding(leaf).shard_shape(leaf.shape), leaf.dtype
      ),
      tree,
    )
    return memory.size_of(shares)

  def room(self) -> int | None:
    """Returns the bytes that may be taken of each device; None if unknown."""
    if self._device_memory_gib:
      return int(self._device_memory_gib * 2**30)
    stats = self._mesh.local_devices[0].memory_stats() or {}
    return stats.get('bytes_limit')

  def make_state(self, make: Callable[..., Any], *args: Any) -> Any:
    """Computes `make(*args)`, a state or params, where it is to lie."""
    shardings = self.state_shardings(jax.eval_shape(make, *args))
    return jax.jit(make, out_shardings=shardings)(*args)

  def replicate(self, tree: Any) -> Any:
    """Puts small arrays whole on every device."""
    return jax.device_put(tree, self._whole)

  def place_batch(self, rows: Any) -> Any:
    """Puts this process's rows on its devices, split along their first axis.

    Args:
      rows: a tree of numpy arrays [b,...], where b is the process's share.

    Returns:
      A tree of arrays: [B,...] under FSDP, [devices,B/devices,...] under pmap.
    """
    own_devices = self.num_devices // jax.process_count()

    def stack(leaf):
      return leaf.reshape(own_devices, -1, *leaf.shape[1:])

    def distribute(leaf):
      return jax.make_array_from_process_local_data(self._split, leaf)

    if self.kind == 'pmap':
      rows = jax.tree.map(stack, rows)
    if jax.process_count() == 1:
      # One call for all leaves takes half the time.
      return jax.device_put(rows, self._split)
    return jax.tree.map(distribute, rows)

  def no_implicit_transfers(self) -> contextlib.AbstractContextManager:
    """Inside, an array that nobody placed on the devices is an error."""
    return jax.transfer_guard_host_to_device('disallow')

  def compile_step(self, step: Callable[..., Any], **static: Any) -> Callable:
    """Compiles a training step; once for equal static arguments.

    Args:
      step: `step.train_step`, or a function of the same arguments.
      **static: its keyword arguments, all hashable.

    Returns:
      A function of the step's positional arguments. The state, the first of
      them, is donated.
    """
    cache_key = tuple(sorted(static.items(), key=lambda item: item[0]))
    if cache_key not in self._compiled:
      self._compiled[cache_key] = self._compile(step, static)
    return self._compiled[cache_key]

  def _compile(
    self, step: Callable[..., Any], static: dict[str, Any]
  ) -> Callable:
    if self.kind == 'pmap':
      call = jax.pmap(
        functools.partial(step, axis_name=AXIS, **static),
        axis_name=AXIS,
        in_axes=(None, None, None, 0, 0, None, None, None),
        out_axes=None,
        donate_argnums=0,
      )
    else:
      call = self._compile_fsdp(functools.partial(step, **static))

    def run(*args):
      state, metrics = call(*args)
      self._wait_if_simulated(metrics)
      return state, metrics

    return run

  def _compile_fsdp(self, step: Callable[..., Any]) -> Callable:
    def sharded(state, *args):
      state, metrics = step(state, *args)
      state = jax.lax.with_sharding_constraint(
        state, self.state_shardings(state)
      )
      metrics = jax.lax.with_sharding_constraint(metrics, self._whole)
      return state, metrics

    return jax.jit(sharded, donate_argnums=0)

  def _wait_if_simulated(self, arrays: Any) -> None:
    """Keeps one computation in flight where the devices are simulated.

    Simulated devices share one thread pool: a second computation in flight
    can take the threads that an all-reduce of the first one waits for.
    """
    if jax.default_backend() == 'cpu' and self.num_devices > 1:
      jax.block_until_ready(arrays)

  def map_rows(
    self, fn: Callable[..., Any], params: Any, rows: Any, batch: int
  ) -> Iterator[np.ndarray]:
    """Yields `fn(params, rows) -> [B,...]` over rows, in calls of one size.

    A call is dispatched before the result of the call before it is fetched, so
    that the devices compute while the host copies and the caller works. Two
    results are on the devices at most.

    Args:
      fn: jitted and row-wise: a row's result depends on that row alone.
      params: arrays, already on the devices.
      rows: tree of numpy arrays [N,...], whole on every process.
      batch: rows a call; rounded up to a multiple of the devices.

    Yields:
      Numpy results [b,...] in order, N rows in all.
    """
    total = len(jax.tree.leaves(rows)[0])
    batch = math.ceil(batch / self.num_devices) * self.num_devices
    pending = None
    for start in range(0, total, batch):
      # The last call repeats the last row, so that all calls are of one size.
      index = np.minimum(np.arange(start, start + batch), total - 1)
      part = jax.tree.map(lambda leaf, index=index: leaf[index], rows)
      result = fn(params, jax.device_put(part, self._split))
      self._wait_if_simulated(result)
      if pending is not None:
        yield fetch(pending)
      pending = result
    if pending is not None:
      yield fetch(pending)[: total - start]


def environment() -> dict[str, str]:
  """Returns what a number was measured with: {'jax', 'devices'}."""
  kind = jax.devices()[0].device_kind
  return {'jax': jax.__version__, 'devices': f'{jax.device_count()} × {kind}'}


def fetch(tree: Any) -> Any:
  """Copies global arrays to numpy, on every process."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)
  return jax.device_get(tree)
