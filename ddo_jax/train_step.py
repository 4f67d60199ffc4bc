"""The one pure step, for every objective, model and executor."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ddo_jax import config as config_lib
from ddo_jax import ddo
from ddo_jax import likelihood
from ddo_jax import rng
from ddo_jax import train_state

Raw = dict[str, jax.Array]  # 'image' [B,...] as stored, 'label' [B], 'id' [B]
Metrics = dict[str, jax.Array]


def interleave(real: Any, fake: Any) -> Any:
  """Pairs of rows in one batch of 2B: real 0, fake 0, real 1, fake 1, …

  Concatenating instead would move every row to another device.
  """
  return jax.tree.map(
    lambda r, f: jnp.stack([r, f], axis=1).reshape(-1, *r.shape[1:]),
    real,
    fake,
  )


def _rows(
  model: likelihood.LikelihoodModel,
  frozen: likelihood.Frozen,
  raw: Raw,
  keys: jax.Array,
  dropped: jax.Array,
) -> likelihood.Batch:
  x = model.encode(frozen, raw['image'], rng.split_rows(keys, 'encode'))
  label = jnp.where(dropped, model.num_classes, raw['label'])
  return likelihood.Batch(x, label, raw['id'])


def _ddo_loss(params, reference, frozen, pair, hyper, model, phase):
  """Loss of eq. 13 / 16 on interleaved rows, and per-row results [B]."""
  batch, keys, dropped = pair
  log_ratio, info = model.log_ratio(params, reference, frozen, batch, keys)
  real, fake = log_ratio[::2], log_ratio[1::2]
  weights = ddo.row_weights(dropped[::2], hyper.alpha)
  terms = ddo.per_example_loss(real, fake, *weights, hyper.beta)
  divisor = ddo.normalizer(hyper.alpha, phase.normalize)
  loss_real, loss_fake = (jnp.mean(term) / divisor for term in terms)
  rows = {
    'log_ratio_real': real,
    'log_ratio_fake': fake,
    'level': info['level'][::2],
    'mle_loss': info['mle_loss'][::2],
  }
  metrics = {
    'loss': loss_real + loss_fake,
    'loss_real': loss_real,
    'loss_fake': loss_fake,
    'chance_loss': ddo.chance_loss(*weights) / divisor,
  }
  return metrics['loss'], (metrics, rows)


def _mle_loss(params, reference, frozen, pair, hyper, model, phase):
  """The family's own pretraining loss on real rows."""
  del reference, hyper, phase
  batch, keys, _ = pair
  loss = jnp.mean(model.mle_loss(params, frozen, batch, keys))
  return loss, ({'loss': loss, 'mle_loss': loss}, {})


def _accumulated(
  grad_fn: Callable[..., Any], pair: Any, parts: int, group: int
) -> Any:
  """Mean over `parts` microbatches of what grad_fn gives, rows gathered.

  Every part takes each parts-th group of rows, so that it stays spread over
  the devices. Unrolled: XLA on CPU runs convolutions in a loop many times
  slower.
  """
  if parts == 1:
    return grad_fn(pair)

  def part(leaf, index):
    split = leaf.reshape(-1, parts, group, *leaf.shape[1:])
    return split[:, index].reshape(-1, *leaf.shape[1:])

  results = [
    grad_fn(jax.tree.map(lambda leaf, i=i: part(leaf, i), pair))
    for i in range(parts)
  ]
  means, rows = [], []
  for (_, (metrics, row)), grads in results:
    means.append((metrics, grads))
    rows.append(row)
  metrics, grads = jax.tree.map(lambda *v: sum(v) / parts, *means)
  rows = jax.tree.map(lambda *v: jnp.concatenate(v), *rows)
  return (metrics['loss'], (metrics, rows)), grads


def train_step(
  state: train_state.TrainState,
  reference: likelihood.Params,
  frozen: likelihood.Frozen,
  real: Raw,
  fake: Raw | None,
  hyper: train_state.Hyper,
  key: jax.Array,
  *,
  model: likelihood.LikelihoodModel,
  phase: config_lib.Phase,
  accumulate: int = 1,
  axis_name: str | None = None,
) -> tuple[train_state.TrainState, Metrics]:
  """One optimizer step on B real rows, and for DDO on B fake rows.

  Args:
    state: θ, its averages and the optimizer's state; safe to donate.
    reference: θ_ref; never changes.
    frozen: weights that are neither.
    real: raw rows of the data.
    fake: raw samples of the reference, the i-th paired with the i-th real
      row: they share noise and label drop. None for the 'mle' objective.
    hyper: α, β and the peak learning rate.
    key: of (seed, round); this step's rows fold in the step and their ids.
    model: static.
    phase: static; its traced fields (α, β, learning rate) are not read.
    accumulate: microbatches; must divide the rows of each device.
    axis_name: of the devices under pmap; None where jit shards the arrays.

  Returns:
    The next state, and metrics over the global batch.
  """
  keys = rng.per_example(jax.random.fold_in(key, state.step), real['id'])
  dropped = jnp.zeros(keys.shape, bool)
  if phase.label_drop:
    drop_keys = rng.split_rows(keys, 'label_drop')
    dropped = jax.vmap(jax.random.uniform)(drop_keys) < phase.label_drop
  batch = _rows(model, frozen, real, keys, dropped)
  pair, group = (batch, keys, dropped), 1
  if phase.objective == 'ddo':
    fakes = _rows(model, frozen, dict(fake, id=real['id']), keys, dropped)
    pair = interleave(pair, (fakes, keys, dropped))
    group = 2
  loss_fn = {'ddo': _ddo_loss, 'mle': _mle_loss}[phase.objective]

  def grad_fn(pair):
    return jax.value_and_grad(loss_fn, has_aux=True)(
      state.params, reference, frozen, pair, hyper, model, phase
    )

  (_, (metrics, rows)), grads = _accumulated(grad_fn, pair, accumulate, group)
  if axis_name:
    metrics, grads = jax.lax.pmean((metrics, grads), axis_name)
    gather = lambda row: jax.lax.all_gather(row, axis_name, tiled=True)
    rows = jax.tree.map(gather, rows)
  # As a float: 2³¹ images are fewer than EDM2 was pretrained on.
  seen = state.step.astype(jnp.result_type(float)) * phase.batch_size
  factor = train_state.learning_rate_factor(phase, seen)
  learning_rate = hyper.learning_rate * factor
  metrics['learning_rate'] = learning_rate
  metrics['grad_norm'] = optax.tree.norm(grads)
  away = jax.tree.map(jnp.subtract, state.params, reference)
  metrics['reference_distance'] = optax.tree.norm(away)
  if rows:
    metrics['mle_loss'] = jnp.mean(rows.pop('mle_loss'))
    metrics |= ddo.diagnostics(
      **rows, num_levels=model.num_levels, beta=hyper.beta
    )
  state = train_state.apply_gradients(state, grads, learning_rate, model, phase)
  return state, metrics
