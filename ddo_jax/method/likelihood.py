"""Models with a likelihood, as the objective sees them.

`LikelihoodModel` is all that the step, the samplers' callers and the rounds
know of a model. `diffusion.Diffusion` serves every denoiser D(x; σ);
`autoregressive.Autoregressive` every transformer over tokens.
"""

from typing import Any
from typing import Protocol

from flax import struct
import jax

Params = Any  # a pytree of arrays
Frozen = dict[str, Params]  # weights neither trained nor the reference


@struct.dataclass
class Batch:
  """Rows of one kind, real or fake; the leading axis is the example.

  Attributes:
    x: [B,H,W,C] float32 in model units, or [B,L] int32 tokens.
    label: [B] int32; `num_classes` means "no label".
    id: [B] uint32 position in the stream, step·B + row: the row's identity.
  """

  x: jax.Array
  label: jax.Array
  id: jax.Array


class LikelihoodModel(Protocol):
  """A hashable frozen dataclass, static under jit; it holds no arrays."""

  example_shape: tuple[int, ...]  # of one row in model units
  num_classes: int  # 0: unconditional
  num_levels: int  # bins of the diagnostics

  def check_source(
    self,
    name: str,
    image_shape: tuple[int, ...],
    num_classes: int,
    pixel_values: int,
  ) -> None:
    """Raises UserError where a data source does not fit the model."""

  def init(self, key: jax.Array) -> Params:
    """Fresh parameters."""

  def project(self, params: Params) -> Params:
    """Puts params back on their manifold; identity for most models."""

  def reduced(self, params: Params) -> Params:
    """The same function, bit for bit, in no more bytes: for a reference."""

  def decay_mask(self, params: Params) -> Any:
    """Tree of bool like params: which leaves `Phase.weight_decay` shrinks."""

  def log_prob(
    self, params: Params, frozen: Frozen, batch: Batch, keys: jax.Array
  ) -> jax.Array:
    """[B] log-likelihood in evaluation mode, deterministic given keys [B]."""

  def log_ratio(
    self,
    params: Params,
    reference: Params,
    frozen: Frozen,
    batch: Batch,
    keys: jax.Array,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """[B] log p_θ − log p_ref, exactly 0 at θ = θ_ref, and per-row info."""

  def mle_loss(
    self, params: Params, frozen: Frozen, batch: Batch, keys: jax.Array
  ) -> jax.Array:
    """[B] the family's own pretraining loss."""

  def sample(
    self,
    params: Params,
    frozen: Frozen,
    label: jax.Array,
    keys: jax.Array,
    sampler: Any,
  ) -> jax.Array:
    """One sample a row of label [B], from its own key of keys [B]."""

  def draw(
    self,
    params: Params,
    frozen: Frozen,
    label: jax.Array,
    keys: jax.Array,
    sampler: Any,
  ) -> jax.Array:
    """The same, as the data stores its rows."""

  def unguided(self, sampler: Any) -> Any:
    """The sampler of p_ref itself: without guidance and filters."""

  def round_trip(
    self, frozen: Frozen, x: jax.Array, keys: jax.Array
  ) -> jax.Array:
    """Samples in model units, as if they had been stored and encoded."""

  def encode(
    self, frozen: Frozen, raw: jax.Array, keys: jax.Array
  ) -> jax.Array:
    """Stored rows to model units."""

  def decode(self, frozen: Frozen, x: jax.Array) -> jax.Array:
    """Model units to rows as the data stores them."""

  def render(self, frozen: Frozen, raw: jax.Array) -> jax.Array:
    """Stored rows to uint8 images [B,H,W,C]; of uint8 rows, themselves."""
