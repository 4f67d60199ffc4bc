"""A recipe of a small model of latents, whose autoencoder is small, too."""

import dataclasses
from typing import Any

from ddo_jax import config as config_lib
from ddo_jax.data import codec
from ddo_jax.method import diffusion
from ddo_jax.models import toy
from ddo_jax.models import vae
from tests.strangers import tiny

AUTOENCODER = vae.AutoencoderKL((4, 4), 0, 4, 2)  # halves an image's sides


@dataclasses.dataclass
class LatentConfig(toy.ToyConfig):
  """A toy denoiser of latents, see `ToyConfig`.

  Attributes:
    signed: see `codec.Latents`.
  """

  signed: bool = True

  def build(self, noise: Any = None, remat: Any = False) -> diffusion.Diffusion:
    """Returns the model under the codec of latents."""
    model = super().build(noise, remat)
    latents = codec.Latents(
      AUTOENCODER,
      mean=(0.0,) * 4,
      std=(1.0,) * 4,
      nearest=True,
      signed=self.signed,
    )
    return model.replace(codec=latents)


def get_config() -> config_lib.Config:
  """Returns the recipe."""
  config = tiny.get_config()
  config.name = 'tiny_latents'
  config.model = LatentConfig(
    hidden=8, image_shape=(4, 4, 4), num_classes=3, pixel_values=256
  )
  return config
