"""Models with a likelihood, as the method sees them.

`LikelihoodModel` is all that the step, the rounds and the samplers' callers
know of a model. `diffusion.Diffusion` serves every denoiser D(x; σ) and
`autoregressive.Autoregressive` every ordered model of tokens; a model of
another family implements the contract itself.
"""

import dataclasses
from typing import Any
from typing import Protocol

from flax import struct
import jax
import jax.numpy as jnp

from ddo_jax import errors
from ddo_jax.data import codec as codec_lib

Params = Any  # a pytree of arrays
Frozen = codec_lib.Frozen  # weights that are neither trained nor the reference


@struct.dataclass
class Batch:
  """Rows of one kind, real or fake; the leading axis is the row.

  Attributes:
    x: [B,H,W,C] float32 in model units, or [B,L] int32 tokens.
    label: [B] int32; `num_classes` means "no label".
    id: [B] uint32, the row's position in the stream, step · B + row, which is
      its identity.
  """

  x: jax.Array
  label: jax.Array
  id: jax.Array


@dataclasses.dataclass(frozen=True)
class WeightRules:
  """What may be done to a model's weights; by default next to nothing."""

  def project(self, params: Params) -> Params:
    """Puts params back on the manifold that they are constrained to."""
    return params

  def reduce(self, params: Params) -> Params:
    """Casts weights that the forward pass casts anyway.

    The output does not change, and a reference takes less memory.
    """
    return params

  def decay_mask(self, params: Params) -> Any:
    """Returns a tree of bool like params: the leaves that weight decay
    shrinks.
    """
    return jax.tree.map(lambda _: True, params)


class LikelihoodModel(Protocol):
  """The contract of a family.

  A model is an immutable pytree dataclass. What it is made of is static; what a
  round may vary (the noise law's numbers) is traced.
  """

  @property
  def offers(self) -> tuple[str, ...]:
    """What a sampler can drive, see `samplers.contract`."""

  @property
  def example_shape(self) -> tuple[int, ...]:
    """The shape of one row in model units."""

  @property
  def num_classes(self) -> int:
    """The number of classes; 0 for an unconditional model."""

  @property
  def num_bins(self) -> int:
    """The number of noise bins in the diagnostics."""

  @property
  def codec(self) -> codec_lib.Codec:
    """What lies between stored rows and model units."""

  @property
  def rules(self) -> WeightRules:
    """What may be done to the weights."""

  def init(self, key: jax.Array) -> Params:
    """Returns fresh parameters."""

  def log_ratio(
    self,
    params: Params,
    reference: Params,
    frozen: Frozen,
    batch: Batch,
    keys: jax.Array,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns [B] log p_θ − log p_ref, exactly 0 where θ = θ_ref.

    Args:
      params: θ.
      reference: θ_ref.
      frozen: weights beside these.
      batch: B rows.
      keys: [B], a row's own key: its result depends on nothing else.

    Returns:
      [B] in nats, and {'noise_bin': [B] int32, 'mle_loss': [B]}.
    """

  def mle_loss(
    self, params: Params, frozen: Frozen, batch: Batch, keys: jax.Array
  ) -> jax.Array:
    """Returns [B], the family's own pretraining loss."""

  def sample(
    self,
    params: Params,
    frozen: Frozen,
    label: jax.Array,
    keys: jax.Array,
    sampler: Any,
  ) -> jax.Array:
    """Returns one sample in model units for each label [B] and key [B]."""

  def draw(
    self,
    params: Params,
    frozen: Frozen,
    label: jax.Array,
    keys: jax.Array,
    sampler: Any,
  ) -> jax.Array:
    """Returns the samples as rows are stored."""

  def guided_by(self, guide: Any) -> 'LikelihoodModel':
    """Returns the model guided by another one's network, if it can be."""


class ModelConfig:
  """The contract of a model's settings: a dataclass that builds the model.

  A recipe sets `config.model` to one. A class outside of the package does as
  well as those in `models/`.
  """

  def build(
    self, noise: Any = None, remat: bool | str = False
  ) -> LikelihoodModel:
    """Returns the model.

    Args:
      noise: the noise law that it is trained under, a `noise.NoiseLaw` with a
        number in place of each tuple; None where it only samples, or has none.
      remat: whether the activations inside each block of the network are
        recomputed in the backward pass: False, True, or 'dots' for all but
        what products with weights make. A model that keeps few may ignore it,
        and one that knows no 'dots' may take it for True.

    Raises:
      errors.UserError: the settings fit no model.
    """
    raise NotImplementedError

  def build_tokenizer(self) -> Any:
    """Returns what trains the model's tokenizer; None if it has none."""
    return None


def hide_labels(
  label: jax.Array, dropped: jax.Array, num_classes: int
) -> jax.Array:
  """Returns labels [B] with "no label" in the rows that lost theirs."""
  return jnp.where(dropped, num_classes, label)


def _shape_fault(got: tuple[int, ...], wanted: tuple[int, ...]) -> str:
  """Says how rows of one shape are brought to another."""
  remedies = []
  if got[-1] in (1, 3) and wanted[-1] in (1, 3):
    height, width, channels = wanted
    if got[:2] != wanted[:2] and height == width:
      remedy = f'--config.data.resize={height}'
      if max(got[:2]) < height:
        remedy += f' (or pad_to={height})'
      remedies.append(remedy)
    if got[2] != channels:
      remedies.append(f'--config.data.channels={channels}')
  remedies.append('set config.model to the data')
  return (
    f'rows are {list(got)} and the model takes {list(wanted)}:'
    f' {" ".join(remedies[:-1])}{", or " if remedies[:-1] else ""}'
    f'{remedies[-1]}'
  )


def check_source(
  model: LikelihoodModel,
  name: str,
  stored_shape: tuple[int, ...],
  num_classes: int,
  pixel_values: int,
) -> None:
  """Raises UserError where a source of stored rows does not fit a model.

  A source may have fewer classes than the model, whose others then stay as they
  are.

  Args:
    model: the model.
    name: what the message calls the source.
    stored_shape: the shape of its stored rows.
    num_classes: the number of its classes; an unconditional model leaves labels
      unused.
    pixel_values: the number of values of its pixels.
  """
  got = tuple(stored_shape)
  wanted = tuple(model.codec.stored_shape(model.example_shape))
  faults = []
  if got != wanted:
    faults.append(_shape_fault(got, wanted))
  if pixel_values != model.codec.pixel_values:
    faults.append(
      f'pixels are 0 .. {pixel_values - 1} and the model takes 0 ..'
      f' {model.codec.pixel_values - 1}: --config.model.pixel_values='
      f"{pixel_values}, or its tokenizer's"
    )
  if model.num_classes and not num_classes:
    faults.append(
      f'it has no classes and the model {model.num_classes}: put the images of'
      ' each class into a folder of its own, or --config.model.num_classes=0'
    )
  if num_classes > model.num_classes > 0:
    faults.append(
      f'labels reach {num_classes - 1} and the model has {model.num_classes}'
      f' classes: --config.model.num_classes={num_classes} (where labels begin'
      ' at 1, --config.data.first_label=1)'
    )
  if faults:
    raise errors.UserError(f'{name} does not fit: {"; ".join(faults)}')


def check_sampler(model: LikelihoodModel, sampler: Any) -> None:
  """Raises UserError where a sampler is of another family than the model."""
  fits = {
    'denoise': 'follows noise levels, such as samplers.heun.Heun',
    'variance': 'learned its variance, such as samplers.ddpm.DDPM',
    'velocity': 'follows a velocity, such as samplers.flow_ode.FlowODE',
    'stages': 'draws tokens, such as samplers.ancestral.Ancestral',
  }
  if sampler.drives not in model.offers:
    wanted = ', or '.join(fits[name] for name in model.offers)
    raise errors.UserError(
      f'config.sampler is {sampler}; this model wants one that {wanted}'
    )
