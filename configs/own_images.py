r"""A folder of your own images: pretraining and two rounds of DDO, at 32×32.

python -m ddo_jax.main --config=configs/own_images.py \
  --workdir=runs/own_images --config.data.source=<folder of class folders>

Devices: 1 with 24 GiB.

The sub-folders are the classes. A tenth of each is held out; images are
cropped to their centre square, resized and made RGB. With more than ten
classes, say how many: --config.model.num_classes=37. Without sub-folders, it
is 0.

For another size set --config.data.resize=64 and
--config.model.image_shape='(64,64,3)' together.

It is meant for one GPU and was not run on one here. On a CPU, take the digits'
recipe for images of 8×8, see docs/data.md. Few images are soon memorised: watch
`memorised` and `nn_ratio` in the report, and lower --config.pretrain.images.
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
    name='own_images',
    rounds=2,
    model=edm.EdmConfig(
      network='ddpmpp',
      image_shape=(32, 32, 3),
      num_classes=10,
      model_channels=64,
      channel_mult=(1, 2, 2),
      num_blocks=2,
      attn_resolutions=(16,),
    ),
    sampler=heun.Heun(num_steps=18, sigma_min=0.002, sigma_max=80.0),
    data=config_lib.Data(source='images', holdout=0.1, resize=32, channels=3),
    pretrain=config_lib.Phase(
      objective=objective.MLE(),
      images=8_000_000,
      batch_size=256,
      label_drop=0.1,
      optimizer=config_lib.Optimizer(
        learning_rate=(1e-3,),
        warmup_images=200_000,
        decay='linear',
        decay_images=2_000_000,
      ),
      averages=config_lib.Averages(halflife=(250_000.0,)),
    ),
    ddo=config_lib.Phase(
      objective=ddo.DDO(alpha=(4.0,), beta=(0.05,)),
      negatives=negatives.Pool(size=20_000),
      images=400_000,
      batch_size=256,
      optimizer=config_lib.Optimizer(
        learning_rate=(1.5e-4,), warmup_images=400_000
      ),
      averages=config_lib.Averages(halflife=(50_000.0,)),
      rhythm=config_lib.Rhythm(eval_images=51_200),
    ),
  )
