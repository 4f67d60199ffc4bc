"""The released models of EDM and EDM2, under their released names."""

import dataclasses
import functools

from ddo_jax import errors
from ddo_jax.models import edm
from ddo_jax.models import edm2

# DDPM++ for unconditional CIFAR-10.
_SMALL = edm.EdmConfig()
_LARGE = edm.EdmConfig(
  image_shape=(64, 64, 3), channel_mult=(1, 2, 2, 2), augment=0.15
)
_replace = dataclasses.replace

# In these names 'vp' and 've' stand for the networks DDPM++ and NCSN++. The
# preconditioning of all of them is EDM's.
EDM = {
  'edm-cifar10-32x32-uncond-vp': _SMALL,
  'edm-cifar10-32x32-uncond-ve': _replace(_SMALL, network='ncsnpp'),
  'edm-cifar10-32x32-cond-vp': _replace(_SMALL, num_classes=10),
  'edm-cifar10-32x32-cond-ve': _replace(
    _SMALL, network='ncsnpp', num_classes=10
  ),
  'edm-ffhq-64x64-uncond-vp': _replace(_LARGE, dropout=0.05),
  'edm-ffhq-64x64-uncond-ve': _replace(_LARGE, dropout=0.05, network='ncsnpp'),
  'edm-afhqv2-64x64-uncond-vp': _replace(_LARGE, dropout=0.25),
  'edm-afhqv2-64x64-uncond-ve': _replace(
    _LARGE, dropout=0.25, network='ncsnpp'
  ),
  'edm-imagenet-64x64-cond-adm': edm.EdmConfig(
    network='adm',
    image_shape=(64, 64, 3),
    num_classes=1000,
    model_channels=192,
    channel_mult=(1, 2, 3, 4),
    num_blocks=3,
    attn_resolutions=(32, 16, 8),
    dropout=0.10,
    augment_dim=0,
    augment=0.0,
  ),
}

_PIXELS = (64, 64, 3)
_latent = functools.partial(_replace, image_shape=(64, 64, 4), latents=True)
_XXS = edm2.Edm2Config(model_channels=64)
_XS = edm2.Edm2Config(model_channels=128)
_S = edm2.Edm2Config(model_channels=192)
_M = edm2.Edm2Config(model_channels=256, dropout=0.10)
_L = edm2.Edm2Config(model_channels=320, dropout=0.10)
_XL = edm2.Edm2Config(model_channels=384, dropout=0.10)
_XXL = edm2.Edm2Config(model_channels=448, dropout=0.10)

EDM2 = {
  'edm2-img64-xs': _replace(_XS, image_shape=_PIXELS),
  'edm2-img64-s': _replace(_S, image_shape=_PIXELS),
  'edm2-img64-m': _replace(_M, image_shape=_PIXELS),
  'edm2-img64-l': _replace(_L, image_shape=_PIXELS),
  'edm2-img64-xl': _replace(_XL, image_shape=_PIXELS),
  'edm2-img512-xxs': _latent(_XXS),
  'edm2-img512-xs': _latent(_XS),
  'edm2-img512-s': _latent(_S),
  'edm2-img512-m': _latent(_M),
  'edm2-img512-l': _latent(_L),
  'edm2-img512-xl': _latent(_XL),
  'edm2-img512-xxl': _latent(_XXL),
  'edm2-img512-xs-uncond': _latent(_XS, num_classes=0),
}


def get(name: str) -> edm.EdmConfig | edm2.Edm2Config:
  """Returns a copy of the config of a released model.

  Raises:
    errors.UserError: there is no model of that name.
  """
  known = EDM | EDM2
  return dataclasses.replace(errors.look_up(name, known, 'released model'))
