"""VAR's tokenizer: a residual VQVAE over scales (Tian et al. 2024, §3.2).

The features f [h,w,C] of an image are approximated scale by scale. What is left
of f is averaged down to n×n vectors, and each of them is replaced by the
nearest vector of the codebook. These are interpolated to h×w, pass a
convolution φ, and are subtracted from f before the next scale. Their sum over
the scales is f̂. An image becomes the tokens of all scales, n² each, in
row-major order, the coarsest scale first.
"""

import dataclasses
import functools
from typing import Any

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors
from ddo_jax import settings
from ddo_jax.models import vqvae_layers

PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # for images of 256 pixels
_CUBIC = -0.75  # a of the bicubic kernel; jax.image's 'cubic' has −0.5
_RESIDUAL = 0.5  # the share of the convolution in φ
_COMMITMENT = 0.25  # the weight of the features' distance to the vectors
_CONVOLUTIONS = 4  # the number of convolutions φ, which the scales share
# Which convolution serves each scale, by the number of scales. With ten scales,
# two lie midway between convolutions, and the original program decides them by
# rounding; the table is exact.
_PHI = {
  4: (0, 1, 2, 3),
  10: (0, 0, 1, 1, 1, 2, 2, 3, 3, 3),
  14: (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3),
}


@functools.lru_cache
def area_matrix(size: int, n: int) -> np.ndarray:
  """Returns the matrix that averages `size` pixels down to n, float64.

  Bin i covers the pixels from i·size/n to (i+1)·size/n, widened to whole
  pixels, so that bins overlap if n does not divide the size.

  Returns:
    The matrix, [n,size].
  """
  matrix = np.zeros((n, size))
  for i in range(n):
    start = i * size // n
    end = -(-(i + 1) * size // n)
    matrix[i, start:end] = 1 / (end - start)
  return matrix


@functools.lru_cache
def bicubic_matrix(n: int, size: int) -> np.ndarray:
  """Returns the matrix of bicubic interpolation from n pixels to `size`.

  It is cubic convolution with a = −0.75. Pixel centres are aligned (half-pixel
  offsets), the border is repeated, and there is no antialiasing.

  Returns:
    The matrix, [size,n] float64.
  """

  def weight(x):
    x = abs(x)
    near = (_CUBIC + 2) * x**3 - (_CUBIC + 3) * x**2 + 1
    far = _CUBIC * (x**3 - 5 * x**2 + 8 * x - 4)
    return near if x <= 1 else far

  matrix = np.zeros((size, n))
  for i in range(size):
    centre = (i + 0.5) * n / size - 0.5
    left = int(np.floor(centre))
    for j in range(left - 1, left + 3):
      matrix[i, min(max(j, 0), n - 1)] += weight(centre - j)
  return matrix


def resize(x: jax.Array, matrix: np.ndarray) -> jax.Array:
  """Applies a matrix [m,n] to both axes of x [B,n,n,C]; returns [B,m,m,C]."""
  weights = jnp.asarray(matrix, x.dtype)
  return jnp.einsum(
    'ih,bhwc,jw->bijc', weights, x, weights, precision='highest'
  )


def phi_index(scales: int) -> tuple[int, ...]:
  """Returns the number of the convolution φ that serves each scale.

  The convolutions are spread evenly over the scales, and each scale is served
  by the nearest one.
  """
  if scales in _PHI:
    return _PHI[scales]
  ticks = np.linspace(1 / 12, 11 / 12, _CONVOLUTIONS)
  ratio = np.arange(scales) / max(scales - 1, 1)
  nearest = np.abs(ticks[None, :] - ratio[:, None]).argmin(1)
  return tuple(int(k) for k in nearest)


class Quantizer(nn.Module):
  """Turns features into the tokens of all scales, and back.

  Everything is float32 with exact products, because a rounding error can turn
  one token into another.

  Attributes:
    patch_nums: the side n of each scale; the last is the side of f.
    vocab: V, the number of vectors in the codebook.
    channels: C, the width of a vector.
  """

  patch_nums: tuple[int, ...]
  vocab: int
  channels: int

  def setup(self):
    self.embedding = nn.Embed(self.vocab, self.channels)
    self.qresi_ls = [
      nn.Conv(self.channels, (3, 3), padding=1, precision='highest')
      for _ in range(_CONVOLUTIONS)
    ]

  def vectors(self) -> jax.Array:
    """Returns the codebook, [V,C]."""
    return self.embedding.embedding

  def nearest(self, z: jax.Array) -> jax.Array:
    """Returns the number [...] int32 of the vector nearest to each z [...,C].

    Of equally near vectors it is the first.
    """
    codebook = self.vectors()
    products = jnp.einsum('...c,vc->...v', z, codebook, precision='highest')
    squares = jnp.sum(codebook**2, axis=1)
    squares = squares.reshape(*[1] * (z.ndim - 1), -1)
    total = jnp.sum(z**2, axis=-1, keepdims=True) + squares
    return jnp.argmin(total - 2 * products, axis=-1).astype(jnp.int32)

  def upscale(self, scale: int, vectors: jax.Array) -> jax.Array:
    """Returns a scale's share of f̂ [B,h,w,C], of its vectors [B,n²,C]."""
    n = self.patch_nums[scale]
    size = self.patch_nums[-1]
    h = vectors.reshape(len(vectors), n, n, self.channels)
    if scale < len(self.patch_nums) - 1:
      h = resize(h, bicubic_matrix(n, size))
    phi = self.qresi_ls[phi_index(len(self.patch_nums))[scale]]
    return (1 - _RESIDUAL) * h + _RESIDUAL * phi(h)

  def __call__(self, f: jax.Array) -> jax.Array:
    """Turns features f [B,h,w,C] into tokens [B,L] int32."""
    size = self.patch_nums[-1]
    chex.assert_shape(f, (None, size, size, self.channels))
    tokens = []
    for scale, n in enumerate(self.patch_nums):
      z = f
      if n != size:
        z = resize(f, area_matrix(size, n))
      ids = self.nearest(z).reshape(len(f), n * n)
      f = f - self.upscale(scale, self.embedding(ids))
      tokens.append(ids)
    return jnp.concatenate(tokens, axis=1)

  def advance(
    self, scale: int, vectors: jax.Array, f_hat: jax.Array
  ) -> tuple[jax.Array, jax.Array | None]:
    """Adds the vectors of a scale to f̂.

    Args:
      scale: the number of the scale, static.
      vectors: the vectors of its tokens, [B,n²,C].
      f_hat: the sum over all coarser scales, [B,h,w,C].

    Returns:
      The new f̂, and what the transformer reads at the next scale, which is f̂
      averaged down to m×m, [B,m²,C]; None after the last scale.
    """
    f_hat = f_hat + self.upscale(scale, vectors)
    if scale == len(self.patch_nums) - 1:
      return f_hat, None
    m = self.patch_nums[scale + 1]
    size = self.patch_nums[-1]
    following = f_hat
    if m != size:
      following = resize(f_hat, area_matrix(size, m))
    return f_hat, following.reshape(len(f_hat), m * m, self.channels)

  def accumulate(self, ids: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Sums up the vectors of given tokens, scale by scale.

    Args:
      ids: the tokens of all scales, [B,L].

    Returns:
      f̂ after each scale, a list of [B,h,w,C]; and what the transformer reads
      under teacher forcing, the inputs [B,L−1,C] of all tokens but the first.
    """
    ends = np.cumsum(np.square(self.patch_nums))
    chex.assert_shape(ids, (None, int(ends[-1])))
    parts = jnp.split(self.embedding(ids), [int(e) for e in ends[:-1]], axis=1)
    size = self.patch_nums[-1]
    shape = (len(ids), size, size, self.channels)
    f_hat = jnp.zeros(shape, parts[0].dtype)
    sums = []
    inputs = []
    for scale, vectors in enumerate(parts):
      f_hat, following = self.advance(scale, vectors, f_hat)
      sums.append(f_hat)
      if following is not None:
        inputs.append(following)
    if not inputs:
      return sums, jnp.zeros((len(ids), 0, self.channels), f_hat.dtype)
    return sums, jnp.concatenate(inputs, axis=1)


class Vqvae(nn.Module):
  """The tokenizer: an encoder, a quantizer and a decoder.

  Attributes:
    patch_nums: see `Quantizer`.
    vocab: see `Quantizer`.
    channels: see `Quantizer`.
    base: the unit of width of encoder and decoder.
    mult: the width of each level, in units of `base`.
    image_channels: the number of channels of an image.
  """

  patch_nums: tuple[int, ...]
  vocab: int
  channels: int
  base: int
  mult: tuple[int, ...]
  image_channels: int = 3

  def setup(self):
    self.encoder = vqvae_layers.Encoder(self.channels, self.base, self.mult)
    self.decoder = vqvae_layers.Decoder(
      self.image_channels, self.base, self.mult
    )
    self.quantize = Quantizer(self.patch_nums, self.vocab, self.channels)
    self.quant_conv = nn.Conv(self.channels, (3, 3), padding=1)
    self.post_quant_conv = nn.Conv(self.channels, (3, 3), padding=1)

  def __call__(self, image: jax.Array) -> jax.Array:
    """Reconstructs an image [B,H,W,C] from its tokens.

    It touches every param, so that `init` makes all of them.
    """
    sums, _ = self.quantize.accumulate(self.encode(image))
    return self.decode(sums[-1])

  def features(self, image: jax.Array) -> jax.Array:
    """Returns the features f [B,h,w,C] of an image [B,H,W,3] in [−1, 1]."""
    with jax.default_matmul_precision('highest'):
      return self.quant_conv(self.encoder(image))

  def encode(self, image: jax.Array) -> jax.Array:
    """Returns the tokens [B,L] int32 of an image [B,H,W,3] in [−1, 1]."""
    return self.quantize(self.features(image))

  def losses(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns what training the tokenizer minimises.

    The gradient of the reconstruction passes from f̂ to f as if they were equal.

    Args:
      image: the images, [B,H,W,3] in [−1, 1].

    Returns:
      The mean squared error of the reconstruction, [B]; and the mean squared
      distance of f and f̂, averaged over the scales, [B]. The latter moves the
      vectors towards the features with weight 1, and the features towards the
      vectors with weight ¼.
    """
    stop = jax.lax.stop_gradient

    def mean_square(x):
      return jnp.mean(x**2, axis=(1, 2, 3))

    f = self.features(image)
    sums, _ = self.quantize.accumulate(self.quantize(stop(f)))
    distance: Any = 0
    for f_hat in sums:
      commitment = _COMMITMENT * mean_square(f - stop(f_hat))
      distance += commitment + mean_square(stop(f) - f_hat)
    straight = f + stop(sums[-1] - f)
    error = self.decoder(self.post_quant_conv(straight)) - image
    return mean_square(error), distance / len(sums)

  def teacher_input(self, ids: jax.Array) -> jax.Array:
    """Returns what the transformer reads of tokens [B,L], [B,L−1,C]."""
    _, inputs = self.quantize.accumulate(ids)
    return inputs

  def f_hat(self, ids: jax.Array) -> jax.Array:
    """Returns f̂ [B,h,w,C] of tokens [B,L], the sum over all scales."""
    sums, _ = self.quantize.accumulate(ids)
    return sums[-1]

  def decode(self, f_hat: jax.Array) -> jax.Array:
    """Returns the image [B,H,W,3] of f̂ [B,h,w,C], clamped to [−1, 1]."""
    return jnp.clip(self.decoder(self.post_quant_conv(f_hat)), -1, 1)

  def vectors(self) -> jax.Array:
    """Returns the codebook, [V,C]."""
    return self.quantize.vectors()

  def advance(
    self, scale: int, vectors: jax.Array, f_hat: jax.Array
  ) -> tuple[jax.Array, jax.Array | None]:
    """Adds the vectors of a scale to f̂; see `Quantizer.advance`."""
    return self.quantize.advance(scale, vectors, f_hat)


@dataclasses.dataclass
class VqvaeConfig:
  """VAR's tokenizer; the defaults are the released one.

  Attributes:
    image_shape: the shape (H, W, C) of an image, with H = W.
    patch_nums: the side of each scale, rising from 1. The last one times
      2 ** (levels − 1) is the side of the image.
    vocab: the number of vectors in the codebook.
    channels: the width of a vector.
    base: the unit of width, a multiple of 32.
    mult: the width of each level, in units of `base`.
    pixel_values: the number of values of a pixel, 0 … pixel_values−1.
    nearest: whether decoding rounds to the nearest pixel value, see
      `codec.Pixels`.
  """

  image_shape: tuple[int, int, int] = settings.at_most(4096, (256, 256, 3))
  patch_nums: tuple[int, ...] = settings.at_most(128, PATCH_NUMS)
  vocab: int = 4096
  channels: int = 32
  base: int = 160
  mult: tuple[int, ...] = (1, 1, 2, 2, 4)
  pixel_values: int = 256
  nearest: bool = False

  def module(self) -> Vqvae:
    """Returns the tokenizer; see `build`."""
    return build(self)


def build(config: VqvaeConfig) -> Vqvae:
  """Returns the tokenizer of a config.

  Raises:
    errors.UserError: the scales do not fit the image, the width does not fit
      the norms, or a number is not positive.
  """
  for name in ('vocab', 'channels', 'base'):
    value = getattr(config, name)
    name = f'model.tokenizer.{name}'
    errors.require(value > 0, name, value, 'a positive integer')
  scales = tuple(config.patch_nums)
  side = 0
  if scales:
    side = scales[-1] * 2 ** (len(config.mult) - 1)
  rising = scales[:1] == (1,) and sorted(set(scales)) == list(scales)
  shape = tuple(config.image_shape)
  if not rising or len(shape) != 3 or shape[:2] != (side, side):
    raise errors.UserError(
      f'patch_nums is {scales} with {len(config.mult)} levels and images'
      f' {shape}; the scales must rise from 1 and the last,'
      ' doubled at each level but one, must be the side of square (H, W, C)'
    )
  if config.base % vqvae_layers.GROUPS:
    raise errors.UserError(
      f'the tokenizer has base {config.base}; it must be a multiple of'
      f' {vqvae_layers.GROUPS}, the groups of its norms'
    )
  return Vqvae(
    patch_nums=scales,
    vocab=config.vocab,
    channels=config.channels,
    base=config.base,
    mult=tuple(config.mult),
    image_channels=shape[2],
  )
