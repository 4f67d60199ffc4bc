"""The augmentation that EDM applies in pretraining, and its 9 labels.

It is geometric only (Karras et al. 2022, appendix F.2, after Karras et al.
2020): flips, then one resampling for the product of scaling, rotation,
anisotropic scaling and translation. Labels tell the network what was done, so
that its samples look unaugmented; labels of zero mean "nothing was done".
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

LABELS = 9

# The low-pass filter of the symlet of six vanishing moments (Daubechies 1992).
_SYM6 = np.array([
  0.015404109327027373,
  0.0034907120842174702,
  -0.11799011114819057,
  -0.048311742585633,
  0.4910559419267466,
  0.787641141030194,
  0.3379294217276218,
  -0.07263752278646252,
  -0.021060292512300564,
  0.04472490177066578,
  0.0017677118642428036,
  -0.007800708325034148,
])  # fmt: skip
# Low-resolution pixels that are kept around the image for the filter.
_MARGIN = 6
# The filter's centre lies this far off the middle of its taps, in
# low-resolution pixels; it is half a high-resolution pixel.
_SHIFT = 0.25

# A gate opens with probability p times its multiplier. The x-flip's gate is
# always open, which makes that flip a fair coin.
_MULTIPLIERS = np.array([1e8, 1, 1, 1, 1, 1])


class Draws(NamedTuple):
  """Everything random in the augmentation of B rows.

  Attributes:
    gates: [B,6] uniform in [0, 1), one for each of x-flip, y-flip, scale,
      rotation, anisotropy, translation. Each is done where its gate is below
      p times its multiplier.
    flips: [B,2] 0 or 1, for the flips along x and along y.
    scale: [B] normal; the image grows by 2^(0.2·scale).
    rotation: [B] uniform in [0, 1), which stands for −π .. π.
    anisotropy: [B] normal; one axis grows by 2^(0.2·anisotropy), and the axis
      across it shrinks by as much.
    axis: [B] uniform in [0, 1), which stands for that axis' angle, −π .. π.
    axis_gate: [B] uniform in [0, 1); below ½ the axis has the drawn angle,
      from ½ on it is x.
    translation: [B,2] normal, along x and y, in eighths of the image.
  """

  gates: jax.Array
  flips: jax.Array
  scale: jax.Array
  rotation: jax.Array
  anisotropy: jax.Array
  axis: jax.Array
  axis_gate: jax.Array
  translation: jax.Array


def draw(keys: jax.Array) -> Draws:
  """Draws for B rows, each from its own key of keys [B]."""

  def draw_row(key):
    uniform_key, normal_key = jax.random.split(key)
    uniform = jax.random.uniform(uniform_key, (11,))
    normal = jax.random.normal(normal_key, (4,))
    return Draws(
      gates=uniform[:6],
      flips=jnp.floor(2 * uniform[6:8]),
      scale=normal[0],
      rotation=uniform[8],
      anisotropy=normal[1],
      axis=uniform[9],
      axis_gate=uniform[10],
      translation=normal[2:],
    )

  return jax.vmap(draw_row)(keys)


@functools.lru_cache
def _resampling(size: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the matrices that resample one axis of `size` pixels.

  The first, [2(3·size−2), size], reflects size−1 pixels on each side, which
  are the most there are, and doubles the resolution. The second,
  [size, 2(size+margin)], halves the resolution and crops the margin.
  """
  taps = _SYM6[::-1] / _SYM6.sum()
  length = len(taps)
  padded = np.pad(np.arange(size), size - 1, mode='reflect')
  up = np.zeros((2 * len(padded), size))
  for i in range(len(up)):
    for k in range(length):
      source, odd = divmod(i + k - length // 2, 2)
      if not odd and 0 <= source < len(padded):
        up[i, padded[source]] += 2 * taps[k]
  down = np.zeros((size, 2 * (size + _MARGIN)))
  for i in range(size):
    start = 2 * i + _MARGIN - length // 2 + 1
    down[i, start : start + length] = taps[::-1]
  return up, down


def _rotation(angle: jax.Array) -> jax.Array:
  """Returns the matrix [2,2] that rotates by an angle in radians."""
  cos = jnp.cos(angle)
  sin = jnp.sin(angle)
  return jnp.stack([jnp.stack([cos, -sin]), jnp.stack([sin, cos])])


def _geometry(
  draws: Draws, done: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Turns the draws of one row into its inverse map and its labels.

  Args:
    draws: the draws of the row, without the leading axis.
    done: [6] bool, whether the gate of each augmentation is open.

  Returns:
    A [2,2] and t [2], in units of the image's size: the point (x, y) of the
    output, from its centre, shows the point A (x, y) + t of the input. Then
    the labels [9].
  """
  flips = jnp.where(done[:2], draws.flips, 0.0)
  scale = jnp.where(done[2], draws.scale, 0.0)
  rotation = jnp.where(done[3], (2 * draws.rotation - 1) * np.pi, 0.0)
  stretch = jnp.where(done[4], draws.anisotropy, 0.0)
  translation = jnp.where(done[5], draws.translation, 0.0)
  axis = (2 * draws.axis - 1) * np.pi
  axis = jnp.where(draws.axis_gate < 0.5, axis, 0.0)
  growth = jnp.exp2(0.2 * stretch)
  squeeze = jnp.diag(jnp.stack([1 / growth, growth]))
  inverse = jnp.exp2(-0.2 * scale) * _rotation(rotation)
  inverse = inverse @ _rotation(-axis) @ squeeze @ _rotation(axis)
  labels = [
    flips,
    scale[None],
    jnp.stack([jnp.cos(rotation) - 1, jnp.sin(rotation)]),
    stretch * jnp.stack([jnp.cos(axis), jnp.sin(axis)]),
    translation,
  ]
  return inverse, -translation / 8, jnp.concatenate(labels)


def _centred(count: int) -> jax.Array:
  """Returns where `count` fine pixels are, from the middle of the image.

  The unit is a low-resolution pixel, which is two fine ones.
  """
  return (jnp.arange(count) - (count - 1) / 2) / 2


def _warp(x: jax.Array, inverse: jax.Array, offset: jax.Array) -> jax.Array:
  """Samples an image at the points of an inverse map, without aliasing.

  The image is resampled to twice its resolution, read there by bilinear
  interpolation, and resampled back.

  Args:
    x: [H,W,C].
    inverse: [2,2], the A of `_geometry`.
    offset: [2], the t of `_geometry`.
  """
  height, width, _ = x.shape
  up_y, down_y = (jnp.asarray(m, x.dtype) for m in _resampling(height))
  up_x, down_x = (jnp.asarray(m, x.dtype) for m in _resampling(width))
  fine = jnp.einsum('ih,hwc,jw->cij', up_y, x, up_x)
  # [2,I,J]: the x and the y of each fine pixel of the output.
  grid = jnp.stack(
    jnp.meshgrid(_centred(down_x.shape[1]), _centred(down_y.shape[1]))
  )
  size = jnp.asarray([width, height], x.dtype)
  shift = (size * offset + _SHIFT)[:, None, None]
  source = jnp.einsum('ab,bij->aij', inverse, grid + shift) - _SHIFT
  _, fine_height, fine_width = fine.shape
  middle = (jnp.asarray([fine_width, fine_height], x.dtype) - 1) / 2
  source = 2 * source + middle[:, None, None]

  def sample(channel):
    return jax.scipy.ndimage.map_coordinates(
      channel, [source[1], source[0]], order=1
    )

  return jnp.einsum('hi,cij,wj->hwc', down_y, jax.vmap(sample)(fine), down_x)


def apply(
  x: jax.Array, draws: Draws, p: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Augments images.

  Args:
    x: [B,H,W,C].
    draws: the draws of `draw` for these rows.
    p: the probability of each augmentation except the x-flip, whose is ½.

  Returns:
    The augmented images [B,H,W,C], and the labels [B,9]: x-flip, y-flip, scale,
    rotation (cos − 1, sin), anisotropy (times cos and sin of its axis' angle),
    translation (x, y).
  """
  chex.assert_rank(x, 4)
  done = draws.gates < jnp.asarray(p * _MULTIPLIERS)[None, :]

  def augment_row(x, draws, done):
    inverse, offset, labels = _geometry(draws, done)
    x = jnp.where(labels[0], x[:, ::-1], x)
    x = jnp.where(labels[1], x[::-1], x)
    return _warp(x, inverse.astype(x.dtype), offset.astype(x.dtype)), labels

  with jax.default_matmul_precision('highest'):
    images, labels = jax.vmap(augment_row)(x, draws, done)
  return images, labels.astype(x.dtype)
