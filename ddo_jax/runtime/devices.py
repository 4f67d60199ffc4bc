"""The only file that knows devices: meshes, pmap, shardings, processes."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import functools
import math
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from ddo_jax.runtime import layout

# The name of the devices' axis under pmap.
AXIS = 'batch'

# The settings stand beside what they set.
ExecutorConfig = layout.ExecutorConfig


class Executor(layout.Layout):
  """Places arrays on the devices there are, and compiles the pure step.

  'pmap' is data parallelism: the state is whole on every device. The other
  kinds are jit with NamedSharding, and split the state or a part of it. All
  hold a state in ordinary global arrays, so what was saved under one resumes
  under another.
  """

  def __init__(self, config: ExecutorConfig, num_devices: int = 0):
    """Takes the first `num_devices` devices; 0 takes all.

    Raises:
      errors.UserError: see `layout.Layout`.
    """
    devices = jax.devices()[: num_devices or None]
    super().__init__(config, len(devices))
    axes = layout.AXES
    shape: tuple[int, ...] = (len(devices) // self.shards, self.shards)
    if self.kind == 'pmap':
      # As pmap names them itself, or each step would be traced twice.
      axes = (AXIS,)
      shape = (len(devices),)
    self._mesh = jax.make_mesh(
      shape, axes, axis_types=(AxisType.Auto,) * len(axes), devices=devices
    )
    self._split = NamedSharding(self._mesh, PartitionSpec(axes))
    self._whole = NamedSharding(self._mesh, PartitionSpec())
    self._compiled = {}

  def state_shardings(self, tree: Any, part: str = 'params') -> Any:
    """Returns where each leaf of a training state, or of one part, lies.

    Args:
      tree: a training state, or a tree of dicts.
      part: what a tree of dicts is; see `layout.Layout.spec`.
    """

    def of_spec(spec):
      return NamedSharding(self._mesh, spec)

    return jax.tree.map(of_spec, self.specs(tree, part))

  def room(self) -> int | None:
    """Returns the bytes that may be taken of each device; None if unknown."""
    stated = super().room()
    if stated is not None:
      return stated
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
      call = self._compile_jit(functools.partial(step, **static))

    def run(*args):
      state, metrics = call(*args)
      self._wait_if_simulated(metrics)
      return state, metrics

    return run

  def _compile_jit(self, step: Callable[..., Any]) -> Callable:
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
