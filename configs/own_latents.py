r"""A folder of your own images at 256×256, as latents: pretraining and DDO.

python -m ddo_jax.main --config=configs/own_latents.py \
  --workdir=runs/own_latents --config.data.source=latents/mine \
  --config.evaluation.protocol=fid_stats/mine --config.evaluation.metric=fid

Devices: 1 with 24 GiB.

Before it, the images are made latents, and statistics of them are made; the
commands stand in docs/data.md. With another number of classes than ten, all
three take --config.model.num_classes=37, or 0 for images without classes.

Cost, by --mode=plan --chip=h100, at 60 % of published rates: the pretraining
takes 9.8 hours and the round 1.5.

It trains SiT-S of patches of 2. What is [?] was not tried: this recipe was not
run on a GPU here, and only its road was, with a small autoencoder. Thousands of
images are soon memorised; lower --config.pretrain.images then.
"""

from ddo_jax import config as config_lib
from ddo_jax.method import ddo
from ddo_jax.method import negatives
from ddo_jax.method import noise
from ddo_jax.method import objective
from ddo_jax.models import dit_presets
from ddo_jax.samplers import flow_ode


def get_config() -> config_lib.Config:
  """Returns the recipe."""
  model = dit_presets.get('SiT-S-2-256x256')
  model.num_classes = 10
  model.learn_sigma = False
  return config_lib.Config(
    name='own_latents',
    rounds=1,
    vae_from='sd-vae-ft-mse',
    model=model,
    sampler=flow_ode.FlowODE(num_steps=25, method='heun'),
    data=config_lib.Data(source='latents'),
    pretrain=config_lib.Phase(
      objective=objective.MLE(),
      images=20_000_000,  # [?]
      batch_size=256,  # SiT's, and its learning rate, label drop and noise
      label_drop=0.1,
      optimizer=config_lib.Optimizer(learning_rate=(1e-4,), warmup_images=0),
      averages=config_lib.Averages(halflife=(1_000_000.0,)),
      noise=noise.UniformTime(),
    ),
    ddo=config_lib.Phase(
      objective=ddo.DDO(alpha=(4.0,), beta=(0.05,)),  # [?]
      negatives=negatives.Pool(size=20_000),  # [?]
      images=400_000,  # [?]
      batch_size=256,
      optimizer=config_lib.Optimizer(
        learning_rate=(1.5e-5,), warmup_images=400_000
      ),
      averages=config_lib.Averages(halflife=(50_000.0,)),
      noise=noise.UniformTime(),
      rhythm=config_lib.Rhythm(eval_images=51_200),
    ),
  )
