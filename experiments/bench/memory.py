"""Bytes of a DDO step by what they are for, counted from shapes."""

from typing import Any

import jax
import jax.numpy as jnp

from ddo_jax import config as config_lib
from ddo_jax import rng
from ddo_jax.method import likelihood
from ddo_jax.runtime import memory
from ddo_jax.training import state as state_lib


def _kept(
  model: likelihood.LikelihoodModel, rows: int, params: Any, frozen: Any
) -> int:
  """Returns the bytes that θ's backward pass keeps, of rows and of params."""
  tokens = len(model.example_shape) == 1
  dtype = jnp.int32 if tokens else jnp.float32
  batch = likelihood.Batch(
    x=jax.ShapeDtypeStruct((rows, *model.example_shape), dtype),
    label=jax.ShapeDtypeStruct((rows,), jnp.int32),
    id=jax.ShapeDtypeStruct((rows,), jnp.uint32),
  )

  def residuals(params, reference, frozen, batch):
    keys = rng.per_example(rng.stream(0), batch.id)

    def loss(params):
      ratio, _ = model.log_ratio(params, reference, frozen, batch, keys)
      return jnp.mean(jax.nn.softplus(ratio))

    _, backward = jax.vjp(loss, params)
    return backward

  kept = jax.eval_shape(residuals, params, params, frozen, batch)
  return memory.size_of(kept)


def counted(
  model: likelihood.LikelihoodModel,
  phase: config_lib.Phase,
  frozen: likelihood.Frozen,
) -> dict[str, int]:
  """Counts the bytes that a DDO step of one microbatch holds, from shapes.

  Args:
    model: the model, with its noise law.
    phase: the phase; its batch_size is that of the microbatch.
    frozen: the shapes of the frozen weights.

  Returns:
    What stands throughout, by name, and 'activations', which the backward pass
    of θ keeps of 2B rows. The reference keeps none.
  """
  params = jax.eval_shape(model.init, rng.stream(0))
  rows = 2 * phase.batch_size
  # The difference leaves out what is kept whatever the number of rows.
  once = _kept(model, rows, params, frozen)
  twice = _kept(model, 2 * rows, params, frozen)

  def fresh(params):
    return state_lib.at_start(params, model.rules, phase)

  state = jax.eval_shape(fresh, params)
  return {
    'params': memory.size_of(state.params),
    'reference': memory.size_of(jax.eval_shape(model.rules.reduce, params)),
    'optimizer': memory.size_of(state.opt_state),
    'ema': memory.size_of(state.ema),
    'gradient': memory.size_of(params),
    'frozen': memory.size_of(frozen),
    'activations': twice - once,
  }
