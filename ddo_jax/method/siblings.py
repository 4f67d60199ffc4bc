"""DDO's siblings: f-divergences, and objectives that need no samples.

Section 3.4 of the paper replaces the GAN loss by another f-divergence. CCA, DPO
and unlearning are the baselines of the VAR experiments; their second rows are
the real images under the labels of their neighbours.
"""

import dataclasses
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp

from ddo_jax import errors
from ddo_jax import settings
from ddo_jax.method import ddo
from ddo_jax.method import objective

# The named members of the α-divergence family, by their order.
_ORDERS = {'reverse_kl': 0.0, 'hellinger': 0.5, 'kl': 1.0, 'pearson': 2.0}
_KINDS = ('js', 'brier', 'order', *_ORDERS)


def _scaled_expm1(z: jax.Array, rate: float, cap: float) -> jax.Array:
  """Returns expm1(rate · z)/rate, a straight line from rate · z = cap on.

  Value and slope are continuous there, and finite for every z.
  """
  if rate == 0:
    return z
  inside = jnp.minimum(rate * z, cap)
  beyond = jnp.maximum(rate * z - cap, 0)
  return (jnp.expm1(inside) + jnp.exp(cap) * beyond) / rate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(unsafe_hash=True)
class FDivergence(objective.Objective):
  """The f-divergence form of §3.4: L = −E_real T(z) + α E_fake F(z), z = β r.

  T = f'(e^z) and F = f*(T), so that F'(z) = e^z T'(z): for every f the optimum
  is that of DDO. All are scaled to f''(1) = 1/2, so that the first gradient of
  a round is DDO's too. They differ in how hard they push far from z = 0:

    js          T = −softplus(−z), F = softplus(z). It is DDO itself.
    brier       T = ½ − 2 σ(−z)², F = 2 σ(z)² − ½. Both gradients vanish far
                out: outliers are ignored, a wrong point may stay.
    order       T = expm1((a − 1) z)/(2(a − 1)), F = expm1(a z)/(2a), the
                α-divergence of order a.
    reverse_kl, hellinger, kl, pearson: the orders 0, ½, 1 and 2.

  Outside of orders 0 .. 1 the loss is not convex in r, so that the one-draw
  estimate of a diffusion model's r is no bound (eq. 16); and it weighs that
  estimate's noise. Offer a diffusion model js, hellinger or brier first.

  Where an exponential grows beyond e^cap it goes on as a straight line, so
  that loss and gradient stay finite; the optimum is untouched where
  |log p_data/p_ref| < cap. The loss of order 0 is unbounded below on fakes, of
  order 1 on real rows.

  Attributes:
    alpha: α, the weight of the fakes, one value a round.
    beta: β, the scale of the log-ratio, one value a round.
    kind: one of those above.
    order: the order a, read where kind is 'order'.
    cap: see above.
    normalize: whether the loss is divided by max(α, 1).
  """

  alpha: settings.PerRound = (4.0,)
  beta: settings.PerRound = (0.05,)
  kind: str = dataclasses.field(default='js', metadata={'static': True})
  order: float = dataclasses.field(default=0.5, metadata={'static': True})
  cap: float = dataclasses.field(default=5.0, metadata={'static': True})
  normalize: bool = dataclasses.field(default=False, metadata={'static': True})

  def check(self, name: str) -> None:
    """Raises UserError where a number is not positive or a kind unknown."""
    super().check(name)
    errors.require_choice(f'{name}.kind', self.kind, _KINDS)
    errors.require(self.cap > 0, f'{name}.cap', self.cap, 'positive')

  def real_term(self, z: jax.Array) -> jax.Array:
    """Returns −T(z)."""
    if self.kind == 'js':
      return jax.nn.softplus(-z)
    if self.kind == 'brier':
      return 2 * jax.nn.sigmoid(-z) ** 2 - 0.5
    rate = _ORDERS.get(self.kind, self.order) - 1
    return -_scaled_expm1(z, rate, self.cap) / 2

  def fake_term(self, z: jax.Array) -> jax.Array:
    """Returns F(z)."""
    if self.kind == 'js':
      return jax.nn.softplus(z)
    if self.kind == 'brier':
      return 2 * jax.nn.sigmoid(z) ** 2 - 0.5
    rate = _ORDERS.get(self.kind, self.order)
    return _scaled_expm1(z, rate, self.cap) / 2

  def loss(
    self,
    log_ratio_real: jax.Array,
    log_ratio_other: jax.Array,
    rows: objective.Rows,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns −w_real T(β r_real) and w_fake F(β r_fake)."""
    real = self.real_term(self.logit(log_ratio_real))
    fake = self.fake_term(self.logit(log_ratio_other))
    return ddo.weigh(real, fake, rows, self.alpha, self.normalize)


def _contrast(
  rows: objective.Rows, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the weights and signs [B] of images under a neighbour's label.

  A pair that lost its labels, or whose neighbour has the same label, is a
  positive: (1, +1); others are negatives: (λ, −1). Where labels are never
  dropped, as published, all are negatives.
  """
  if not rows.label_drop:
    ones = jnp.ones(rows.dropped.shape)
    return weight * ones, -ones
  positive = rows.dropped | (rows.label == rows.other_label)
  return jnp.where(positive, 1.0, weight), jnp.where(positive, 1.0, -1.0)


def _contrast_divisor(
  rows: objective.Rows, weight: jax.Array, normalize: bool
) -> jax.Array | float:
  """Returns max(λ, 1) where that is published: normalised, with label drop."""
  if not normalize or not rows.label_drop:
    return 1.0
  return jnp.maximum(weight, 1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(unsafe_hash=True)
class CCA(objective.Objective):
  """Condition contrastive alignment (Chen et al. 2024): needs no samples.

  L = −log σ(β r) − w log σ(±β r_other), where r_other is of the same image
  under its neighbour's label.

  Attributes:
    alpha: λ, the weight of the negatives, one value a round.
    beta: β, the scale of the log-ratio, one value a round.
    normalize: whether the loss is divided by max(λ, 1), as published where
      labels are dropped; otherwise it never is.
  """

  compares_labels: ClassVar[bool] = True

  alpha: settings.PerRound = (4.0,)
  beta: settings.PerRound = (0.05,)
  normalize: bool = dataclasses.field(default=False, metadata={'static': True})

  def loss(
    self,
    log_ratio_real: jax.Array,
    log_ratio_other: jax.Array,
    rows: objective.Rows,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns −log σ(β r) and −w log σ(±β r_other)."""
    chex.assert_equal_shape([log_ratio_real, log_ratio_other, rows.dropped])
    weight, sign = _contrast(rows, self.alpha)
    first = jax.nn.softplus(-self.logit(log_ratio_real))
    second = weight * jax.nn.softplus(-sign * self.logit(log_ratio_other))
    divisor = _contrast_divisor(rows, self.alpha, self.normalize)
    return first / divisor, second / divisor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(unsafe_hash=True)
class DPO(objective.Objective):
  """The form of DPO (Rafailov et al. 2023): −log σ(β (r − r_other)).

  Only the margin counts: both log-ratios may fall without end. With a fake
  pool as the second rows it is the pairwise loss of SPIN-Diffusion, whose
  optimum needs no α.

  Attributes:
    beta: β, the scale of the log-ratio, one value a round.
  """

  beta: settings.PerRound = (0.05,)

  def loss(
    self,
    log_ratio_real: jax.Array,
    log_ratio_other: jax.Array,
    rows: objective.Rows,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns −log σ(β (r − r_other)), and zeros: a pair is one term."""
    chex.assert_equal_shape([log_ratio_real, log_ratio_other, rows.dropped])
    margin = log_ratio_real - log_ratio_other
    first = jax.nn.softplus(-self.logit(margin))
    return first, jnp.zeros_like(first)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(unsafe_hash=True)
class Unlearning(objective.Objective):
  """−r − (±w r_other): unbounded below, for no sigmoid brakes it.

  Attributes:
    alpha: w of negatives, one value a round.
    normalize: as for `CCA`.
  """

  compares_labels: ClassVar[bool] = True

  alpha: settings.PerRound = (4.0,)
  normalize: bool = dataclasses.field(default=False, metadata={'static': True})

  def logit(self, log_ratio: jax.Array) -> jax.Array:
    """There is no β: returns the log-ratio itself."""
    return log_ratio

  def loss(
    self,
    log_ratio_real: jax.Array,
    log_ratio_other: jax.Array,
    rows: objective.Rows,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns −r and −(±w r_other)."""
    chex.assert_equal_shape([log_ratio_real, log_ratio_other, rows.dropped])
    weight, sign = _contrast(rows, self.alpha)
    divisor = _contrast_divisor(rows, self.alpha, self.normalize)
    first = -log_ratio_real / divisor
    second = -sign * weight * log_ratio_other / divisor
    return first, second
