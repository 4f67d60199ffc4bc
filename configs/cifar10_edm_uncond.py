r"""CIFAR-10, unconditional: DDO takes EDM's DDPM++ from FID 1.97 to 1.38.

python -m ddo_jax.main --config=configs/cifar10_edm_uncond.py \
  --workdir=runs/cifar10_edm_uncond

Devices: 1 with 80 GiB.

The weights (223 MB), CIFAR-10 (170 MB), Inception's weights (96 MB) and EDM's
statistics are fetched. Without a network a line for each says where to put it.

Cost: a round sees 1.5 M images, each with 2 forward and backward passes of a
56 M parameter network, and draws 50,000 samples of 35 evaluations each. The
paper plays 12 rounds and sweeps alpha and beta anew in each of them. Expected:
one round takes FID from 1.97 to 1.72, and twelve rounds take it to 1.38.
Neither was run here.

[?] marks what no public source states.
"""

from ddo_jax import config as config_lib
from ddo_jax.method import ddo
from ddo_jax.method import negatives
from ddo_jax.method import noise
from ddo_jax.models import presets
from ddo_jax.samplers import heun


def get_config() -> config_lib.Config:
  """Returns the recipe."""
  images = 1_500_000  # the paper: 30 epochs, 0.75 % of pretraining
  return config_lib.Config(
    name='cifar10_edm_uncond',
    rounds=12,  # the paper
    init_from='edm-cifar10-32x32-uncond-vp',
    model=presets.get('edm-cifar10-32x32-uncond-vp'),
    sampler=heun.Heun(num_steps=18, sigma_min=0.002, sigma_max=80.0),  # EDM
    data=config_lib.Data(source='cifar10'),
    ddo=config_lib.Phase(
      objective=ddo.DDO(
        alpha=(4.0,),  # swept over 0.5 .. 6; 4 is where beta was ablated
        beta=(0.05,),  # swept over 0.01 .. 0.1; 0.05 is where alpha was
      ),
      negatives=negatives.Pool(
        size=50_000,  # offline
      ),
      images=images,
      batch_size=512,  # the paper
      optimizer=config_lib.Optimizer(
        learning_rate=(1.5e-4,),  # the paper
        warmup_images=images,  # linear over the whole round, no decay
      ),
      averages=config_lib.Averages(
        halflife=(250_000.0,),  # the paper
      ),
      noise=noise.LogNormal(
        p_mean=(-1.2,),  # EDM's; [?] for DDO
        p_std=(1.2,),  # EDM's; [?] for DDO
      ),
      rhythm=config_lib.Rhythm(
        eval_images=100_352,  # [?]; quality peaks inside a round
      ),
    ),
    evaluation=config_lib.Evaluation(
      protocol='edm-cifar10',
      metric='fid',
      selection_samples=10_000,  # [?]
    ),
  )
