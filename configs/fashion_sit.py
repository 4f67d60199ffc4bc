r"""Fashion-MNIST, 14×14: a small transformer by flow matching, a round of DDO.

python -m ddo_jax.main --config=configs/fashion_sit.py \
  --workdir=runs/fashion_sit

Devices: 1 with 1 GiB; two CPU cores do.

It is the sibling of fashion_small for comparisons of many methods
(experiments/rivals): a SiT of two blocks over the sixteen patches of an image.
Its round's β and learning rate are near the best of a sweep's eight on seed 9.
"""

from ddo_jax import config as config_lib
from ddo_jax.configs import fashion_small
from ddo_jax.method import ddo
from ddo_jax.method import noise
from ddo_jax.models import discriminator
from ddo_jax.models import sit
from ddo_jax.samplers import flow_ode


def get_config() -> config_lib.Config:
  """Returns the recipe."""
  config = fashion_small.get_config()
  config.name = 'fashion_sit'
  config.model = sit.SitConfig(
    image_shape=(16, 16, 1),
    num_classes=10,
    patch=4,
    width=64,
    depth=2,
    heads=4,
    learn_sigma=False,
    pixel_values=256,
  )
  config.data.pad_to = 16
  config.sampler = flow_ode.FlowODE(num_steps=8, method='heun')
  for phase in (config.pretrain, config.ddo):
    phase.noise = noise.UniformTime()
  # The narrowest convolutions would cost 0.7 of a forward pass of the model;
  # this costs 0.1.
  config.discriminator_network = discriminator.DiscriminatorConfig(
    network='mlp', hidden=128
  )
  config.pretrain.images = 3_000 * 256
  config.pretrain.optimizer.learning_rate = (1e-3,)
  config.pretrain.optimizer.decay_images = 1_000 * 256
  config.ddo.objective = ddo.DDO(alpha=(1.0,), beta=(0.02,))
  config.ddo.negatives.size = 5_000
  config.ddo.images = 100 * 256
  config.ddo.optimizer.learning_rate = (5e-4,)
  config.ddo.optimizer.warmup_images = 100 * 256
  config.ddo.averages.halflife = (5_000.0,)
  config.ddo.rhythm.eval_images = 10 * 256
  config.evaluation.selection_samples = 1_000
  config.evaluation.samples = 2_000
  return config
