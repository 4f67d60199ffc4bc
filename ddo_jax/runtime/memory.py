"""Memory: what a call takes, counted before it is compiled; what there is.

The count walks over the jaxpr of a call, seconds for the largest networks, and
needs neither the device nor the arrays. Beside what XLA plans for gradients on
a CPU it is between 0.85 and 1.15 of it (`tests/training/test_activations.py`)
where XLA schedules for little memory, as it does for accelerators.
"""

from collections.abc import Callable
from collections.abc import Iterator
import math
from typing import Any
from typing import NamedTuple

import jax
from jax.extend import core

# XLA computes these inside the loops that read them, again for each if need be:
# cheap functions of single numbers, and changes of shape.
_CHEAP_NAMES = (
  'abs add add_any and broadcast_in_dim ceil clamp concatenate '
  'convert_element_type copy eq expand_dims floor ge gt integer_pow iota '
  'is_finite le lt max min mul name ne neg not optimization_barrier or pad '
  'random_bits random_unwrap random_wrap reduce_precision reshape rev round '
  'select_n shift_left shift_right_arithmetic shift_right_logical sign '
  'slice square squeeze stop_gradient sub transpose xor '
)
# These read their input as it is computed.
_REDUCING_NAMES = (
  'argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod '
  'reduce_sum '
)
# Functions of single numbers, like most of the cheap ones. They write over an
# array that nobody reads any more; what moves numbers does not.
_COSTLY_NAMES = (
  'cos div erf erf_inv exp exp2 expm1 log log1p logistic pow rem rsqrt sin sqrt'
  ' tan tanh'
)
_MOVING_NAMES = 'broadcast_in_dim concatenate iota pad rev slice transpose '
# Calls that are part of the program which calls them.
_INLINE_NAMES = (
  'checkpoint closed_call core_call custom_jvp_call custom_vjp_call jit '
  'pjit remat2 '
)

_CHEAP = frozenset(_CHEAP_NAMES.split())
_REDUCING = frozenset(_REDUCING_NAMES.split())
_ELEMENTWISE = _CHEAP | frozenset(_COSTLY_NAMES.split())
_ELEMENTWISE -= frozenset(_MOVING_NAMES.split())
_INLINE = frozenset(_INLINE_NAMES.split())


class Op(NamedTuple):
  """One operation of a program without calls.

  Attributes:
    equation: what it is.
    inputs: the numbers of the arrays it reads, but for constants.
    outputs: the numbers of the arrays it makes.
  """

  equation: core.JaxprEqn
  inputs: list[int]
  outputs: list[int]

  @property
  def name(self) -> str:
    """The primitive's name."""
    return self.equation.primitive.name

  @property
  def bodies(self) -> list[core.Jaxpr]:
    """The programs that it holds, such as a scan's body."""
    return list(bodies(self.equation))


class Program(NamedTuple):
  """A program without calls, and without what nobody reads.

  Attributes:
    ops: its operations in their order.
    sizes: the bytes of its arrays, by their number: its arguments first, then
      what the operations make.
    results: the numbers of its results; None for constants.
  """

  ops: list[Op]
  sizes: list[int]
  results: list[int | None]


def size_of(tree: Any) -> int:
  """Returns the bytes of arrays, or of their shapes."""
  return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _bytes(array: Any) -> int:
  """Returns the bytes of an array or its shape; 0 for what has no type."""
  if not hasattr(array, 'dtype'):
    return 0
  return math.prod(array.shape) * array.dtype.itemsize


def bodies(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
  """Yields the programs that an equation holds, such as a scan's body."""
  for value in equation.params.values():
    for part in value if isinstance(value, list | tuple) else [value]:
      if isinstance(part, core.ClosedJaxpr):
        yield part.jaxpr
      elif isinstance(part, core.Jaxpr):
        yield part


def _inline(
  jaxpr: core.Jaxpr,
  arguments: list[int | None],
  ops: list[Op],
  sizes: list[int],
) -> list[int | None]:
  """Appends a program's operations, those of the calls in it among them.

  Args:
    jaxpr: the program.
    arguments: the numbers of its arguments; None for constants.
    ops: where operations are appended.
    sizes: where the bytes of the arrays made are appended, by their number.

  Returns:
    The numbers of its results.
  """
  numbers: dict[Any, int | None] = dict(
    zip(jaxpr.invars, arguments, strict=True)
  )

  def number_of(variable):
    if isinstance(variable, core.Literal):
      return None
    return numbers.get(variable)  # a constant has none

  for equation in jaxpr.eqns:
    inputs = [number_of(variable) for variable in equation.invars]
    # XLA unrolls a loop of one turn, whose slices are the arrays themselves.
    once = equation.primitive.name == 'scan' and equation.params['length'] == 1
    if once or equation.primitive.name in _INLINE:
      inner = next(bodies(equation))
      outputs = _inline(inner, inputs, ops, sizes)
    else:
      outputs = list(range(len(sizes), len(sizes) + len(equation.outvars)))
      sizes += [_bytes(variable.aval) for variable in equation.outvars]
      made = [number for number in inputs if number is not None]
      ops.append(Op(equation, made, outputs))
    numbers.update(zip(equation.outvars, outputs, strict=True))
  return [number_of(variable) for variable in jaxpr.outvars]


def _without_dead(ops: list[Op], results: list[int | None]) -> list[Op]:
  """Returns the operations that the results depend on, in their order."""
  needed = {*results}
  kept = []
  for op in reversed(ops):
    if needed.intersection(op.outputs):
      needed.update(op.inputs)
      kept.append(op)
  return kept[::-1]


def flatten(jaxpr: core.Jaxpr) -> Program:
  """Returns a program without the calls in it, and without what is dead."""
  ops: list[Op] = []
  sizes = [_bytes(variable.aval) for variable in jaxpr.invars]
  arguments: list[int | None] = [*range(len(sizes))]
  results = _inline(jaxpr, arguments, ops, sizes)
  return Program(_without_dead(ops, results), sizes, results)


def _sources(
  ops: list[Op], results: set[int], sizes: list[int]
) -> dict[int, set[int]]:
  """Returns the arrays that are never stored, and those each is computed from.

  An array is not stored if it is a cheap function of a single one of its own
  size, and is read by cheap operations and reductions alone.
  """
  stored = set(results)
  for op in ops:
    if op.name not in _CHEAP | _REDUCING:
      stored.update(op.inputs)
  sources: dict[int, set[int]] = {}
  for op in ops:
    if op.name not in _CHEAP or stored.intersection(op.outputs):
      continue
    read = {base for i in op.inputs for base in sources.get(i, {i})}
    size = sizes[op.outputs[0]]
    if sum(2 * sizes[base] > size for base in read) <= 1:
      sources[op.outputs[0]] = read
  return sources


def _hoisted(ops: list[Op], num_constants: int) -> tuple[set[int], set[int]]:
  """Returns the arrays of a loop's body that XLA makes once, before the loop.

  They follow from its constants alone, such as weights that are normalized, and
  stand for as long as the loop runs.

  Args:
    ops: the operations of the body.
    num_constants: the number of its first arguments that are the same in every
      turn.

  Returns:
    All that follow from them, and those among these that stand.
  """
  # What is computed twice, such as for two calls of a network, is made once.
  first = {number: number for number in range(num_constants)}
  made: dict[Any, list[int]] = {}
  hoisted = set()
  read = set()
  for op in ops:
    if not op.inputs or not first.keys() >= set(op.inputs):
      read.update(first[i] for i in op.inputs if i in first)
      continue
    what = (op.name, *(first[number] for number in op.inputs))
    outputs = made.setdefault(what, op.outputs)
    first.update(zip(op.outputs, outputs, strict=True))
    if op.name not in _CHEAP or hoisted.intersection(op.inputs):
      hoisted.update(op.outputs)
  return hoisted, hoisted & read


def _inside(equation: core.JaxprEqn) -> int:
  """Returns the most bytes that the programs in an equation take at once."""
  constants = equation.params.get('num_consts', 0)
  carried = equation.params.get('num_carry')
  found = [_peak(body, constants, carried) for body in bodies(equation)]
  return max(found, default=0)


def _peak(
  jaxpr: core.Jaxpr, num_constants: int = 0, num_carried: int | None = None
) -> int:
  """Returns the most bytes that arrays made by a program take at once.

  Args:
    jaxpr: the program.
    num_constants: if it is the body of a loop, see `_hoisted`.
    num_carried: if it is the body of a scan, the number of its results that
      the next turn takes; it stores the others where they are counted already.
  """
  ops, sizes, numbers = flatten(jaxpr)
  # All of them where there is no number.
  results = {n for n in numbers[:num_carried] if n is not None}
  # The arguments stand whether the program runs or not.
  sizes = [0] * len(jaxpr.invars) + sizes[len(jaxpr.invars) :]
  hoisted, once = _hoisted(ops, num_constants)
  stands = sum(sizes[number] for number in once)
  for number in hoisted:
    sizes[number] = 0
  sources = _sources(ops, results, sizes)
  last_read: dict[int, int] = {}
  for time, op in enumerate(ops):
    for number in op.inputs:
      for base in sources.get(number, {number}):
        last_read[base] = time
  for number in results:
    last_read[number] = len(ops)
  ending: dict[int, int] = {}  # time -> bytes that are let go after it
  alive = 0
  most = 0
  for time, op in enumerate(ops):
    made = sum(sizes[number] for number in op.outputs if number not in sources)
    read = {base for i in op.inputs for base in sources.get(i, {i})}
    ended = max((sizes[i] for i in read if last_read[i] == time), default=0)
    overwrites = op.name in _ELEMENTWISE and ended >= made
    alive += made
    for number in op.outputs:
      if number not in sources:
        end = last_read.get(number, time)
        ending[end] = ending.get(end, 0) + sizes[number]
    held = alive - made if overwrites else alive
    most = max(most, held + _inside(op.equation))
    alive -= ending.get(time, 0)
  return most + stands


def on_device(tree: Any) -> Any:
  """Brings traced arrays that lie in the host's memory to the devices."""

  def bring(leaf):
    if jax.typeof(leaf).memory_space == jax.memory.Space.Host:
      return jax.device_put(leaf, jax.memory.Space.Device)
    return leaf

  return jax.tree.map(bring, tree)


def peak(call: Callable[..., Any], *args: Any) -> int:
  """Returns the most bytes that arrays made in a call take at once.

  The arguments themselves are not counted, the results are.

  Args:
    call: a function that jax can trace.
    *args: arrays, or their shapes (`jax.ShapeDtypeStruct`).
  """
  return _peak(jax.make_jaxpr(call)(*args).jaxpr)


def allotted(compiled: Any) -> int:
  """Returns the bytes that XLA plans for a call, its arguments included."""
  found = compiled.memory_analysis()
  fresh = found.output_size_in_bytes - found.alias_size_in_bytes
  return found.argument_size_in_bytes + found.temp_size_in_bytes + fresh
