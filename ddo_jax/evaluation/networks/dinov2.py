"""DINOv2's ViT-L/14, whose features FD-DINOv2 compares.

The network is that of Oquab et al. 2023 (arXiv 2304.07193): plain pre-norm
transformer blocks with a learnt scale on each branch. Stein et al. 2023 (arXiv
2306.04675) propose the distance, and EDM2 reports it. `weights.dinov2` reads
the published weights.
"""

from collections.abc import Mapping
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.evaluation.networks import resize

SIDE = 224  # height and width of the network's input, in pixels
WIDTH = 1_024  # number of features
_GRID = 37  # patches along a side where the position embedding was trained
_OFFSET = 0.1  # DINOv2 adds this to the target before it divides by _GRID
_EPSILON = 1e-6
# ImageNet's mean and standard deviation, for images in [0, 1].
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_SD = np.array([0.229, 0.224, 0.225], np.float32)


def position_matrix(grid: int) -> np.ndarray:
  """Returns how position embeddings become those of a grid of other size.

  Args:
    grid: the number of patches along a side.

  Returns:
    [grid, 37] float64, to be applied to both axes.
  """
  scale = (grid + _OFFSET) / _GRID
  return resize.bicubic_point_matrix(_GRID, grid, scale)


def _dense(features: int, name: str) -> nn.Dense:
  return nn.Dense(features, precision='highest', name=name)


def _norm(name: str) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=_EPSILON, use_fast_variance=False, name=name)


class Block(nn.Module):
  """Attention, then a perceptron; each is scaled and added to its input.

  Attributes:
    heads: the number of attention heads.
  """

  heads: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    attention_scale = self.param('ls1', nn.initializers.ones, (width,))
    perceptron_scale = self.param('ls2', nn.initializers.ones, (width,))
    y = self._attend(_dense(3 * width, 'qkv')(_norm('norm1')(x)))
    y = _dense(width, 'proj')(y)
    x = x + attention_scale[None, None, :] * y
    y = _dense(4 * width, 'fc1')(_norm('norm2')(x))
    y = _dense(width, 'fc2')(nn.gelu(y, approximate=False))
    return x + perceptron_scale[None, None, :] * y

  def _attend(self, qkv: jax.Array) -> jax.Array:
    """Attends between all tokens: [B,N,3·width] to [B,N,width]."""
    batch, tokens, width = qkv.shape
    channels = width // (3 * self.heads)
    qkv = qkv.reshape(batch, tokens, 3, self.heads, channels)
    q, k, v = jnp.moveaxis(qkv, 2, 0)  # each [B,N,heads,channels]
    logits = jnp.einsum('bqhc,bkhc->bhqk', q, k, precision='highest')
    weights = jax.nn.softmax(logits * channels**-0.5)
    out = jnp.einsum('bhqk,bkhc->bqhc', weights, v, precision='highest')
    return out.reshape(batch, tokens, width // 3)


class DinoV2(nn.Module):
  """The network on its own input; the defaults are ViT-L/14's.

  Attributes:
    width: the number of features.
    depth: the number of blocks.
    heads: the number of attention heads in each block.
    patch: the height and width of a patch, in pixels.
  """

  width: int = WIDTH
  depth: int = 24
  heads: int = 16
  patch: int = 14

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the normed class token [B,width] of x [B,H,W,3].

    H and W are equal, and a multiple of `patch`.
    """
    batch = len(x)
    grid = x.shape[1] // self.patch
    x = nn.Conv(
      self.width,
      (self.patch, self.patch),
      (self.patch, self.patch),
      padding='VALID',
      precision='highest',
      name='patch_embed',
    )(x)
    init = nn.initializers.normal(0.02)
    token = self.param('cls_token', init, (1, 1, self.width))
    position = self.param('pos_embed', init, (1, 1 + _GRID**2, self.width))
    matrix = position_matrix(grid).astype(np.float32)
    table = position[0, 1:].reshape(_GRID, _GRID, self.width)
    table = jnp.einsum(
      'ih,jw,hwc->ijc', matrix, matrix, table, precision='highest'
    )
    x = x.reshape(batch, grid**2, self.width)
    x = x + table.reshape(1, grid**2, self.width)
    token = jnp.broadcast_to(token + position[:, :1], (batch, 1, self.width))
    x = jnp.concatenate([token, x], axis=1)
    for i in range(self.depth):
      x = Block(self.heads, name=f'blocks_{i}')(x)
    return _norm('norm')(x[:, 0])


VIT_L14 = DinoV2()


def preprocess(images: jax.Array) -> jax.Array:
  """Returns the network's input for raw images, as EDM2's evaluation does.

  Args:
    images: [B,H,W,3] uint8, or float32 in [0, 255].

  Returns:
    [B,224,224,3] float32, resized by the antialiased bicubic rule, neither
    rounded nor clipped, in units of ImageNet's standard deviations.

  Raises:
    UserError: the images have another shape or type.
  """
  x = resize.bicubic(resize.check_images(images), SIDE) / 255
  return (x - _MEAN[None, None, None]) / _SD[None, None, None]


def apply(params: Mapping[str, Any], images: jax.Array) -> jax.Array:
  """Returns the features [B,1024] float32 of raw images.

  The function is pure, and is to be jitted.

  Args:
    params: the weights, as `weights.dinov2.load` returns them.
    images: raw images; see `preprocess`.
  """
  return VIT_L14.apply({'params': params}, preprocess(images))


@functools.cache
def param_shapes(network: DinoV2 = VIT_L14) -> Any:
  """Returns the params as a tree of `jax.ShapeDtypeStruct`."""
  x = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
  return jax.eval_shape(network.init, jax.random.key(0), x)['params']
