"""Small denoisers for small images: a residual MLP and a small U-Net."""

from collections.abc import Callable
import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from ddo_jax import errors
from ddo_jax import precision as precision_lib
from ddo_jax import settings
from ddo_jax.data import codec
from ddo_jax.method import diffusion
from ddo_jax.method import likelihood
from ddo_jax.method import noise as noise_lib
from ddo_jax.models import layers
from ddo_jax.models import precond

GROUPS = 8  # of the U-Net's norms


@dataclasses.dataclass
class ToyConfig(likelihood.ModelConfig):
  """A denoiser that trains in seconds.

  Attributes:
    network: 'mlp', which sees an image as one vector, or 'unet', which has
      convolutions.
    hidden: the width of the MLP, or of the U-Net at full resolution.
    blocks: the number of residual blocks of the MLP, or of the U-Net at each
      resolution.
    image_shape: the shape (H, W, C) of the data. The U-Net halves H and W once.
    num_classes: the number of classes; 0 for an unconditional model.
    sigma_data: σ_d, the standard deviation of the data in [−1, 1] units.
    pixel_values: the number of values of a pixel, 0 … pixel_values−1.
    precision: that of the network's products in training, 'highest', 'high' or
      'default'; see `precision`.
  """

  network: str = 'mlp'
  hidden: int = 64
  blocks: int = settings.at_most(64, 2)
  image_shape: tuple[int, int, int] = settings.at_most(4096, (8, 8, 1))
  num_classes: int = 10
  sigma_data: float = 0.752
  pixel_values: int = 17
  precision: str = 'highest'

  def build(
    self, noise: noise_lib.NoiseLaw | None = None, remat: bool | str = False
  ) -> diffusion.Diffusion:
    """Returns the model under EDM's preconditioning and weight.

    The MLP keeps so little for its backward pass that `remat` leaves it alone.

    Raises:
      errors.UserError: the network is unknown, or does not fit the image.
    """
    networks: dict[str, Callable[..., nn.Module]] = {
      'mlp': ResidualMLP,
      'unet': functools.partial(SmallUNet, remat=remat),
    }
    errors.require_choice('model.network', self.network, networks)
    precision_lib.check('model.precision', self.precision)
    height, width, _ = self.image_shape
    errors.require(
      self.network == 'mlp' or (height % 2 == 0 and width % 2 == 0),
      'model.image_shape',
      self.image_shape,
      'of even height and width for the U-Net (pad with config.data.pad_to)',
    )
    errors.require(
      self.network == 'mlp' or self.hidden % GROUPS == 0,
      'model.hidden',
      self.hidden,
      f'a multiple of {GROUPS} for the U-Net, the groups of its norms',
    )
    network = networks[self.network](self.hidden, self.blocks, self.num_classes)
    return diffusion.Diffusion(
      denoiser=precond.EdmPrecond(network, self.sigma_data),
      example_shape=self.image_shape,
      num_classes=self.num_classes,
      weight=noise_lib.EdmWeight(self.sigma_data),
      codec=codec.Pixels(self.pixel_values),
      noise=noise,
      precision=self.precision,
    )


class Condition(nn.Module):
  """Embeds the noise level and the label as one vector.

  Attributes:
    features: the width of the embedding.
    num_classes: the number of classes.
  """

  features: int
  num_classes: int

  @nn.compact
  def __call__(self, c_noise: jax.Array, label: jax.Array) -> jax.Array:
    """Embeds c_noise [B] and label [B] as [B, features]."""
    h = layers.FourierEmbedding(32)(c_noise)
    h = nn.Dense(self.features)(nn.silu(nn.Dense(self.features)(h)))
    # There is one row more than classes; the last means "no label".
    return nn.silu(h + nn.Embed(self.num_classes + 1, self.features)(label))


def residual(
  h: jax.Array, condition: jax.Array, last_init: nn.initializers.Initializer
) -> jax.Array:
  """Adds a residual block to h; condition scales and shifts its norm.

  It is called inside a compact module, whose layers its layers become.

  Args:
    h: [B,F].
    condition: [B,E].
    last_init: of the block's last layer; zeros leave h as it is at first.
  """
  width = h.shape[-1]
  scale, shift = jnp.split(nn.Dense(2 * width)(condition), 2, -1)
  y = nn.LayerNorm(use_bias=False, use_scale=False)(h)
  y = nn.silu(nn.Dense(width)(y * (1 + scale) + shift))
  return h + nn.Dense(width, kernel_init=last_init)(y)


class ResidualMLP(nn.Module):
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
    self, x: jax.Array, c_noise: jax.Array, label: jax.Array
  ) -> jax.Array:
    """Returns F [B,H,W,C] of x [B,H,W,C], c_noise [B] and label [B]."""
    condition = Condition(self.hidden, self.num_classes)(c_noise, label)
    flat = x.reshape(x.shape[0], -1)
    h = nn.Dense(self.hidden)(flat)
    for _ in range(self.blocks):
      h = residual(h, condition, nn.initializers.zeros)
    h = nn.LayerNorm()(h)
    out = nn.Dense(flat.shape[1], kernel_init=nn.initializers.zeros)(h)
    return out.reshape(x.shape)


class ConvBlock(nn.Module):
  """A residual block of two 3×3 convolutions; the condition is added to it.

  Attributes:
    channels: the width of the output.
  """

  channels: int

  @nn.compact
  def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
    """Returns [B,H,W,channels] of x [B,H,W,C] and condition [B,E]."""
    # The fast variance loses all its digits where the mean is large.
    norm = functools.partial(
      nn.GroupNorm, GROUPS, epsilon=1e-5, use_fast_variance=False
    )
    zeros = nn.initializers.zeros
    h = nn.silu(norm()(x))
    h = nn.Conv(self.channels, (3, 3))(h)
    h = h + nn.Dense(self.channels)(condition)[:, None, None, :]
    h = nn.silu(norm()(h))
    h = nn.Conv(self.channels, (3, 3), kernel_init=zeros)(h)
    if x.shape[-1] != self.channels:
      x = nn.Conv(self.channels, (1, 1))(x)
    return x + h


class SmallUNet(nn.Module):
  """A U-Net of two resolutions.

  Attributes:
    hidden: the width at full resolution, a multiple of 8; it is doubled at the
      lower one.
    blocks: the number of residual blocks at full resolution, on each side.
    num_classes: the number of classes.
    remat: which activations inside each block are recomputed in the backward
      pass, see `layers.remat_policy`; False for none.
  """

  hidden: int
  blocks: int
  num_classes: int
  remat: bool | str = False

  @nn.compact
  def __call__(
    self, x: jax.Array, c_noise: jax.Array, label: jax.Array
  ) -> jax.Array:
    """Returns F [B,H,W,C] of x [B,H,W,C], c_noise [B] and label [B].

    H and W must be even.
    """
    condition = Condition(4 * self.hidden, self.num_classes)(c_noise, label)

    def apply(block, h):
      return block(h, condition)

    apply = layers.checkpointed(apply, self.remat)
    h = nn.Conv(self.hidden, (3, 3))(x)
    skips = []
    for _ in range(self.blocks):
      h = apply(ConvBlock(self.hidden), h)
      skips.append(h)
    h = nn.Conv(2 * self.hidden, (2, 2), strides=(2, 2))(h)
    for _ in range(2 * self.blocks):
      h = apply(ConvBlock(2 * self.hidden), h)
    h = nn.ConvTranspose(self.hidden, (2, 2), strides=(2, 2))(h)
    while skips:
      h = jnp.concatenate([h, skips.pop()], axis=-1)
      h = apply(ConvBlock(self.hidden), h)
    return nn.Conv(x.shape[-1], (3, 3), kernel_init=nn.initializers.zeros)(h)
