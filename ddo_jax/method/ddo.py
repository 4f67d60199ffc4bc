"""The objective of Direct Discriminative Optimization (arXiv 2503.01103).

A GAN loss whose discriminator is the likelihood ratio of the model and a
frozen reference: d_θ(x) = σ(r(x)), r(x) = log p_θ(x) − log p_ref(x). This
module knows log-ratios only; `likelihood` makes them, `train_step` feeds them.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

# Of β·r in `diagnostics`: one bin is centred on 0, where every round starts;
# the first and the last bin are open.
HISTOGRAM_EDGES = np.linspace(-6.125, 6.125, 50)


def row_weights(
  dropped: jax.Array, alpha: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Weights of the real and the fake rows, given which lost their label.

  A row without a label gets no negative signal, because the unconditional
  branch is itself the negative signal of classifier-free guidance and should
  stay mode-covering. They come from the drop mask, never from the label: a
  model without classes carries no labels and still has full fake weight.

  Args:
    dropped: [B] bool, true where the label was dropped at random.
    alpha: [] weight α of the fakes.

  Returns:
    ([B] real, [B] fake): (max(α, 1), 0) on dropped rows, (1, α) elsewhere.
  """
  real = jnp.where(dropped, jnp.maximum(alpha, 1.0), 1.0)
  fake = jnp.where(dropped, 0.0, alpha)
  return real, fake


def per_example_loss(
  log_ratio_real: jax.Array,
  log_ratio_fake: jax.Array,
  weight_real: jax.Array,
  weight_fake: jax.Array,
  beta: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The two terms of eq. 13 (exact log-ratios) and eq. 16 (diffusion).

  Args:
    log_ratio_real: [B] r on real rows [nats].
    log_ratio_fake: [B] r on samples of the reference [nats].
    weight_real: [B] see `row_weights`.
    weight_fake: [B] see `row_weights`.
    beta: [] scale β of the log-ratio. It must bring β·r to O(1).

  Returns:
    ([B], [B]): −w_real log σ(β r_real) and −w_fake log σ(−β r_fake). Their
    means add up to L_{α,β}; finite, gradients too, for any finite log-ratio.
  """
  chex.assert_equal_shape(
    [log_ratio_real, log_ratio_fake, weight_real, weight_fake]
  )
  real = weight_real * jax.nn.softplus(-beta * log_ratio_real)
  fake = weight_fake * jax.nn.softplus(beta * log_ratio_fake)
  return real, fake


def contrast_weights(
  dropped: jax.Array,
  label: jax.Array,
  other_label: jax.Array,
  weight: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Weights and signs of CCA's second rows: images under another's label.

  Condition contrastive alignment (Chen et al. 2024) needs no samples: its
  negatives are the real images with the labels of their neighbours. A row
  that lost its label, or whose neighbour has the same one, is a positive.

  Args:
    dropped: [B] bool, true where the label was dropped at random.
    label: [B] the images' labels, after the drop.
    other_label: [B] the neighbours', dropped in the same rows.
    weight: [] λ of the negatives.

  Returns:
    ([B], [B]): (1, +1) for positives, (λ, −1) for negatives.
  """
  positive = dropped | (label == other_label)
  return jnp.where(positive, 1.0, weight), jnp.where(positive, 1.0, -1.0)


def contrastive_loss(
  log_ratio: jax.Array,
  log_ratio_other: jax.Array,
  weight: jax.Array,
  sign: jax.Array,
  beta: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The two terms of CCA; divide their means by `normalizer` of λ.

  Where labels are never dropped, as published all second rows are negatives,
  (λ, −1), and nothing is divided.

  Args:
    log_ratio: [B] r of images under their labels [nats].
    log_ratio_other: [B] r of the images under the other labels [nats].
    weight: [B] see `contrast_weights`.
    sign: [B] see `contrast_weights`.
    beta: [] scale β of the log-ratio.

  Returns:
    ([B], [B]): −log σ(β r) and −w log σ(±β r_other).
  """
  chex.assert_equal_shape([log_ratio, log_ratio_other, weight, sign])
  first = jax.nn.softplus(-beta * log_ratio)
  return first, weight * jax.nn.softplus(-beta * sign * log_ratio_other)


def preference_loss(
  log_ratio: jax.Array, log_ratio_other: jax.Array, beta: jax.Array
) -> jax.Array:
  """[B] the form of DPO (Rafailov et al. 2023), −log σ(β (r − r_other)).

  Only the margin counts: both log-ratios may fall without end. Arguments as
  for `contrastive_loss`; β 0.02 as there.
  """
  chex.assert_equal_shape([log_ratio, log_ratio_other])
  return jax.nn.softplus(-beta * (log_ratio - log_ratio_other))


def unlearning_loss(
  log_ratio: jax.Array,
  log_ratio_other: jax.Array,
  weight: jax.Array,
  sign: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """([B], [B]): −r and −(±w r_other), unbounded below: no sigmoid brakes it.

  Arguments as for `contrastive_loss`.
  """
  chex.assert_equal_shape([log_ratio, log_ratio_other, weight, sign])
  return -log_ratio, -sign * weight * log_ratio_other


def normalizer(alpha: jax.Array, normalize: bool) -> jax.Array:
  """What the loss is divided by: max(α, 1) for VAR as published, else 1."""
  return jnp.maximum(alpha, 1.0) if normalize else jnp.ones_like(alpha)


def optimal_density(
  p_reference: jax.Array, p_data: jax.Array, beta: float
) -> tuple[jax.Array, jax.Array]:
  """Theorem 3.3: the population optimum of eq. 13 on a grid, and its α.

  Args:
    p_reference: [K] probabilities of the reference, all > 0, sum 1.
    p_data: [K] probabilities of the data, all > 0, sum 1.
    beta: β > 0. Below 1 the optimum overshoots the data.

  Returns:
    ([K], []): p_ref^(1−1/β) p_data^(1/β) / Z and α* = Z^β, the only α at which
    a normalized model can reach it (1 at β = 1).
  """
  log_density = (1 - 1 / beta) * jnp.log(p_reference)
  log_density += jnp.log(p_data) / beta
  log_z = jax.nn.logsumexp(log_density)
  return jnp.exp(log_density - log_z), jnp.exp(beta * log_z)


def diagnostics(
  log_ratio_real: jax.Array,
  log_ratio_fake: jax.Array,
  level: jax.Array,
  num_levels: int,
  beta: jax.Array,
) -> dict[str, jax.Array]:
  """What tells a healthy run from one at chance or saturated.

  Args:
    log_ratio_real: [B] [nats].
    log_ratio_fake: [B] [nats].
    level: [B] int, bin of each pair (for diffusion: of ln σ).
    num_levels: number of bins.
    beta: [] scale of the log-ratio.

  Returns:
    Scalars; two vectors [num_levels] of mean log-ratios by level, NaN where
    a bin is empty; two vectors of counts of β·r between `HISTOGRAM_EDGES`.
  """
  logits = beta * jnp.stack([log_ratio_real, -log_ratio_fake])
  metrics = {
    # A tie is a coin toss: it counts half.
    'accuracy': jnp.mean(0.5 * (1 + jnp.sign(logits))),
    'saturated': jnp.mean(jnp.abs(logits) > 4),
    'max_abs_logit': jnp.max(jnp.abs(logits)),
    'margin': jnp.mean(log_ratio_real) - jnp.mean(log_ratio_fake),
  }
  count = jnp.zeros(num_levels).at[level].add(1.0)
  for name, r in (('real', log_ratio_real), ('fake', log_ratio_fake)):
    metrics[f'log_ratio_{name}_mean'] = jnp.mean(r)
    metrics[f'log_ratio_{name}_std'] = jnp.std(r)
    p5, p95 = jnp.percentile(r, jnp.array([5.0, 95.0]))
    metrics[f'log_ratio_{name}_p5'] = p5
    metrics[f'log_ratio_{name}_p95'] = p95
    bins = jnp.searchsorted(HISTOGRAM_EDGES, beta * r)
    metrics[f'logit_{name}_histogram'] = jnp.bincount(
      bins, length=HISTOGRAM_EDGES.size + 1
    )
    total = jnp.zeros(num_levels).at[level].add(r)
    metrics[f'log_ratio_{name}_by_level'] = total / count
  return metrics
