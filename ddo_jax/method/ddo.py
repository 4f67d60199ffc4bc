"""Direct Discriminative Optimization (arXiv 2503.01103).

A GAN loss whose discriminator is the likelihood ratio of the model and a
frozen reference: d_θ(x) = σ(β r(x)), r(x) = log p_θ(x) − log p_ref(x).
"""

from collections.abc import Callable
import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import settings
from ddo_jax.method import objective

# Edges of the histogram of logits. One bin is centred on 0, where every round
# starts; the first and the last bin are open.
HISTOGRAM_EDGES = np.linspace(-6.125, 6.125, 50)


def row_weights(
  dropped: jax.Array, alpha: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the weights of real and fake rows, given which lost their label.

  A row without a label gets no negative signal, because the unconditional
  branch is itself the negative signal of classifier-free guidance and should
  stay mode-covering. The weights follow from the drop, never from the label: a
  model without classes carries no labels and its fakes still count in full.

  Args:
    dropped: [B] bool, true where the label was dropped at random.
    alpha: [] the weight α of the fakes.

  Returns:
    ([B] real, [B] fake): (max(α, 1), 0) on dropped rows, (1, α) elsewhere.
  """
  real = jnp.where(dropped, jnp.maximum(alpha, 1.0), 1.0)
  fake = jnp.where(dropped, 0.0, alpha)
  return real, fake


def weigh(
  real: jax.Array,
  fake: jax.Array,
  rows: objective.Rows,
  alpha: jax.Array,
  normalize: bool,
) -> tuple[jax.Array, jax.Array]:
  """Returns the two terms times `row_weights`, the form of eq. 13.

  Args:
    real: [B] the term of each real row.
    fake: [B] the term of each fake row.
    rows: says which pairs lost their labels.
    alpha: [] the weight α of the fakes.
    normalize: whether both are divided by max(α, 1).
  """
  chex.assert_equal_shape([real, fake, rows.dropped])
  weight_real, weight_fake = row_weights(rows.dropped, alpha)
  real = weight_real * real
  fake = weight_fake * fake
  if not normalize:
    return real, fake
  divisor = jnp.maximum(alpha, 1.0)
  return real / divisor, fake / divisor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(unsafe_hash=True)
class DDO(objective.Objective):
  """The loss of eq. 13 (exact log-ratios) and of eq. 16 (diffusion).

  L = −E_real log σ(β r) − α E_fake log σ(−β r). It and its gradient are finite
  for every finite log-ratio.

  Attributes:
    alpha: α, the weight of the fakes, one value a round.
    beta: β, the scale of the log-ratio, one value a round. It must bring β r
      to O(1), and so depends on the dimension of the data.
    normalize: whether the loss is divided by max(α, 1), as published for VAR.
  """

  alpha: settings.PerRound = (4.0,)
  beta: settings.PerRound = (0.05,)
  normalize: bool = dataclasses.field(default=False, metadata={'static': True})

  def loss(
    self,
    log_ratio_real: jax.Array,
    log_ratio_other: jax.Array,
    rows: objective.Rows,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns −w_real log σ(β r_real) and −w_fake log σ(−β r_fake)."""
    real = jax.nn.softplus(-self.logit(log_ratio_real))
    fake = jax.nn.softplus(self.logit(log_ratio_other))
    return weigh(real, fake, rows, self.alpha, self.normalize)


def optimal_density(
  p_reference: jax.Array, p_data: jax.Array, beta: float
) -> tuple[jax.Array, jax.Array]:
  """Theorem 3.3: the population optimum of eq. 13 on a grid, and its α.

  Args:
    p_reference: [K] probabilities of the reference, all > 0, with sum 1.
    p_data: [K] probabilities of the data, all > 0, with sum 1.
    beta: β > 0. Below 1 the optimum overshoots the data.

  Returns:
    ([K], []): p_ref^(1−1/β) p_data^(1/β) / Z and α* = Z^β, the only α at which
    a normalised model can reach it. At β = 1, α* is 1.
  """
  log_density = (1 - 1 / beta) * jnp.log(p_reference)
  log_density += jnp.log(p_data) / beta
  log_z = jax.nn.logsumexp(log_density)
  return jnp.exp(log_density - log_z), jnp.exp(beta * log_z)


def diagnostics(
  log_ratio_real: jax.Array,
  log_ratio_fake: jax.Array,
  noise_bin: jax.Array,
  num_bins: int,
  logit: Callable[[jax.Array], jax.Array],
) -> dict[str, jax.Array]:
  """Measures what tells a healthy round from one at chance or saturated.

  Args:
    log_ratio_real: [B], in nats.
    log_ratio_fake: [B], in nats.
    noise_bin: [B] int, the bin of each pair's noise level.
    num_bins: the number of bins.
    logit: `Objective.logit`.

  Returns:
    Scalars; two vectors [num_bins] of mean log-ratios by noise level, NaN where
    a bin is empty; two vectors of counts of logits between `HISTOGRAM_EDGES`.
  """
  signed = jnp.stack([logit(log_ratio_real), -logit(log_ratio_fake)])
  metrics = {
    # A tie is a coin toss: it counts half.
    'accuracy': jnp.mean(0.5 * (1 + jnp.sign(signed))),
    'saturated': jnp.mean(jnp.abs(signed) > 4),
    'max_abs_logit': jnp.max(jnp.abs(signed)),
    'margin': jnp.mean(log_ratio_real) - jnp.mean(log_ratio_fake),
  }
  count = jnp.zeros(num_bins).at[noise_bin].add(1.0)
  for name, r in (('real', log_ratio_real), ('fake', log_ratio_fake)):
    metrics[f'log_ratio_{name}_mean'] = jnp.mean(r)
    metrics[f'log_ratio_{name}_std'] = jnp.std(r)
    p5, p95 = jnp.percentile(r, jnp.array([5.0, 95.0]))
    metrics[f'log_ratio_{name}_p5'] = p5
    metrics[f'log_ratio_{name}_p95'] = p95
    bins = jnp.searchsorted(HISTOGRAM_EDGES, logit(r))
    metrics[f'logit_{name}_histogram'] = jnp.bincount(
      bins, length=HISTOGRAM_EDGES.size + 1
    )
    total = jnp.zeros(num_bins).at[noise_bin].add(r)
    metrics[f'log_ratio_{name}_by_noise_level'] = total / count
  return metrics
