r"""Fashion-MNIST, 14×14: a small MLP by MLE, and then rounds of DDO, on a CPU.

python -m ddo_jax.main --config=configs/fashion_small.py \
  --workdir=runs/fashion_small

Devices: 1 with 1 GiB; two CPU cores do.

It trains on the first 10,000 images at 14×14, because a network of vectors that
is narrower than an image cannot take its noise away.
"""

from ddo_jax import config as config_lib
from ddo_jax.method import ddo
from ddo_jax.method import negatives
from ddo_jax.method import noise
from ddo_jax.method import objective
from ddo_jax.models import toy
from ddo_jax.samplers import heun


def get_config() -> config_lib.Config:
  """Returns the recipe."""
  return config_lib.Config(
    name='fashion_small',
    rounds=1,
    model=toy.ToyConfig(
      hidden=256,
      blocks=2,
      image_shape=(14, 14, 1),
      sigma_data=0.664,
      pixel_values=256,
    ),
    sampler=heun.Heun(num_steps=12, sigma_min=0.02, sigma_max=60.0),
    data=config_lib.Data(
      source='fashion_mnist', train_split='train[:10000]', resize=14
    ),
    pretrain=config_lib.Phase(
      objective=objective.MLE(),
      images=6_000 * 256,
      batch_size=256,
      label_drop=0.1,
      optimizer=config_lib.Optimizer(
        learning_rate=(2e-3,), decay='linear', decay_images=2_000 * 256
      ),
      averages=config_lib.Averages(halflife=(50_000.0,)),
      noise=noise.LogNormal(p_mean=(-0.8,), p_std=(1.2,)),
      rhythm=config_lib.Rhythm(log_images=25_600),
    ),
    ddo=config_lib.Phase(
      objective=ddo.DDO(alpha=(1.0,), beta=(0.05,)),
      negatives=negatives.Pool(size=10_000),
      images=400 * 256,
      batch_size=256,
      optimizer=config_lib.Optimizer(
        learning_rate=(1e-3,), warmup_images=400 * 256
      ),
      averages=config_lib.Averages(halflife=(20_000.0,)),
      noise=noise.LogNormal(p_mean=(-0.4,), p_std=(1.2,)),
      rhythm=config_lib.Rhythm(eval_images=100 * 256, log_images=2_560),
    ),
  )
