"""VAR's tokenizer: a residual VQVAE over scales (Tian et al. 2024, §3.2).

An image's features f [h,w,C] are approximated scale by scale: what is left of
f is averaged down to n×n, each vector is replaced by the nearest of the
codebook, and the interpolation of that, through a convolution φ, is taken
off. An image is the tokens of all scales, n² each, row-major, coarse first.
"""

import dataclasses
import functools

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors
from ddo_jax.models import vqvae_layers

PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # 256 px
_CUBIC = -0.75  # of the bicubic kernel; jax.image's 'cubic' has −0.5
_RESIDUAL = 0.5  # share of the convolution in φ
_COMMITMENT = 0.25  # of the features to the vectors, in training
_CONVOLUTIONS = 4  # φ, shared by the scales
# Which of them serves a scale. For ten scales, two lie midway and
# are decided by rounding in the original program: a table is exact.
_PHI = {
  4: (0, 1, 2, 3),
  10: (0, 0, 1, 1, 1, 2, 2, 3, 3, 3),
  14: (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3),
}


@functools.lru_cache
def area_matrix(size: int, n: int) -> np.ndarray:
  """[n,size] float64: averages over bins i·size/n … (i+1)·size/n.

  Bins are widened to whole pixels, so they overlap where n does not divide.
  """
  matrix = np.zeros((n, size))
  for i in range(n):
    start, end = i * size // n, -(-(i + 1) * size // n)
    matrix[i, start:end] = 1 / (end - start)
  return matrix


@functools.lru_cache
def bicubic_matrix(n: int, size: int) -> np.ndarray:
  """[size,n] float64: cubic convolution, a = −0.75, borders repeated.

  Pixel centres are aligned (half-pixel), no antialiasing.
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
  """Applies a matrix [m,n] to both axes of x [B,n,n,C] -> [B,m,m,C]."""
  matrix = jnp.asarray(matrix, x.dtype)
  return jnp.einsum('ih,bhwc,jw->bijc', matrix, x, matrix, precision='highest')


def phi_index(scales: int) -> tuple[int, ...]:
  """Which of the convolutions φ serves each scale: the nearest in depth."""
  if scales in _PHI:
    return _PHI[scales]
  ticks = np.linspace(1 / 12, 11 / 12, _CONVOLUTIONS)
  ratio = np.arange(scales) / max(scales - 1, 1)
  nearest = np.abs(ticks[None, :] - ratio[:, None]).argmin(1)
  return tuple(int(k) for k in nearest)


class Quantizer(nn.Module):
  """Features to tokens of all scales, and back.

  float32 with exact products throughout: a rounding can flip a token.

  Attributes:
    patch_nums: side n of each scale; the last is that of f.
    vocab: V, vectors in the codebook.
    channels: C, of a vector.
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
    """[V,C] the codebook."""
    return self.embedding.embedding

  def nearest(self, z: jax.Array) -> jax.Array:
    """Z [...,C] -> [...] int32, the nearest vector; the first of equals."""
    codebook = self.vectors()
    products = jnp.einsum('...c,vc->...v', z, codebook, precision='highest')
    squares = jnp.sum(codebook**2, axis=1)
    squares = squares.reshape(*[1] * (z.ndim - 1), -1)
    total = jnp.sum(z**2, axis=-1, keepdims=True) + squares
    return jnp.argmin(total - 2 * products, axis=-1).astype(jnp.int32)

  def upscale(self, scale: int, vectors: jax.Array) -> jax.Array:
    """Vectors [B,n²,C] of a scale to its share of f̂, [B,h,w,C]."""
    n, size = self.patch_nums[scale], self.patch_nums[-1]
    h = vectors.reshape(len(vectors), n, n, self.channels)
    if scale < len(self.patch_nums) - 1:
      h = resize(h, bicubic_matrix(n, size))
    phi = self.qresi_ls[phi_index(len(self.patch_nums))[scale]]
    return (1 - _RESIDUAL) * h + _RESIDUAL * phi(h)

  def __call__(self, f: jax.Array) -> jax.Array:
    """Features [B,h,w,C] to tokens [B,L] int32."""
    size = self.patch_nums[-1]
    chex.assert_shape(f, (None, size, size, self.channels))
    tokens = []
    for scale, n in enumerate(self.patch_nums):
      z = f if n == size else resize(f, area_matrix(size, n))
      ids = self.nearest(z).reshape(len(f), n * n)
      f = f - self.upscale(scale, self.embedding(ids))
      tokens.append(ids)
    return jnp.concatenate(tokens, axis=1)

  def advance(
    self, scale: int, vectors: jax.Array, f_hat: jax.Array
  ) -> tuple[jax.Array, jax.Array | None]:
    """Adds a scale's vectors [B,n²,C] to f̂ [B,h,w,C].

    Returns:
      f̂, and what the transformer reads at the next scale, [B,m²,C]; None
      after the last.
    """
    f_hat = f_hat + self.upscale(scale, vectors)
    if scale == len(self.patch_nums) - 1:
      return f_hat, None
    m, size = self.patch_nums[scale + 1], self.patch_nums[-1]
    following = f_hat if m == size else resize(f_hat, area_matrix(size, m))
    return f_hat, following.reshape(len(f_hat), m * m, self.channels)

  def accumulate(self, ids: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Tokens [B,L] to f̂ after each scale, and the teacher-forcing input.

    Returns:
      S times [B,h,w,C]; and [B,L−1,C], the inputs of the tokens but the first.
    """
    ends = np.cumsum(np.square(self.patch_nums))
    chex.assert_shape(ids, (None, int(ends[-1])))
    parts = jnp.split(self.embedding(ids), [int(e) for e in ends[:-1]], axis=1)
    size = self.patch_nums[-1]
    shape = (len(ids), size, size, self.channels)
    f_hat = jnp.zeros(shape, parts[0].dtype)
    sums, inputs = [], []
    for scale, vectors in enumerate(parts):
      f_hat, following = self.advance(scale, vectors, f_hat)
      sums.append(f_hat)
      if following is not None:
        inputs.append(following)
    if not inputs:
      return sums, jnp.zeros((len(ids), 0, self.channels), f_hat.dtype)
    return sums, jnp.concatenate(inputs, axis=1)


class Vqvae(nn.Module):
  """The tokenizer.

  Attributes:
    patch_nums: see `Quantizer`.
    vocab: see `Quantizer`.
    channels: C, of a latent vector.
    base: unit of width of encoder and decoder.
    mult: width of each level, in units.
    image_channels: of the image.
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
    """Image [B,H,W,3] -> its reconstruction; touches every parameter."""
    sums, _ = self.quantize.accumulate(self.encode(image))
    return self.decode(sums[-1])

  def features(self, image: jax.Array) -> jax.Array:
    """Image [B,H,W,3] in [−1, 1] -> f [B,h,w,C]."""
    with jax.default_matmul_precision('highest'):
      return self.quant_conv(self.encoder(image))

  def encode(self, image: jax.Array) -> jax.Array:
    """Image [B,H,W,3] in [−1, 1] -> tokens [B,L] int32."""
    return self.quantize(self.features(image))

  def losses(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What training the tokenizer minimises, for images [B,H,W,3].

    Returns:
      [B] mean squared error of the reconstruction, and [B] the distance of
      features and vectors after each scale, which the vectors make up for in
      full and the features in a quarter; gradients pass the rounding straight.
    """
    f = self.features(image)
    sums, _ = self.quantize.accumulate(self.quantize(jax.lax.stop_gradient(f)))
    mean = lambda x: jnp.mean(x**2, axis=(1, 2, 3))
    stop = jax.lax.stop_gradient
    distances = [
      _COMMITMENT * mean(f - stop(f_hat)) + mean(stop(f) - f_hat)
      for f_hat in sums
    ]
    straight = f + stop(sums[-1] - f)
    error = self.decoder(self.post_quant_conv(straight)) - image
    return mean(error), sum(distances) / len(distances)

  def teacher_input(self, ids: jax.Array) -> jax.Array:
    """Tokens [B,L] -> what the transformer reads, [B,L−1,C]."""
    return self.quantize.accumulate(ids)[1]

  def f_hat(self, ids: jax.Array) -> jax.Array:
    """Tokens [B,L] -> f̂ [B,h,w,C], the sum of all scales."""
    return self.quantize.accumulate(ids)[0][-1]

  def decode(self, f_hat: jax.Array) -> jax.Array:
    """f̂ [B,h,w,C] -> image [B,H,W,3], clamped to [−1, 1]."""
    return jnp.clip(self.decoder(self.post_quant_conv(f_hat)), -1, 1)

  def vectors(self) -> jax.Array:
    """[V,C] the codebook."""
    return self.quantize.vectors()

  def advance(
    self, scale: int, vectors: jax.Array, f_hat: jax.Array
  ) -> tuple[jax.Array, jax.Array | None]:
    """See `Quantizer.advance`."""
    return self.quantize.advance(scale, vectors, f_hat)


@dataclasses.dataclass
class VqvaeConfig:
  """VAR's tokenizer; the defaults are the released one.

  Attributes:
    image_shape: (H, W, C), H = W.
    patch_nums: side of each scale, 1 first; the last times the reduction
      2 ** (levels − 1) is the image's side.
    vocab: vectors in the codebook.
    channels: of a latent vector.
    base: unit of width, a multiple of 32.
    mult: width of each level, in units.
    pixel_values: pixel values are 0 .. pixel_values−1.
    nearest: see `encoders.Pixels`.
  """

  image_shape: tuple[int, int, int] = (256, 256, 3)
  patch_nums: tuple[int, ...] = PATCH_NUMS
  vocab: int = 4096
  channels: int = 32
  base: int = 160
  mult: tuple[int, ...] = (1, 1, 2, 2, 4)
  pixel_values: int = 256
  nearest: bool = False


def build(config: VqvaeConfig) -> Vqvae:
  """The tokenizer of a config.

  Raises:
    errors.UserError: the scales do not fit the image, or the width the norms,
      or a number is not positive.
  """
  for name in ('vocab', 'channels', 'base'):
    value = getattr(config, name)
    name = f'model.tokenizer.{name}'
    errors.require(value > 0, name, value, 'a positive integer')
  scales = tuple(config.patch_nums)
  side = scales[-1] * 2 ** (len(config.mult) - 1) if scales else 0
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
