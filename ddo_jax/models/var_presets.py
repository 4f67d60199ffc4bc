"""The released VAR models, under their released names."""

import copy

from ddo_jax import errors
from ddo_jax.models import var
from ddo_jax.models import vqvae

_512 = vqvae.VqvaeConfig(
  image_shape=(512, 512, 3), patch_nums=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
)


def _sized(depth: int, gate_init: float, **options) -> var.VarConfig:
  """Returns the config of a depth, which sets the width and the heads."""
  return var.VarConfig(
    depth=depth, width=64 * depth, heads=depth, gate_init=gate_init, **options
  )


VAR = {
  'var_d16': _sized(16, 1e-3),
  'var_d20': _sized(20, 1e-3),
  'var_d24': _sized(24, 1e-4),
  'var_d30': _sized(30, 1e-5),
  # The gates' initial weights are not published; these are those of d30.
  'var_d36': _sized(36, 1e-5, tokenizer=_512, shared_modulation=True),
}


def get(name: str) -> var.VarConfig:
  """Returns a copy of the config of a released model.

  Raises:
    errors.UserError: there is no model of that name.
  """
  return copy.deepcopy(errors.look_up(name, VAR, 'released model'))
