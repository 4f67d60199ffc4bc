r"""Fashion-MNIST, 14×14: a small U-Net by MLE and a round of DDO, on two cores.

python -m ddo_jax.main --config=configs/fashion_conv.py \
  --workdir=runs/fashion_conv

Devices: 1 with 1 GiB; two CPU cores do.

It is the convolutional sibling of fashion_small, for comparisons of many
methods (experiments/rivals): 18 thousand weights, and few steps of sampling.
"""

from ddo_jax import config as config_lib
from ddo_jax.configs import fashion_small
from ddo_jax.models import toy
from ddo_jax.samplers import heun


def get_config() -> config_lib.Config:
  """Returns the recipe."""
  config = fashion_small.get_config()
  config.name = 'fashion_conv'
  config.model = toy.ToyConfig(
    network='unet',
    hidden=8,
    blocks=1,
    image_shape=(14, 14, 1),
    sigma_data=0.664,
    pixel_values=256,
  )
  config.sampler = heun.Heun(num_steps=8, sigma_min=0.02, sigma_max=60.0)
  config.pretrain.images = 2_000 * 256
  config.pretrain.optimizer.decay_images = 1_000 * 256
  config.ddo.negatives.size = 5_000
  config.ddo.images = 100 * 256
  config.ddo.optimizer.warmup_images = 100 * 256
  config.ddo.averages.halflife = (5_000.0,)
  config.ddo.rhythm.eval_images = 10 * 256
  config.evaluation.selection_samples = 1_000
  config.evaluation.samples = 2_000
  return config
