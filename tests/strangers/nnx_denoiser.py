"""A stranger's denoiser written in Flax NNX.

python -m ddo_jax.main --config=tests/strangers/nnx_denoiser.py \
  --workdir=runs/nnx
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from ddo_jax import config as config_lib
from ddo_jax.data import codec
from ddo_jax.method import diffusion
from ddo_jax.method import likelihood
from ddo_jax.method import noise as noise_lib
from ddo_jax.models import nnx_module
from tests.strangers import tiny

SIGMA_DATA = 0.75


class Denoiser(nnx.Module):
  """A small MLP under EDM's preconditioning."""

  def __init__(self, size: int, hidden: int, classes: int, rngs: nnx.Rngs):
    self.label = nnx.Embed(classes + 1, hidden, rngs=rngs)
    self.noise = nnx.Linear(1, hidden, rngs=rngs)
    self.first = nnx.Linear(size, hidden, rngs=rngs)
    self.second = nnx.Linear(hidden, size, rngs=rngs)

  def __call__(
    self, x: jax.Array, sigma: jax.Array, label: jax.Array
  ) -> jax.Array:
    """x [B,H,W,C], sigma [B], label [B] -> D."""
    total = sigma**2 + SIGMA_DATA**2
    flat = x.reshape(len(x), -1)
    h = self.first(flat / jnp.sqrt(total)[:, None]) + self.label(label)
    h = nnx.silu(h + self.noise(jnp.log(sigma)[:, None] / 4))
    out = (sigma * SIGMA_DATA / jnp.sqrt(total))[:, None] * self.second(h)
    return ((SIGMA_DATA**2 / total)[:, None] * flat + out).reshape(x.shape)


@dataclasses.dataclass
class NnxConfig(likelihood.ModelConfig):
  """The denoiser for the digits."""

  hidden: int = 16

  def build(
    self, noise: noise_lib.NoiseLaw | None = None, remat: bool = False
  ) -> diffusion.Diffusion:
    """Returns the model."""
    return diffusion.Diffusion(
      denoiser=nnx_module.NnxModule(Denoiser, (64, self.hidden, 10)),
      example_shape=(8, 8, 1),
      num_classes=10,
      weight=noise_lib.EdmWeight(SIGMA_DATA),
      codec=codec.Pixels(17),
      noise=noise,
    )


def get_config() -> config_lib.Config:
  """Returns the recipe."""
  config = tiny.get_config()
  config.name = 'nnx'
  config.model = NnxConfig()
  return config
