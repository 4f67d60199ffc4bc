"""LlamaGen's tokenizer: one token for each cell of a grid (Sun et al. 2024).

The features of a cell and the vectors of the codebook are scaled to length 1;
the token is the nearest vector, and the decoder reads that vector at length 1.
Encoder and decoder have the layers of VAR's.
"""

import dataclasses
import functools

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp

from ddo_jax import errors
from ddo_jax import settings
from ddo_jax.models import var_layers
from ddo_jax.models import vqvae_layers

_COMMITMENT = 0.25  # the weight of the features' distance to the vectors


class VqTokenizer(nn.Module):
  """The tokenizer: an encoder, a codebook and a decoder.

  Attributes:
    grid: the number of rows and of columns of tokens.
    vocab: V, the number of vectors in the codebook.
    channels: C, the width of a vector.
    features: the number of channels between encoder and codebook.
    base: the unit of width of encoder and decoder.
    mult: the width of each level, in units of `base`.
    image_channels: the number of channels of an image.
  """

  grid: tuple[int, int]
  vocab: int
  channels: int
  features: int
  base: int
  mult: tuple[int, ...]
  image_channels: int = 3

  def setup(self):
    self.encoder = vqvae_layers.Encoder(self.features, self.base, self.mult)
    self.decoder = vqvae_layers.Decoder(
      self.image_channels, self.base, self.mult
    )
    self.quantize_embedding = nn.Embed(self.vocab, self.channels)
    pointwise = functools.partial(nn.Conv, kernel_size=(1, 1))
    self.quant_conv = pointwise(self.channels)
    self.post_quant_conv = pointwise(self.features)

  def __call__(self, image: jax.Array) -> jax.Array:
    """Reconstructs an image [B,H,W,C] from its tokens.

    It touches every param, so that `init` makes all of them.
    """
    return self.decode(self.f_hat(self.encode(image)))

  def vectors(self) -> jax.Array:
    """Returns the codebook as the decoder reads it, [V,C], of length 1."""
    return var_layers.unit(self.quantize_embedding.embedding)

  def z(self, image: jax.Array) -> jax.Array:
    """Returns the features [B,h,w,C] of an image [B,H,W,3] in [−1, 1]."""
    with jax.default_matmul_precision('highest'):
      return self.quant_conv(self.encoder(image))

  def nearest(self, z: jax.Array) -> jax.Array:
    """Returns the token [...] int32 of each z [...,C], the first of equals."""
    cosines = jnp.einsum(
      '...c,vc->...v', var_layers.unit(z), self.vectors(), precision='highest'
    )
    return jnp.argmax(cosines, axis=-1).astype(jnp.int32)

  def encode(self, image: jax.Array) -> jax.Array:
    """Returns the tokens [B,L] int32 of an image [B,H,W,3], row by row."""
    z = self.z(image)
    chex.assert_shape(z, (len(image), *self.grid, self.channels))
    return self.nearest(z).reshape(len(z), -1)

  def f_hat(self, ids: jax.Array) -> jax.Array:
    """Returns the vectors [B,h,w,C] of tokens [B,L]."""
    return self.vectors()[ids].reshape(len(ids), *self.grid, self.channels)

  def decode_unbounded(self, f_hat: jax.Array) -> jax.Array:
    """Returns the image [B,H,W,3] of vectors [B,h,w,C], as it comes."""
    return self.decoder(self.post_quant_conv(f_hat))

  def decode(self, f_hat: jax.Array) -> jax.Array:
    """Returns the image [B,H,W,3] of vectors, clamped to [−1, 1]."""
    return jnp.clip(self.decode_unbounded(f_hat), -1, 1)

  def losses(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns what training the tokenizer minimises.

    The gradient of the reconstruction passes from the vectors to the features
    as if they were equal.

    Args:
      image: the images, [B,H,W,3] in [−1, 1].

    Returns:
      The mean squared error of the reconstruction, [B]; and the mean squared
      distance of features and vectors, both of length 1, [B]. It moves the
      vectors with weight 1, and the features with weight ¼.
    """
    stop = jax.lax.stop_gradient

    def mean_square(x):
      return jnp.mean(x**2, axis=(1, 2, 3))

    z = var_layers.unit(self.z(image))
    vectors = self.vectors()[self.nearest(stop(z))]
    distance = mean_square(stop(z) - vectors)
    distance += _COMMITMENT * mean_square(z - stop(vectors))
    error = self.decode_unbounded(z + stop(vectors - z)) - image
    return mean_square(error), distance


@dataclasses.dataclass
class VqConfig:
  """LlamaGen's tokenizer; the defaults are VQ-16 at 256×256.

  Attributes:
    image_shape: the shape (H, W, C) of an image.
    vocab: the number of vectors in the codebook.
    channels: the width of a vector.
    features: the number of channels between encoder and codebook.
    base: the unit of width, a multiple of 32.
    mult: the width of each level, in units of `base`. Each level but the last
      halves the side.
    pixel_values: the number of values of a pixel, 0 … pixel_values−1.
    nearest: whether decoding rounds to the nearest pixel value, see
      `codec.Pixels`.
  """

  image_shape: tuple[int, int, int] = settings.at_most(4096, (256, 256, 3))
  vocab: int = 16_384
  channels: int = 8
  features: int = 256
  base: int = 128
  mult: tuple[int, ...] = (1, 1, 2, 2, 4)
  pixel_values: int = 256
  nearest: bool = True

  @property
  def grid(self) -> tuple[int, int]:
    """The number of rows and of columns of tokens."""
    factor = 2 ** (len(self.mult) - 1)
    return self.image_shape[0] // factor, self.image_shape[1] // factor

  def module(self) -> VqTokenizer:
    """Returns the tokenizer.

    Raises:
      errors.UserError: the levels do not fit the image, the width does not fit
        the norms, or a number is not positive.
    """
    for name in ('vocab', 'channels', 'features', 'base'):
      value = getattr(self, name)
      errors.require(
        value > 0, f'model.tokenizer.{name}', value, 'a positive integer'
      )
    shape = tuple(self.image_shape)
    factor = 2 ** (len(self.mult) - 1)
    if len(shape) != 3 or shape[0] % factor or shape[1] % factor:
      raise errors.UserError(
        f'the tokenizer has {len(self.mult)} levels and images {shape}; wanted'
        f' (H, W, C) with H and W multiples of {factor}, since each level but'
        ' one halves the side'
      )
    if self.base % vqvae_layers.GROUPS:
      raise errors.UserError(
        f'the tokenizer has base {self.base}; it must be a multiple of'
        f' {vqvae_layers.GROUPS}, the groups of its norms'
      )
    return VqTokenizer(
      grid=self.grid,
      vocab=self.vocab,
      channels=self.channels,
      features=self.features,
      base=self.base,
      mult=tuple(self.mult),
      image_channels=shape[2],
    )
