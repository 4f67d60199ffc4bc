"""EDM's augmentation for pretraining, and its 9 labels.

Geometric only (Karras et al. 2022, appendix F.2, after Karras et al. 2020):
flips, then one resampling for the product of scaling, rotation, anisotropic
scaling and translation. The network is told what was done by the labels, so
that it does not leak into what it generates: their zero is "nothing done".
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

LABELS = 9

# The low-pass of the symlet of six vanishing moments (Daubechies 1992).
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
_MARGIN = 6  # low-resolution pixels, kept around the image for the filter
# The filter's centre is half a high-resolution pixel off the taps' middle.
_SHIFT = 0.25  # [low-resolution pixels]

# Multiplies the probability p, by gate: the x-flip is always a fair coin.
_MULTIPLIERS = np.array([1e8, 1, 1, 1, 1, 1])


class Draws(NamedTuple):
  """All that is random in the augmentation of B rows.

  Attributes:
    gates: [B,6] uniform in [0, 1): x-flip, y-flip, scale, rotation,
      anisotropy, translation; each is done where its gate is below p.
    flips: [B,2] 0 or 1: along x, along y.
    scale: [B] normal; the image grows by 2^(0.2·scale).
    rotation: [B] uniform in [0, 1), from −π to π.
    anisotropy: [B] normal; grows one axis by 2^(0.2·anisotropy), and shrinks
      the other.
    axis: [B] uniform in [0, 1), that axis' angle, from −π to π.
    axis_gate: [B] uniform in [0, 1); from ½ on the axis is x.
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

  def row(key):
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

  return jax.vmap(row)(keys)


@functools.lru_cache
def _resampling(size: int) -> tuple[np.ndarray, np.ndarray]:
  """Matrices along one axis: to the padded double resolution, and back.

  Returns:
    Up [2(3·size−2), size]: reflects size−1 pixels on each side, the most
    there are, then doubles. Down [size, 2(size+margin)]: halves, and crops
    the margin.
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
  for o in range(size):
    start = 2 * o + _MARGIN - length // 2 + 1
    down[o, start : start + length] = taps[::-1]
  return up, down


def _matrix(*rows: tuple[jax.Array | float, ...]) -> jax.Array:
  return jnp.stack([jnp.stack([jnp.asarray(v) for v in row]) for row in rows])


def _rotation(angle: jax.Array) -> jax.Array:
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return _matrix((cos, -sin), (sin, cos))


def _geometry(
  draws: Draws, done: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """One row's inverse map and labels.

  Args:
    draws: of the row.
    done: [6] bool, of each gate.

  Returns:
    A [2,2] and t [2], in units of the image's size: the output's point (x, y)
    from the centre shows the input's A (x, y) + A t; labels [9].
  """
  only = lambda i, value: jnp.where(done[i], value, 0.0)
  flips = jnp.where(done[:2], draws.flips, 0.0)
  scale = only(2, draws.scale)
  rotation = only(3, (2 * draws.rotation - 1) * np.pi)
  stretch = only(4, draws.anisotropy)
  axis = (2 * draws.axis - 1) * np.pi
  axis = jnp.where(draws.axis_gate < 0.5, axis, 0.0)
  translation = only(5, draws.translation)
  grow = jnp.exp2(0.2 * stretch)
  inverse = jnp.exp2(-0.2 * scale) * _rotation(rotation)
  squeeze = _matrix((1 / grow, 0.0), (0.0, grow))
  inverse = inverse @ _rotation(-axis) @ squeeze @ _rotation(axis)
  labels = [
    flips,
    scale[None],
    jnp.stack([jnp.cos(rotation) - 1, jnp.sin(rotation)]),
    stretch * jnp.stack([jnp.cos(axis), jnp.sin(axis)]),
    translation,
  ]
  return inverse, -translation / 8, jnp.concatenate(labels)


def _warp(x: jax.Array, inverse: jax.Array, offset: jax.Array) -> jax.Array:
  """X [H,W,C] at the points that the inverse map gives, antialiased."""
  height, width, _ = x.shape
  up_y, down_y = (jnp.asarray(m, x.dtype) for m in _resampling(height))
  up_x, down_x = (jnp.asarray(m, x.dtype) for m in _resampling(width))
  fine = jnp.einsum('ih,hwc,jw->cij', up_y, x, up_x)

  def centred(count):  # of each fine pixel, in low-resolution pixels
    return (jnp.arange(count) - (count - 1) / 2) / 2

  grid = jnp.stack(
    jnp.meshgrid(centred(down_x.shape[1]), centred(down_y.shape[1]))
  )  # [2,I,J]: x and y
  size = jnp.asarray([width, height], x.dtype)
  shift = (size * offset + _SHIFT)[:, None, None]
  source = jnp.einsum('ab,bij->aij', inverse, grid + shift) - _SHIFT
  middle = (jnp.asarray(fine.shape[:0:-1], x.dtype) - 1) / 2
  source = 2 * source + middle[:, None, None]
  sample = lambda channel: jax.scipy.ndimage.map_coordinates(
    channel, [source[1], source[0]], order=1
  )
  return jnp.einsum('hi,cij,wj->hwc', down_y, jax.vmap(sample)(fine), down_x)


def apply(
  x: jax.Array, draws: Draws, p: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Augments images.

  Args:
    x: [B,H,W,C].
    draws: of `draw`.
    p: probability of each augmentation but the x-flip, which has ½.

  Returns:
    [B,H,W,C] and the labels [B,9]: x-flip, y-flip, scale, rotation (cos − 1,
    sin), anisotropy (along cos, sin of its axis), translation (x, y).
  """
  chex.assert_rank(x, 4)
  done = draws.gates < jnp.asarray(p * _MULTIPLIERS)[None, :]

  def row(x, draws, done):
    inverse, offset, labels = _geometry(draws, done)
    x = jnp.where(labels[0], x[:, ::-1], x)
    x = jnp.where(labels[1], x[::-1], x)
    return _warp(x, inverse.astype(x.dtype), offset.astype(x.dtype)), labels

  with jax.default_matmul_precision('highest'):
    images, labels = jax.vmap(row)(x, draws, done)
  return images, labels.astype(x.dtype)
