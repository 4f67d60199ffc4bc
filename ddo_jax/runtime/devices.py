"""The only file that knows devices: meshes, pmap, shardings, processes."""

from collections.abc import Callable
import contextlib
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from ddo_jax import config as config_lib
from ddo_jax import errors

AXIS = 'batch'


class Executor:
  """Places arrays and compiles the pure step, one way or the other.

  'pmap': data parallelism, the state whole on every device. 'fsdp': jit with
  NamedSharding, state and reference split over the devices. A state of one
  resumes under the other, for both are ordinary global arrays.
  """

  def __init__(self, config: config_lib.Executor, num_devices: int = 0):
    """Takes the first `num_devices` devices, or all."""
    devices = jax.devices()[: num_devices or None]
    self.kind = config.kind
    self.num_devices = len(devices)
    self._mesh = jax.make_mesh(
      (len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices
    )
    self._split = NamedSharding(self._mesh, PartitionSpec(AXIS))
    self._whole = NamedSharding(self._mesh, PartitionSpec())
    self._compiled = {}

  def check_batch(self, batch_size: int, accumulate: int) -> None:
    """Raises UserError unless every microbatch divides over the devices."""
    unit = self.num_devices * accumulate
    if batch_size % unit:
      near = max(unit, round(batch_size / unit) * unit)
      raise errors.UserError(
        f'batch_size {batch_size} is not divisible by {self.num_devices}'
        f' devices × {accumulate} microbatches; try {near}'
      )

  def _state_sharding(self, leaf: Any) -> NamedSharding:
    """FSDP: the largest axis that divides over the devices is split."""
    if self.kind == 'fsdp':
      for axis in sorted(range(len(leaf.shape)), key=lambda a: -leaf.shape[a]):
        if leaf.shape[axis] % self.num_devices == 0:
          spec = [None] * len(leaf.shape)
          spec[axis] = AXIS
          return NamedSharding(self._mesh, PartitionSpec(*spec))
    return self._whole

  def state_shardings(self, tree: Any) -> Any:
    """Shardings of a state, or of params such as the reference."""
    return jax.tree.map(self._state_sharding, tree)

  def make_state(self, make: Callable[..., Any], *args: Any) -> Any:
    """Puts `make(*args)`, a state or params, on the devices at once."""
    shardings = self.state_shardings(jax.eval_shape(make, *args))
    return jax.jit(make, out_shardings=shardings)(*args)

  def place_state(self, tree: Any) -> Any:
    """Puts a state or params on the devices, in new buffers."""
    # A jitted copy: device_put may alias, and what is donated must not be.
    return self.make_state(lambda t: jax.tree.map(jnp.copy, t), tree)

  def replicate(self, tree: Any) -> Any:
    """Puts small arrays whole on every device."""
    return jax.device_put(tree, self._whole)

  def place_batch(self, rows: Any) -> Any:
    """Puts this process's rows (numpy, leading axis) on its devices."""
    stack = self.num_devices // jax.process_count()
    if self.kind == 'pmap':
      rows = jax.tree.map(
        lambda leaf: leaf.reshape(stack, -1, *leaf.shape[1:]), rows
      )
    if jax.process_count() == 1:  # one call for all leaves: half the time
      return jax.device_put(rows, self._split)
    return jax.tree.map(
      lambda leaf: jax.make_array_from_process_local_data(self._split, leaf),
      rows,
    )

  def no_implicit_transfers(self) -> contextlib.AbstractContextManager:
    """Inside, an array that nobody placed on the devices is an error."""
    return jax.transfer_guard_host_to_device('disallow')

  def compile_step(self, step: Callable[..., Any], **static: Any) -> Callable:
    """Compiles `train_step.train_step`; once for equal static arguments."""
    cache_key = tuple(sorted(static.items(), key=lambda item: item[0]))
    if cache_key not in self._compiled:
      self._compiled[cache_key] = self._compile(step, static)
    return self._compiled[cache_key]

  def _compile(self, step, static):
    if self.kind == 'pmap':
      bound = functools.partial(step, axis_name=AXIS, **static)
      call = jax.pmap(
        bound,
        axis_name=AXIS,
        in_axes=(None, None, None, 0, 0, None, None, None),
        out_axes=None,
        donate_argnums=0,
      )
    else:
      call = self._compile_fsdp(functools.partial(step, **static))
    simulated = jax.default_backend() == 'cpu' and self.num_devices > 1

    def run(*args):
      state, metrics = call(*args)
      if simulated:
        # Simulated devices share one thread pool: a second step in flight
        # can take the threads that the first one's all-reduce waits for.
        jax.block_until_ready(metrics)
      return state, metrics

    return run

  def _compile_fsdp(self, step):
    def sharded(state, *args):
      state, metrics = step(state, *args)
      state = jax.lax.with_sharding_constraint(
        state, self.state_shardings(state)
      )
      return state, jax.lax.with_sharding_constraint(metrics, self._whole)

    return jax.jit(sharded, donate_argnums=0)

  def map_rows(
    self, fn: Callable[..., Any], params: Any, rows: Any, batch: int
  ) -> Any:
    """Runs `fn(params, rows) -> [B,...]` over rows in calls of one size.

    Args:
      fn: jitted and row-wise: a row's result depends on that row alone.
      params: arrays, already on the devices.
      rows: tree of numpy arrays [N,...], whole on every process.
      batch: rows a call; rounded up to a multiple of the devices.

    Returns:
      A generator of numpy results, in order, N rows in all.
    """
    total = len(jax.tree.leaves(rows)[0])
    batch = math.ceil(batch / self.num_devices) * self.num_devices
    for start in range(0, total, batch):
      index = np.minimum(np.arange(start, start + batch), total - 1)
      part = jax.device_put(
        jax.tree.map(lambda leaf, i=index: leaf[i], rows), self._split
      )
      yield fetch(fn(params, part))[: total - start]


def environment() -> dict[str, str]:
  """What a number was measured with: {'jax', 'devices'}."""
  kind = jax.devices()[0].device_kind
  return {'jax': jax.__version__, 'devices': f'{jax.device_count()} × {kind}'}


def fetch(tree: Any) -> Any:
  """Global arrays to numpy, on every process."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)
  return jax.device_get(tree)
