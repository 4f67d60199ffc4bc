"""Layers that more than one model uses."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors
from ddo_jax import precision as precision_lib
from ddo_jax import settings


class FourierEmbedding(nn.Module):
  """The sine and cosine of a scalar at geometrically spaced frequencies.

  Attributes:
    features: the width of the output, even.
    lowest: the smallest frequency, in radians per unit of the scalar.
    highest: the largest frequency, in radians per unit of the scalar.
  """

  features: int
  lowest: float = 1.0
  highest: float = 16.0

  @nn.compact
  def __call__(self, value: jax.Array) -> jax.Array:
    """Embeds value [B] as [B, features]."""
    frequency = np.geomspace(self.lowest, self.highest, self.features // 2)
    angle = value[:, None] * jnp.asarray(frequency, value.dtype)[None, :]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def _pad_axis(x: jax.Array, axis: int, amount: int) -> jax.Array:
  """Pads one axis with `amount` zeros on both sides."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (amount, amount)
  return jnp.pad(x, widths)


def downsample(
  x: jax.Array, taps: Sequence[float], pad: int | None = None
) -> jax.Array:
  """Halves H and W by a separable filter; beyond the border there are zeros.

  Args:
    x: the image, [B,H,W,C].
    taps: the filter, symmetric and of even length. It is scaled to sum 1, so
      that (1, 1) averages 2×2 pixels.
    pad: the number of zeros on each side; by default as many as give H/2, W/2.

  Returns:
    The smaller image, [B,H/2,W/2,C] for even H, W and the default `pad`.
  """
  if pad is None:
    pad = (len(taps) - 1) // 2
  for axis in (1, 2):
    size = (x.shape[axis] + 2 * pad - len(taps)) // 2 + 1
    x = _pad_axis(x, axis, pad)
    total: Any = 0
    for k, tap in enumerate(taps):
      part = jax.lax.slice_in_dim(x, k, k + 2 * size - 1, stride=2, axis=axis)
      total += tap / sum(taps) * part
    x = total
  return x


def upsample(
  x: jax.Array, taps: Sequence[float], pad: int | None = None
) -> jax.Array:
  """Doubles H and W by a separable filter; four times `downsample`'s adjoint.

  Args:
    x: the image, [B,H,W,C].
    taps: the filter, as for `downsample`; (1, 1) repeats pixels.
    pad: the number of rows and columns that are cut off on each side; by
      default as many as give 2H, 2W.

  Returns:
    The larger image, [B,2H,2W,C] for the default `pad`.
  """
  length = len(taps)
  if pad is None:
    pad = (length - 1) // 2
  for axis in (1, 2):
    size = x.shape[axis] + length // 2 - 1 - pad
    x = _pad_axis(x, axis, length // 2)
    phases = []
    for phase in (0, 1):
      # Tap k of the output 2m + phase multiplies the input m + shift, where
      # 2·shift + k = phase + pad.
      total: Any = 0
      for k in range((phase + pad) % 2, length, 2):
        start = length // 2 + (phase + pad - k) // 2
        part = jax.lax.slice_in_dim(x, start, start + size, axis=axis)
        total += 2 * taps[k] / sum(taps) * part
      phases.append(total)
    x = jnp.stack(phases, axis=axis + 1)
    x = x.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 2 :])
  return x


def resample(x: jax.Array, mode: str, taps: Sequence[float]) -> jax.Array:
  """Keeps, halves or doubles H and W of x [B,H,W,C].

  Args:
    x: the image.
    mode: 'keep', 'down' or 'up'.
    taps: the filter, see `downsample`.

  Returns:
    The image of the new size.
  """
  if mode == 'keep':
    return x
  return {'down': downsample, 'up': upsample}[mode](x, taps)


def split_heads(
  qkv: jax.Array, heads: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Splits queries, keys and values, and the heads of each.

  EDM and EDM2 interleave the three within a head: channel h·3c + 3j + i of the
  input is channel j of head h, with i = 0 for the queries, 1 for the keys and 2
  for the values, and c channels in a head.

  Args:
    qkv: the joint projection, [B,H,W,3C].
    heads: the number of heads.

  Returns:
    The queries, the keys and the values, each [B,HW,heads,C/heads].
  """
  batch, height, width, channels = qkv.shape
  shape = (batch, height * width, heads, channels // (3 * heads), 3)
  q, k, v = jnp.moveaxis(qkv.reshape(shape), -1, 0)
  return q, k, v


def _is_product_with_weights(primitive: Any, *args: Any, **params: Any) -> bool:
  """Says whether an operation is a convolution, or a product of matrices.

  The products within attention, of two activations of the same row, are none:
  what they make can be larger than all else in a block.
  """
  if primitive is jax.lax.conv_general_dilated_p:
    return True
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return policy(primitive, *args, **params)


def remat_policy(remat: bool | str) -> Callable[..., bool] | None:
  """Returns what is kept of a block whose activations are recomputed.

  Args:
    remat: True, nothing; or 'dots', what products with weights make: a third
      or so of all that is there, and nearly all of the arithmetic.
  """
  return _is_product_with_weights if remat == settings.DOTS else None


def checkpointed(
  apply: Callable[..., jax.Array], remat: bool | str
) -> Callable[..., jax.Array]:
  """Returns a block's call, its activations recomputed if `remat` says so.

  The backward pass then keeps what goes into the block, and computes what is
  inside it again when it comes to it. A whole network as one such block would
  save nothing: all of it would be computed again at once.

  Args:
    apply: (module, arrays...) -> array.
    remat: False, or see `remat_policy`.
  """
  return nn.remat(apply, policy=remat_policy(remat)) if remat else apply


def stacked(
  block: type[nn.Module], depth: int, in_axes: Any, remat: bool | str
) -> Callable[..., nn.Module]:
  """Returns what makes a module of `depth` blocks, one after the other.

  Flax scans over them: their params are stacked, and one is compiled.

  Args:
    block: (carry, inputs...) -> (carry, outputs); it is made with the settings
      that the result is called with.
    depth: the number of blocks.
    in_axes: for each input, `nn.broadcast` where all blocks share it, or 0.
    remat: False, or see `remat_policy`.
  """
  if remat:
    policy = remat_policy(remat)
    block = nn.remat(block, prevent_cse=False, policy=policy)
  return nn.scan(
    block,
    variable_axes={'params': 0, 'intermediates': 0},
    split_rngs={'params': True},
    in_axes=in_axes,
    length=depth,
  )


def apply_training(
  module: nn.Module,
  params: Any,
  keys: jax.Array,
  rows: dict[str, jax.Array],
  precision: str,
) -> jax.Array:
  """Applies a module in training mode; every row has a dropout key of its own.

  A single key for the whole batch would tie a row's dropout mask to the row's
  place in the batch, and so to the number of devices.

  Args:
    module: a module whose rows do not see each other. It takes the arguments
      `rows` and `train`, and returns an array [B,...].
    params: the module's params.
    keys: the rows' keys, [B].
    rows: the module's arguments by name, arrays [B,...].
    precision: that of its products, see `precision`.

  Returns:
    The module's output, [B,...].
  """

  def apply_row(key, row):
    batch_of_one = jax.tree.map(lambda leaf: leaf[None], row)
    output = module.apply(
      {'params': params}, **batch_of_one, train=True, rngs={'dropout': key}
    )
    return output[0]

  with precision_lib.of(precision):
    return jax.vmap(apply_row)(keys, rows)


def check_levels(
  image_shape: Sequence[int], channel_mult: Sequence[int]
) -> None:
  """Checks that an image can be halved at each level of a U-Net but the last.

  Args:
    image_shape: (H, W, C) of the image.
    channel_mult: the widths of the levels.

  Raises:
    errors.UserError: the image is not square, or its side cannot be halved as
      often as that.
  """
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
    name: the block's name, such as '16x16_block0'; the number before the first
      underscore is the resolution.
    channels: the width of the block's output.
    resample: 'keep', 'down' or 'up'.
    attention: whether the block has self-attention.
    joins: whether the block's input is joined with a skip from the encoder.
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
  """Lists the blocks of a U-Net's encoder after its first convolution.

  The outputs of the first convolution and of every block are kept as skips.

  Args:
    resolution: the side of the image.
    widths: the width of each level, from the image down.
    num_blocks: the number of blocks in a level, a resampling block not counted.
    attention: the resolutions at which every block has self-attention, but for
      the resampling blocks.
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
  """Lists the blocks of a U-Net's decoder before its last convolution.

  The decoder goes from the deepest level up. Each of its levels has one block
  more than the encoder's, and every one of these takes a skip.

  Args:
    resolution: the side of the image.
    widths: the width of each level, from the image down.
    num_blocks: the number of blocks in a level of the encoder.
    attention: the resolutions at which blocks have self-attention.
    last_only: whether only the last block of such a level has it.
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
      has_attention = r in attention
      if last_only and i < num_blocks:
        has_attention = False
      steps.append(
        Step(
          f'{r}x{r}_block{i}',
          widths[level],
          attention=has_attention,
          joins=True,
        )
      )
  return steps
