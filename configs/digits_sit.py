"""Handwritten digits by a small transformer under flow matching, and DDO on it.

python -m ddo_jax.main --config=configs/digits_sit.py --workdir=runs/digits_sit

Devices: 1 with 1 GiB; two CPU cores do.
"""

from ddo_jax import config as config_lib
from ddo_jax.configs import digits
from ddo_jax.method import noise
from ddo_jax.models import sit
from ddo_jax.samplers import flow_ode


def get_config() -> config_lib.Config:
  """Returns the recipe."""
  config = digits.get_config()
  config.name = 'digits_sit'
  config.rounds = 1
  config.model = sit.SitConfig(
    image_shape=(8, 8, 1),
    num_classes=10,
    patch=2,
    width=32,
    depth=2,
    heads=2,
    learn_sigma=False,
    pixel_values=17,
  )
  config.sampler = flow_ode.FlowODE(num_steps=18, method='heun')
  for phase in (config.pretrain, config.ddo):
    phase.noise = noise.UniformTime()
    phase.batch_size = 64
  config.pretrain.images = 4_000 * 64
  config.pretrain.optimizer.decay_images = 1_000 * 64
  config.ddo.images = 400 * 64
  config.ddo.optimizer.warmup_images = 400 * 64
  config.ddo.rhythm.eval_images = 50 * 64
  return config
