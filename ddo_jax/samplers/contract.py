"""The contract of samplers, on one page.

A `Sampler` is a mutable dataclass of settings with `unsafe_hash=True`. It is
mutable so that `--config.sampler.x=v` can write a field, and hashed once it is
built, as a static argument of compiled functions. It knows no model. It drives
one of four small interfaces, which its class attribute `drives` names:

  'denoise'   a denoiser D(x; σ), a `Denoise`, as `heun.Heun` does;
  'variance'  a denoiser that returns D and as many channels more, a learned
              variance, as `ddpm.DDPM` does;
  'velocity'  a `Velocity` v(x, t) from noise to data, as `flow_ode.FlowODE`
              does;
  'stages'    a model that is sampled stage after stage, a `Stages`, as
              `ancestral.Ancestral` does.

A model says which of these it offers, and refuses samplers of other kinds
(`method.likelihood.check_sampler`).

Every row has a key of its own, and its sample depends on nothing else: not on
the other rows, the size of the batch or the number of devices.
"""

import abc
import dataclasses
from typing import Any
from typing import ClassVar
from typing import NamedTuple
from typing import Protocol

import jax
import jax.numpy as jnp


class Denoise(Protocol):
  """A denoiser with its params and labels bound."""

  def __call__(self, x: jax.Array, sigma: jax.Array, /) -> jax.Array:
    """Returns the clean data [B,...] expected of x [B,...] at sigma [B]."""


class Velocity(Protocol):
  """A velocity field with its params and labels bound."""

  def __call__(self, x: jax.Array, t: jax.Array, /) -> jax.Array:
    """Returns dx/dt [B,...] at x [B,...], at times t [B].

    x is unit noise at t = 0 and data at t = 1, and t x₀ + (1 − t) n between.
    """


class Predict(Protocol):
  """The model's part of one stage."""

  def __call__(
    self, stage: int | jax.Array, label: jax.Array, inputs: Any, past: Any
  ) -> tuple[jax.Array, Any]:
    """Predicts the tokens of a stage.

    Args:
      stage: the number of the stage, from 0.
      label: the classes, [B] int.
      inputs: what `Begin` or `Advance` said that the model reads here, B rows.
      past: what the stage before returned, B rows.

    Returns:
      The logits [B,n,V] of the stage's n tokens, and the past for the next
      stage.
    """


class Advance(Protocol):
  """What becomes of the tokens that were drawn at a stage."""

  def __call__(
    self, stage: int | jax.Array, vectors: jax.Array, canvas: Any
  ) -> tuple[Any, Any]:
    """Takes the vectors of the drawn tokens.

    Args:
      stage: the number of the stage, from 0.
      vectors: the codebook's vectors of the stage's tokens, [B,n,C].
      canvas: the canvas before this stage.

    Returns:
      The canvas with the vectors in it, and the inputs of the next stage;
      after the last stage nobody reads those.
    """


class Begin(Protocol):
  """What sampling starts from."""

  def __call__(self, rows: int) -> tuple[Any, Any, Any]:
    """Returns (inputs, past, canvas) before the first stage, for `rows` rows.

    All three are pytrees. The first axis of every leaf of the inputs has one
    entry for each row.
    """


class Stages(NamedTuple):
  """An ordered model of tokens, with its params bound.

  A next-scale model draws all tokens of one scale at a stage. A next-token
  model draws one, and keeps the keys and values of its attention in the past.

  Attributes:
    sizes: the number of tokens that are drawn at each stage.
    none: the label that means "no label".
    codebook: the vector that the model reads for each token, [V,C].
    begin: makes the inputs, the past and the canvas before the first stage.
    predict: predicts the tokens of a stage.
    advance: puts the drawn tokens on the canvas.
    scanned: all stages have one shape, `predict` and `advance` accept a traced
      stage number, and inputs, past and canvas keep their shapes. The sampler
      then compiles one stage and scans over it, where it would unroll all.
  """

  sizes: tuple[int, ...]
  none: int
  codebook: jax.Array
  begin: Begin
  predict: Predict
  advance: Advance
  scanned: bool = False


class Sampler:
  """The base class of all samplers.

  A sampler is called in one of two ways. One that drives a denoiser derives
  from `DenoiseSampler`. One that drives stages is called as
  `sampler(stages, label, keys)`, with a `Stages`, the classes [B] int and the
  rows' keys [B], and returns the tokens [B,L] int32 of all stages and the last
  canvas.

  Attributes:
    drives: the name of the interface that the sampler drives.
    guidance: the setting of guidance; what means none is the sampler's own.
  """

  drives: ClassVar[str]
  guidance: float

  @property
  def guides(self) -> bool:
    """Whether guidance is asked for, at some noise level or stage."""
    return self.guidance != self.unguided().guidance

  def unguided(self) -> 'Sampler':
    """Returns the sampler of p_ref itself: no guidance and no filter."""
    raise NotImplementedError


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class DenoiseSampler(Sampler, abc.ABC):
  """The base class of samplers that drive a denoiser, or its velocity.

  One is called as `sampler(denoise, shape, keys)`, with a `Denoise` or a
  `Velocity`, the shape of one sample and the rows' keys [B], and returns the
  samples [B, *shape] in the denoiser's units. Its fields of guidance are for
  the model, which builds the guided denoiser and hands it in.

  Attributes:
    guidance: the weight of guidance, see `guidance.guided`; 1 is none.
    guidance_min: noise levels up to this one are not guided.
    guidance_max: the largest noise level that is guided.
    guidance_channels: how many channels are guided; 0 for all. DiT's and SiT's
      programs guide the first 3 of 4.
    discriminator: the weight w of a discriminator's gradient, see
      `guidance.corrected` and `guidance.corrected_velocity`; 0 is none.
    discriminator_min: noise levels up to this one are not corrected.
    discriminator_max: the largest noise level that is corrected.
    precision: that of the network's products while it draws, 'highest', 'high'
      or 'default'; see `precision`.
  """

  drives: ClassVar[str] = 'denoise'

  guidance: float = 1.0
  guidance_min: float = 0.0
  guidance_max: float = 1e9
  guidance_channels: int = 0
  discriminator: float = 0.0
  discriminator_min: float = 0.05
  discriminator_max: float = 80.0
  precision: str = 'highest'

  def level(self, told: jax.Array) -> jax.Array:
    """Returns the noise levels [B] of what the denoiser is told, [B]."""
    return told

  @abc.abstractmethod
  def __call__(
    self, denoise: Denoise, shape: tuple[int, ...], keys: jax.Array
  ) -> jax.Array:
    """Returns one sample [B, *shape] for each key [B]."""

  def unguided(self) -> 'DenoiseSampler':
    """Returns the sampler of the model itself, without guidance."""
    return dataclasses.replace(self, guidance=1.0, discriminator=0.0)


class VelocitySampler(DenoiseSampler):
  """The base class of samplers that drive a velocity.

  One is called as `sampler(velocity, shape, keys)`. Its intervals of guidance,
  and of a discriminator, are in noise levels σ = (1 − t)/t, as those of all
  samplers.
  """

  drives: ClassVar[str] = 'velocity'

  @staticmethod
  def level(told: jax.Array) -> jax.Array:
    """Returns the noise levels of times [B].

    That of t = 0 is none and that of t = 1 is 0; they count as within the
    widest interval, so that guidance without an interval is everywhere.
    """
    return jnp.clip((1 - told) / told, 1e-9, 1e9)
