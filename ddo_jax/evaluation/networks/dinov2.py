"""DINOv2's ViT-L/14, whose features FD-DINOv2 compares.

Oquab et al. 2023 (arXiv 2304.07193); Stein et al. 2023 (arXiv 2306.04675)
propose the distance, EDM2 reports it. Plain pre-norm transformer blocks with
a learnt scale on each branch. `convert.dinov2` brings the weights.
"""

from collections.abc import Mapping
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.evaluation.networks import resize

SIDE = 224  # pixels of the network's input
WIDTH = 1_024  # features
_GRID = 37  # patches a side that the position embedding was trained at
_OFFSET = 0.1  # that DINOv2 adds to the target before it divides by _GRID
_EPSILON = 1e-6
# ImageNet's, of images in [0, 1].
_MEAN = np.float32([0.485, 0.456, 0.406])
_SD = np.float32([0.229, 0.224, 0.225])


def position_matrix(grid: int) -> np.ndarray:
  """[grid, 37] float64: position embeddings for another number of patches."""
  scale = (grid + _OFFSET) / _GRID
  return resize.bicubic_point_matrix(_GRID, grid, scale)


def _dense(features: int, name: str) -> nn.Dense:
  return nn.Dense(features, precision='highest', name=name)


def _norm(name: str) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=_EPSILON, use_fast_variance=False, name=name)


class Block(nn.Module):
  """Attention, then a perceptron, each scaled and added: [B,N,width]."""

  heads: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    scales = [
      self.param(name, nn.initializers.ones, (width,))
      for name in ('ls1', 'ls2')
    ]
    y = self._attend(_dense(3 * width, 'qkv')(_norm('norm1')(x)))
    x = x + scales[0][None, None, :] * _dense(width, 'proj')(y)
    y = _dense(4 * width, 'fc1')(_norm('norm2')(x))
    y = _dense(width, 'fc2')(nn.gelu(y, approximate=False))
    return x + scales[1][None, None, :] * y

  def _attend(self, qkv: jax.Array) -> jax.Array:
    batch, tokens, width = qkv.shape
    shape = (batch, tokens, 3, self.heads, width // (3 * self.heads))
    q, k, v = jnp.moveaxis(qkv.reshape(shape), 2, 0)  # [B,N,heads,C]
    exact = {'precision': jax.lax.Precision.HIGHEST}
    logits = jnp.einsum('bqhc,bkhc->bhqk', q, k, **exact) * shape[-1] ** -0.5
    out = jnp.einsum('bhqk,bkhc->bqhc', jax.nn.softmax(logits), v, **exact)
    return out.reshape(batch, tokens, width // 3)


class DinoV2(nn.Module):
  """The network on its own input; the defaults are ViT-L/14's.

  Attributes:
    width: features.
    depth: blocks.
    heads: of attention, a block.
    patch: pixels a side.
  """

  width: int = WIDTH
  depth: int = 24
  heads: int = 16
  patch: int = 14

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """The normed class token [B,width] of [B,H,W,3], sides k·patch."""
    batch, grid = len(x), x.shape[1] // self.patch
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
    exact = {'precision': jax.lax.Precision.HIGHEST}
    table = jnp.einsum('ih,jw,hwc->ijc', matrix, matrix, table, **exact)
    x = x.reshape(batch, grid**2, self.width)
    x = x + table.reshape(1, grid**2, self.width)
    token = jnp.broadcast_to(token + position[:, :1], (batch, 1, self.width))
    x = jnp.concatenate([token, x], axis=1)
    for i in range(self.depth):
      x = Block(self.heads, name=f'blocks_{i}')(x)
    return _norm('norm')(x[:, 0])


VIT_L14 = DinoV2()


def preprocess(images: jax.Array) -> jax.Array:
  """The network's input for raw images, as EDM2's evaluation makes it.

  Args:
    images: [B,H,W,3] uint8, or float32 in [0, 255].

  Returns:
    [B,224,224,3] float32: antialiased bicubic, neither rounded nor clipped,
    in units of ImageNet's standard deviations.

  Raises:
    UserError: if the images have another shape or type.
  """
  x = resize.bicubic(resize.check_images(images), SIDE) / 255
  return (x - _MEAN[None, None, None]) / _SD[None, None, None]


def apply(params: Mapping[str, Any], images: jax.Array) -> jax.Array:
  """Features [B,1024] float32 of raw images; pure, to be jitted.

  Args:
    params: `convert.dinov2.load` returns them.
    images: see `preprocess`.
  """
  return VIT_L14.apply({'params': params}, preprocess(images))


@functools.cache
def param_shapes(network: DinoV2 = VIT_L14) -> Any:
  """The params as a tree of `jax.ShapeDtypeStruct`."""
  x = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
  return jax.eval_shape(network.init, jax.random.key(0), x)['params']
