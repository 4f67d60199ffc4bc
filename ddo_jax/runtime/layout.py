"""Where each part of what a step takes lies; knows no device.

What a run takes of devices can so be counted where there are none.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import PartitionSpec

from ddo_jax import errors
from ddo_jax import settings
from ddo_jax.runtime import memory

# What each kind splits over the devices beside the rows: fields of a training
# state, the reference and the gradient. Other weights go as 'params' do.
SPLIT: dict[str, tuple[str, ...]] = {
  'pmap': (),
  'zero1': ('gradient', 'opt_state', 'ema'),
  'fsdp': ('gradient', 'opt_state', 'ema', 'params', 'reference'),
}

# What may lie in the host's memory.
OFFLOADABLE = ('reference', 'ema')

# The axes of the devices. Rows are split over both, the state over the second.
AXES: tuple[str, ...] = ('data', 'fsdp')

# A leaf of fewer elements than this is never split. Each split leaf is gathered
# in every pass, which takes some ten microseconds whatever its size, and what
# the split of a small leaf saves is nothing: of EDM's 417 leaves, 284 are
# smaller than this and hold 0.2 % of its params, and the small leaves of all
# the published networks take less than 0.4 MB a copy.
SMALLEST_SPLIT = 2**14


@dataclasses.dataclass
class ExecutorConfig:
  """How a step runs on the devices; never changes what it computes."""

  # What of the state is split over the devices, beside the rows. 'pmap':
  # nothing; 'zero1': moments and averages; 'fsdp': everything.
  kind: str = dataclasses.field(default='pmap', metadata={'science': False})
  # Devices that share one copy of what is split, such as those of a host, where
  # the others hold copies of their own (hybrid sharding); 0: all of them.
  fsdp_devices: int = dataclasses.field(default=0, metadata={'science': False})
  # What lies in the host's memory between its uses: 'reference', 'ema', both or
  # none. Averages are there while the gradient is computed; the reference comes
  # to the devices for each microbatch.
  offload: tuple[str, ...] = dataclasses.field(
    default=(), metadata={'science': False}
  )
  # Microbatches a step; 'auto' takes as few as fit into the devices' memory.
  accumulate: settings.OrAuto = dataclasses.field(
    default=settings.AUTO, metadata={'science': False}
  )
  # Which activations inside a block of the network are recomputed in the
  # backward pass: none (False), all but the products with weights ('dots'), or
  # all of them (True); 'auto' recomputes where hardly a row fits without.
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
    errors.require_choice(f'{name}.kind', self.kind, tuple(SPLIT))
    errors.require_integer(f'{name}.fsdp_devices', self.fsdp_devices, 0)
    if self.kind == 'pmap':
      errors.require(
        self.fsdp_devices == 0,
        f'{name}.fsdp_devices',
        self.fsdp_devices,
        "0 where executor.kind is 'pmap', which splits rows alone",
      )
      errors.require(
        not self.offload,
        f'{name}.offload',
        self.offload,
        "() where executor.kind is 'pmap'; 'fsdp' and 'zero1' offload, also on"
        ' one device',
      )
    errors.require(
      set(self.offload) <= set(OFFLOADABLE),
      f'{name}.offload',
      self.offload,
      f'some of {OFFLOADABLE}',
    )
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
      self.remat in (True, False, settings.DOTS, settings.AUTO),
      f'{name}.remat',
      self.remat,
      "True, False, 'dots' or 'auto'",
    )
    errors.require(
      self.device_memory_gib >= 0,
      f'{name}.device_memory_gib',
      self.device_memory_gib,
      '0 or more',
    )


def parts(tree: Any, part: str = 'params') -> Any:
  """Returns the part that each leaf belongs to; see `Layout.specs`."""

  def of_leaf(path, leaf):
    del leaf
    return getattr(path[0], 'name', part) if path else part

  return jax.tree_util.tree_map_with_path(of_leaf, tree)


class Layout:
  """Where each part of what a step takes lies, on so many devices.

  Attributes:
    kind: the executor's.
    num_devices: the number of devices, over all processes.
    shards: the number of devices that what is split is split over.
    offload: the parts that lie in the host's memory.
  """

  def __init__(self, config: ExecutorConfig, num_devices: int):
    """Takes the executor's settings and any number of devices.

    Raises:
      errors.UserError: `fsdp_devices` does not divide them.
    """
    self.kind = config.kind
    self.offload = config.offload
    self.num_devices = num_devices
    self._device_memory_gib = config.device_memory_gib
    self.shards = config.fsdp_devices or num_devices
    if not SPLIT[config.kind]:
      self.shards = 1
    errors.require(
      num_devices % self.shards == 0,
      'executor.fsdp_devices',
      self.shards,
      f'0, or a divisor of the {num_devices} devices',
    )

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

  def spec(self, leaf: Any, part: str = 'params') -> PartitionSpec:
    """Returns how one leaf is split, over `AXES`.

    A large leaf of what is split is so along its largest axis that divides over
    the shards. A small one, and one without such an axis, stays whole.

    Args:
      leaf: an array or its shape.
      part: what it belongs to, see `SPLIT`.
    """
    if part not in SPLIT[self.kind] or math.prod(leaf.shape) < SMALLEST_SPLIT:
      return PartitionSpec()
    divisible = [
      axis for axis, size in enumerate(leaf.shape) if size % self.shards == 0
    ]
    if not divisible:
      return PartitionSpec()
    largest = max(divisible, key=lambda axis: leaf.shape[axis])
    split: list[str | None] = [None] * len(leaf.shape)
    split[largest] = AXES[1]
    return PartitionSpec(*split)

  def specs(self, tree: Any, part: str = 'params') -> Any:
    """Returns how each leaf of a training state, or of one part, is split.

    Args:
      tree: a training state, whose fields are parts; or a tree of dicts.
      part: what a tree of dicts is; see `spec`.
    """
    return jax.tree.map(self.spec, tree, parts(tree, part))

  def share(self, tree: Any, part: str = 'params') -> int:
    """Returns the bytes of a tree that are each device's; see `specs`.

    What is offloaded counts as it does while it is on the devices.
    """

    def of_leaf(leaf, spec):
      return memory.size_of(leaf) // (self.shards if any(spec) else 1)

    return sum(
      jax.tree.leaves(jax.tree.map(of_leaf, tree, self.specs(tree, part)))
    )

  def room(self) -> int | None:
    """Returns the bytes that may be taken of each device; None if unknown."""
    if self._device_memory_gib:
      return int(self._device_memory_gib * 2**30)
    return None
