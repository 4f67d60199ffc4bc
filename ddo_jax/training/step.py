"""The one pure step, for every objective, model and executor."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ddo_jax import config as config_lib
from ddo_jax import rng
from ddo_jax.method import ddo
from ddo_jax.method import likelihood
from ddo_jax.training import state as state_lib

# 'stored' [B,...], 'label' [B], 'id' [B]; 'other_label' [B] for the
# objectives that contrast labels.
Raw = dict[str, jax.Array]
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


def _drawn(model, frozen, reference, label, keys, sampler, phase):
  """Samples of the reference [B,...], in model units."""
  sample_keys = rng.split_rows(keys, 'fakes')
  x = model.sample(reference, frozen, label, sample_keys, sampler)
  if phase.round_trip:
    x = model.round_trip(frozen, x, rng.split_rows(keys, 'encode'))
  return x


def _batches(model, frozen, reference, rows, sampler, phase):
  """The rows of a step or a part of it, ready for the loss.

  Returns:
    (batch, keys, dropped) of real rows; for all objectives but 'mle', of these
    interleaved with their negatives.
  """
  real, fake, keys, dropped = rows
  encode = lambda raw: model.encode(
    frozen, raw['stored'], rng.split_rows(keys, 'encode')
  )
  hide = lambda label: jnp.where(dropped, model.num_classes, label)
  first = likelihood.Batch(encode(real), hide(real['label']), real['id'])
  if phase.objective == 'mle':
    return first, keys, dropped
  if phase.contrasts:
    second = first.replace(label=hide(real['other_label']))
  elif phase.fakes == 'pool':
    second = first.replace(x=encode(fake), label=hide(fake['label']))
  else:
    label = real['label']
    x = _drawn(model, frozen, reference, label, keys, sampler, phase)
    second = first.replace(x=x)
  return interleave((first, keys, dropped), (second, keys, dropped))


def _terms(phase, real, other, batch, dropped, hyper):
  """([B], [B]) of the objective, from log-ratios of rows and of negatives.

  And what their means are divided by, as published.
  """
  divisor = ddo.normalizer(hyper.alpha, phase.normalize)
  if phase.objective == 'ddo':
    weights = ddo.row_weights(dropped, hyper.alpha)
    return ddo.per_example_loss(real, other, *weights, hyper.beta), divisor
  if phase.objective == 'dpo':
    loss = ddo.preference_loss(real, other, hyper.beta)
    return (loss, jnp.zeros_like(loss)), 1
  if phase.label_drop:
    labels = batch.label[::2], batch.label[1::2]
    weights = ddo.contrast_weights(dropped, *labels, hyper.alpha)
  else:
    weights = jnp.full_like(real, hyper.alpha), jnp.full_like(real, -1)
    divisor = 1
  if phase.objective == 'unlearning':
    return ddo.unlearning_loss(real, other, *weights), divisor
  return ddo.contrastive_loss(real, other, *weights, hyper.beta), divisor


def _discriminative_loss(params, reference, frozen, pair, hyper, model, phase):
  """Loss of eq. 13 / 16 or a sibling's, and per-row results [B]."""
  batch, keys, dropped = pair
  log_ratio, info = model.log_ratio(params, reference, frozen, batch, keys)
  real, fake = log_ratio[::2], log_ratio[1::2]
  rest = (batch, dropped[::2], hyper)
  terms, divisor = _terms(phase, real, fake, *rest)
  chance, _ = _terms(phase, *[jnp.zeros_like(real)] * 2, *rest)
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
    'chance_loss': sum(jnp.mean(term) for term in chance) / divisor,
  }
  return metrics['loss'], (metrics, rows)


def _mle_loss(params, reference, frozen, pair, hyper, model, phase):
  """The family's own pretraining loss on real rows."""
  del reference, hyper, phase
  batch, keys, _ = pair
  loss = jnp.mean(model.mle_loss(params, frozen, batch, keys))
  return loss, ({'loss': loss, 'mle_loss': loss}, {})


def _away(ours: jax.Array, theirs: jax.Array) -> jax.Array:
  """The difference, of weights as they are read, see `reduced`."""
  if ours.dtype != theirs.dtype:  # else XLA might make a copy of `ours`
    kept = jnp.finfo(theirs.dtype)
    ours = jax.lax.reduce_precision(ours, kept.nexp, kept.nmant)
  return ours - theirs


def _accumulated(grad_fn: Callable[..., Any], rows: Any, parts: int) -> Any:
  """Mean over `parts` microbatches of what grad_fn gives, rows gathered.

  A scan: compiled once for any number of parts, one sum of gradients held.
  (XLA on CPU runs convolutions in a loop many times slower.)
  """
  if parts == 1:
    return grad_fn(rows)

  def split(leaf):
    # Every part takes each parts-th row, and so stays spread over the devices.
    return jnp.moveaxis(leaf.reshape(-1, parts, *leaf.shape[1:]), 1, 0)

  def add(total, part):
    (_, (metrics, row)), grads = grad_fn(part)
    return jax.tree.map(jnp.add, total, (metrics, grads)), row

  rows = jax.tree.map(split, rows)
  (_, (metrics, _)), grads = jax.eval_shape(
    grad_fn, jax.tree.map(lambda leaf: leaf[0], rows)
  )
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (metrics, grads))
  total, rows = jax.lax.scan(add, zero, rows)
  metrics, grads = jax.tree.map(lambda leaf: leaf / parts, total)
  rows = jax.tree.map(lambda leaf: leaf.reshape(-1), rows)
  return (metrics['loss'], (metrics, rows)), grads


def train_step(
  state: state_lib.TrainState,
  reference: likelihood.Params,
  frozen: likelihood.Frozen,
  real: Raw,
  fake: Raw | None,
  hyper: state_lib.Hyper,
  key: jax.Array,
  *,
  model: likelihood.LikelihoodModel,
  phase: config_lib.Phase,
  sampler: Any = None,
  accumulate: int = 1,
  axis_name: str | None = None,
) -> tuple[state_lib.TrainState, Metrics]:
  """One optimizer step on B real rows, and on as many fakes or negatives.

  Args:
    state: θ, its averages and the optimizer's state; safe to donate.
    reference: θ_ref; never changes.
    frozen: weights that are neither.
    real: raw rows of the data.
    fake: raw samples of the reference, the i-th paired with the i-th real
      row: they share noise and label drop. None unless `phase` wants a pool.
    hyper: α, β and the peak learning rate.
    key: of (seed, round); this step's rows fold in the step and their ids.
    model: static.
    phase: static; its traced fields (α, β, learning rate) are not read.
    sampler: static; draws online fakes, else not used.
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
  loss_fn = _mle_loss if phase.objective == 'mle' else _discriminative_loss

  def grad_fn(rows):
    pair = _batches(model, frozen, reference, rows, sampler, phase)
    return jax.value_and_grad(loss_fn, has_aux=True)(
      state.params, reference, frozen, pair, hyper, model, phase
    )

  rows = (real, fake, keys, dropped)
  (_, (metrics, rows)), grads = _accumulated(grad_fn, rows, accumulate)
  if axis_name:
    metrics, grads = jax.lax.pmean((metrics, grads), axis_name)
    gather = lambda row: jax.lax.all_gather(row, axis_name, tiled=True)
    rows = jax.tree.map(gather, rows)
  # As a float: 2³¹ images are fewer than EDM2 was pretrained on.
  seen = state.step.astype(jnp.result_type(float)) * phase.batch_size
  factor = state_lib.learning_rate_factor(phase, seen)
  learning_rate = hyper.learning_rate * factor
  metrics['learning_rate'] = learning_rate
  metrics['grad_norm'] = optax.tree.norm(grads)
  away = jax.tree.map(_away, state.params, reference)
  metrics['reference_distance'] = optax.tree.norm(away)
  if rows:
    metrics['mle_loss'] = jnp.mean(rows.pop('mle_loss'))
    metrics |= ddo.diagnostics(
      **rows, num_levels=model.num_levels, beta=hyper.beta
    )
  state = state_lib.apply_gradients(state, grads, learning_rate, model, phase)
  return state, metrics
