"""The InceptionV3 of 2015-12-05 that FID, sFID and the Inception Score mean.

Szegedy et al. 2015 (arXiv 1512.00567) as TensorFlow's model archive froze it:
not the network of today's model zoos. 94 convolutions without bias, each with
batch normalisation (ε 1e-3) and ReLU; 1,008 outputs; average pools that leave
padding out of the mean; a max pool in the last block. Modules carry PyTorch's
names for it; `convert.inception` brings the weights.
"""

from collections.abc import Mapping
import functools
from typing import Any
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from ddo_jax.evaluation.networks import resize

SIDE = 299  # pixels of the network's input
CLASSES = 1_008
_SPATIAL = 7  # channels of Mixed_6d's first branch that sFID takes
_EPSILON = 1e-3


class Taps(NamedTuple):
  """What the network says of images; all float32.

  Under `jax.jit` what is not returned is not computed.

  Attributes:
    pool_1: [B, 64] spatial means after the first max pool.
    pool_2: [B, 192] after the second.
    mixed_6e: [B, 768] of the last block at 17×17.
    features: [B, 2048] of the last block: FID, KID, precision and recall.
    spatial: [B, 2023] Mixed_6d's 1×1 branch after ReLU, 17×17×7 in the order
      height, width, channel: sFID (Nash et al. 2021, arXiv 2103.03841).
    logits_unbiased: [B, 1008] without the last layer's bias: Inception Score.
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
  """Convolution, batch normalisation with fixed statistics, ReLU."""

  features: int
  kernel: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: str = 'SAME'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (*self.kernel, x.shape[-1], self.features)
    kernel = self.param('kernel', nn.initializers.he_normal(), shape)
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    width = (self.features,)
    scale = self.param('scale', ones, width)
    bias = self.param('bias', zeros, width)
    mean = self.param('mean', zeros, width)
    variance = self.param('var', ones, width)
    # The normalisation is linear: it goes into the kernel, at no cost.
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


def _conv(name: str, features: int, *kernel: int, **options: Any) -> ConvNorm:
  return ConvNorm(features, kernel or (1, 1), name=name, **options)


def _halve(name: str, features: int) -> ConvNorm:
  return _conv(name, features, 3, 3, stride=2, padding='VALID')


def _max_pool(x: jax.Array) -> jax.Array:
  return nn.max_pool(x, (3, 3), (2, 2), 'VALID')


def _average_pool(x: jax.Array) -> jax.Array:
  return nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)


def _join(*branches: jax.Array) -> jax.Array:
  return jnp.concatenate(branches, axis=-1)


class BlockA(nn.Module):
  """35×35: Mixed_5b, 5c, 5d."""

  pool_features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    one = _conv('branch1x1', 64)(x)
    five = _conv('branch5x5_1', 48)(x)
    five = _conv('branch5x5_2', 64, 5, 5)(five)
    double = _conv('branch3x3dbl_1', 64)(x)
    double = _conv('branch3x3dbl_2', 96, 3, 3)(double)
    double = _conv('branch3x3dbl_3', 96, 3, 3)(double)
    pool = _conv('branch_pool', self.pool_features)(_average_pool(x))
    return _join(one, five, double, pool)


class BlockB(nn.Module):
  """35×35 to 17×17: Mixed_6a."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    three = _halve('branch3x3', 384)(x)
    double = _conv('branch3x3dbl_1', 64)(x)
    double = _conv('branch3x3dbl_2', 96, 3, 3)(double)
    double = _halve('branch3x3dbl_3', 96)(double)
    return _join(three, double, _max_pool(x))


class BlockC(nn.Module):
  """17×17: Mixed_6b to 6e. Returns the block's output and its 1×1 branch."""

  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    one = _conv('branch1x1', 192)(x)
    seven = _conv('branch7x7_1', self.width)(x)
    seven = _conv('branch7x7_2', self.width, 1, 7)(seven)
    seven = _conv('branch7x7_3', 192, 7, 1)(seven)
    double = _conv('branch7x7dbl_1', self.width)(x)
    double = _conv('branch7x7dbl_2', self.width, 7, 1)(double)
    double = _conv('branch7x7dbl_3', self.width, 1, 7)(double)
    double = _conv('branch7x7dbl_4', self.width, 7, 1)(double)
    double = _conv('branch7x7dbl_5', 192, 1, 7)(double)
    pool = _conv('branch_pool', 192)(_average_pool(x))
    return _join(one, seven, double, pool), one


class BlockD(nn.Module):
  """17×17 to 8×8: Mixed_7a."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    three = _conv('branch3x3_1', 192)(x)
    three = _halve('branch3x3_2', 320)(three)
    seven = _conv('branch7x7x3_1', 192)(x)
    seven = _conv('branch7x7x3_2', 192, 1, 7)(seven)
    seven = _conv('branch7x7x3_3', 192, 7, 1)(seven)
    seven = _halve('branch7x7x3_4', 192)(seven)
    return _join(three, seven, _max_pool(x))


class BlockE(nn.Module):
  """8×8: Mixed_7b, whose pool is a mean, and 7c, whose pool is a maximum."""

  max_pool: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    one = _conv('branch1x1', 320)(x)
    three = _conv('branch3x3_1', 384)(x)
    three_a = _conv('branch3x3_2a', 384, 1, 3)(three)
    three_b = _conv('branch3x3_2b', 384, 3, 1)(three)
    double = _conv('branch3x3dbl_1', 448)(x)
    double = _conv('branch3x3dbl_2', 384, 3, 3)(double)
    double_a = _conv('branch3x3dbl_3a', 384, 1, 3)(double)
    double_b = _conv('branch3x3dbl_3b', 384, 3, 1)(double)
    # The graph's own slip, which every FID since contains.
    same = functools.partial(nn.max_pool, window_shape=(3, 3), padding='SAME')
    pool = same(x) if self.max_pool else _average_pool(x)
    pool = _conv('branch_pool', 192)(pool)
    return _join(one, three_a, three_b, double_a, double_b, pool)


class Inception(nn.Module):
  """The network on its own input: [B,299,299,3] float32 in [-1, 1]."""

  @nn.compact
  def __call__(self, x: jax.Array) -> Taps:
    mean = lambda x: x.mean(axis=(1, 2))
    x = _halve('Conv2d_1a_3x3', 32)(x)
    x = _conv('Conv2d_2a_3x3', 32, 3, 3, padding='VALID')(x)
    x = pool_1 = _max_pool(_conv('Conv2d_2b_3x3', 64, 3, 3)(x))
    x = _conv('Conv2d_3b_1x1', 80)(x)
    x = _conv('Conv2d_4a_3x3', 192, 3, 3, padding='VALID')(x)
    x = pool_2 = _max_pool(x)
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
    features = mean(x)
    unbiased = nn.Dense(
      CLASSES, use_bias=False, precision='highest', name='fc'
    )(features)
    bias = self.param('fc_bias', nn.initializers.zeros, (CLASSES,))
    return Taps(
      pool_1=mean(pool_1),
      pool_2=mean(pool_2),
      mixed_6e=mean(mixed_6e),
      features=features,
      spatial=spatial,
      logits_unbiased=unbiased,
      logits=unbiased + bias[None, :],
    )


def preprocess(images: jax.Array, rule: resize.Bilinear = 'tf1') -> jax.Array:
  """The network's input for raw images.

  Args:
    images: [B,H,W,3] uint8, or float32 in [0, 255].
    rule: 'tf1' resizes as TensorFlow 1 and takes (x - 128)/128; 'half_pixel'
      resizes as pytorch-fid and takes 2·x/255 - 1.

  Returns:
    [B,299,299,3] float32.

  Raises:
    UserError: if the images have another shape or type.
  """
  x = resize.check_images(images)
  if rule == 'half_pixel':
    return 2 * resize.bilinear(x / 255, SIDE, rule) - 1
  return (resize.bilinear(x, SIDE, rule) - 128) / 128


def apply(
  params: Mapping[str, Any], images: jax.Array, rule: resize.Bilinear = 'tf1'
) -> Taps:
  """All taps of raw images; pure, to be jitted with `rule` static.

  Args:
    params: `convert.inception.load` returns them.
    images: see `preprocess`.
    rule: see `preprocess`; 'tf1' is what EDM, EDM2, torch-fidelity and OpenAI's
      references are made with.
  """
  return Inception().apply({'params': params}, preprocess(images, rule))


@functools.cache
def param_shapes() -> Any:
  """The params as a tree of `jax.ShapeDtypeStruct`."""
  x = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
  return jax.eval_shape(Inception().init, jax.random.key(0), x)['params']
