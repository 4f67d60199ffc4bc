"""Handwritten digits pixel by pixel: DDO on a tiny raster GPT, on two cores.

python -m ddo_jax.main --config=configs/digits_raster.py \
  --workdir=runs/digits_raster

Devices: 1 with 1 GiB; two CPU cores do.

LlamaGen's transformer reads the 64 pixels of an image as tokens of 17 values,
so that no tokenizer is trained. The fakes are drawn in every step.
"""

from ddo_jax import config as config_lib
from ddo_jax.configs import digits_var
from ddo_jax.models import llamagen


def get_config() -> config_lib.Config:
  """Returns the recipe."""
  config = digits_var.get_config()
  config.name = 'digits_raster'
  config.model = llamagen.PixelGptConfig(
    image_shape=(8, 8, 1),
    pixel_values=17,
    num_classes=10,
    depth=2,
    width=48,
    heads=4,
    hidden=128,
  )
  config.pretrain.images = 3_000 * 64
  return config
