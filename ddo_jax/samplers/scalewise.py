"""Sampling of VAR: all tokens of one scale at once, scale after scale."""

from collections.abc import Callable
import dataclasses
from typing import Any
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from ddo_jax import errors
from ddo_jax import rng

CONVENTIONS = ('var', 'minus_one')


class Stages(NamedTuple):
  """A model as the sampler sees it; see `bind`.

  Attributes:
    patch_nums: side n of each scale.
    none: the label that means "no label".
    codebook: [V,C] vectors of the tokens.
    predict: (scale, label [B], inputs [B,n²,C], past) -> logits [B,n²,V] and
      the past of the next scale, a pytree; inputs are [B,0,C], the past None,
      at scale 0.
    advance: (scale, vectors [B,n²,C], f̂ [B,h,w,C]) -> f̂, and the next
      scale's inputs.
  """

  patch_nums: tuple[int, ...]
  none: int
  codebook: jax.Array
  predict: Callable[..., tuple[jax.Array, Any]]
  advance: Callable[..., tuple[jax.Array, jax.Array | None]]


def bind(
  transformer: nn.Module, tokenizer: nn.Module, params: Any, frozen: Any
) -> Stages:
  """The stages of a `var.Var` and a `vqvae.Vqvae` with their parameters.

  Args:
    transformer: gives `predict`, `patch_nums` and `num_classes`.
    tokenizer: gives `advance` and `vectors`.
    params: of the transformer.
    frozen: of the tokenizer.
  """
  ours, theirs = {'params': params}, {'params': frozen}
  return Stages(
    transformer.patch_nums,
    transformer.num_classes,
    jnp.asarray(tokenizer.apply(theirs, method='vectors')),
    lambda *args: transformer.apply(ours, *args, method='predict'),
    lambda *args: tokenizer.apply(theirs, *args, method='advance'),
  )


def keep(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
  """Logits [...,V] with the unlikely ones at −∞.

  Args:
    logits: unnormalised.
    top_k: those below the k-th largest go, ties stay; 0 keeps all.
    top_p: then the least likely go, as long as together they have at most
      1 − top_p, the likeliest stays; 0 keeps all.
  """
  if top_k:
    top = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0]
    logits = jnp.where(logits < top[..., -1:], -jnp.inf, logits)
  if top_p:
    order = jnp.argsort(logits, axis=-1)
    ascending = jnp.take_along_axis(logits, order, axis=-1)
    mass = jnp.cumsum(jax.nn.softmax(ascending), axis=-1)
    drop = (mass <= 1 - top_p).at[..., -1].set(False)
    drop = jnp.take_along_axis(drop, jnp.argsort(order, axis=-1), axis=-1)
    logits = jnp.where(drop, -jnp.inf, logits)
  return logits


def smoothed(
  logits: jax.Array, gumbel: jax.Array, ratio: float, codebook: jax.Array
) -> jax.Array:
  """Mixtures of vectors in place of one drawn: for the eye, never for scores.

  Args:
    logits: [...,V], after `keep`.
    gumbel: [...,V] standard Gumbel noise.
    ratio: 0 at the first scale … 1 at the last.
    codebook: [V,C].

  Returns:
    [...,C].
  """
  return smooth_weights(logits, gumbel, ratio) @ codebook


def smooth_weights(
  logits: jax.Array, gumbel: jax.Array, ratio: float
) -> jax.Array:
  """[...,V] the weights of `smoothed`, sharper at finer scales."""
  temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
  return jax.nn.softmax((logits * (1 + ratio) + gumbel) / temperature)


# Mutable only so that `--config.sampler.x=v` can write it; hashed once built.
@dataclasses.dataclass(unsafe_hash=True)
class Scalewise:
  """Draws the tokens of each scale given all coarser ones.

  Guidance at scale i of S is (1+t)·logits − t·logits without label, with t
  rising linearly in r = i/(S−1). What the published numbers call guidance is
  ambiguous, so the convention has a name:
    'var': t = guidance · r, as in VAR's public code; 0 is no guidance.
    'minus_one': t = (guidance − 1) · r, as elsewhere; 1 is no guidance.
  Without guidance the unlabelled half is not computed. References for DDO are
  sampled without guidance and without the filters.

  Attributes:
    guidance: s of the formulas above.
    convention: 'var' or 'minus_one'.
    top_k: see `keep`; 0 is off.
    top_p: see `keep`; 0 is off.
    smooth: see `smoothed`; tokens are drawn all the same.
  """

  guidance: float = 0.0
  convention: str = 'var'
  top_k: int = 0
  top_p: float = 0.0
  smooth: bool = False

  reads = 'stages'

  def strength(self, ratio: float) -> float:
    """Guidance t at r = `ratio`.

    Raises:
      errors.UserError: the convention has another name, or t is negative.
    """
    if self.convention not in CONVENTIONS:
      raise errors.UserError(
        f'config.sampler.convention is {self.convention!r}; it must be one of'
        f' {CONVENTIONS}'
      )
    none = float(self.convention == 'minus_one')
    if self.guidance < none:
      raise errors.UserError(
        f'config.sampler.guidance is {self.guidance} in the convention'
        f' {self.convention!r}, where {none} is no guidance and less would'
        ' guide away from the class: set it to that or more'
      )
    return (self.guidance - none) * ratio

  def unguided(self) -> 'Scalewise':
    """Draws from the model itself: no guidance, no filter."""
    none = float(self.convention == 'minus_one')
    return Scalewise(guidance=none, convention=self.convention)

  def __call__(
    self, stages: Stages, label: jax.Array, keys: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Draws one image a row.

    Args:
      stages: the model.
      label: [B] int.
      keys: [B] a row's own key: its image depends on nothing else.

    Returns:
      [B,L] int32 tokens, and f̂ [B,h,w,C] for the tokenizer's decoder; with
      `smooth`, f̂ is not that of the tokens.

    Raises:
      errors.UserError: see `strength`; or top_k, top_p out of range.
    """
    self._check()
    guided = self.strength(1.0) > 0
    size, channels = stages.patch_nums[-1], stages.codebook.shape[1]
    dtype = stages.codebook.dtype
    f_hat = jnp.zeros((len(label), size, size, channels), dtype)
    inputs, past = jnp.zeros((len(label), 0, channels), dtype), None
    if guided:
      label = jnp.concatenate([label, jnp.full_like(label, stages.none)])
    tokens = []
    for scale in range(len(stages.patch_nums)):
      ratio = scale / max(len(stages.patch_nums) - 1, 1)
      if guided:
        inputs = jnp.concatenate([inputs, inputs])
      logits, past = stages.predict(scale, label, inputs, past)
      if guided:
        t = self.strength(ratio)
        with_label, without = jnp.split(logits, 2)
        logits = (1 + t) * with_label - t * without
      logits = keep(logits, self.top_k, self.top_p)
      ids, vectors = self._draw(stages.codebook, logits, keys, scale, ratio)
      tokens.append(ids)
      f_hat, inputs = stages.advance(scale, vectors, f_hat)
    return jnp.concatenate(tokens, axis=1), f_hat

  def _check(self) -> None:
    if self.top_k < 0 or not 0 <= self.top_p <= 1:
      raise errors.UserError(
        f'config.sampler has top_k {self.top_k} and top_p {self.top_p}; wanted'
        ' a number of tokens, and a probability in [0, 1]; 0 is off'
      )

  def _draw(self, codebook, logits, keys, scale, ratio):
    """Tokens [B,n²] of one scale, and the vectors that stand for them."""
    token_keys = rng.split_rows(keys, 'tokens', scale)
    ids = jax.vmap(jax.random.categorical)(token_keys, logits)
    if not self.smooth:
      return ids.astype(jnp.int32), codebook[ids]
    noise_keys = rng.split_rows(keys, 'smooth', scale)
    draw = lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype)
    gumbel = jax.vmap(draw)(noise_keys)
    vectors = smoothed(logits, gumbel, ratio, codebook)
    return ids.astype(jnp.int32), vectors
