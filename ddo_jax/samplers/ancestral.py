"""Ancestral sampling of tokens: every stage given all stages before it.

It serves next-scale models, which draw all tokens of one scale at a stage, and
next-token models, which draw one token at a stage and keep the keys and values
of their attention.
"""

import dataclasses
from typing import Any
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.samplers import contract

# Each convention's value of `guidance` that means no guidance.
_NEUTRAL = {'var': 0.0, 'minus_one': 1.0, 'constant': 1.0}


def keep(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
  """Filters logits: sets those of unlikely tokens to −∞.

  Args:
    logits: unnormalised log-probabilities, [...,V].
    top_k: keep the k likeliest tokens and those that tie with the k-th; 0 keeps
      all.
    top_p: then drop the least likely tokens for as long as their total
      probability is at most 1 − top_p. The likeliest always stays. 0 drops
      none.

  Returns:
    The filtered logits, [...,V].
  """
  if top_k:
    largest, _ = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))
    logits = jnp.where(logits < largest[..., -1:], -jnp.inf, logits)
  if top_p:
    order = jnp.argsort(logits, axis=-1)
    ascending = jnp.take_along_axis(logits, order, axis=-1)
    mass = jnp.cumsum(jax.nn.softmax(ascending), axis=-1)
    drop = (mass <= 1 - top_p).at[..., -1].set(False)
    drop = jnp.take_along_axis(drop, jnp.argsort(order, axis=-1), axis=-1)
    logits = jnp.where(drop, -jnp.inf, logits)
  return logits


def smoothing(ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the sharpness and the temperature of `smooth_weights`.

  Args:
    ratio: 0 at the first stage, rising to 1 at the last.
  """
  return 1 + ratio, np.maximum(0.27 * (1 - 0.95 * ratio), 0.005)


def smooth_weights(
  logits: jax.Array,
  gumbel: jax.Array,
  sharpness: float | jax.Array,
  temperature: float | jax.Array,
) -> jax.Array:
  """Returns the weights of the mixture that stands for a drawn vector.

  VAR mixes the codebook's vectors by these weights where plain sampling takes
  the vector of one token. This smooths images for the eye; scores that are
  meant to be compared must not use it.

  Args:
    logits: the filtered logits, [...,V].
    gumbel: standard Gumbel noise, [...,V].
    sharpness: multiplies the logits.
    temperature: divides the noisy logits.

  Returns:
    The weights [...,V], which sum to 1.
  """
  return jax.nn.softmax((logits * sharpness + gumbel) / temperature)


@dataclasses.dataclass(unsafe_hash=True)
class Ancestral(contract.Sampler):
  """Draws the tokens of each stage given all stages before it.

  With guidance the model sees every row twice, with its label and without, and
  the logits are (1+t)·with − t·without. The strength t depends on `guidance` s
  and, at stage i of S, on r = i/(S−1). What the published numbers call guidance
  is ambiguous, so there are three conventions:

    'var'        t = s r, as in VAR's public code; s = 0 is no guidance.
    'minus_one'  t = (s − 1) r; s = 1 is no guidance.
    'constant'   t = s − 1 at every stage, as in LlamaGen; s = 1 is none.

  `guided_stages` n > 0 guides the first n stages alone, and goes on with the
  logits of the label. What LlamaGen's program calls an interval of k is n =
  k + 2.

  Without guidance the model sees every row once. References for DDO are sampled
  without guidance and without filters, see `unguided`.

  Attributes:
    guidance: s of the formulas above.
    convention: 'var', 'minus_one' or 'constant'.
    top_k: see `keep`; 0 is off.
    top_p: see `keep`; 0 is off.
    guided_stages: only so many stages, the first ones, are guided; 0 for all.
    temperature: the guided logits are divided by it before the filters; towards
      0 only the likeliest token is drawn.
    smooth: put smooth mixtures of vectors on the canvas, see `smooth_weights`.
      The tokens that are returned are drawn all the same, but the canvas is not
      theirs.
  """

  drives: ClassVar[str] = 'stages'

  guidance: float = 0.0
  convention: str = 'var'
  top_k: int = 0
  top_p: float = 0.0
  guided_stages: int = 0
  temperature: float = 1.0
  smooth: bool = False

  def strength(self, ratio: float) -> float:
    """Returns the strength t of guidance at r = `ratio`.

    Raises:
      errors.UserError: there is no such convention, or t is negative.
    """
    none = self._neutral()
    if self.guidance < none:
      raise errors.UserError(
        f'config.sampler.guidance is {self.guidance} in the convention'
        f' {self.convention!r}, where {none} is no guidance and less would'
        ' guide away from the class: set it to that or more'
      )
    if self.convention == 'constant':
      return self.guidance - none
    return (self.guidance - none) * ratio

  def unguided(self) -> 'Ancestral':
    """Returns the sampler of the model itself: no guidance and no filter."""
    return Ancestral(guidance=self._neutral(), convention=self.convention)

  def __call__(
    self, stages: contract.Stages, label: jax.Array, keys: jax.Array
  ) -> tuple[jax.Array, Any]:
    """Draws one sample for each key.

    Args:
      stages: the model.
      label: the classes, [B] int.
      keys: the rows' keys, [B]; a sample depends on its own key only.

    Returns:
      The tokens [B,L] int32 of all stages, and the last canvas.

    Raises:
      errors.UserError: a setting makes no sense.
    """
    self._check()
    rows = label.shape[0]
    inputs, past, canvas = stages.begin(rows)
    if self.guides:
      # The past has both halves; inputs and canvas are the same for both.
      _, past, _ = stages.begin(2 * rows)
      label = jnp.concatenate([label, jnp.full_like(label, stages.none)])
    schedule = self._schedule(len(stages.sizes))

    def step(carry, now):
      """Runs one stage; `now` is its row of the schedule."""
      inputs, past, canvas = carry
      logits, past = self._predict(stages, now, label, inputs, past)
      tokens, vectors = self._draw(stages.codebook, now, logits, keys)
      canvas, inputs = stages.advance(now['stage'], vectors, canvas)
      return (inputs, past, canvas), tokens

    carry = (inputs, past, canvas)
    if stages.scanned:
      columns = jax.tree.map(jnp.asarray, schedule)
      carry, parts = jax.lax.scan(step, carry, columns)
      tokens = jnp.moveaxis(parts, 0, 1).reshape(rows, -1)
    else:
      parts = []
      for stage in range(len(stages.sizes)):
        now = {name: column[stage].item() for name, column in schedule.items()}
        carry, part = step(carry, now)
        parts.append(part)
      tokens = jnp.concatenate(parts, axis=1)
    _, _, canvas = carry
    return tokens, canvas

  def _neutral(self) -> float:
    """Returns the value of `guidance` that means no guidance."""
    if self.convention not in _NEUTRAL:
      raise errors.UserError(
        f'config.sampler.convention is {self.convention!r}; it must be one of'
        f' {tuple(_NEUTRAL)}'
      )
    return _NEUTRAL[self.convention]

  def _check(self) -> None:
    self.strength(1.0)
    if self.top_k < 0 or not 0 <= self.top_p <= 1:
      raise errors.UserError(
        f'config.sampler has top_k {self.top_k} and top_p {self.top_p}; wanted'
        ' a number of tokens, and a probability in [0, 1]; 0 is off'
      )
    errors.require(
      self.guided_stages >= 0,
      'sampler.guided_stages',
      self.guided_stages,
      'a number of stages, or 0 for all',
    )
    errors.require(
      self.temperature > 0, 'sampler.temperature', self.temperature, 'positive'
    )

  def _schedule(self, count: int) -> dict[str, np.ndarray]:
    """Returns what varies from stage to stage, as columns [count].

    The columns are float64, so that a scan and an unrolled loop round the same
    numbers to the type of the logits.
    """
    stage = np.arange(count)
    ratio = stage / max(count - 1, 1)
    strength = np.array([self.strength(r) for r in ratio])
    strength[self.guided_stages or count :] = 0
    sharpness, temperature = smoothing(ratio)
    return {
      'stage': stage,
      'with_label': 1 + strength,
      'without': strength,
      'sharpness': sharpness,
      'temperature': temperature,
    }

  def _predict(self, stages, now, label, inputs, past):
    """Returns a stage's guided and filtered logits [B,n,V], and the past."""
    if self.guides:
      inputs = jax.tree.map(lambda x: jnp.concatenate([x, x]), inputs)
    logits, past = stages.predict(now['stage'], label, inputs, past)
    if self.guides:
      with_label, without = jnp.split(logits, 2)
      with_label = jnp.asarray(now['with_label'], logits.dtype) * with_label
      without = jnp.asarray(now['without'], logits.dtype) * without
      logits = with_label - without
    if self.temperature != 1:
      logits = logits / self.temperature
    return keep(logits, self.top_k, self.top_p), past

  def _draw(self, codebook, now, logits, keys):
    """Returns a stage's tokens [B,n], and the vectors that stand for them."""
    token_keys = rng.split_rows(keys, 'tokens', now['stage'])
    tokens = jax.vmap(jax.random.categorical)(token_keys, logits)
    tokens = tokens.astype(jnp.int32)
    if not self.smooth:
      return tokens, codebook[tokens]

    def draw_gumbel(key):
      return jax.random.gumbel(key, logits.shape[1:], logits.dtype)

    noise_keys = rng.split_rows(keys, 'smooth', now['stage'])
    weights = smooth_weights(
      logits,
      jax.vmap(draw_gumbel)(noise_keys),
      sharpness=jnp.asarray(now['sharpness'], logits.dtype),
      temperature=jnp.asarray(now['temperature'], logits.dtype),
    )
    return tokens, weights @ codebook
