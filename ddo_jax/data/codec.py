"""Codecs: between rows as they are stored and a model's units.

Real and fake rows take one road. They are stored alike (uint8 pixels, or the
raw latents of an autoencoder) and one codec, an attribute of the model, turns
both into what the model reads.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any
from typing import Protocol

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors

Shape = tuple[int, ...]
Frozen = Mapping[str, Any]  # weights that are neither trained nor the reference


class Codec(Protocol):
  """A hashable frozen dataclass without arrays."""

  @property
  def pixel_values(self) -> int:
    """A pixel of the images is one of 0 .. pixel_values − 1."""

  def stored_shape(self, example_shape: Shape) -> Shape:
    """The shape of a stored row, given that of a row in model units."""

  def encode(
    self, frozen: Frozen, stored: jax.Array, keys: jax.Array
  ) -> jax.Array:
    """Turns stored rows [B,...] into model units; each row has a key [B]."""

  def decode(self, frozen: Frozen, x: jax.Array) -> jax.Array:
    """Turns rows in model units into rows as they are stored."""

  def round_trip(
    self, frozen: Frozen, x: jax.Array, keys: jax.Array
  ) -> jax.Array:
    """Returns x as if it had been stored and encoded again."""

  def render(self, frozen: Frozen, stored: jax.Array) -> jax.Array:
    """Returns the uint8 images [B,H,W,C] that stored rows stand for."""


@dataclasses.dataclass(frozen=True)
class Pixels:
  """uint8 pixels [B,H,W,C] as x = 2 stored/(pixel_values − 1) − 1, in [−1, 1].

  Attributes:
    pixel_values: a pixel is one of 0 .. pixel_values − 1.
    nearest: whether x is rounded to the nearest pixel value. If not, it is cut
      off to the one below, as VAR's programs write images.
  """

  pixel_values: int = 256
  nearest: bool = True

  def stored_shape(self, example_shape: Shape) -> Shape:
    """Images are stored in the shape that the model reads."""
    return tuple(example_shape)

  def encode(
    self, frozen: Frozen, stored: jax.Array, keys: jax.Array
  ) -> jax.Array:
    """Turns pixels into [−1, 1], to the bit as NumPy divides."""
    del frozen, keys
    # XLA would multiply by the reciprocal, which is 1e-7 off for half of the
    # values; a table is exact.
    half = np.float32((self.pixel_values - 1) / 2)
    values = np.arange(self.pixel_values, dtype=np.float32)
    table = values / half - np.float32(1)
    return jnp.asarray(table)[stored.astype(jnp.int32)]

  def decode(self, frozen: Frozen, x: jax.Array) -> jax.Array:
    """Turns [−1, 1] into pixels, uint8."""
    del frozen
    top = self.pixel_values - 1
    if not self.nearest:
      return ((jnp.clip(x, -1, 1) + 1) / 2 * top).astype(jnp.uint8)
    pixels = jnp.floor(jnp.clip(x * (top / 2) + (top / 2 + 0.5), 0, top))
    return pixels.astype(jnp.uint8)

  def round_trip(
    self, frozen: Frozen, x: jax.Array, keys: jax.Array
  ) -> jax.Array:
    """Rounds x to whole pixel values."""
    return self.encode(frozen, self.decode(frozen, x), keys)

  def render(self, frozen: Frozen, stored: jax.Array) -> jax.Array:
    """Stored rows are images already."""
    del frozen
    return stored


@dataclasses.dataclass(frozen=True)
class Latents:
  """Raw latents [B,H,W,2C] (means, deviations), as in EDM2's ImageNet-512.

  x = (z − mean) σ_d / std with z = μ + s n, n ~ N(0, 1) drawn anew each time a
  row is read. Latents of unit variance are so brought to variance σ_d².

  Attributes:
    autoencoder: `models.vae.AutoencoderKL`. Its weights are `frozen['vae']`;
      only the decoding half is needed to show latents.
    mean: the mean of the data's latents, by channel.
    std: their standard deviation, by channel.
    sigma_data: σ_d, the standard deviation of x.
    pixel_values: a pixel of an image is one of 0 .. pixel_values − 1.
    nearest: whether an image is rounded to the nearest pixel value, as DiT's
      programs do. If not, it is cut off to the one below, as EDM2's do.
    signed: whether the autoencoder's images lie in [−1, 1], as for Stable
      Diffusion and DiT. If not, they lie in [0, 1], as for EDM2.
  """

  autoencoder: nn.Module
  mean: tuple[float, ...] = (5.81, 3.25, 0.12, -2.15)
  std: tuple[float, ...] = (4.17, 4.62, 3.71, 3.28)
  sigma_data: float = 0.5
  pixel_values: int = 256
  nearest: bool = False
  signed: bool = False

  @property
  def image_range(self) -> tuple[float, float]:
    """Where the autoencoder's images lie."""
    return (-1.0, 1.0) if self.signed else (0.0, 1.0)

  @property
  def factor(self) -> int:
    """How many times larger the sides of an image are than its latent's."""
    return 2 ** (len(self.autoencoder.widths) - 1)

  def image_shape(self, example_shape: Shape) -> Shape:
    """The shape (H, W, 3) of an image whose latent has the given shape."""
    height, width, _ = example_shape
    return (self.factor * height, self.factor * width, 3)

  def affine(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns float32 scale and bias [1,1,1,C] of x = scale · z + bias."""
    scale = np.float32(self.sigma_data) / np.asarray(self.std, np.float32)
    bias = -np.asarray(self.mean, np.float32) * scale
    return scale[None, None, None], bias[None, None, None]

  def stored_shape(self, example_shape: Shape) -> Shape:
    """A row [H,W,C] is stored with twice the channels, [H,W,2C]."""
    return (*example_shape[:-1], 2 * example_shape[-1])

  def encode(
    self, frozen: Frozen, stored: jax.Array, keys: jax.Array
  ) -> jax.Array:
    """Turns raw latents [B,H,W,2C] into x [B,H,W,C], one draw a row."""
    del frozen
    mean, std = jnp.split(stored, 2, axis=-1)

    def draw(key):
      return jax.random.normal(key, mean.shape[1:], stored.dtype)

    scale, bias = self.affine()
    return (mean + std * jax.vmap(draw)(keys)) * scale + bias

  def decode(self, frozen: Frozen, x: jax.Array) -> jax.Array:
    """Turns x [B,H,W,C] into raw latents [B,H,W,2C] of deviation 0."""
    del frozen
    scale, bias = self.affine()
    mean = (x - bias) / scale
    return jnp.concatenate([mean, jnp.zeros_like(mean)], axis=-1)

  def round_trip(
    self, frozen: Frozen, x: jax.Array, keys: jax.Array
  ) -> jax.Array:
    """Latents are stored as floats, so that only their rounding is left."""
    return self.encode(frozen, self.decode(frozen, x), keys)

  def compress(self, frozen: Frozen, images: jax.Array) -> jax.Array:
    """Turns uint8 images [B,H,W,3] into raw latents [B,H/8,W/8,2C]."""
    low, high = self.image_range
    x = images.astype(jnp.float32) / (self.pixel_values - 1)
    x = low + (high - low) * x
    moments = self._apply(frozen, x, 'encode_moments')
    return jnp.concatenate(moments, axis=-1)

  def render(self, frozen: Frozen, stored: jax.Array) -> jax.Array:
    """Decodes the means of raw latents to uint8 images [B,8H,8W,3].

    Raises:
      errors.UserError: the autoencoder's weights are not among `frozen`.
    """
    mean, _ = jnp.split(stored, 2, axis=-1)
    low, high = self.image_range
    x = jnp.clip(self._apply(frozen, mean, 'decode'), low, high)
    x = (x - low) / (high - low)
    # 0.999 of a pixel value that is cut off is the one below.
    half = 0.5 if self.nearest else 0.0
    return jnp.floor(x * (self.pixel_values - 1) + half).astype(jnp.uint8)

  def _apply(self, frozen: Frozen, x: jax.Array, method: str) -> Any:
    if 'vae' not in frozen:
      raise errors.UserError(
        "images of latents need the autoencoder's weights and none were"
        ' given: name the file of stabilityai/sd-vae-ft-mse with'
        ' --config.vae_from'
      )
    with jax.default_matmul_precision('highest'):
      params = {'params': frozen['vae']}
      return self.autoencoder.apply(params, x, method=method)


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Images [B,H,W,C] as the tokens [B,L] of a frozen tokenizer.

  Attributes:
    tokenizer: a Linen module such as `models.vqvae.Vqvae`, with the methods
      `encode` (images to tokens), `f_hat` (tokens to features) and `decode`
      (features to images). Its weights are `frozen['tokenizer']`.
    image_shape: (H, W, C).
    pixels: the codec between uint8 images and the tokenizer's [−1, 1].
  """

  tokenizer: nn.Module
  image_shape: tuple[int, int, int]
  pixels: Pixels

  @property
  def pixel_values(self) -> int:
    """A pixel of the images is one of 0 .. pixel_values − 1."""
    return self.pixels.pixel_values

  def stored_shape(self, example_shape: Shape) -> Shape:
    """Tokens are stored as the image they stand for."""
    del example_shape
    return tuple(self.image_shape)

  def weights(self, frozen: Frozen) -> Any:
    """Returns the tokenizer's weights; UserError if none were given."""
    if 'tokenizer' not in frozen:
      raise errors.UserError(
        'the model reads tokens and has no tokenizer: name its folder of'
        ' params with --config.tokenizer_from'
      )
    return frozen['tokenizer']

  def _apply(self, frozen: Frozen, x: jax.Array, method: str) -> jax.Array:
    variables = {'params': self.weights(frozen)}
    return self.tokenizer.apply(variables, x, method=method)

  def _image(self, frozen: Frozen, x: jax.Array) -> jax.Array:
    """The unrounded image [B,H,W,C] in [−1, 1] of tokens [B,L]."""
    features = self._apply(frozen, x, 'f_hat')
    return self._apply(frozen, features, 'decode')

  def encode(
    self, frozen: Frozen, stored: jax.Array, keys: jax.Array
  ) -> jax.Array:
    """Turns uint8 images [B,H,W,C] into tokens [B,L], int32."""
    image = self.pixels.encode(frozen, stored, keys)
    return self._apply(frozen, image, 'encode')

  def decode(self, frozen: Frozen, x: jax.Array) -> jax.Array:
    """Turns tokens [B,L] into uint8 images [B,H,W,C]."""
    return self.pixels.decode(frozen, self._image(frozen, x))

  def decode_canvas(self, frozen: Frozen, canvas: jax.Array) -> jax.Array:
    """Turns the features that a sampler summed up into uint8 images."""
    image = self._apply(frozen, canvas, 'decode')
    return self.pixels.decode(frozen, image)

  def round_trip(
    self, frozen: Frozen, x: jax.Array, keys: jax.Array
  ) -> jax.Array:
    """Returns the tokens of the tokens' image, which is not rounded.

    That is as published. Real and fake tokens are then both what the
    tokenizer makes of an image.
    """
    del keys
    return self._apply(frozen, self._image(frozen, x), 'encode')

  def render(self, frozen: Frozen, stored: jax.Array) -> jax.Array:
    """Stored rows are images already."""
    del frozen
    return stored


@dataclasses.dataclass(frozen=True)
class PixelTokens:
  """Grey images [B,H,W,1] as tokens [B,H·W], a pixel each, row by row.

  Attributes:
    image_shape: (H, W, 1).
    pixel_values: a pixel, and a token, is one of 0 .. pixel_values − 1.
  """

  image_shape: tuple[int, int, int]
  pixel_values: int

  def stored_shape(self, example_shape: Shape) -> Shape:
    """Tokens are stored as the image they are."""
    del example_shape
    return tuple(self.image_shape)

  def encode(
    self, frozen: Frozen, stored: jax.Array, keys: jax.Array
  ) -> jax.Array:
    """Turns uint8 images [B,H,W,1] into tokens [B,L], int32."""
    del frozen, keys
    return stored.reshape(len(stored), -1).astype(jnp.int32)

  def decode(self, frozen: Frozen, x: jax.Array) -> jax.Array:
    """Turns tokens [B,L] into uint8 images [B,H,W,1]."""
    del frozen
    return x.reshape(len(x), *self.image_shape).astype(jnp.uint8)

  def round_trip(
    self, frozen: Frozen, x: jax.Array, keys: jax.Array
  ) -> jax.Array:
    """Returns x: nothing is lost."""
    del frozen, keys
    return x

  def render(self, frozen: Frozen, stored: jax.Array) -> jax.Array:
    """Stored rows are images already."""
    del frozen
    return stored
