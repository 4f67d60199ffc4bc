"""Bytes of a DDO step, counted from shapes; bytes of a compiled call."""

from typing import Any

import jax
import jax.numpy as jnp

from ddo_jax import config as config_lib
from ddo_jax import rng
from ddo_jax.method import likelihood
from ddo_jax.training import state as state_lib


def size_of(tree: Any) -> int:
  """Bytes of arrays or of their shapes."""
  leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, 'dtype')]
  return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _kept(
  model: likelihood.LikelihoodModel, rows: int, params: Any, frozen: Any
) -> int:
  """Bytes that the backward pass of θ keeps, of rows and of params."""
  shape = jax.ShapeDtypeStruct
  tokens = len(model.example_shape) == 1
  batch = likelihood.Batch(
    shape((rows, *model.example_shape), jnp.int32 if tokens else jnp.float32),
    shape((rows,), jnp.int32),
    shape((rows,), jnp.uint32),
  )

  def residuals(params, reference, frozen, batch):
    keys = rng.per_example(rng.stream(0), batch.id)

    def loss(params):
      ratio, _ = model.log_ratio(params, reference, frozen, batch, keys)
      return jnp.mean(jax.nn.softplus(ratio))

    return jax.vjp(loss, params)[1]

  return size_of(jax.eval_shape(residuals, params, params, frozen, batch))


def counted(
  model: likelihood.LikelihoodModel,
  phase: config_lib.Phase,
  frozen: likelihood.Frozen,
) -> dict[str, int]:
  """Bytes that a DDO step of one microbatch holds, from shapes.

  Args:
    model: the family.
    phase: its batch_size is that of the microbatch.
    frozen: shapes.

  Returns:
    What stands throughout, by name; 'activations' of θ, those of 2B rows. The
    reference keeps none.
  """
  params = jax.eval_shape(model.init, rng.stream(0))
  rows = 2 * phase.batch_size
  kept = [_kept(model, count, params, frozen) for count in (rows, 2 * rows)]
  state = jax.eval_shape(lambda p: state_lib.create(p, phase), params)
  return {
    'params': size_of(state.params),
    'reference': size_of(jax.eval_shape(model.reduced, params)),
    'optimizer': size_of(state.opt_state),
    'ema': size_of(state.ema),
    'gradient': size_of(params),
    'frozen': size_of(frozen),
    'activations': kept[1] - kept[0],
  }


def allotted(compiled: Any) -> int:
  """Bytes of a compiled call, its arguments included: what XLA plans."""
  found = compiled.memory_analysis()
  fresh = found.output_size_in_bytes - found.alias_size_in_bytes
  return found.argument_size_in_bytes + found.temp_size_in_bytes + fresh
