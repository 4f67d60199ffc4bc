"""The one pure step, for every objective, model and executor.

Read `train_step` first; it is the method in one page. The functions above it
are its parts, in the order in which it calls them.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ddo_jax import rng
from ddo_jax.method import ddo
from ddo_jax.method import likelihood
from ddo_jax.method import negatives
from ddo_jax.method import objective as objective_lib
from ddo_jax.runtime import memory
from ddo_jax.training import state as state_lib

Metrics = dict[str, jax.Array]


class Microbatch(NamedTuple):
  """The rows of a step, or of one of its microbatches.

  Attributes:
    real: the real rows as stored: 'stored' [B,...], 'label' [B], 'id' [B], and
      'other_label' [B] where the negatives ask for it.
    fake: rows of the fake pool as stored, the i-th for the i-th real row; None
      unless the negatives ask for them.
    keys: [B], the pairs' keys.
    dropped: [B] bool, the pairs that lose their labels.
  """

  real: negatives.Stored
  fake: negatives.Stored | None
  keys: jax.Array
  dropped: jax.Array


class Pairs(NamedTuple):
  """The rows of a microbatch, ready for a loss.

  Attributes:
    real: the real rows in model units.
    other: the second rows; None where the objective has none.
    keys: [B], the pairs' keys.
    dropped: [B] bool.
  """

  real: likelihood.Batch
  other: likelihood.Batch | None
  keys: jax.Array
  dropped: jax.Array


def drop_labels(keys: jax.Array, label_drop: float) -> jax.Array:
  """Returns which rows [B] lose their labels, each by its own key [B]."""
  if not label_drop:
    return jnp.zeros(keys.shape, bool)
  drop_keys = rng.split_rows(keys, 'label_drop')
  return jax.vmap(jax.random.uniform)(drop_keys) < label_drop


def make_pairs(
  rows: Microbatch,
  reference: likelihood.Params,
  frozen: likelihood.Frozen,
  model: likelihood.LikelihoodModel,
  phase: Any,
  sampler: Any,
) -> Pairs:
  """Encodes the real rows and gets the second rows from the negatives."""
  label = likelihood.hide_labels(
    rows.real['label'], rows.dropped, model.num_classes
  )
  encode_keys = rng.split_rows(rows.keys, 'encode')
  x = model.codec.encode(frozen, rows.real['stored'], encode_keys)
  real = likelihood.Batch(x=x, label=label, id=rows.real['id'])
  if not phase.objective.contrastive:
    return Pairs(real, None, rows.keys, rows.dropped)
  pairing = negatives.Pairing(
    real=real,
    stored=rows.real,
    fake=rows.fake,
    dropped=rows.dropped,
    keys=rows.keys,
    reference=reference,
    frozen=frozen,
  )
  other = phase.negatives.rows(pairing, model, sampler)
  return Pairs(real, other, rows.keys, rows.dropped)


def interleave(real: Any, other: Any) -> Any:
  """Returns one batch of 2B rows: real 0, other 0, real 1, other 1, …

  Concatenating instead would move every row to another device.
  """

  def pair(r, o):
    return jnp.stack([r, o], axis=1).reshape(-1, *r.shape[1:])

  return jax.tree.map(pair, real, other)


def split_pairs(rows: Any) -> tuple[Any, Any]:
  """Undoes `interleave`."""
  real = jax.tree.map(lambda row: row[::2], rows)
  other = jax.tree.map(lambda row: row[1::2], rows)
  return real, other


def contrastive_loss(
  params: likelihood.Params,
  reference: likelihood.Params,
  frozen: likelihood.Frozen,
  pairs: Pairs,
  model: likelihood.LikelihoodModel,
  phase: Any,
) -> tuple[jax.Array, tuple[Metrics, Metrics]]:
  """Returns an objective's loss on pairs, its metrics and per-row results."""
  batch = interleave(pairs.real, pairs.other)
  keys = interleave(pairs.keys, pairs.keys)
  log_ratio, info = model.log_ratio(params, reference, frozen, batch, keys)
  log_ratio_real, log_ratio_other = split_pairs(log_ratio)
  info_real, _ = split_pairs(info)
  rows = objective_lib.Rows(
    dropped=pairs.dropped,
    label=pairs.real.label,
    other_label=pairs.other.label,
    label_drop=phase.label_drop,
  )
  real, other = phase.objective.loss(log_ratio_real, log_ratio_other, rows)
  chance_real, chance_other = phase.objective.chance(rows)
  loss_real = jnp.mean(real)
  loss_other = jnp.mean(other)
  metrics = {
    'loss': loss_real + loss_other,
    'loss_real': loss_real,
    'loss_fake': loss_other,
    'chance_loss': jnp.mean(chance_real) + jnp.mean(chance_other),
  }
  results = {
    'log_ratio_real': log_ratio_real,
    'log_ratio_fake': log_ratio_other,
    'noise_bin': info_real['noise_bin'],
    'mle_loss': info_real['mle_loss'],
  }
  return metrics['loss'], (metrics, results)


def mle_loss(
  params: likelihood.Params,
  reference: likelihood.Params,
  frozen: likelihood.Frozen,
  pairs: Pairs,
  model: likelihood.LikelihoodModel,
  phase: Any,
) -> tuple[jax.Array, tuple[Metrics, Metrics]]:
  """Returns the family's own pretraining loss on the real rows."""
  del reference, phase
  losses = model.mle_loss(params, frozen, pairs.real, pairs.keys)
  loss = jnp.mean(losses)
  return loss, ({'loss': loss, 'mle_loss': loss}, {})


def gradient_of(
  trained: likelihood.Params,
  reference: likelihood.Params,
  frozen: likelihood.Frozen,
  rows: Microbatch,
  model: likelihood.LikelihoodModel,
  phase: Any,
  sampler: Any,
) -> tuple[Metrics, Metrics, likelihood.Params]:
  """Returns the metrics, per-row results [B] and gradient of a microbatch.

  Args:
    trained: what is trained, see `lora.Lora`.
    reference: θ_ref.
    frozen: weights that are neither.
    rows: those of the microbatch.
    model: the family.
    phase: the phase, which says how θ is made of what is trained.
    sampler: draws fakes inside the step, where the negatives ask for it.
  """
  # Each microbatch asks for it, so that it need not stay there between them.
  reference = memory.on_device(reference)
  pairs = make_pairs(rows, reference, frozen, model, phase, sampler)
  loss_of = contrastive_loss if phase.objective.contrastive else mle_loss

  def loss(trained):
    params = phase.lora.merge(reference, trained)
    return loss_of(params, reference, frozen, pairs, model, phase)

  (_, (metrics, results)), grads = jax.value_and_grad(loss, has_aux=True)(
    trained
  )
  return metrics, results, grads


def accumulated(
  gradient: Callable[[Microbatch], Any], rows: Microbatch, parts: int
) -> tuple[Metrics, Metrics, likelihood.Params]:
  """Calls `gradient` on `parts` microbatches, one after the other.

  It is a scan, compiled once for any number of parts, which holds one sum of
  gradients. (XLA on CPU runs convolutions in a loop many times slower.)

  Args:
    gradient: rows -> (metrics, per-row results [B], gradient).
    rows: the rows of all microbatches.
    parts: their number.

  Returns:
    The mean of metrics and gradients, and the results of all rows.
  """
  if parts == 1:
    return gradient(rows)

  def split(leaf):
    # Every part takes each parts-th row, and so stays spread over the devices.
    return jnp.moveaxis(leaf.reshape(-1, parts, *leaf.shape[1:]), 1, 0)

  def add(total, part):
    metrics, results, grads = gradient(part)
    return jax.tree.map(jnp.add, total, (metrics, grads)), results

  split_rows = jax.tree.map(split, rows)
  first = jax.tree.map(lambda leaf: leaf[0], split_rows)
  metrics, _, grads = jax.eval_shape(gradient, first)
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (metrics, grads))
  total, results = jax.lax.scan(add, zero, split_rows)
  metrics, grads = jax.tree.map(lambda leaf: leaf / parts, total)
  results = jax.tree.map(lambda leaf: leaf.reshape(-1), results)
  return metrics, results, grads


def _difference(ours: jax.Array, theirs: jax.Array) -> jax.Array:
  """Returns θ − θ_ref of a leaf, whose reference may be in a smaller type.

  Then θ is first rounded as the forward pass rounds it. (For equal types XLA
  might make a copy of θ, so they are left alone.)
  """
  if ours.dtype != theirs.dtype:
    kept = jnp.finfo(theirs.dtype)
    ours = jax.lax.reduce_precision(ours, kept.nexp, kept.nmant)
  return ours - theirs


def without_bad(
  bad: jax.Array, state: state_lib.TrainState, next_state: state_lib.TrainState
) -> state_lib.TrainState:
  """Returns the next state; after a bad step it has learned nothing of it.

  Args:
    bad: [] bool.
    state: the state before the step.
    next_state: the state after it.
  """
  kept = state_lib.at_step(state, next_state.step)

  def choose(old, new):
    return jnp.where(bad, old, new)

  return jax.tree.map(choose, kept, next_state)


def train_step(
  state: state_lib.TrainState,
  reference: likelihood.Params,
  frozen: likelihood.Frozen,
  real: negatives.Stored,
  fake: negatives.Stored | None,
  model: likelihood.LikelihoodModel,
  phase: Any,
  key: jax.Array,
  *,
  sampler: Any = None,
  accumulate: int = 1,
  axis_name: str | None = None,
) -> tuple[state_lib.TrainState, Metrics]:
  """One optimizer step on B real rows, and on as many fakes or negatives.

  Args:
    state: what is trained, its averages and the optimizer's state; safe to
      donate.
    reference: θ_ref, which never changes.
    frozen: weights that are neither.
    real: the real rows as stored, see `Microbatch`.
    fake: rows of the fake pool as stored, see `Microbatch`. A pair shares its
      noise and its label drop.
    model: the family; the numbers of its noise law are traced.
    phase: a `config.Phase` at its round (`config.at_round`); the numbers of its
      objective and its peak learning rate are traced.
    key: the key of (seed, stage); a row's key folds in the step and its id.
    sampler: draws fakes inside the step, where the negatives ask for it.
    accumulate: the number of microbatches; it divides the rows of each device.
    axis_name: the name of the devices' axis under pmap; None where jit shards
      the arrays.

  Returns:
    The next state, and metrics over the global batch.
  """
  keys = rng.per_example(jax.random.fold_in(key, state.step), real['id'])
  dropped = drop_labels(keys, phase.label_drop)

  def gradient(rows: Microbatch):
    return gradient_of(
      state.params, reference, frozen, rows, model, phase, sampler
    )

  rows = Microbatch(real, fake, keys, dropped)
  metrics, results, grads = accumulated(gradient, rows, accumulate)
  if axis_name:
    metrics, grads = jax.lax.pmean((metrics, grads), axis_name)
    results = jax.lax.all_gather(results, axis_name, tiled=True)

  rules = phase.lora.rules(model.rules)
  transform = phase.optimizer.transform(rules, phase.batch_size, phase.images)
  next_state = state_lib.apply_gradients(
    state=state,
    grads=grads,
    transform=transform,
    averages=phase.averages,
    rules=rules,
    batch_size=phase.batch_size,
  )
  metrics['grad_norm'] = optax.tree.norm(grads)
  if phase.bad_numbers.watches:
    metrics['bad'] = phase.bad_numbers.are_bad(
      loss=metrics['loss'],
      grad_norm=metrics['grad_norm'],
      opt_state=state.opt_state,
      adam_b2=phase.optimizer.adam_b2,
    )
    next_state = without_bad(metrics['bad'], state, next_state)

  there = memory.on_device(reference)
  distance = jax.tree.map(
    _difference, phase.lora.merge(there, state.params), there
  )
  metrics['learning_rate'] = phase.optimizer.rate(
    state.step, phase.batch_size, phase.images
  )
  metrics['reference_distance'] = optax.tree.norm(distance)
  if results:
    metrics['mle_loss'] = jnp.mean(results['mle_loss'])
    metrics |= ddo.diagnostics(
      log_ratio_real=results['log_ratio_real'],
      log_ratio_fake=results['log_ratio_fake'],
      noise_bin=results['noise_bin'],
      num_bins=model.num_bins,
      logit=phase.objective.logit,
    )
  return next_state, metrics
