"""The published sizes of DiT and SiT, by the names of their released files.

'DiT-XL-2-256x256' is DiT-XL of patches of 2, on the latents of images of
256×256; so are S, B and L, patches of 4 and 8, and 512×512. Weights are
released of DiT-XL-2 at both sizes and of SiT-XL-2 at 256.
"""

import copy
from typing import Any

from ddo_jax import errors
from ddo_jax.models import dit
from ddo_jax.models import sit

_SIZES: dict[str, dict[str, Any]] = {
  'S': {'width': 384, 'depth': 12, 'heads': 6},
  'B': {'width': 768, 'depth': 12, 'heads': 12},
  'L': {'width': 1024, 'depth': 24, 'heads': 16},
  'XL': {'width': 1152, 'depth': 28, 'heads': 16},
}


def _presets() -> dict[str, dit.TransformerConfig]:
  presets: dict[str, dit.TransformerConfig] = {}
  for family, kind in (('DiT', dit.DitConfig), ('SiT', sit.SitConfig)):
    for size, options in _SIZES.items():
      for patch in (2, 4, 8):
        for side in (256, 512):
          presets[f'{family}-{size}-{patch}-{side}x{side}'] = kind(
            image_shape=(side // 8, side // 8, 4),
            patch=patch,
            latents=True,
            **options,
          )
  return presets


PRESETS = _presets()


def get(name: str) -> dit.TransformerConfig:
  """Returns a copy of the config of a published size.

  Raises:
    errors.UserError: there is no model of that name.
  """
  if name not in PRESETS:
    raise errors.UserError(
      f'no published model is called {name!r}; wanted DiT or SiT, S, B, L or'
      ' XL, a patch of 2, 4 or 8, and the size, such as DiT-XL-2-256x256'
      f'{errors.near_miss(name, PRESETS)}'
    )
  return copy.deepcopy(PRESETS[name])
