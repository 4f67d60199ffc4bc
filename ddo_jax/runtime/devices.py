"""The only file that knows devices: meshes, pmap and shardings."""

import collections
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import functools
import math
from typing import Any

from flax import linen as nn
import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from ddo_jax import errors
from ddo_jax.runtime import layout
from ddo_jax.runtime import memory
from ddo_jax.runtime import processes

# The name of the devices' axis under pmap.
AXIS = 'batch'

# The host's memory, as far as the devices read it by themselves.
_HOST = 'pinned_host'

_LAG = 2  # steps between a process's wish and the answer to it


def from_host(tree: Any) -> Any:
  """Copies what is offloaded of a tree of arrays to the devices."""

  def place(leaf):
    if leaf.sharding.memory_kind != _HOST:
      return leaf
    return jax.device_put(leaf, leaf.sharding.with_memory_kind('device'))

  return jax.tree.map(place, tree)


def _keep(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
  """Has a traced array lie where it is to lie."""
  if sharding.memory_kind != _HOST:
    return jax.lax.with_sharding_constraint(leaf, sharding)
  on_device = sharding.with_memory_kind('device')
  leaf = jax.lax.with_sharding_constraint(leaf, on_device)
  return jax.device_put(leaf, jax.memory.Space.Host)


class Executor(layout.Layout):
  """Places arrays on the devices there are, and compiles the pure step.

  'pmap' is data parallelism: the state is whole on every device. The other
  kinds are jit with NamedSharding, and split the state or a part of it. All
  hold a state in ordinary global arrays, so what was saved under one resumes
  under another.
  """

  def __init__(self, config: layout.ExecutorConfig, num_devices: int = 0):
    """Takes the first `num_devices` devices; 0 takes all.

    A process that works by itself takes its own.

    Raises:
      errors.UserError: see `layout.Layout`.
    """
    alone = processes.is_by_itself()
    devices = jax.local_devices() if alone else jax.devices()
    devices = devices[: num_devices or None]
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
    kinds = {kind.kind for kind in devices[0].addressable_memories()}
    if self.offload and _HOST not in kinds:
      raise errors.UserError(
        f'config.executor.offload is {self.offload}, and {devices[0]} has no'
        f' memory of the kind {_HOST!r}, only {sorted(kinds)}: leave it empty'
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

    def of_leaf(spec, part):
      sharding = NamedSharding(self._mesh, spec)
      if part in self.offload:
        return sharding.with_memory_kind(_HOST)
      return sharding

    return jax.tree.map(
      of_leaf, self.specs(tree, part), layout.parts(tree, part)
    )

  def room(self) -> int | None:
    """Returns the bytes that may be taken of each device; None if unknown."""
    stated = super().room()
    if stated is not None:
      return stated
    stats = self._mesh.local_devices[0].memory_stats() or {}
    limit = stats.get('bytes_limit')
    return processes.decide('room', functools.partial(int, limit or 0)) or None

  def make_state(
    self, make: Callable[..., Any], *args: Any, part: str = 'params'
  ) -> Any:
    """Computes `make(*args)`, where it is to lie.

    Args:
      make: returns a training state, or one part.
      *args: arrays.
      part: what it returns; see `state_shardings`.
    """
    shardings = self.state_shardings(jax.eval_shape(make, *args), part)
    return jax.jit(make, out_shardings=shardings)(*args)

  def replicate(self, tree: Any) -> Any:
    """Puts small arrays, equal on all processes, whole on every device."""
    if processes.count() == 1:
      return jax.device_put(tree, self._whole)
    return jax.jit(_identity, out_shardings=self._whole)(tree)

  def place_batch(self, rows: Any) -> Any:
    """Puts this process's rows on its devices, split along their first axis.

    Args:
      rows: a tree of numpy arrays [b,...], where b is the process's share.

    Returns:
      A tree of arrays: [B,...], or under pmap [devices,B/devices,...] where
      there is one process.
    """

    def stack(leaf):
      return leaf.reshape(self.num_devices, -1, *leaf.shape[1:])

    def distribute(leaf):
      return jax.make_array_from_process_local_data(self._split, leaf)

    if processes.count() > 1:
      # It counts as implicit, unlike device_put, and is not.
      with jax.transfer_guard_host_to_device('allow'):
        return jax.tree.map(distribute, rows)
    if self.kind == 'pmap':
      rows = jax.tree.map(stack, rows)
    # One call for all leaves takes half the time.
    return jax.device_put(rows, self._split)

  def _place_whole_batch(self, rows: Any) -> Any:
    """Puts rows that every process has on all devices, split among them."""
    if processes.count() == 1:
      return jax.device_put(rows, self._split)

    def place(leaf):
      return jax.make_array_from_callback(
        leaf.shape, self._split, leaf.__getitem__
      )

    return jax.tree.map(place, rows)

  def largest(self, numbers: Sequence[int]) -> jax.Array:
    """Returns the largest of each number [N] over all processes."""
    own = self.num_devices // processes.count()
    rows = np.tile(np.asarray(numbers, np.int32), (own, 1))
    result = self._largest(
      jax.make_array_from_process_local_data(self._split, rows)
    )
    self._wait_if_simulated(result)
    return result

  @functools.cached_property
  def _largest(self) -> Callable[[jax.Array], jax.Array]:
    def largest(rows):
      return rows.max(axis=0)

    return jax.jit(largest, out_shardings=self._whole)

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
    if cache_key in self._compiled:
      return self._compiled[cache_key]
    call = self.traceable_step(step, **static)

    def run(*args):
      state, metrics = call(*args)
      self._wait_if_simulated(metrics)
      return state, metrics

    self._compiled[cache_key] = run
    return run

  def traceable_step(self, step: Callable[..., Any], **static: Any) -> Any:
    """Returns what `compile_step` calls: a jitted function, with a `lower`."""
    if self.kind == 'pmap':
      return self._jit_mapped(functools.partial(step, axis_name=AXIS, **static))
    parts = static.get('accumulate', 1)
    return self._jit_sharded(functools.partial(step, **static), parts)

  def _jit_mapped(self, step: Callable[..., Any]) -> Any:
    if processes.count() == 1:
      return jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(None, None, None, 0, 0, None, None, None),
        out_axes=None,
        donate_argnums=0,
      )
    # What pmap is made of. It would hand out each process's part of an array,
    # and Orbax saves whole ones.
    whole = PartitionSpec()
    split = PartitionSpec(AXIS)
    mapped = jax.shard_map(
      step,
      mesh=self._mesh,
      in_specs=(whole, whole, whole, split, split, whole, whole, whole),
      out_specs=whole,
      check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=0)

  def _jit_sharded(self, step: Callable[..., Any], parts: int) -> Any:
    """Jits a step of `parts` microbatches."""

    def sharded(state, reference, frozen, real, *args):
      rows = len(jax.tree.leaves(real)[0]) // parts
      state = memory.on_device(state)
      with self._rows_pinned(rows):
        state, metrics = step(state, reference, frozen, real, *args)
      shardings = self.state_shardings(state)
      state = jax.tree.map(_keep, state, shardings)
      metrics = jax.lax.with_sharding_constraint(metrics, self._whole)
      return state, metrics

    return jax.jit(sharded, donate_argnums=0)

  def _rows_pinned(self, rows: int) -> contextlib.AbstractContextManager:
    """Inside, what Flax's modules make of rows stays split by rows.

    Where weights are split by channels, XLA may otherwise split activations so,
    too, and gather those in place of the weights: a step of VAR-d30 on eight
    devices would take twice the memory.

    Args:
      rows: the real rows of a microbatch. Networks see them alone, or together
        with as many second rows.
    """

    def pin(leaf):
      if np.shape(leaf)[:1] in ((rows,), (2 * rows,)):
        return jax.lax.with_sharding_constraint(leaf, self._split)
      return leaf

    def call(method, args, kwargs, context):
      made = method(*args, **kwargs)
      if context.method_name != '__call__':
        return made
      return jax.tree.map(pin, made)

    return nn.intercept_methods(call)

  def _wait_if_simulated(self, arrays: Any) -> None:
    """Keeps one computation in flight where the devices are simulated.

    Simulated devices share one thread pool: a second computation in flight
    can take the threads that an all-reduce of the first one waits for.
    """
    if jax.default_backend() == 'cpu' and self.num_devices > 1:
      jax.block_until_ready(arrays)

  def map_rows(
    self, fn: Callable[..., Any], params: Any, blocks: Iterable[Any], batch: int
  ) -> Iterator[np.ndarray]:
    """Yields `fn(params, rows) -> [B,...]` over rows, in calls of one size.

    A call is dispatched before the result of the call before it is fetched, so
    that the devices compute while the host copies and the caller works, also
    where a block ends. Two results are on the devices at most.

    Args:
      fn: jitted and row-wise: a row's result depends on that row alone.
      params: arrays that lie where the executor keeps them.
      blocks: trees of numpy arrays [N,...], whole on every process. No call
        takes rows of two blocks, so that what a row stands beside, and how it
        is rounded, does not hang on the other blocks.
      batch: rows a call; rounded up to a multiple of the devices.

    Yields:
      Numpy results [b,...] in order, N rows for each block in all.
    """
    batch = math.ceil(batch / self.num_devices) * self.num_devices
    if self.offload:
      params = from_host(params)
    pending = None
    count = 0
    for rows in blocks:
      total = len(jax.tree.leaves(rows)[0])
      for start in range(0, total, batch):
        # The last call repeats the last row, so that all are of one size.
        index = np.minimum(np.arange(start, start + batch), total - 1)
        part = jax.tree.map(lambda leaf, index=index: leaf[index], rows)
        result = fn(params, self._place_whole_batch(part))
        self._wait_if_simulated(result)
        if pending is not None:
          yield fetch(pending)[:count]
        pending = result
        count = min(batch, total - start)
    if pending is not None:
      yield fetch(pending)[:count]


class Agreement:
  """What processes wish, known to all of them at the same call.

  A wish goes over the devices between two steps. It is read some calls later,
  so that no step waits for it.
  """

  def __init__(self, executor: Executor):
    """Nobody wishes for anything yet."""
    self._executor = executor
    self._pending: collections.deque[jax.Array] = collections.deque()

  def __call__(self, *wishes: int) -> tuple[int, ...]:
    """Returns the largest of each wish, of all processes, `_LAG` calls ago.

    Of a single process it returns the wishes themselves.

    Args:
      *wishes: small whole numbers, 0 for nothing; all processes make the same
        number of calls.
    """
    if processes.count() == 1:
      return wishes
    self._pending.append(self._executor.largest(wishes))
    if len(self._pending) <= _LAG:
      return (0,) * len(wishes)
    return tuple(fetch(self._pending.popleft()).tolist())


def environment() -> dict[str, str]:
  """Returns what a number was measured with: {'jax', 'devices'}."""
  kind = jax.devices()[0].device_kind
  return {'jax': jax.__version__, 'devices': f'{jax.device_count()} × {kind}'}


def are_done(tree: Any) -> bool:
  """Says whether all arrays are computed, without waiting for them."""
  return all(leaf.is_ready() for leaf in jax.tree.leaves(tree))


def fetch(tree: Any) -> Any:
  """Copies global arrays to numpy, on every process."""
  return jax.device_get(gathered(tree))


def gathered(tree: Any) -> Any:
  """Returns arrays, brought here from other processes where they are split."""

  def gather(leaf):
    here = not isinstance(leaf, jax.Array)
    here = here or leaf.is_fully_addressable or leaf.is_fully_replicated
    if here:
      return leaf
    return multihost_utils.process_allgather(leaf, tiled=True)

  return jax.tree.map(gather, tree) if processes.count() > 1 else tree


def exchange(tree: Any) -> Any:
  """Returns every process's numpy rows [n,...], one's after the other's.

  Args:
    tree: arrays of equal shapes on all processes; any bits are kept.
  """

  def gather(leaf):
    # As words, for jax would make float32 of float64.
    words = np.ascontiguousarray(leaf).view(np.uint32)
    gathered = multihost_utils.process_allgather(words, tiled=True)
    return np.ascontiguousarray(gathered).view(leaf.dtype)

  return jax.tree.map(gather, tree)


def _identity(tree: Any) -> Any:
  return tree
