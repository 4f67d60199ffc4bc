"""What training changes: parameters, their averages, the optimizer's state."""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from ddo_jax import config as config_lib
from ddo_jax.method import likelihood
from ddo_jax.training import averages as ema_lib

Params = likelihood.Params
_FLAT = 0.05  # of VAR's schedule 'lin0'


@struct.dataclass
class TrainState:
  """Arrays only: no key, no iterator, no function.

  Attributes:
    step: [] int32, optimizer steps done in this phase.
    params: θ.
    ema: profile name -> averaged params; possibly empty.
    opt_state: of `make_optimizer`.
  """

  step: jax.Array
  params: Params
  ema: dict[str, Params]
  opt_state: Any

  def candidates(self) -> dict[str, Params]:
    """What may be evaluated and promoted: the averages, else θ itself."""
    return self.ema or {'params': self.params}


@struct.dataclass
class Hyper:
  """Scalars that are traced: a sweep or a new round retraces nothing."""

  alpha: jax.Array
  beta: jax.Array
  learning_rate: jax.Array

  @classmethod
  def of(cls, phase: config_lib.Phase, round_index: int) -> 'Hyper':
    """The phase's values in a round."""
    values = (phase.alpha, phase.beta, phase.learning_rate)
    picked = (config_lib.pick(v, round_index) for v in values)
    return cls(*(jnp.float32(v) for v in picked))


def profile_names(phase: config_lib.Phase) -> tuple[str, ...]:
  """The EMA profiles of a phase, as they are named on disk."""
  halflives = tuple(f'halflife_{half:g}' for half in phase.ema_halflife)
  return halflives + tuple(f'power_{width:.3f}' for width in phase.ema_width)


def _ema_weights(phase: config_lib.Phase, step: jax.Array) -> list[jax.Array]:
  """Of the new params in each profile, at `step` steps before this one."""
  batch = phase.batch_size
  seen = step.astype(jnp.result_type(float)) * batch
  return [
    ema_lib.halflife_weight(half, batch, seen, phase.ema_rampup)
    for half in phase.ema_halflife
  ] + [
    ema_lib.power_weight(width, batch, seen + batch)
    for width in phase.ema_width
  ]


def make_optimizer(phase: config_lib.Phase) -> optax.GradientTransformation:
  """Adam's direction; the step multiplies it by −`learning_rate`."""
  clip = phase.clip_norm
  return optax.chain(
    optax.clip_by_global_norm(clip) if clip else optax.identity(),
    optax.scale_by_adam(phase.adam_b1, phase.adam_b2, phase.adam_eps),
  )


def learning_rate_factor(
  phase: config_lib.Phase, images_seen: jax.Array
) -> jax.Array:
  """[] in [0, 1]: the schedule at `images_seen` real rows before the step."""
  seen = images_seen.astype(jnp.result_type(float))
  factor = jnp.ones_like(seen)
  warmup, start = phase.warmup_images, phase.warmup_start
  if warmup:
    factor *= start + (1 - start) * jnp.minimum(seen / warmup, 1)
  if phase.decay == 'linear':
    left = (phase.images - seen) / phase.decay_images
    factor *= jnp.clip(left, 0, 1)
  elif phase.decay == 'inverse_sqrt':
    factor *= jax.lax.rsqrt(jnp.maximum(seen / phase.decay_images, 1))
  elif phase.decay == 'lin0':
    done = (seen - warmup) / (phase.decay_images - warmup)
    left = jnp.clip((1 - done) / (1 - _FLAT), 0, 1)
    factor *= phase.decay_end + (1 - phase.decay_end) * left
  return factor


def create(params: Params, phase: config_lib.Phase) -> TrainState:
  """A fresh state that shares no buffer with `params` (it is donated)."""
  copy = lambda: jax.tree.map(jnp.copy, params)
  return TrainState(
    step=jnp.zeros([], jnp.int32),
    params=copy(),
    ema={name: copy() for name in profile_names(phase)},
    opt_state=make_optimizer(phase).init(params),
  )


def apply_gradients(
  state: TrainState,
  grads: Params,
  learning_rate: jax.Array,
  model: likelihood.LikelihoodModel,
  phase: config_lib.Phase,
) -> TrainState:
  """One step of Adam or AdamW, the projection, and the averages after it."""
  direction, opt_state = make_optimizer(phase).update(
    grads, state.opt_state, state.params
  )
  if phase.weight_decay:
    shrink = lambda d, p, on: d + phase.weight_decay * p if on else d
    mask = model.decay_mask(state.params)
    direction = jax.tree.map(shrink, direction, state.params, mask)
  update = jax.tree.map(lambda d: -learning_rate * d, direction)
  params = model.project(optax.apply_updates(state.params, update))
  weights = _ema_weights(phase, state.step)
  ema = {
    name: model.project(ema_lib.update(state.ema[name], params, weight))
    for name, weight in zip(profile_names(phase), weights, strict=True)
  }
  return TrainState(state.step + 1, params, ema, opt_state)
