"""Models of tokens with an exact likelihood, as the objective sees them."""

import dataclasses
from typing import Any

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp

from ddo_jax import errors
from ddo_jax.data import codec
from ddo_jax.method import likelihood

Batch = likelihood.Batch
Frozen = likelihood.Frozen
Params = likelihood.Params


@dataclasses.dataclass(frozen=True)
class Autoregressive:
  """A transformer over the tokens of a frozen tokenizer.

  log p(x) is exact: the sum over all tokens of log p(token | what precedes it),
  from a float32 log-sum-exp whatever the type of the matrix products. A row is
  [L] int32 tokens; nothing in its likelihood is random.

  Attributes:
    transformer: a Linen module such as `models.var.Var`, with the methods
      `log_prob`, `cross_entropy` and `predict`.
    tokenizer: a Linen module such as `models.vqvae.Vqvae`; its params are
      `frozen['tokenizer']`.
    image_shape: (H, W, C).
    token_channels: of a token's vector, that the transformer reads.
    num_classes: of the labels.
    pixels: between uint8 images and [−1, 1].
    decayed: params -> tree of bool, which leaves decay.
    cast: params -> tree of bool, which leaves the transformer converts to its
      `dtype` before all else.
    stages: binds the transformer, the tokenizer and their params for sampling,
      such as `models.var.stages`.
    num_levels: bins of the diagnostics; a token has no noise level.
  """

  transformer: nn.Module
  tokenizer: nn.Module
  image_shape: tuple[int, int, int]
  token_channels: int
  num_classes: int
  pixels: codec.Pixels
  decayed: Any
  cast: Any
  stages: Any
  num_levels: int = 1

  @property
  def example_shape(self) -> tuple[int]:
    """(L,), tokens of an image."""
    return (sum(n * n for n in self.transformer.patch_nums),)

  @property
  def pixel_values(self) -> int:
    """Values of a pixel of the images, 0 .. pixel_values−1."""
    return self.pixels.pixel_values

  def check_source(
    self,
    name: str,
    image_shape: tuple[int, ...],
    num_classes: int,
    pixel_values: int,
  ) -> None:
    """Raises UserError where a data source does not fit the model."""
    got = (tuple(image_shape), pixel_values, num_classes)
    wanted = (tuple(self.image_shape), self.pixel_values, self.num_classes)
    if got != wanted:
      raise errors.UserError(
        f'{name} has (image shape, pixel values, classes) {got}, the model'
        f' takes {wanted}: set config.model and config.model.tokenizer to the data'
      )

  def init(self, key: jax.Array) -> Params:
    """Fresh parameters of the transformer."""
    inputs = jnp.zeros((1, self.example_shape[0] - 1, self.token_channels))
    return self.transformer.init(key, jnp.zeros([1], jnp.int32), inputs)[
      'params'
    ]

  def project(self, params: Params) -> Params:
    """Identity."""
    return params

  def reduced(self, params: Params) -> Params:
    """Leaves that are converted at every use, converted already."""
    dtype = self.transformer.dtype
    if dtype is None:
      return params
    convert = lambda p, on: p.astype(dtype) if on else p
    return jax.tree.map(convert, params, self.cast(params))

  def decay_mask(self, params: Params) -> Any:
    """The transformer's own."""
    return self.decayed(params)

  def _weights(self, frozen: Frozen) -> Params:
    """The tokenizer's; raises UserError if they are not among `frozen`."""
    if 'tokenizer' not in frozen:
      raise errors.UserError(
        'the model reads tokens and has no tokenizer: name its folder of'
        ' params with --config.tokenizer_from'
      )
    return frozen['tokenizer']

  def _tokenizer(self, frozen: Frozen, method: str, x: jax.Array) -> jax.Array:
    """A method of the tokenizer."""
    variables = {'params': self._weights(frozen)}
    return self.tokenizer.apply(variables, x, method=method)

  def _apply(self, params, frozen, batch, method):
    """A method of the transformer under teacher forcing, [B]."""
    chex.assert_shape(batch.x, (None, *self.example_shape))
    inputs = self._tokenizer(frozen, 'teacher_input', batch.x)
    return self.transformer.apply(
      {'params': params}, batch.label, inputs, batch.x, method=method
    )

  def log_prob(
    self, params: Params, frozen: Frozen, batch: Batch, keys: jax.Array
  ) -> jax.Array:
    """[B] log p(x | label), nats an image."""
    del keys
    return self._apply(params, frozen, batch, 'log_prob')

  def log_ratio(
    self,
    params: Params,
    reference: Params,
    frozen: Frozen,
    batch: Batch,
    keys: jax.Array,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """[B] log p_θ(x) − log p_ref(x), and per-row info.

    A difference of two sums: exactly 0 at θ = θ_ref, where a sum of the
    tokens' differences is not.
    """
    ours = self.log_prob(params, frozen, batch, keys)
    theirs = self.log_prob(reference, frozen, batch, keys)
    info = {
      'level': jnp.zeros(ours.shape, jnp.int32),
      'mle_loss': -ours / self.example_shape[0],
    }
    return ours - jax.lax.stop_gradient(theirs), info

  def mle_loss(
    self, params: Params, frozen: Frozen, batch: Batch, keys: jax.Array
  ) -> jax.Array:
    """[B] mean cross-entropy, nats a token: VAR's pretraining loss."""
    del keys
    return self._apply(params, frozen, batch, 'cross_entropy')

  def _sampled(self, params, frozen, label, keys, sampler):
    """Tokens [B,L] and f̂ of a `ancestral.Ancestral`."""
    self._check_sampler(sampler)
    if 'guide' in frozen:
      raise errors.UserError(
        'this model is guided by itself without labels: unset config.guide_from'
      )
    chex.assert_equal_shape([label, keys])
    weights = self._weights(frozen)
    stages = self.stages(self.transformer, self.tokenizer, params, weights)
    return sampler(stages, label, keys)

  def sample(
    self,
    params: Params,
    frozen: Frozen,
    label: jax.Array,
    keys: jax.Array,
    sampler: Any,
  ) -> jax.Array:
    """Tokens [B,L] of a `ancestral.Ancestral`.

    Raises:
      errors.UserError: it is no such sampler, it mixes vectors, which tokens
        cannot tell, or there is a guide.
    """
    if getattr(sampler, 'smooth', False):
      raise errors.UserError(
        f'config.sampler is {sampler}; tokens cannot tell of mixed vectors: set'
        ' config.sampler.smooth=False'
      )
    return self._sampled(params, frozen, label, keys, sampler)[0]

  def draw(
    self,
    params: Params,
    frozen: Frozen,
    label: jax.Array,
    keys: jax.Array,
    sampler: Any,
  ) -> jax.Array:
    """uint8 images [B,H,W,C] of a `ancestral.Ancestral`, smooth ones too.

    Raises:
      errors.UserError: it is no such sampler, or there is a guide.
    """
    _, f_hat = self._sampled(params, frozen, label, keys, sampler)
    return self.pixels.decode(self._tokenizer(frozen, 'decode', f_hat))

  def unguided(self, sampler: Any) -> Any:
    """No guidance in the sampler's own convention, no filter.

    Raises:
      errors.UserError: the sampler does not go with tokens.
    """
    self._check_sampler(sampler)
    return sampler.unguided()

  def _check_sampler(self, sampler: Any) -> None:
    if getattr(sampler, 'reads', None) != 'stages':
      raise errors.UserError(
        f'config.sampler is {sampler}; this model wants a'
        ' samplers.ancestral.Ancestral'
      )

  def _image(self, frozen: Frozen, x: jax.Array) -> jax.Array:
    """The image [B,H,W,C] in [−1, 1] of tokens [B,L]."""
    return self._tokenizer(
      frozen, 'decode', self._tokenizer(frozen, 'f_hat', x)
    )

  def round_trip(
    self, frozen: Frozen, x: jax.Array, keys: jax.Array
  ) -> jax.Array:
    """Tokens of the tokens' image, unrounded as published.

    Both real and fake tokens are then what the tokenizer makes of pixels.
    """
    del keys
    return self._tokenizer(frozen, 'encode', self._image(frozen, x))

  def encode(
    self, frozen: Frozen, raw: jax.Array, keys: jax.Array
  ) -> jax.Array:
    """uint8 images [B,H,W,C] to tokens [B,L] int32."""
    return self._tokenizer(frozen, 'encode', self.pixels.encode(raw, keys))

  def decode(self, frozen: Frozen, x: jax.Array) -> jax.Array:
    """Tokens [B,L] to uint8 images [B,H,W,C]."""
    return self.pixels.decode(self._image(frozen, x))

  def render(self, frozen: Frozen, raw: jax.Array) -> jax.Array:
    """The rows themselves."""
    del frozen
    return raw
