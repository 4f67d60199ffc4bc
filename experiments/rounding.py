"""A function computed again with the operands of its products rounded.

It works on a traced function, gradients and all, so that it serves any network
and touches none.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
from jax.extend import core
import jax.numpy as jnp

from ddo_jax.training import step as step_lib

_PRODUCTS = ('dot_general', 'conv_general_dilated')
# Calls whose bodies are computed in their place.
_CALLS = {
  'jit': 'jaxpr',
  'pjit': 'jaxpr',
  'closed_call': 'call_jaxpr',
  'core_call': 'call_jaxpr',
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
}


@dataclasses.dataclass(frozen=True)
class Rounding:
  """What becomes of the operands of a product; sums are float32.

  Attributes:
    mantissa: the bits of the mantissa that are kept; all formats have the
      exponent of float32.
    products: 1 rounds. 3 takes a second number of so many bits of what was
      rounded off, and leaves out the product of the two rests.
    dtype: the type as which operands are handed over, for the units that
      multiply it; None leaves them float32.
  """

  mantissa: int
  products: int = 1
  dtype: Any = None


KINDS = {
  'tf32': Rounding(10),
  'tf32x3': Rounding(10, 3),
  'bf16': Rounding(7),
  'bf16x3': Rounding(7, 3),
}


def _product(
  equation: Any, operands: list[jax.Array], rounding: Rounding
) -> jax.Array:
  """Computes a dot or a convolution of float32 operands."""

  def cut(x):
    return jax.lax.reduce_precision(x, 8, rounding.mantissa)

  params = equation.params | {'preferred_element_type': jnp.float32}

  def bind(*operands):
    if rounding.dtype is not None:
      operands = [x.astype(rounding.dtype) for x in operands]
    return equation.primitive.bind(*operands, **params)

  left, right = operands
  high = cut(left)
  other = cut(right)
  product = bind(high, other)
  if rounding.products == 3:
    product += bind(high, cut(right - other)) + bind(cut(left - high), other)
  return product


def _bodies(params: dict[str, Any], rounding: Rounding) -> dict[str, Any]:
  """Rounds the bodies that an equation holds, such as a scan's."""

  def change(value):
    if isinstance(value, core.ClosedJaxpr):
      shapes = [variable.aval for variable in value.jaxpr.invars]
      run = functools.partial(_run, value.jaxpr, value.consts, rounding)
      return jax.make_jaxpr(lambda *args: run(args))(*shapes)
    if isinstance(value, core.Jaxpr):
      return change(core.ClosedJaxpr(value, [])).jaxpr
    if type(value) is tuple:  # a cond's branches; no named tuple
      return tuple(change(part) for part in value)
    return value

  return {name: change(value) for name, value in params.items()}


def _run(
  jaxpr: core.Jaxpr, consts: Any, rounding: Rounding, args: Any
) -> list[Any]:
  """Computes a program."""
  values = dict(zip(jaxpr.constvars, consts, strict=True))
  values |= dict(zip(jaxpr.invars, args, strict=True))

  def read(variable):
    if isinstance(variable, core.Literal):
      return variable.val
    return values[variable]

  for equation in jaxpr.eqns:
    operands = [read(variable) for variable in equation.invars]
    name = equation.primitive.name
    if name in _PRODUCTS and operands[0].dtype == jnp.float32:
      results = [_product(equation, operands, rounding)]
    elif name in _CALLS:
      body = equation.params[_CALLS[name]]
      results = _run(body.jaxpr, body.consts, rounding, operands)
    else:
      params = _bodies(equation.params, rounding)
      params = equation.primitive.get_bind_params(params)
      results = equation.primitive.bind(*operands, **params)
      if not equation.primitive.multiple_results:
        results = [results]
    values |= dict(zip(equation.outvars, results, strict=True))
  return [read(variable) for variable in jaxpr.outvars]


def rounded(
  function: Callable[..., Any], rounding: Rounding
) -> Callable[..., Any]:
  """Returns the function with the products of float32 arrays rounded.

  Args:
    function: a function of pytrees of arrays.
    rounding: how.
  """

  def call(*args):
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    results = _run(closed.jaxpr, closed.consts, rounding, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shapes), results)

  return call


@contextlib.contextmanager
def trained_in(rounding: Rounding | None) -> Iterator[None]:
  """Inside, steps are compiled whose gradients are made of rounded products.

  Args:
    rounding: how; None leaves them as they are.
  """
  original = step_lib.gradient_of

  def gradient_of(params, reference, frozen, rows, model, phase, sampler):
    def inner(*args):
      return original(*args, sampler)

    changed = rounded(inner, rounding)
    return changed(params, reference, frozen, rows, model, phase)

  if rounding is None:
    yield
    return
  with mock.patch.object(step_lib, 'gradient_of', gradient_of):
    yield
