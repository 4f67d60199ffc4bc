"""Work: what a program computes and moves, counted before it is compiled.

Like the count of `memory`, it walks over a jaxpr and needs no device.
"""

import collections
from collections.abc import Callable
import math
from typing import Any
from typing import NamedTuple

import jax
from jax.extend import core

from ddo_jax.runtime import memory

# These read their inputs from memory, and no loop computes them on the way.
_UNFUSED_NAMES = (
  'all_gather cond conv_general_dilated cumsum cummax dot_general '
  'dynamic_slice dynamic_update_slice fft gather psum reduce_window_max '
  'reduce_window_sum scan scatter scatter-add select_and_scatter_add sort '
  'top_k while '
)
_UNFUSED = frozenset(_UNFUSED_NAMES.split())
_LOOPS = frozenset(['cond', 'scan', 'while'])


class Work(NamedTuple):
  """What a call does.

  Attributes:
    flops: the additions and multiplications in matrix products and
      convolutions, by the precision that they ask for: a `jax.lax.Precision` in
      lower case, the same of a `DotAlgorithmPreset`, or a type of 16 bits. All
      other arithmetic is left out, as papers do.
    moved: the bytes that are read and written, if loops over single numbers are
      fused with what reads them.
    loops: the number of such loops, products among them, which a device is told
      to run one after the other.
  """

  flops: dict[str, int]
  moved: int
  loops: int

  @property
  def total(self) -> int:
    """The additions and multiplications of all precisions."""
    return sum(self.flops.values())


def _precision(equation: core.JaxprEqn) -> str:
  """Returns the precision that a product asks for, see `Work`."""
  operand: Any = equation.invars[0].aval
  dtype = operand.dtype
  if dtype.itemsize < 4:
    return dtype.name
  asked = equation.params['precision']
  if isinstance(asked, tuple):
    asked = asked[0]
  return 'default' if asked is None else asked.name.lower()


def _product(equation: core.JaxprEqn) -> int:
  """Returns the additions and multiplications of a product, else 0."""
  name = equation.primitive.name
  shapes: list[Any] = [variable.aval for variable in equation.invars[:2]]
  made: Any = equation.outvars[0].aval
  if name == 'dot_general':
    (summed, _), _ = equation.params['dimension_numbers']
    return 2 * made.size * math.prod(shapes[0].shape[axis] for axis in summed)
  if name == 'conv_general_dilated':
    kernel = shapes[1]
    out_axis = equation.params['dimension_numbers'].rhs_spec[0]
    return 2 * made.size * (kernel.size // kernel.shape[out_axis])
  return 0


def _fused(program: memory.Program) -> dict[int, set[int]]:
  """Returns the arrays that are never stored, and those each is computed from.

  An array is computed inside the loop that reads it if one loop alone does, or
  if it is itself computed from a single one of its size.
  """
  stored = set(program.results)
  readers: collections.Counter[int] = collections.Counter()
  for op in program.ops:
    readers.update(set(op.inputs))
    if op.name in _UNFUSED:
      stored.update(op.inputs)
  sources: dict[int, set[int]] = {}
  for op in program.ops:
    ends = op.name in _UNFUSED or op.name.startswith('reduce_')
    if ends or stored.intersection(op.outputs):
      continue
    made = op.outputs[0]
    read = {base for i in op.inputs for base in sources.get(i, {i})}
    large = sum(2 * program.sizes[base] > program.sizes[made] for base in read)
    if readers[made] <= 1 or large <= 1:
      sources[made] = read
  return sources


def count(jaxpr: core.Jaxpr) -> Work:
  """Returns the work of a program.

  XLA's own cost analysis would count the body of a loop once, and VAR's blocks
  are one loop. The body of a `while`, whose length nobody knows, does count
  once here too, and of branches the longest one does.

  Args:
    jaxpr: as `jax.make_jaxpr` makes it.
  """
  program = memory.flatten(jaxpr)
  sources = _fused(program)
  flops: collections.Counter[str] = collections.Counter()
  moved = 0
  loops = 0
  for op in program.ops:
    inner = max((count(body) for body in op.bodies), key=_total, default=None)
    if inner and (inner.total or op.name in _LOOPS):
      times = op.equation.params.get('length', 1)
      moved += times * inner.moved
      loops += times * inner.loops
      for precision, number in inner.flops.items():
        flops[precision] += times * number
      continue
    product = _product(op.equation)
    if product:
      flops[_precision(op.equation)] += product
    if not sources.keys() & op.outputs:
      read = {base for i in op.inputs for base in sources.get(i, {i})}
      moved += sum(program.sizes[number] for number in (*read, *op.outputs))
      loops += 1
  return Work(dict(flops), moved, loops)


def _total(work: Work) -> tuple[int, int]:
  return work.total, work.moved


def of(call: Callable[..., Any], *args: Any) -> Work:
  """Returns the work of a call; nothing is computed.

  Args:
    call: a function that jax can trace.
    *args: arrays, or their shapes (`jax.ShapeDtypeStruct`).
  """
  return count(jax.make_jaxpr(call)(*args).jaxpr)
