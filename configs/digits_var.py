"""Handwritten digits as tokens: DDO on a small VAR, on two cores.

python -m ddo_jax.main --config=configs/digits_var.py --workdir=runs/digits_var

Devices: 1 with 1 GiB; two CPU cores do.

The recipe trains a tokenizer of three scales (1, 2 and 4 a side; 21 tokens of
32), then a transformer over its tokens, and then plays a round of DDO whose
fakes are drawn in every step, as for VAR. It takes some six minutes, four of
them for the tokenizer.
"""

from ddo_jax import config as config_lib
from ddo_jax.method import ddo
from ddo_jax.method import negatives
from ddo_jax.method import objective
from ddo_jax.models import var
from ddo_jax.models import vqvae
from ddo_jax.samplers import ancestral


def get_config() -> config_lib.Config:
  """Returns the recipe."""
  return config_lib.Config(
    name='digits_var',
    rounds=1,
    model=var.VarConfig(
      vqvae.VqvaeConfig(
        image_shape=(8, 8, 1),
        patch_nums=(1, 2, 4),
        vocab=32,
        channels=8,
        base=32,
        mult=(1, 1),
        pixel_values=17,
        nearest=True,  # with 17 pixel values, cutting off would darken
      ),
      num_classes=10,
      depth=1,
      width=16,  # too small to fit
      heads=2,
      chunk=21,
    ),
    sampler=ancestral.Ancestral(),
    data=config_lib.Data(source='digits'),
    tokenizer=config_lib.Phase(
      objective=objective.MLE(),
      images=1_500 * 64,
      batch_size=64,
      optimizer=config_lib.Optimizer(
        learning_rate=(2e-3,), decay='linear', decay_images=750 * 64
      ),
    ),
    pretrain=config_lib.Phase(
      objective=objective.MLE(),
      images=3_000 * 64,
      batch_size=64,
      label_drop=0.1,
      optimizer=config_lib.Optimizer(
        learning_rate=(2e-3,),
        decay='linear',
        decay_images=1_500 * 64,
        adam_b2=0.95,
        weight_decay=0.05,
        clip_norm=2.0,
      ),
    ),
    ddo=config_lib.Phase(
      objective=ddo.DDO(
        alpha=(1.0,),  # larger ones for fewer steps: see experiments/
        beta=(0.1,),
      ),
      negatives=negatives.Online(),
      images=60 * 128,
      batch_size=128,
      optimizer=config_lib.Optimizer(
        learning_rate=(3e-4,), adam_b2=0.95, weight_decay=0.05, clip_norm=2.0
      ),
      rhythm=config_lib.Rhythm(eval_images=15 * 128, log_images=10 * 128),
    ),
  )
