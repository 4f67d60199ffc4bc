"""Small networks that tell real rows from drawn ones.

See `method.discriminator` for what they learn. They are networks of their own.
The published discriminator stands on a frozen classifier, and others on the
denoiser's own encoder; but a denoiser gives the method D(x; σ) and nothing from
inside of it, and a gradient through the whole of it would make a step of
sampling three times as long.
"""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.method import discriminator
from ddo_jax.method import likelihood
from ddo_jax.method import noise as noise_lib
from ddo_jax.models import toy

_KINDS = ('auto', 'mlp', 'conv')


@dataclasses.dataclass
class DiscriminatorConfig:
  """The size of a discriminator.

  Attributes:
    network: 'mlp', which sees an image as one vector; 'conv', which has
      convolutions; or 'auto', which is 'conv' where the denoiser has any.
    hidden: the width of the MLP, or of the convolutions at full resolution,
      there a multiple of 8.
    blocks: the number of residual blocks of the MLP, or of the convolutions at
      each of two resolutions.
  """

  network: str = 'auto'
  hidden: int = 64
  blocks: int = 2

  def check(self, name: str) -> None:
    """Raises UserError, naming the field, where a value makes no sense."""
    errors.require_choice(f'{name}.network', self.network, _KINDS)
    errors.require_integer(f'{name}.hidden', self.hidden, 1)
    errors.require_integer(f'{name}.blocks', self.blocks, 0)

  def beside(
    self,
    model: likelihood.LikelihoodModel,
    noise: noise_lib.NoiseLaw | None = None,
  ) -> discriminator.Discriminator:
    """Returns the discriminator of a denoiser's samples.

    Args:
      model: the denoiser.
      noise: the law of σ that it is trained under; None where it only guides.

    Raises:
      errors.UserError: the width does not fit the convolutions, or the model
        is no denoiser.
    """
    if 'denoise' not in model.offers:
      raise errors.UserError(
        'a discriminator corrects denoisers, and config.model draws tokens:'
        ' take rounds of DDO, and leave out config.discriminator_from'
      )
    kind = self.network
    if kind == 'auto':
      kind = 'conv' if _has_convolutions(model) else 'mlp'
    errors.require(
      kind == 'mlp' or self.hidden % toy.GROUPS == 0,
      'discriminator_network.hidden',
      self.hidden,
      f'a multiple of {toy.GROUPS} for convolutions, the groups of their norms',
    )
    height, width, channels = model.example_shape
    networks = {'mlp': VectorNetwork, 'conv': ImageNetwork}
    return discriminator.Discriminator(
      network=networks[kind](self.hidden, self.blocks, model.num_classes),
      example_shape=(height, width, channels),
      num_classes=model.num_classes,
      codec=model.codec,
      noise=noise,
    )


def _has_convolutions(model: likelihood.LikelihoodModel) -> bool:
  """Whether some weights of a model are kernels of more than one pixel."""
  shapes = jax.eval_shape(model.init, rng.stream(0))
  kernels = [leaf.shape for leaf in jax.tree.leaves(shapes) if leaf.ndim == 4]
  return any(max(shape[:2]) > 1 for shape in kernels)


def _scaled(x: jax.Array, sigma: jax.Array) -> jax.Array:
  """Returns noisy rows [B,H,W,C], of data in [−1, 1], at about unit size."""
  return x / jnp.sqrt(1 + sigma**2)[:, None, None, None]


def _logit(features: jax.Array) -> jax.Array:
  """Returns [B] of features [B,F]; 0 until it is trained."""
  return nn.Dense(1, kernel_init=nn.initializers.zeros)(features)[:, 0]


class VectorNetwork(nn.Module):
  """A residual MLP; noise level and label scale and shift its norms.

  Attributes:
    hidden: the width of every layer.
    blocks: the number of residual blocks.
    num_classes: the number of classes.
  """

  hidden: int
  blocks: int
  num_classes: int

  @nn.compact
  def __call__(
    self, x: jax.Array, sigma: jax.Array, label: jax.Array
  ) -> jax.Array:
    """Returns the logit [B] of x [B,H,W,C], sigma [B] and label [B]."""
    condition = toy.Condition(self.hidden, self.num_classes)(
      jnp.log(sigma) / 4, label
    )
    x = _scaled(x, sigma)
    h = nn.Dense(self.hidden)(x.reshape(x.shape[0], -1))
    for _ in range(self.blocks):
      h = toy.residual(h, condition, nn.initializers.lecun_normal())
    return _logit(nn.silu(nn.LayerNorm()(h)))


class ImageNetwork(nn.Module):
  """Residual convolutions at two resolutions, and the mean over all pixels.

  Attributes:
    hidden: the width at full resolution, a multiple of 8; it is doubled at the
      lower one.
    blocks: the number of residual blocks at each resolution.
    num_classes: the number of classes.
  """

  hidden: int
  blocks: int
  num_classes: int

  @nn.compact
  def __call__(
    self, x: jax.Array, sigma: jax.Array, label: jax.Array
  ) -> jax.Array:
    """Returns the logit [B] of x [B,H,W,C], sigma [B] and label [B]."""
    condition = toy.Condition(4 * self.hidden, self.num_classes)(
      jnp.log(sigma) / 4, label
    )
    h = nn.Conv(self.hidden, (3, 3))(_scaled(x, sigma))
    for _ in range(self.blocks):
      h = toy.ConvBlock(self.hidden)(h, condition)
    h = nn.Conv(2 * self.hidden, (2, 2), strides=(2, 2))(h)
    for _ in range(self.blocks):
      h = toy.ConvBlock(2 * self.hidden)(h, condition)
    h = nn.GroupNorm(toy.GROUPS, epsilon=1e-5, use_fast_variance=False)(h)
    return _logit(jnp.mean(nn.silu(h), axis=(1, 2)))
