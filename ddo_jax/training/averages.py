"""Averages of the weights: half-life and power function, and post hoc.

The power function and its reconstruction are EDM2's (Karras et al. 2024,
section 3 and its appendix): two tracked averages of different width give, by
least squares, the average of any width after the training is over.
"""

from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = Any  # a pytree of arrays

_WIDEST = 12**-0.5  # relative width of a uniform average: exponent 0


def halflife_weight(
  halflife: float, batch_size: int, images_seen: jax.Array, rampup: float
) -> jax.Array:
  """Returns the weight [] of the new params in an exponential average.

  Args:
    halflife: the images after which an image's weight has halved.
    batch_size: images a step.
    images_seen: [] images before the step.
    rampup: the half-life is at most this share of `images_seen` (EDM: 0.05);
      0 sets no such limit.
  """
  if rampup:
    ceiling = jnp.maximum(images_seen * rampup, 1e-8)
    bounded: Any = jnp.minimum(halflife, ceiling)
  else:
    bounded = halflife
  # With expm1, for 1 − 0.5^x loses all digits of a long average in float32.
  return -jnp.expm1(-np.log(2.0) * batch_size / bounded)


def power_weight(
  width: float, batch_size: int, images_seen: jax.Array
) -> jax.Array:
  """Returns the weight [] of the new params in a power-function average.

  The average weighs the params at image t by t^γ: it keeps (1 − batch/n)^(γ+1)
  of itself, where n is the number of images seen after the step. The first step
  takes the params as they are.

  Args:
    width: σ_rel, the relative standard deviation of the profile.
    batch_size: images a step.
    images_seen: [] images after the step.
  """
  power = float(exponent(width)) + 1
  return -jnp.expm1(power * jnp.log1p(-batch_size / images_seen))


def update(average: Params, params: Params, weight: jax.Array) -> Params:
  """Returns the average, moved by `weight` in [0, 1] towards params.

  A leaf that equals the params' stays as it is, to the bit, so that constants
  among the params do not drift.
  """
  return jax.tree.map(lambda a, p: a + weight * (p - a), average, params)


def exponent(width: float | np.ndarray) -> np.ndarray:
  """Returns the exponent γ of a relative width σ_rel in (0, 12^−½), float64.

  σ_rel² = (γ+1) / ((γ+2)² (γ+3)), of which γ is the largest real root.

  Raises:
    ValueError: no γ ≥ 0 has this width.
  """
  widths = np.asarray(width, np.float64)
  if not np.all((widths > 0) & (widths <= _WIDEST)):
    raise ValueError(f'width is {width}; it must be in (0, {_WIDEST:.4f}]')
  roots = [
    np.roots([1, 7, 16 - s**-2, 12 - s**-2]).real.max() for s in widths.flat
  ]
  return np.reshape(roots, widths.shape)


def relative_width(gamma: float | np.ndarray) -> np.ndarray:
  """Returns the relative width σ_rel of an exponent γ; inverts `exponent`."""
  gamma = np.asarray(gamma, np.float64)
  return np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def profile(images: np.ndarray, end: float, width: float) -> np.ndarray:
  """Returns the weight that an average gives to each image.

  p(t) = (γ+1) t^γ / end^(γ+1) up to `end`, and 0 after; its integral is 1.

  Args:
    images: where the density is wanted.
    end: images seen where the average was taken.
    width: the average's relative width.
  """
  gamma = exponent(width)
  images = np.asarray(images, np.float64)
  density = (gamma + 1) / end * (images / end) ** gamma
  return np.where(images <= end, density, 0.0)


def correlation(
  end_a: np.ndarray, width_a: np.ndarray, end_b: np.ndarray, width_b: np.ndarray
) -> np.ndarray:
  """Returns the inner products ∫ p_a p_b of two sets of profiles, [A, B].

  Args:
    end_a: [A] images seen where each average of the first set was taken.
    width_a: [A] the widths of the first set.
    end_b: [B] images seen where each average of the second set was taken.
    width_b: [B] the widths of the second set.
  """
  end_a = np.asarray(end_a, np.float64)[:, None]
  end_b = np.asarray(end_b, np.float64)[None, :]
  gamma_a = exponent(width_a)[:, None]
  gamma_b = exponent(width_b)[None, :]
  # Where they overlap, the later profile is seen up to the earlier one's end.
  later = np.where(end_a < end_b, gamma_b, gamma_a)
  ratio = np.minimum(end_a, end_b) / np.maximum(end_a, end_b)
  product = (gamma_a + 1) * (gamma_b + 1) * ratio**later
  return product / ((gamma_a + gamma_b + 1) * np.maximum(end_a, end_b))


def posthoc_coefficients(
  ends: np.ndarray, widths: np.ndarray, end: float, target: np.ndarray
) -> np.ndarray:
  """Returns how to combine S snapshots into averages of other widths, [S, T].

  The combination is the least-squares one between profiles, in float64 because
  it is badly conditioned, scaled so that each column sums to 1.

  Args:
    ends: [S] images seen where each snapshot was taken.
    widths: [S] the width of the average that each snapshot is of.
    end: images seen where the wanted averages end.
    target: [T] the widths of the wanted averages.
  """
  target = np.asarray(target, np.float64)
  gram = correlation(ends, widths, ends, widths)
  wanted = correlation(ends, widths, np.full(target.shape, end), target)
  coefficients = np.linalg.solve(gram, wanted)
  return coefficients / coefficients.sum(axis=0, keepdims=True)


def reconstruct(
  snapshots: Iterable[Params], coefficients: Sequence[float]
) -> Params:
  """Returns a combination of snapshots, with one in memory at a time.

  Args:
    snapshots: params, in the order of `coefficients`.
    coefficients: [S], a column of `posthoc_coefficients`.

  Returns:
    Params in the snapshots' dtypes, summed in float64. Constants among the
    params come out as they are.
  """
  total = None
  for snapshot, c in zip(snapshots, coefficients, strict=True):
    term = jax.tree.map(
      lambda leaf, c=c: c * np.asarray(leaf, np.float64), snapshot
    )
    total = term if total is None else jax.tree.map(np.add, total, term)
  dtypes = jax.tree.map(lambda leaf: leaf.dtype, snapshot)
  return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), total, dtypes)
