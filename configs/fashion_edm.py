r"""Fashion-MNIST at 32×32: a small DDPM++ by MLE, and then two rounds of DDO.

python -m ddo_jax.main --config=configs/fashion_edm.py \
  --workdir=runs/fashion_edm

Devices: 1 with 24 GiB.

It is meant to take minutes on one GPU; it was not run on one here. The control
is a run with --config.ddo.objective=mle --config.ddo.images=2133333 in another
--workdir. On the digits a small U-Net gained precision and accuracy but lost
held-out distance where beta was too small: sweep --config.ddo.objective.beta.
"""

from ddo_jax import config as config_lib
from ddo_jax.method import ddo
from ddo_jax.method import negatives
from ddo_jax.method import objective
from ddo_jax.models import edm
from ddo_jax.samplers import heun


def get_config() -> config_lib.Config:
  """Returns the recipe."""
  return config_lib.Config(
    name='fashion_edm',
    rounds=2,
    model=edm.EdmConfig(
      network='ddpmpp',
      image_shape=(32, 32, 1),
      num_classes=10,
      model_channels=64,
      channel_mult=(1, 2, 2),
      num_blocks=2,
      attn_resolutions=(16,),
      dropout=0.1,
      augment_dim=0,
      augment=0.0,
    ),
    sampler=heun.Heun(num_steps=18, sigma_min=0.002, sigma_max=80.0),
    data=config_lib.Data(source='fashion_mnist', pad_to=32),
    pretrain=config_lib.Phase(
      objective=objective.MLE(),
      images=12_000_000,
      batch_size=512,
      label_drop=0.1,
      optimizer=config_lib.Optimizer(
        learning_rate=(1e-3,),
        warmup_images=500_000,
        decay='linear',
        decay_images=3_000_000,
      ),
      averages=config_lib.Averages(halflife=(250_000.0,)),
    ),
    ddo=config_lib.Phase(
      objective=ddo.DDO(alpha=(4.0,), beta=(0.05,)),
      negatives=negatives.Pool(size=50_000),
      images=800_000,
      batch_size=512,
      optimizer=config_lib.Optimizer(
        learning_rate=(1.5e-4,), warmup_images=800_000
      ),
      averages=config_lib.Averages(halflife=(100_000.0,)),
      rhythm=config_lib.Rhythm(eval_images=102_400),
    ),
  )
