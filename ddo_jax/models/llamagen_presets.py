"""LlamaGen's published sizes, by the names of their released files.

'c2i_B_256' is GPT-B of images of 256×256, on 16×16 tokens of VQ-16; 'c2i_L_384'
is GPT-L of images of 384×384. Every size can be had at both; released are B and
L at 256, and all at 384. The files of CCA's guidance-free models are of the
sizes at 384.
"""

import copy
from typing import Any

from ddo_jax import errors
from ddo_jax.models import llamagen
from ddo_jax.models import llamagen_vq

_SIZES: dict[str, dict[str, Any]] = {
  'B': {'width': 768, 'depth': 12, 'heads': 12},
  'L': {'width': 1024, 'depth': 24, 'heads': 16},
  'XL': {'width': 1280, 'depth': 36, 'heads': 20},
  'XXL': {'width': 1536, 'depth': 48, 'heads': 24},
  '3B': {'width': 3200, 'depth': 24, 'heads': 32},
}
# By the names of their released files.
TOKENIZERS = {
  'vq_ds16_c2i': llamagen_vq.VqConfig(),
  'vq_ds8_c2i': llamagen_vq.VqConfig(mult=(1, 2, 2, 4)),
}


def _presets() -> dict[str, llamagen.LlamagenConfig]:
  presets = {}
  for size, options in _SIZES.items():
    for side in (256, 384):
      tokenizer = llamagen_vq.VqConfig(image_shape=(side, side, 3))
      presets[f'c2i_{size}_{side}'] = llamagen.LlamagenConfig(
        tokenizer=tokenizer, **options
      )
  return presets


PRESETS = _presets()


def get(name: str) -> llamagen.LlamagenConfig:
  """Returns a copy of the config of a published size.

  Raises:
    errors.UserError: there is no model of that name.
  """
  return copy.deepcopy(errors.look_up(name, PRESETS, 'published model'))
