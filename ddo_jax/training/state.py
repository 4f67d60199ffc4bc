"""What training changes: parameters, their averages, the optimizer's state."""

import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from ddo_jax import errors
from ddo_jax import rng
from ddo_jax import settings
from ddo_jax.method import likelihood
from ddo_jax.training import averages as averages_lib

Params = likelihood.Params
_FLAT = 0.05  # the share of VAR's schedule 'lin0' that stays at the peak


@struct.dataclass
class TrainState:
  """Arrays only: no key, no iterator, no function.

  Attributes:
    step: [] int32, the optimizer steps done in this phase.
    params: θ, or the factors of θ − θ_ref where a phase has a `lora.Lora`.
    ema: profile name -> averages of these; possibly empty.
    opt_state: the state of `Optimizer.transform`.
  """

  step: jax.Array
  params: Params
  ema: dict[str, Params]
  opt_state: Any

  def candidates(self) -> dict[str, Params]:
    """Returns what may be evaluated and promoted: the averages, else θ.

    Factors are still to be merged. The average of products is of no low rank;
    that of the factors stands for it.
    """
    return self.ema or {'params': self.params}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(unsafe_hash=True)
class Optimizer:
  """Adam or AdamW under a schedule that counts images.

  Attributes:
    learning_rate: the peak, one value a round; the only traced number.
    warmup_images: the length of the linear warm-up. The paper's diffusion
      models warm up for a whole round.
    warmup_start: the share of the peak where the warm-up starts; VAR: 0.005.
    decay: 'none', 'linear', 'inverse_sqrt' or 'lin0', see `factor`.
    decay_images: linear: the length of the final descent to 0. inverse_sqrt:
      the images after which the rate falls as 1/√ (EDM2's t_ref · batch).
      lin0: where VAR's schedule ends, perhaps far beyond the phase.
    decay_end: lin0: the share of the peak at the end; VAR: 0.1, 0.01.
    adam_b1: decay of Adam's first moment.
    adam_b2: decay of Adam's second moment.
    adam_eps: Adam's ε.
    weight_decay: AdamW's, of the leaves in the model's decay mask.
    clip_norm: largest global norm of the gradient; 0 does not clip.
  """

  learning_rate: settings.PerRound = (1.5e-4,)
  warmup_images: int = dataclasses.field(default=0, metadata={'static': True})
  warmup_start: float = dataclasses.field(
    default=0.0, metadata={'static': True}
  )
  decay: str = dataclasses.field(default='none', metadata={'static': True})
  decay_images: int = dataclasses.field(default=0, metadata={'static': True})
  decay_end: float = dataclasses.field(default=0.0, metadata={'static': True})
  adam_b1: float = dataclasses.field(default=0.9, metadata={'static': True})
  adam_b2: float = dataclasses.field(default=0.999, metadata={'static': True})
  adam_eps: float = dataclasses.field(default=1e-8, metadata={'static': True})
  weight_decay: float = dataclasses.field(
    default=0.0, metadata={'static': True}
  )
  clip_norm: float = dataclasses.field(default=0.0, metadata={'static': True})

  def factor(self, images_seen: jax.Array, images: int) -> jax.Array:
    """Returns the schedule, [] in [0, 1], as a share of the peak.

    optax's schedules count steps and form 1 − (1 − x), which loses digits of a
    warm-up's first rates; these are written out.

    Args:
      images_seen: real rows before the step.
      images: real rows of the whole phase.
    """
    seen = images_seen.astype(jnp.result_type(float))
    factor = jnp.ones_like(seen)
    if self.warmup_images:
      rise = jnp.minimum(seen / self.warmup_images, 1)
      factor *= self.warmup_start + (1 - self.warmup_start) * rise
    if self.decay == 'linear':
      left = (images - seen) / self.decay_images
      factor *= jnp.clip(left, 0, 1)
    elif self.decay == 'inverse_sqrt':
      factor *= jax.lax.rsqrt(jnp.maximum(seen / self.decay_images, 1))
    elif self.decay == 'lin0':
      # Flat for a twentieth of what follows the warm-up, then linear.
      length = self.decay_images - self.warmup_images
      done = (seen - self.warmup_images) / length
      left = jnp.clip((1 - done) / (1 - _FLAT), 0, 1)
      factor *= self.decay_end + (1 - self.decay_end) * left
    return factor

  def rate(self, step: jax.Array, batch_size: int, images: int) -> jax.Array:
    """Returns the learning rate of a step, [].

    Args:
      step: [] int, steps before this one.
      batch_size: real rows a step.
      images: real rows of the whole phase.
    """
    # As a float: 2³¹ images are fewer than EDM2 was pretrained on.
    seen = step.astype(jnp.result_type(float)) * batch_size
    return self.learning_rate * self.factor(seen, images)

  def transform(
    self, rules: likelihood.WeightRules, batch_size: int, images: int
  ) -> optax.GradientTransformation:
    """Returns the optax chain; inside a traced step its peak is traced.

    Args:
      rules: the model's; their decay mask says what decays.
      batch_size: real rows a step.
      images: real rows of the whole phase.
    """

    def schedule(count):
      return self.rate(count, batch_size, images)

    parts = []
    if self.clip_norm:
      parts.append(optax.clip_by_global_norm(self.clip_norm))
    parts.append(optax.scale_by_adam(self.adam_b1, self.adam_b2, self.adam_eps))
    if self.weight_decay:
      parts.append(
        optax.add_decayed_weights(self.weight_decay, mask=rules.decay_mask)
      )
    parts.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*parts)

  def check(self, name: str) -> None:
    """Raises UserError, naming the field, where a value makes no sense."""
    errors.require_positive(f'{name}.learning_rate', self.learning_rate)
    decays = ('none', 'linear', 'inverse_sqrt', 'lin0')
    errors.require_choice(f'{name}.decay', self.decay, decays)
    for field in ('warmup_images', 'decay_images', 'clip_norm', 'weight_decay'):
      value = getattr(self, field)
      errors.require(value >= 0, f'{name}.{field}', value, '0 or more')
    for field in ('warmup_start', 'decay_end', 'adam_b1', 'adam_b2'):
      value = getattr(self, field)
      errors.require(0 <= value < 1, f'{name}.{field}', value, 'in [0, 1)')
    if self.decay != 'none':
      least = self.warmup_images if self.decay == 'lin0' else 0
      errors.require(
        self.decay_images > least,
        f'{name}.decay_images',
        self.decay_images,
        f'more than {least} to decay',
      )


@dataclasses.dataclass(unsafe_hash=True)
class Averages:
  """The averages of the weights that are tracked, a profile each.

  Attributes:
    halflife: the half-lives of exponential averages [images].
    rampup: a half-life is at most this share of the images seen; EDM: 0.05.
    width: the relative widths σ_rel of power-function averages (EDM2 tracks
      0.05 and 0.10).
  """

  halflife: tuple[float, ...] = ()
  rampup: float = 0.0
  width: tuple[float, ...] = ()

  def names(self) -> tuple[str, ...]:
    """Returns the profiles' names, as they stand on disk."""
    halflives = [f'halflife_{half:g}' for half in self.halflife]
    return (*halflives, *self.power_names())

  def power_names(self) -> tuple[str, ...]:
    """Returns the names of the power-function averages, as in `width`."""
    return tuple(f'power_{width:.3f}' for width in self.width)

  def weights(self, step: jax.Array, batch_size: int) -> list[jax.Array]:
    """Returns the weight of the new params in each profile.

    Args:
      step: [] int, steps before the one that made the params.
      batch_size: real rows a step.
    """
    seen = step.astype(jnp.result_type(float)) * batch_size
    weights = [
      averages_lib.halflife_weight(half, batch_size, seen, self.rampup)
      for half in self.halflife
    ]
    weights += [
      averages_lib.power_weight(width, batch_size, seen + batch_size)
      for width in self.width
    ]
    return weights

  def check(self, name: str) -> None:
    """Raises UserError, naming the field, where a value makes no sense."""
    if self.halflife:
      errors.require_positive(f'{name}.halflife', self.halflife)
    good = all(0 < width < 0.288 for width in self.width)
    errors.require(good, f'{name}.width', self.width, 'in (0, 0.288)')
    errors.require(self.rampup >= 0, f'{name}.rampup', self.rampup, '0 or more')


def create(
  params: Params,
  transform: optax.GradientTransformation,
  averages: Averages,
) -> TrainState:
  """Returns a fresh state, which shares no buffer with `params`.

  It will be donated; params, such as a reference, will not.
  """

  def copy():
    return jax.tree.map(jnp.copy, params)

  return TrainState(
    step=jnp.zeros([], jnp.int32),
    params=copy(),
    ema={name: copy() for name in averages.names()},
    opt_state=transform.init(params),
  )


def at_start(
  params: Params,
  rules: likelihood.WeightRules,
  phase: Any,
  key: jax.Array | None = None,
) -> TrainState:
  """Returns the state of a phase's step 0; see `create`.

  Args:
    params: where θ starts.
    rules: those of the model, which say what decays.
    phase: a `config.Phase`, at any round: its numbers take no part.
    key: draws the factors of a phase of low rank; None draws the same ones
      always, which does for their shapes.
  """
  transform = phase.optimizer.transform(
    phase.lora.rules(rules), phase.batch_size, phase.images
  )
  trained = phase.lora.start(params, rng.stream(0) if key is None else key)
  return create(trained, transform, phase.averages)


def at_step(state: TrainState, step: jax.Array) -> TrainState:
  """Returns a state at another time: nothing is learned, the schedule goes on.

  Args:
    state: the state.
    step: [] int32, the steps that are to lie behind it.
  """

  def is_schedule(node):
    return isinstance(node, optax.ScaleByScheduleState)

  def put(node):
    return node._replace(count=step) if is_schedule(node) else node

  opt_state = jax.tree.map(put, state.opt_state, is_leaf=is_schedule)
  return TrainState(step, state.params, state.ema, opt_state)


def apply_gradients(
  state: TrainState,
  grads: Params,
  transform: optax.GradientTransformation,
  averages: Averages,
  rules: likelihood.WeightRules,
  batch_size: int,
) -> TrainState:
  """Returns the state after one optimizer step, projection and averaging."""
  updates, opt_state = transform.update(grads, state.opt_state, state.params)
  params = rules.project(optax.apply_updates(state.params, updates))
  ema = {}
  weights = averages.weights(state.step, batch_size)
  for name, weight in zip(averages.names(), weights, strict=True):
    average = averages_lib.update(state.ema[name], params, weight)
    ema[name] = rules.project(average)
  return TrainState(state.step + 1, params, ema, opt_state)
