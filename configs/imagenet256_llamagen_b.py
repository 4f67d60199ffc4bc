r"""ImageNet-256: DDO on LlamaGen's GPT-B, which has FID 26.26, guided 5.46.

python -m ddo_jax.main --config=configs/imagenet256_llamagen_b.py \
  --workdir=runs/imagenet256_llamagen_b \
  --config.data.source=<folder or zip of ImageNet at 256×256>

Devices: 8 with 40 GiB each.

The weights (MIT; 0.4 GB), the tokenizer, Inception's weights and OpenAI's
statistics (2 GB) are fetched.

No DDO of LlamaGen is published, so that nothing is expected; what such a round
reaches is [?]. Before it, published (Sun et al. 2024): FID 26.262 and IS 48.07
without guidance, 5.464 and 193.61 by
  --config.sampler.convention=constant --config.sampler.guidance=2.0
Others found 6.13 in its place. Labels were drawn at random there, and take
turns here. The nearest that is published is CCA on the models of 384×384, which
takes GPT-B from 32.2 (scored at 256×256) to 7.04 without guidance. Here samples
of those models would be scored at 384×384, which is not as published.

Cost: a round is 98 steps of 1,024 real images and as many samples of the
reference, each 256 evaluations of one token, decoded and encoded again. It was
not run here, and its hours are [?]; --mode=plan says them for your devices.

LlamaGen was trained, and CCA fine-tuned it, with dropout of 0.1; here there is
none. Its codes came from ten crops of each image; here images are cropped once,
when the set is made.

[?] marks what no public source states.
"""

from ddo_jax import config as config_lib
from ddo_jax.method import ddo
from ddo_jax.method import negatives
from ddo_jax.models import llamagen_presets
from ddo_jax.samplers import ancestral


def get_config() -> config_lib.Config:
  """Returns the recipe."""
  model = llamagen_presets.get('c2i_B_256')
  model.dtype = 'bfloat16'  # as trained
  return config_lib.Config(
    name='imagenet256_llamagen_b',
    rounds=1,
    init_from='c2i_B_256',
    tokenizer_from='vq_ds16_c2i',
    model=model,
    sampler=ancestral.Ancestral(guidance=1.0, convention='constant'),
    data=config_lib.Data(source='datasets/img256.zip'),
    ddo=config_lib.Phase(
      objective=ddo.DDO(
        alpha=(50.0,),  # [?]; the paper's on VAR-d16
        beta=(0.02,),  # [?]; the paper's on VAR, and CCA's on LlamaGen
        normalize=True,
      ),
      negatives=negatives.Online(),
      images=98 * 1_024,  # [?]; as on VAR
      batch_size=1_024,  # [?]; as on VAR
      label_drop=0.1,  # CCA's on LlamaGen; [?] for DDO
      optimizer=config_lib.Optimizer(
        learning_rate=(1e-5,),  # [?]; CCA's, for 256 images
        adam_b1=0.9,
        adam_b2=0.95,
        weight_decay=0.05,
        clip_norm=1.0,
      ),
      rhythm=config_lib.Rhythm(
        eval_images=4_096,  # [?]
        log_images=1_024,
      ),
    ),
    evaluation=config_lib.Evaluation(
      protocol='adm-img256',
      metric='fid',
      features=('fid',),
      selection_samples=10_000,  # [?]
    ),
    executor=config_lib.Executor(accumulate=8, remat=True, sample_batch=256),
  )
