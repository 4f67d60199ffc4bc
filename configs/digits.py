"""Handwritten digits, 8×8: the whole method in two minutes on two cores.

python -m ddo_jax.main --config=configs/digits.py --workdir=runs/digits

Devices: 1 with 1 GiB; two CPU cores do.
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
    name='digits',
    rounds=2,
    model=toy.ToyConfig(),
    sampler=heun.Heun(num_steps=18, sigma_min=0.02, sigma_max=40.0),
    data=config_lib.Data(source='digits'),
    pretrain=config_lib.Phase(
      objective=objective.MLE(),
      images=8_000 * 256,
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
      objective=ddo.DDO(alpha=(1.0,), beta=(0.1,)),
      negatives=negatives.Pool(size=10_000),
      images=400 * 256,
      batch_size=256,
      optimizer=config_lib.Optimizer(
        learning_rate=(1e-3, 5e-4), warmup_images=400 * 256
      ),
      averages=config_lib.Averages(halflife=(20_000.0,)),
      noise=noise.LogNormal(p_mean=(-0.4,), p_std=(1.2,)),
      rhythm=config_lib.Rhythm(eval_images=50 * 256, log_images=2_560),
    ),
  )
