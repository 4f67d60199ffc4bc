"""Resizing as the evaluation networks' programs do it, to float32 rounding.

There are three rules, all separable. The two bilinear ones differ by up to half
a source pixel, which moves a FID by more than methods differ: statistics made
with one of them must not be compared with statistics made with the other.
"""

import functools
import typing
from typing import Literal
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors

# 'tf1': TensorFlow 1's ResizeBilinear (the graph itself, torch-fidelity, EDM,
# EDM2, OpenAI). 'half_pixel': PyTorch's interpolate (pytorch-fid).
Bilinear = Literal['tf1', 'half_pixel']

# The constant a of Keys' bicubic kernel, as PyTorch chooses it.
_ANTIALIASED = -0.5
_PLAIN = -0.75
_REACH = 2.0  # half the width of Keys' kernel, in pixels


def check_images(images: jax.Array) -> jax.Array:
  """Returns raw images [B,H,W,3] of pixel values 0 to 255 as float32.

  Raises:
    UserError: they are neither uint8 nor float32, or have another shape.
  """
  known = images.dtype in (jnp.uint8, jnp.float32)
  if images.ndim != 4 or images.shape[-1] != 3 or not known:
    raise errors.UserError(
      f'images are {images.dtype} {images.shape}; wanted [B,H,W,3] uint8 or '
      'float32 from 0 to 255: repeat the channel of grey images three times'
    )
  return images.astype(jnp.float32)


class Table(NamedTuple):
  """Linear interpolation along an axis: v[lo] + (v[hi] − v[lo])·fraction.

  Attributes:
    lo: [out] int32, the lower source index.
    hi: [out] int32, lo + 1 clamped to the border.
    fraction: [out] float32 in [0, 1).
  """

  lo: np.ndarray
  hi: np.ndarray
  fraction: np.ndarray


@functools.cache
def bilinear_table(size: int, out: int, rule: Bilinear = 'tf1') -> Table:
  """Returns the interpolation of `size` pixels to `out`, not antialiased.

  Raises:
    UserError: a size is below 1, or the rule is unknown.
  """
  if rule not in typing.get_args(Bilinear):
    raise errors.UserError(
      f'resize {rule!r} is unknown; wanted one of {typing.get_args(Bilinear)}'
    )
  if size < 1 or out < 1:
    raise errors.UserError(
      f'cannot resize {size} pixels to {out}; both must be 1 or more'
    )
  if rule == 'tf1':  # source = i·size/out, in float32 as TensorFlow has it
    scale = np.float32(size) / np.float32(out)
    source = np.arange(out, dtype=np.float32) * scale
  else:  # pixel centres correspond
    source = (np.arange(out) + 0.5) * (size / out) - 0.5
    source = np.maximum(source, 0)
  lo = np.minimum(np.floor(source).astype(np.int32), size - 1)
  hi = np.minimum(lo + 1, size - 1)
  return Table(lo, hi, (source - lo).astype(np.float32))


def bilinear(images: jax.Array, out: int, rule: Bilinear = 'tf1') -> jax.Array:
  """Resizes [B,H,W,C] float32 to [B,out,out,C] by `bilinear_table`."""
  for axis in (2, 1):
    table = bilinear_table(images.shape[axis], out, rule)
    shape = [1] * images.ndim
    shape[axis] = out
    low = jnp.take(images, table.lo, axis=axis)
    high = jnp.take(images, table.hi, axis=axis)
    images = low + (high - low) * table.fraction.reshape(shape)
  return images


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  """Evaluates Keys' kernel, which is 0 at two pixels' distance and beyond."""
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = (((x - 5) * x + 8) * x - 4) * a
  return np.where(x < 1, near, np.where(x < _REACH, far, 0))


@functools.cache
def bicubic_matrix(size: int, out: int) -> np.ndarray:
  """Returns PyTorch's antialiased bicubic resize along an axis.

  Returns:
    [out, size] float64, to be applied to both axes. Weights beyond the border
    are left out, and then each row is scaled to sum to one.
  """
  scale = size / out
  width = max(scale, 1.0)  # the kernel widens as the image shrinks
  matrix = np.zeros((out, size))
  for i in range(out):
    centre = scale * (i + 0.5)
    reach = _REACH * width
    first = max(int(centre - reach + 0.5), 0)
    last = min(int(centre + reach + 0.5), size)
    taps = np.arange(first, last)
    weights = _cubic((taps - centre + 0.5) / width, _ANTIALIASED)
    matrix[i, first:last] = weights / weights.sum()
  return matrix


@functools.cache
def bicubic_point_matrix(size: int, out: int, scale: float) -> np.ndarray:
  """Returns PyTorch's bicubic interpolation along an axis, not antialiased.

  Args:
    size: the number of source values.
    out: the number of values wanted.
    scale: out/size, or what the program that is followed says instead of it.

  Returns:
    [out, size] float64; beyond the border, the value at the border repeats.
  """
  matrix = np.zeros((out, size))
  for i in range(out):
    centre = (i + 0.5) / scale - 0.5
    taps = int(np.floor(centre)) + np.arange(-1, 3)
    weights = _cubic(taps - centre, _PLAIN)
    np.add.at(matrix[i], np.clip(taps, 0, size - 1), weights)
  return matrix


def bicubic(images: jax.Array, out: int) -> jax.Array:
  """Resizes [B,H,W,C] float32 to [B,out,out,C] by `bicubic_matrix`."""
  rows = bicubic_matrix(images.shape[1], out).astype(np.float32)
  columns = bicubic_matrix(images.shape[2], out).astype(np.float32)
  images = jnp.einsum('oh,bhwc->bowc', rows, images, precision='highest')
  return jnp.einsum('ow,bhwc->bhoc', columns, images, precision='highest')
