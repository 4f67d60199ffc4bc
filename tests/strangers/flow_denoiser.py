"""A stranger's denoiser: a velocity network under flow matching.

python -m ddo_jax.main --config=tests/strangers/flow_denoiser.py \
  --workdir=runs/flow
"""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from ddo_jax import config as config_lib
from ddo_jax.data import codec
from ddo_jax.method import diffusion
from ddo_jax.method import likelihood
from ddo_jax.method import noise as noise_lib
from ddo_jax.models import precond
from tests.strangers import tiny


class Velocity(nn.Module):
  """A small MLP of a noisy image, its time and its class."""

  hidden: int
  num_classes: int

  @nn.compact
  def __call__(self, x: jax.Array, t: jax.Array, label: jax.Array) -> jax.Array:
    """x [B,H,W,C] on the straight path, t [B], label [B] -> velocity."""
    flat = x.reshape(len(x), -1)
    time = nn.Dense(self.hidden)(jnp.stack([t, t**2, jnp.sqrt(t)], axis=1))
    h = nn.Dense(self.hidden)(flat) + time
    h = h + nn.Embed(self.num_classes + 1, self.hidden)(label)
    h = nn.Dense(self.hidden)(nn.silu(h))
    return nn.Dense(flat.shape[1])(nn.silu(h)).reshape(x.shape)


# --- From here on, what the house asks for -----------------------------------


@dataclasses.dataclass
class FlowConfig(likelihood.ModelConfig):
  """A velocity network for small images.

  Attributes:
    hidden: the width of the network.
    image_shape: (H, W, C).
    num_classes: the number of classes.
    pixel_values: a pixel is one of 0 .. pixel_values − 1.
  """

  hidden: int = 16
  image_shape: tuple[int, int, int] = (8, 8, 1)
  num_classes: int = 10
  pixel_values: int = 17

  def build(
    self, noise: noise_lib.NoiseLaw | None = None, remat: bool = False
  ) -> diffusion.Diffusion:
    """Returns the model under the velocity's preconditioning and weight."""
    network = Velocity(self.hidden, self.num_classes)
    return diffusion.Diffusion(
      denoiser=precond.FlowPrecond(network),
      example_shape=tuple(self.image_shape),
      num_classes=self.num_classes,
      weight=noise_lib.VelocityWeight(),
      codec=codec.Pixels(self.pixel_values),
      noise=noise,
    )


def get_config() -> config_lib.Config:
  """Returns the recipe."""
  config = tiny.get_config()
  config.name = 'flow'
  config.model = FlowConfig()
  config.pretrain.noise = noise_lib.UniformTime()
  config.ddo.noise = noise_lib.UniformTime()
  return config
