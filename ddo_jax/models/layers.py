"""Layers that more than one model uses."""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors


class FourierEmbedding(nn.Module):
  """Sine and cosine of a scalar at fixed, geometrically spaced frequencies.

  Attributes:
    features: width of the output, even.
    lowest: smallest frequency [rad per unit].
    highest: largest frequency [rad per unit].
  """

  features: int
  lowest: float = 1.0
  highest: float = 16.0

  @nn.compact
  def __call__(self, value: jax.Array) -> jax.Array:
    """Value [B] -> [B, features]."""
    frequency = np.geomspace(self.lowest, self.highest, self.features // 2)
    angle = value[:, None] * jnp.asarray(frequency, value.dtype)[None, :]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def downsample(
  x: jax.Array, taps: Sequence[float], pad: int | None = None
) -> jax.Array:
  """Halves H and W by a separable FIR filter, zeros beyond the border.

  Args:
    x: [B,H,W,C].
    taps: symmetric, of even length; scaled to sum 1. (1, 1) averages 2×2.
    pad: zeros on each side; by default those that make it H/2, W/2.

  Returns:
    [B,H/2,W/2,C] for even H, W and the default `pad`.
  """
  pad = (len(taps) - 1) // 2 if pad is None else pad
  for axis in (1, 2):
    size = (x.shape[axis] + 2 * pad - len(taps)) // 2 + 1
    x = jnp.pad(x, [(pad, pad) if a == axis else (0, 0) for a in range(4)])
    part = lambda k, x=x, axis=axis, size=size: jax.lax.slice_in_dim(
      x, k, k + 2 * size - 1, 2, axis
    )
    x = sum(tap / sum(taps) * part(k) for k, tap in enumerate(taps))
  return x


def upsample(
  x: jax.Array, taps: Sequence[float], pad: int | None = None
) -> jax.Array:
  """Doubles H and W: four times the adjoint of `downsample`.

  Args:
    x: [B,H,W,C].
    taps: as for `downsample`. (1, 1) repeats pixels.
    pad: rows cut off each side; by default those that make it 2H, 2W.

  Returns:
    [B,2H,2W,C] for the default `pad`.
  """
  length = len(taps)
  pad = (length - 1) // 2 if pad is None else pad
  for axis in (1, 2):
    size = x.shape[axis] + length // 2 - 1 - pad
    edge = (length // 2, length // 2)
    x = jnp.pad(x, [edge if a == axis else (0, 0) for a in range(4)])
    phases = []
    for phase in (0, 1):
      # Output 2m + phase sees input m + shift where 2·shift + k = phase + pad.
      total = 0
      for k in range((phase + pad) % 2, length, 2):
        start = length // 2 + (phase + pad - k) // 2
        part = jax.lax.slice_in_dim(x, start, start + size, axis=axis)
        total += 2 * taps[k] / sum(taps) * part
      phases.append(total)
    x = jnp.stack(phases, axis=axis + 1)
    x = x.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 2 :])
  return x


def resample(x: jax.Array, mode: str, taps: Sequence[float]) -> jax.Array:
  """X [B,H,W,C] kept, halved or doubled: mode 'keep', 'down' or 'up'."""
  if mode == 'keep':
    return x
  return {'down': downsample, 'up': upsample}[mode](x, taps)


def split_heads(qkv: jax.Array, heads: int) -> tuple[jax.Array, ...]:
  """Splits [B,H,W,3C] into q, k, v, each [B,HW,heads,C/heads].

  The three are interleaved within a head, as EDM and EDM2 store them: output
  channel h·3c + 3j + {0: q, 1: k, 2: v}.
  """
  batch, height, width, channels = qkv.shape
  shape = (batch, height * width, heads, channels // (3 * heads), 3)
  return tuple(jnp.moveaxis(qkv.reshape(shape), -1, 0))


def apply_training(
  module: nn.Module,
  params: Any,
  keys: jax.Array,
  rows: dict[str, jax.Array],
  remat: bool,
) -> jax.Array:
  """Applies a module in training mode, each row with its own dropout key.

  One key for the batch would tie a row's mask to its place in the batch, and
  so to the number of devices.

  Args:
    module: of rows and `train` -> [B,...], no row seeing another.
    params: of the module.
    keys: [B].
    rows: arguments by name, arrays [B,...].
    remat: recompute activations in the backward pass.

  Returns:
    [B,...].
  """

  def one(key, row):
    row = jax.tree.map(lambda leaf: leaf[None], row)
    rngs = {'dropout': key}
    return module.apply({'params': params}, **row, train=True, rngs=rngs)[0]

  if remat:
    policy = jax.checkpoint_policies.dots_saveable
    one = jax.checkpoint(one, policy=policy)
  with jax.default_matmul_precision('highest'):
    return jax.vmap(one)(keys, rows)


def check_levels(
  image_shape: Sequence[int], channel_mult: Sequence[int]
) -> None:
  """Raises UserError where an image cannot be halved level by level."""
  halvings = len(channel_mult) - 1
  height, width, _ = image_shape
  if height != width or height % 2**halvings:
    raise errors.UserError(
      f'config.model.image_shape is {tuple(image_shape)}; the'
      f' {halvings + 1} levels of config.model.channel_mult need a square whose'
      f' side is a multiple of {2**halvings}: pad the images or drop a level'
    )


class Step(NamedTuple):
  """One block of a U-Net.

  Attributes:
    name: '16x16_block0'; the number is the level's resolution.
    channels: of its output.
    resample: 'keep', 'down' or 'up'.
    attention: whether self-attention follows.
    joins: whether the input is joined with a skip from the encoder.
  """

  name: str
  channels: int
  resample: str = 'keep'
  attention: bool = False
  joins: bool = False


def encoder_steps(
  resolution: int,
  widths: Sequence[int],
  num_blocks: int,
  attention: Sequence[int],
) -> list[Step]:
  """The encoder after its first convolution, `widths` level by level.

  Each block's output, and that of the convolution, is kept for the decoder.
  Attention stands in every block at the resolutions of `attention`.
  """
  steps = []
  for level, width in enumerate(widths):
    r = resolution >> level
    if level:
      steps.append(Step(f'{r}x{r}_down', widths[level - 1], 'down'))
    for i in range(num_blocks):
      steps.append(Step(f'{r}x{r}_block{i}', width, attention=r in attention))
  return steps


def decoder_steps(
  resolution: int,
  widths: Sequence[int],
  num_blocks: int,
  attention: Sequence[int],
  last_only: bool = False,
) -> list[Step]:
  """The decoder up to its last convolution, from the deepest level up.

  Each level has one block more than the encoder's, and every one of these
  takes a skip. `last_only`: attention in a level's last block alone.
  """
  steps = []
  for level in reversed(range(len(widths))):
    r = resolution >> level
    if level == len(widths) - 1:
      steps.append(Step(f'{r}x{r}_in0', widths[level], attention=True))
      steps.append(Step(f'{r}x{r}_in1', widths[level]))
    else:
      steps.append(Step(f'{r}x{r}_up', widths[level + 1], 'up'))
    for i in range(num_blocks + 1):
      attends = r in attention and (i == num_blocks or not last_only)
      steps.append(
        Step(f'{r}x{r}_block{i}', widths[level], 'keep', attends, True)
      )
  return steps
