"""Ordered models of tokens, whose likelihood is exact."""

import dataclasses
from typing import Any
from typing import ClassVar
from typing import Protocol

import chex
import jax
import jax.numpy as jnp

from ddo_jax import errors
from ddo_jax.method import likelihood
from ddo_jax.samplers import guidance

Batch = likelihood.Batch
Frozen = likelihood.Frozen
Params = likelihood.Params


class TokenNetwork(Protocol):
  """A transformer bound to what it reads of tokens.

  Scale-wise models (all tokens of a scale at once) and raster ones (one token
  after the other) differ in this object alone. A hashable frozen dataclass
  without arrays.
  """

  @property
  def length(self) -> int:
    """The number L of tokens in an image."""

  def init(self, key: jax.Array) -> Params:
    """Returns fresh parameters."""

  def token_log_prob(
    self, params: Params, frozen: Frozen, label: jax.Array, tokens: jax.Array
  ) -> jax.Array:
    """Returns log p(token | the tokens before it, label), [B,L] in nats.

    The log-sum-exp is float32 whatever the type of the matrix products.

    Args:
      params: the transformer's.
      frozen: weights beside it, such as a tokenizer's.
      label: [B] int32; `num_classes` means "no label".
      tokens: [B,L] int32.
    """

  def stages(self, params: Params, frozen: Frozen) -> Any:
    """Returns the network as a sampler drives it, a `contract.Stages`."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Autoregressive:
  """A transformer over the tokens of a codec.

  log p(x) is exact: the sum over all tokens of log p(token | what precedes it).
  Nothing in it is random.

  Attributes:
    network: the transformer, see `TokenNetwork`.
    codec: between stored rows and tokens; its `decode_canvas` turns what a
      sampler summed up into images, where the network's stages have a canvas.
    num_classes: the number of classes.
    rules: what may be done to the weights.
    num_bins: 1, for a token has no noise level.
    guide: the guide's transformer; None where the guide is built as this one
      is.
  """

  offers: ClassVar[tuple[str, ...]] = ('stages',)

  network: TokenNetwork
  codec: Any
  num_classes: int
  rules: likelihood.WeightRules = likelihood.WeightRules()
  num_bins: int = 1
  guide: TokenNetwork | None = None

  @property
  def example_shape(self) -> tuple[int]:
    """The shape (L,) of a row of tokens."""
    return (self.network.length,)

  def init(self, key: jax.Array) -> Params:
    """Returns fresh parameters of the transformer."""
    return self.network.init(key)

  def log_prob(
    self, params: Params, frozen: Frozen, batch: Batch, keys: jax.Array
  ) -> jax.Array:
    """Returns log p(x | label), [B] in nats an image."""
    del keys
    return jnp.sum(self._token_log_prob(params, frozen, batch), axis=1)

  def log_ratio(
    self,
    params: Params,
    reference: Params,
    frozen: Frozen,
    batch: Batch,
    keys: jax.Array,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns log p_θ(x) − log p_ref(x), [B], and per-row info.

    It is a difference of two sums. That is exactly 0 at θ = θ_ref, where a sum
    of the tokens' differences is not.
    """
    ours = self.log_prob(params, frozen, batch, keys)
    theirs = self.log_prob(reference, frozen, batch, keys)
    info = {
      'noise_bin': jnp.zeros(ours.shape, jnp.int32),
      'mle_loss': -ours / self.network.length,
    }
    return ours - jax.lax.stop_gradient(theirs), info

  def mle_loss(
    self, params: Params, frozen: Frozen, batch: Batch, keys: jax.Array
  ) -> jax.Array:
    """Returns the mean cross-entropy [B], in nats a token."""
    del keys
    return -jnp.mean(self._token_log_prob(params, frozen, batch), axis=1)

  def _token_log_prob(
    self, params: Params, frozen: Frozen, batch: Batch
  ) -> jax.Array:
    """Returns the log-probability of each token, [B,L] in nats."""
    chex.assert_shape(batch.x, (None, *self.example_shape))
    return self.network.token_log_prob(params, frozen, batch.label, batch.x)

  def _sampled(
    self,
    params: Params,
    frozen: Frozen,
    label: jax.Array,
    keys: jax.Array,
    sampler: Any,
  ) -> tuple[jax.Array, Any]:
    """Returns tokens [B,L] and the sampler's canvas.

    Where the sampler guides, the guide is `frozen['guide']`, weights of the
    transformer `guide`, under the same labels. Without such weights it is the
    model itself without labels (classifier-free guidance).
    """
    likelihood.check_sampler(self, sampler)
    chex.assert_equal_shape([label, keys])
    stages = self.network.stages(params, frozen)
    if not sampler.guides or 'guide' not in frozen:
      return sampler(stages, label, keys)
    network = self.network if self.guide is None else self.guide
    stages = guidance.with_guide(
      stages, network.stages(frozen['guide'], frozen)
    )
    tokens, (canvas, _) = sampler(stages, label, keys)
    return tokens, canvas

  def sample(
    self,
    params: Params,
    frozen: Frozen,
    label: jax.Array,
    keys: jax.Array,
    sampler: Any,
  ) -> jax.Array:
    """Returns tokens [B,L].

    Raises:
      errors.UserError: the sampler drives no stages, or it mixes vectors, which
        tokens cannot say.
    """
    if getattr(sampler, 'smooth', False):
      raise errors.UserError(
        f'config.sampler is {sampler}; tokens cannot tell of mixed vectors: set'
        ' config.sampler.smooth=False'
      )
    tokens, _ = self._sampled(params, frozen, label, keys, sampler)
    return tokens

  def draw(
    self,
    params: Params,
    frozen: Frozen,
    label: jax.Array,
    keys: jax.Array,
    sampler: Any,
  ) -> jax.Array:
    """Returns uint8 images [B,H,W,C], smooth ones too.

    Raises:
      errors.UserError: the sampler drives no stages.
    """
    tokens, canvas = self._sampled(params, frozen, label, keys, sampler)
    if canvas is None:
      return self.codec.decode(frozen, tokens)
    return self.codec.decode_canvas(frozen, canvas)

  def guided_by(self, guide: Any) -> 'Autoregressive':
    """Returns this model with another transformer as its guide.

    Raises:
      errors.UserError: the guide is of another family, or of other tokens.
    """
    if 'stages' not in guide.offers or guide.codec != self.codec:
      raise errors.UserError(
        'config.guide is of other tokens than config.model: a model of tokens'
        ' is guided by one of the same tokenizer'
      )
    return dataclasses.replace(self, guide=guide.network)
