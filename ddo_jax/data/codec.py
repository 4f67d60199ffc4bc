"""Between rows as the data stores them and a model's units.

Stored rows are uint8 pixels, or raw latents: what an autoencoder makes of an
image, the means of its latents and then their standard deviations.
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
Frozen = Mapping[str, Any]  # weights neither trained nor the reference


class Encoder(Protocol):
  """A hashable frozen dataclass, static under jit."""

  pixel_values: int  # values of a pixel of the images, 0 .. pixel_values−1

  def raw_shape(self, example_shape: Shape) -> Shape:
    """Shape of the stored row of an example in model units."""

  def encode(self, raw: jax.Array, keys: jax.Array) -> jax.Array:
    """Stored rows to model units, float32; each row's own key of keys [B]."""

  def decode(self, x: jax.Array) -> jax.Array:
    """Model units to rows as they are stored."""

  def render(self, frozen: Frozen, raw: jax.Array) -> jax.Array:
    """Stored rows to the uint8 images [B,H,W,C] that they stand for."""


@dataclasses.dataclass(frozen=True)
class Pixels:
  """uint8 pixels [B,H,W,C] as x = 2 raw/(pixel_values−1) − 1, in [−1, 1].

  Attributes:
    pixel_values: pixel values are 0 .. pixel_values−1.
    nearest: pixels are rounded to the nearest level; or else cut off to the
      one below, as VAR's programs write images.
  """

  pixel_values: int = 256
  nearest: bool = True

  def raw_shape(self, example_shape: Shape) -> Shape:
    """The same."""
    return tuple(example_shape)

  def encode(self, raw: jax.Array, keys: jax.Array) -> jax.Array:
    """Pixels to [−1, 1], to the bit as NumPy divides."""
    del keys
    # XLA would multiply by the reciprocal: 1e-7 off in half of the values.
    half = np.float32((self.pixel_values - 1) / 2)
    table = np.arange(self.pixel_values, dtype=np.float32) / half - np.float32(
      1
    )
    return jnp.asarray(table)[raw.astype(jnp.int32)]

  def decode(self, x: jax.Array) -> jax.Array:
    """[−1, 1] to pixels, uint8."""
    top = self.pixel_values - 1
    if not self.nearest:
      return ((jnp.clip(x, -1, 1) + 1) / 2 * top).astype(jnp.uint8)
    raw = jnp.floor(jnp.clip(x * (top / 2) + (top / 2 + 0.5), 0, top))
    return raw.astype(jnp.uint8)

  def render(self, frozen: Frozen, raw: jax.Array) -> jax.Array:
    """The rows themselves."""
    del frozen
    return raw


@dataclasses.dataclass(frozen=True)
class Latents:
  """Raw latents [B,H,W,2C] (means, deviations), as in EDM2's ImageNet-512.

  x = (z − mean) σ_d / std with z = μ + s n, n ~ N(0, 1) drawn anew at every
  reading: unit-variance latents times σ_d.

  Attributes:
    autoencoder: `models.vae.AutoencoderKL`; its params are `frozen['vae']`, of
      which only the decoding half is needed here. It has images in [0, 1].
    mean: of the data's latents, by channel.
    std: their standard deviation, by channel.
    sigma_data: σ_d, what it becomes.
    pixel_values: of the images.
  """

  autoencoder: nn.Module
  mean: tuple[float, ...] = (5.81, 3.25, 0.12, -2.15)
  std: tuple[float, ...] = (4.17, 4.62, 3.71, 3.28)
  sigma_data: float = 0.5
  pixel_values: int = 256

  def affine(self) -> tuple[np.ndarray, np.ndarray]:
    """The float32 scale and bias [1,1,1,C] of x = scale z + bias."""
    scale = np.float32(self.sigma_data) / np.asarray(self.std, np.float32)
    bias = -np.asarray(self.mean, np.float32) * scale
    return scale[None, None, None], bias[None, None, None]

  def raw_shape(self, example_shape: Shape) -> Shape:
    """[H,W,C] to [H,W,2C]."""
    return (*example_shape[:-1], 2 * example_shape[-1])

  def encode(self, raw: jax.Array, keys: jax.Array) -> jax.Array:
    """Raw latents [B,H,W,2C] to x [B,H,W,C], a draw of its key each row."""
    mean, std = jnp.split(raw, 2, axis=-1)
    draw = lambda key: jax.random.normal(key, mean.shape[1:], raw.dtype)
    scale, bias = self.affine()
    return (mean + std * jax.vmap(draw)(keys)) * scale + bias

  def decode(self, x: jax.Array) -> jax.Array:
    """X [B,H,W,C] to raw latents [B,H,W,2C] of deviation 0."""
    scale, bias = self.affine()
    mean = (x - bias) / scale
    return jnp.concatenate([mean, jnp.zeros_like(mean)], axis=-1)

  def compress(self, frozen: Frozen, images: jax.Array) -> jax.Array:
    """The raw latents [B,H/8,W/8,2C] of uint8 images [B,H,W,3]."""
    x = images.astype(jnp.float32) / (self.pixel_values - 1)
    return jnp.concatenate(self._apply(frozen, x, 'encode_moments'), axis=-1)

  def render(self, frozen: Frozen, raw: jax.Array) -> jax.Array:
    """The images uint8 [B,8H,8W,3] of raw latents' means.

    Raises:
      errors.UserError: no autoencoder among `frozen`.
    """
    mean, _ = jnp.split(raw, 2, axis=-1)
    x = jnp.clip(self._apply(frozen, mean, 'decode'), 0, 1)
    # Cut off, as the original does: 0.999 of a level is the one below.
    return jnp.floor(x * (self.pixel_values - 1)).astype(jnp.uint8)

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
