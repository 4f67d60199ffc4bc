"""VAR's or LlamaGen's tokenizer as what a phase of training learns."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ddo_jax.data import codec as codec_lib
from ddo_jax.method import likelihood
from ddo_jax.models import llamagen_vq
from ddo_jax.models import vqvae


@dataclasses.dataclass(frozen=True)
class ConvolutionRules(likelihood.WeightRules):
  """Only the kernels of convolutions decay."""

  def decay_mask(self, params: likelihood.Params) -> Any:
    """Returns a tree of bool like params."""
    return jax.tree.map(lambda leaf: leaf.ndim == 4, params)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Learner:
  """As much of a `LikelihoodModel` as training by `mle_loss` needs.

  The released tokenizers were also trained by perceptual and adversarial
  losses; this is for small images, where squared errors do.

  Attributes:
    module: the tokenizer.
    codec: between uint8 images and [−1, 1].
    rules: what may be done to the weights.
    num_classes: 0: a tokenizer goes by no labels.
  """

  module: vqvae.Vqvae | llamagen_vq.VqTokenizer
  image_shape: tuple[int, int, int]
  codec: codec_lib.Pixels
  rules: likelihood.WeightRules = ConvolutionRules()
  num_classes: int = 0

  @property
  def example_shape(self) -> tuple[int, int, int]:
    """The shape (H, W, C) of an image, in model units."""
    return self.image_shape

  def init(self, key: jax.Array) -> likelihood.Params:
    """Returns fresh parameters."""
    return self.module.init(key, jnp.zeros((1, *self.image_shape)))['params']

  def mle_loss(
    self,
    params: likelihood.Params,
    frozen: likelihood.Frozen,
    batch: likelihood.Batch,
    keys: jax.Array,
  ) -> jax.Array:
    """Returns [B] the loss of reconstruction and of quantisation."""
    del frozen, keys
    reconstruction, quantisation = self.module.apply(
      {'params': params}, batch.x, method='losses'
    )
    return reconstruction + quantisation


def build(config: vqvae.VqvaeConfig | llamagen_vq.VqConfig) -> Learner:
  """Returns the learner of a tokenizer."""
  return Learner(
    module=config.module(),
    image_shape=config.image_shape,
    codec=codec_lib.Pixels(config.pixel_values, config.nearest),
  )
