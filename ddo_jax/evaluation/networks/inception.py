"""The InceptionV3 of 2015-12-05 that FID, sFID and the Inception Score use.

This is the network of Szegedy et al. 2015 (arXiv 1512.00567) as TensorFlow's
model archive froze it, which differs from the one in today's model zoos. It has
94 convolutions without bias, each followed by batch normalisation (ε = 1e-3)
and ReLU, 1,008 outputs, average pools that leave padding out of the mean, and a
max pool in the last block. Modules carry the names that PyTorch's copies use;
`weights.inception` reads the published weights.
"""

from collections.abc import Mapping
import functools
from typing import Any
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from ddo_jax.evaluation.networks import resize

SIDE = 299  # height and width of the network's input, in pixels
CLASSES = 1_008
_SPATIAL = 7  # channels of Mixed_6d's first branch that sFID takes
_EPSILON = 1e-3


class Taps(NamedTuple):
  """The outputs of the network, all float32.

  Under `jax.jit` an output that is not returned is not computed.

  Attributes:
    pool_1: [B, 64] spatial means after the first max pool.
    pool_2: [B, 192] spatial means after the second max pool.
    mixed_6e: [B, 768] spatial means of the last block at 17×17.
    features: [B, 2048] spatial means of the last block, which FID, KID,
      precision and recall compare.
    spatial: [B, 2023] Mixed_6d's 1×1 branch after ReLU, 17×17×7 in the order
      height, width, channel, which sFID compares (Nash et al. 2021, arXiv
      2103.03841).
    logits_unbiased: [B, 1008] without the last layer's bias, for the Inception
      Score.
    logits: [B, 1008].
  """

  pool_1: jax.Array
  pool_2: jax.Array
  mixed_6e: jax.Array
  features: jax.Array
  spatial: jax.Array
  logits_unbiased: jax.Array
  logits: jax.Array


class ConvNorm(nn.Module):
  """A convolution, batch normalisation with fixed statistics, and ReLU."""

  features: int
  kernel: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: str = 'SAME'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (*self.kernel, x.shape[-1], self.features)
    kernel = self.param('kernel', nn.initializers.he_normal(), shape)
    width = (self.features,)
    scale = self.param('scale', nn.initializers.ones, width)
    bias = self.param('bias', nn.initializers.zeros, width)
    mean = self.param('mean', nn.initializers.zeros, width)
    variance = self.param('var', nn.initializers.ones, width)
    # The normalisation is linear, so it goes into the kernel at no cost.
    scale = scale * jax.lax.rsqrt(variance + _EPSILON)
    x = jax.lax.conv_general_dilated(
      x,
      kernel * scale[None, None, None, :],
      (self.stride, self.stride),
      self.padding,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      precision=jax.lax.Precision.HIGHEST,
    )
    return nn.relu(x + (bias - mean * scale)[None, None, None, :])


def _conv(
  name: str,
  features: int,
  kernel: tuple[int, int] = (1, 1),
  padding: str = 'SAME',
) -> ConvNorm:
  return ConvNorm(features, kernel, padding=padding, name=name)


def _halve(name: str, features: int) -> ConvNorm:
  return ConvNorm(features, (3, 3), stride=2, padding='VALID', name=name)


def _max_pool(x: jax.Array) -> jax.Array:
  return nn.max_pool(x, (3, 3), (2, 2), 'VALID')


def _average_pool(x: jax.Array) -> jax.Array:
  return nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)


def _join(branches: list[jax.Array]) -> jax.Array:
  return jnp.concatenate(branches, axis=-1)


def _spatial_mean(x: jax.Array) -> jax.Array:
  return x.mean(axis=(1, 2))


class BlockA(nn.Module):
  """A block at 35×35: Mixed_5b, 5c and 5d."""

  pool_features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    one = _conv('branch1x1', 64)(x)
    five = _conv('branch5x5_1', 48)(x)
    five = _conv('branch5x5_2', 64, (5, 5))(five)
    double = _conv('branch3x3dbl_1', 64)(x)
    double = _conv('branch3x3dbl_2', 96, (3, 3))(double)
    double = _conv('branch3x3dbl_3', 96, (3, 3))(double)
    pool = _conv('branch_pool', self.pool_features)(_average_pool(x))
    return _join([one, five, double, pool])


class BlockB(nn.Module):
  """The block from 35×35 to 17×17: Mixed_6a."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    three = _halve('branch3x3', 384)(x)
    double = _conv('branch3x3dbl_1', 64)(x)
    double = _conv('branch3x3dbl_2', 96, (3, 3))(double)
    double = _halve('branch3x3dbl_3', 96)(double)
    return _join([three, double, _max_pool(x)])


class BlockC(nn.Module):
  """A block at 17×17: Mixed_6b to 6e.

  It returns its output and its 1×1 branch.
  """

  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    one = _conv('branch1x1', 192)(x)
    seven = _conv('branch7x7_1', self.width)(x)
    seven = _conv('branch7x7_2', self.width, (1, 7))(seven)
    seven = _conv('branch7x7_3', 192, (7, 1))(seven)
    double = _conv('branch7x7dbl_1', self.width)(x)
    double = _conv('branch7x7dbl_2', self.width, (7, 1))(double)
    double = _conv('branch7x7dbl_3', self.width, (1, 7))(double)
    double = _conv('branch7x7dbl_4', self.width, (7, 1))(double)
    double = _conv('branch7x7dbl_5', 192, (1, 7))(double)
    pool = _conv('branch_pool', 192)(_average_pool(x))
    return _join([one, seven, double, pool]), one


class BlockD(nn.Module):
  """The block from 17×17 to 8×8: Mixed_7a."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    three = _conv('branch3x3_1', 192)(x)
    three = _halve('branch3x3_2', 320)(three)
    seven = _conv('branch7x7x3_1', 192)(x)
    seven = _conv('branch7x7x3_2', 192, (1, 7))(seven)
    seven = _conv('branch7x7x3_3', 192, (7, 1))(seven)
    seven = _halve('branch7x7x3_4', 192)(seven)
    return _join([three, seven, _max_pool(x)])


class BlockE(nn.Module):
  """A block at 8×8: Mixed_7b, which pools by the mean, and Mixed_7c.

  Attributes:
    max_pool: whether it pools by the maximum, as Mixed_7c does.
  """

  max_pool: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    one = _conv('branch1x1', 320)(x)
    three = _conv('branch3x3_1', 384)(x)
    three_a = _conv('branch3x3_2a', 384, (1, 3))(three)
    three_b = _conv('branch3x3_2b', 384, (3, 1))(three)
    double = _conv('branch3x3dbl_1', 448)(x)
    double = _conv('branch3x3dbl_2', 384, (3, 3))(double)
    double_a = _conv('branch3x3dbl_3a', 384, (1, 3))(double)
    double_b = _conv('branch3x3dbl_3b', 384, (3, 1))(double)
    if self.max_pool:  # a slip of the graph, which every FID since contains
      pool = nn.max_pool(x, window_shape=(3, 3), padding='SAME')
    else:
      pool = _average_pool(x)
    pool = _conv('branch_pool', 192)(pool)
    return _join([one, three_a, three_b, double_a, double_b, pool])


class Inception(nn.Module):
  """The network on its own input: [B,299,299,3] float32 in [-1, 1]."""

  @nn.compact
  def __call__(self, x: jax.Array) -> Taps:
    x = _halve('Conv2d_1a_3x3', 32)(x)
    x = _conv('Conv2d_2a_3x3', 32, (3, 3), padding='VALID')(x)
    x = _conv('Conv2d_2b_3x3', 64, (3, 3))(x)
    pool_1 = _max_pool(x)
    x = _conv('Conv2d_3b_1x1', 80)(pool_1)
    x = _conv('Conv2d_4a_3x3', 192, (3, 3), padding='VALID')(x)
    pool_2 = _max_pool(x)
    x = pool_2
    for name, width in (('5b', 32), ('5c', 64), ('5d', 64)):
      x = BlockA(width, name=f'Mixed_{name}')(x)
    x = BlockB(name='Mixed_6a')(x)
    for name, width in (('6b', 128), ('6c', 160), ('6d', 160), ('6e', 192)):
      x, one = BlockC(width, name=f'Mixed_{name}')(x)
      if name == '6d':
        spatial = one[..., :_SPATIAL].reshape(len(one), -1)
    mixed_6e = x
    x = BlockD(name='Mixed_7a')(x)
    x = BlockE(False, name='Mixed_7b')(x)
    x = BlockE(True, name='Mixed_7c')(x)
    features = _spatial_mean(x)
    unbiased = nn.Dense(
      CLASSES, use_bias=False, precision='highest', name='fc'
    )(features)
    bias = self.param('fc_bias', nn.initializers.zeros, (CLASSES,))
    return Taps(
      pool_1=_spatial_mean(pool_1),
      pool_2=_spatial_mean(pool_2),
      mixed_6e=_spatial_mean(mixed_6e),
      features=features,
      spatial=spatial,
      logits_unbiased=unbiased,
      logits=unbiased + bias[None, :],
    )


def preprocess(images: jax.Array, rule: resize.Bilinear = 'tf1') -> jax.Array:
  """Returns the network's input for raw images.

  Args:
    images: [B,H,W,3] uint8, or float32 in [0, 255].
    rule: 'tf1' resizes as TensorFlow 1 and takes (x - 128)/128; 'half_pixel'
      resizes as pytorch-fid and takes 2·x/255 - 1.

  Returns:
    [B,299,299,3] float32.

  Raises:
    UserError: the images have another shape or type.
  """
  x = resize.check_images(images)
  if rule == 'half_pixel':
    return 2 * resize.bilinear(x / 255, SIDE, rule) - 1
  return (resize.bilinear(x, SIDE, rule) - 128) / 128


def apply(
  params: Mapping[str, Any], images: jax.Array, rule: resize.Bilinear = 'tf1'
) -> Taps:
  """Returns all taps of raw images.

  The function is pure, and is to be jitted with `rule` static.

  Args:
    params: the weights, as `weights.inception.load` returns them.
    images: raw images; see `preprocess`.
    rule: how they are resized; see `preprocess`. The published statistics of
      EDM, EDM2, torch-fidelity and OpenAI are made with 'tf1'.
  """
  return Inception().apply({'params': params}, preprocess(images, rule))


@functools.cache
def param_shapes() -> Any:
  """Returns the params as a tree of `jax.ShapeDtypeStruct`."""
  x = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
  return jax.eval_shape(Inception().init, jax.random.key(0), x)['params']
