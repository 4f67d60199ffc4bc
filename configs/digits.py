"""Handwritten digits, 8×8: the whole method in two minutes on two cores.

python -m ddo_jax.main --config=configs/digits.py --workdir=runs/digits
"""

from ddo_jax import config as config_lib
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
      objective='mle',
      images=8_000 * 256,
      batch_size=256,
      learning_rate=(2e-3,),
      decay='linear',
      decay_images=2_000 * 256,
      ema_halflife=(50_000.0,),
      p_mean=(-0.8,),
      p_std=(1.2,),
      label_drop=0.1,
      log_images=25_600,
    ),
    ddo=config_lib.Phase(
      images=400 * 256,
      batch_size=256,
      alpha=(1.0,),
      beta=(0.1,),
      learning_rate=(1e-3, 5e-4),
      warmup_images=400 * 256,
      ema_halflife=(20_000.0,),
      p_mean=(-0.4,),
      p_std=(1.2,),
      pool_size=10_000,
      eval_images=50 * 256,
      log_images=2_560,
    ),
  )
