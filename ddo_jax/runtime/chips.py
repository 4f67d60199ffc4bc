"""Published figures of chips, by which a plan counts hours.

Rates are of dense products, without sparsity. A plan's seconds are an estimate:
`UTILISATION` says which share of the published rates a program is taken to
reach, in arithmetic and in memory traffic alike, neither of which hides the
other. Convolutions on small images reach less, large products of
matrices more; what a device at hand really takes, a probe measures.
"""

import dataclasses
import os
import re

from ddo_jax import errors
from ddo_jax.runtime import work as work_lib

UTILISATION = 0.6
LOOP = 4e-6  # seconds to begin a loop, which bounds small networks

# The share of a GPU's memory that jax takes where no variable says otherwise.
_GPU_SHARE = 0.75
_SHARE_VARIABLES = ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION')


@dataclasses.dataclass(frozen=True)
class Chip:
  """A chip's published figures.

  Attributes:
    name: how --chip names it.
    title: what it is called.
    device_kinds: what jax calls such a device.
    memory_gib: its memory [GiB].
    bfloat16: products of bfloat16 [FLOP/s].
    tf32: products in TF32 [FLOP/s]; 0 where there is no such type.
    float32: products of float32 as jax runs them at precision 'highest'
      [FLOP/s]: a GPU without its tensor cores, a TPU in six passes of bfloat16.
    bandwidth: of its memory [bytes/s].
    source: where the figures are published.
  """

  name: str
  title: str
  device_kinds: tuple[str, ...]
  memory_gib: float
  bfloat16: float
  tf32: float
  float32: float
  bandwidth: float
  source: str

  @property
  def share(self) -> float:
    """The share of its memory that jax takes, in (0, 1]."""
    if not self.tf32:
      return 1.0
    for variable in _SHARE_VARIABLES:
      if os.environ.get(variable):
        return float(os.environ[variable])
    return _GPU_SHARE

  @property
  def room_gib(self) -> float:
    """The memory that jax takes of it [GiB]."""
    return self.memory_gib * self.share

  def rate(self, precision: str) -> float:
    """Returns the published rate of products [FLOP/s].

    Args:
      precision: what they ask for, see `work.Work`.
    """
    fast = (
      self.tf32 or self.bfloat16
    )  # what float32 becomes where none is asked
    rates = {
      'default': fast,
      'high': self.tf32 or self.bfloat16 / 3,
      'highest': self.float32,
      'bfloat16': self.bfloat16,
      'float16': self.bfloat16,
    }
    if precision in rates:
      return rates[precision]
    # The name of a `jax.lax.DotAlgorithmPreset`, such as BF16_BF16_F32_X3.
    kinds = {'bf16': self.bfloat16, 'f16': self.bfloat16, 'tf32': fast}
    passes = re.search(r'_x(\d+)$', precision)
    rate = kinds.get(precision.partition('_')[0], self.float32)
    return rate / (int(passes[1]) if passes else 1)

  def seconds(self, work: work_lib.Work) -> float:
    """Returns the time that a call is taken to need on one chip."""
    arithmetic = sum(
      count / self.rate(precision) for precision, count in work.flops.items()
    )
    busy = (arithmetic + work.moved / self.bandwidth) / UTILISATION
    return busy + work.loops * LOOP


_T = 1e12
_H100 = Chip(
  name='h100',
  title='H100 SXM (80 GB)',
  device_kinds=('NVIDIA H100 80GB HBM3',),
  memory_gib=80,
  bfloat16=989.4 * _T,
  tf32=494.7 * _T,
  float32=66.9 * _T,
  bandwidth=3.35 * _T,
  source='NVIDIA H100 Tensor Core GPU architecture, white paper (SXM5)',
)
_H200 = dataclasses.replace(
  _H100,
  name='h200',
  title='H200 SXM (141 GB)',
  device_kinds=('NVIDIA H200',),
  memory_gib=141,
  bandwidth=4.8 * _T,
  source='NVIDIA H200 Tensor Core GPU, datasheet (SXM)',
)
_A100_40G = Chip(
  name='a100-40g',
  title='A100 SXM (40 GB)',
  device_kinds=('NVIDIA A100-SXM4-40GB',),
  memory_gib=40,
  bfloat16=312 * _T,
  tf32=156 * _T,
  float32=19.5 * _T,
  bandwidth=1.555 * _T,
  source='NVIDIA A100 Tensor Core GPU, datasheet (SXM)',
)
_A100_80G = dataclasses.replace(
  _A100_40G,
  name='a100-80g',
  title='A100 SXM (80 GB)',
  device_kinds=('NVIDIA A100-SXM4-80GB',),
  memory_gib=80,
  bandwidth=2.039 * _T,
)


def _tpu(
  version: str,
  device_kinds: tuple[str, ...],
  memory_gib: float,
  bfloat16: float,
  bandwidth: float,
) -> Chip:
  """Returns a TPU, one chip of which is one of jax's devices."""
  return Chip(
    name=version,
    title=f'TPU {version} ({memory_gib:g} GB)',
    device_kinds=device_kinds,
    memory_gib=memory_gib,
    bfloat16=bfloat16,
    tf32=0.0,
    float32=bfloat16 / 6,
    bandwidth=bandwidth,
    source=f'https://docs.cloud.google.com/tpu/docs/{version}',
  )


CHIPS = {
  chip.name: chip
  for chip in (
    _H100,
    _H200,
    _A100_40G,
    _A100_80G,
    _tpu('v5e', ('TPU v5 lite', 'TPU v5e'), 16, 197 * _T, 0.819 * _T),
    _tpu('v5p', ('TPU v5', 'TPU v5p'), 95, 459 * _T, 2.765 * _T),
    _tpu('v6e', ('TPU v6 lite', 'TPU v6e'), 32, 918 * _T, 1.6 * _T),
  )
}


def get(name: str) -> Chip:
  """Returns the chip of a name.

  Raises:
    errors.UserError: there is none.
  """
  folded = name.casefold()
  if folded in CHIPS:
    return CHIPS[folded]
  near = [known for known in CHIPS if known.startswith(folded)]
  near = near or errors.nearest(folded, CHIPS)
  remedy = 'or measure the devices at hand with --probe'
  if near:
    remedy = f'did you mean {" or ".join(near)}?'
  raise errors.UserError(
    f'--chip={name} is not known; wanted one of {", ".join(CHIPS)}; {remedy}'
  )


def of_device(device_kind: str) -> Chip | None:
  """Returns the chip that jax calls by a name; None if it is not known."""
  for chip in CHIPS.values():
    if device_kind in chip.device_kinds:
      return chip
  return None
