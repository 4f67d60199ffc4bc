"""The tokenizer as what a phase of training learns."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ddo_jax.data import codec
from ddo_jax.method import likelihood
from ddo_jax.models import vqvae


@dataclasses.dataclass(frozen=True)
class Learner:
  """So much of a `LikelihoodModel` as training by `mle_loss` needs.

  The released tokenizer was also trained by perceptual and adversarial losses;
  this is for small images, where squared errors do.

  Attributes:
    module: the tokenizer.
    image_shape: (H, W, C).
    pixels: between uint8 images and [−1, 1].
    num_classes: of no account.
  """

  module: vqvae.Vqvae
  image_shape: tuple[int, int, int]
  pixels: codec.Pixels
  num_classes: int = 0

  def init(self, key: jax.Array) -> likelihood.Params:
    """Fresh parameters."""
    return self.module.init(key, jnp.zeros((1, *self.image_shape)))['params']

  def project(self, params: likelihood.Params) -> likelihood.Params:
    """Identity."""
    return params

  def decay_mask(self, params: likelihood.Params) -> Any:
    """Kernels of convolutions."""
    return jax.tree.map(lambda leaf: leaf.ndim == 4, params)

  def mle_loss(
    self,
    params: likelihood.Params,
    frozen: likelihood.Frozen,
    batch: likelihood.Batch,
    keys: jax.Array,
  ) -> jax.Array:
    """[B] reconstruction plus quantisation, see `vqvae.Vqvae.losses`."""
    del frozen, keys
    losses = self.module.apply({'params': params}, batch.x, method='losses')
    return sum(losses)

  def encode(
    self, frozen: likelihood.Frozen, raw: jax.Array, keys: jax.Array
  ) -> jax.Array:
    """uint8 images to [−1, 1], float32."""
    del frozen
    return self.pixels.encode(raw, keys)


def build(config: vqvae.VqvaeConfig) -> Learner:
  """The learner of a tokenizer."""
  return Learner(
    module=vqvae.build(config),
    image_shape=tuple(config.image_shape),
    pixels=codec.Pixels(config.pixel_values, config.nearest),
  )
