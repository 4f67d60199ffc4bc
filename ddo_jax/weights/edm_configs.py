"""The config of a released network, from the arguments inside its file."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ddo_jax import errors
from ddo_jax import settings
from ddo_jax.data import codec
from ddo_jax.models import edm
from ddo_jax.models import edm2
from ddo_jax.models import edm_layers
from ddo_jax.models import vae
from ddo_jax.weights import pickle_reader

_PRECONDS = {
  'EDMPrecond': 'edm',
  'VPPrecond': 'vp',
  'VEPrecond': 've',
  'iDDPMPrecond': 'iddpm',
}
# The arguments that tell DDPM++ from NCSN++.
_STYLES = {
  'ddpmpp': {
    'embedding_type': 'positional',
    'encoder_type': 'standard',
    'decoder_type': 'standard',
    'channel_mult_noise': 1,
    'resample_filter': edm_layers.DDPMPP.taps,
  },
  'ncsnpp': {
    'embedding_type': 'fourier',
    'encoder_type': 'residual',
    'decoder_type': 'standard',
    'channel_mult_noise': 2,
    'resample_filter': edm_layers.NCSNPP.taps,
  },
}
# These say how a network is run, not what it is: its precision, and the range
# of its sampler.
_IGNORED = ('model_type', 'use_fp16', 'sigma_min', 'sigma_max')
# Arguments that are constants in the networks here, at their published values.
_FIXED = {'channel_mult_emb': 4, 'label_dropout': 0}
_FIXED_EDM2 = {
  'channel_mult_noise': None,
  'channel_mult_emb': None,
  'label_balance': 0.5,
  'concat_balance': 0.5,
  'res_balance': 0.3,
  'attn_balance': 0.3,
  'clip_act': 256,
}
_FIELDS = (
  'model_channels',
  'channel_mult',
  'num_blocks',
  'attn_resolutions',
  'channels_per_head',
  'dropout',
  'sigma_data',
)
# Arguments that every released network of EDM gives; the others have defaults.
_GIVEN = ('model_channels', 'channel_mult', 'dropout')


def _tupled(value: Any) -> Any:
  """Returns a tuple for a list, as the configs have it; else the value."""
  return tuple(value) if isinstance(value, list) else value


def _fields(
  options: Mapping[str, Any],
  given: tuple[str, ...],
  names: tuple[str, ...],
  fixed: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns the config's fields among a constructor's arguments.

  Args:
    options: the arguments.
    given: names of arguments that must be there, besides the resolution,
      the channels and the classes.
    names: names of arguments that are fields of the config.
    fixed: arguments that are constants here, and must have that value.

  Raises:
    errors.UserError: an argument is missing, or asks for another network.
  """
  options = {
    name: _tupled(value)
    for name, value in options.items()
    if name not in _IGNORED
  }
  found = {}
  try:
    side = options.pop('img_resolution')
    found['image_shape'] = (side, side, options.pop('img_channels'))
    found['num_classes'] = options.pop('label_dim')
    for name in given:
      found[name] = options.pop(name)
  except KeyError as error:
    raise errors.UserError(
      f'the network inside the file does not say its {error}; wanted the .pkl'
      ' of an EDM, EDM2 or DDO network'
    ) from error
  for name, value in options.items():
    if name in names:
      found[name] = value
    elif name not in fixed or fixed[name] != value:
      raise errors.UserError(
        f'the network inside the file has {name}={errors.brief(value)}; the'
        f' networks here have {fixed.get(name, "no such argument")}'
      )
  return found


def _edm_config(network: pickle_reader.Network) -> edm.EdmConfig:
  """Returns the config of a network of EDM."""
  options = dict(network.init_kwargs)
  model_type = options.get('model_type')
  # What the original constructors take where an argument is not given.
  defaults: dict[str, Any] = {'augment_dim': 0}
  fixed: dict[str, Any] = _FIXED
  if model_type == 'SongUNet':
    taps = _tupled(options.get('resample_filter'))
    kind = 'ncsnpp' if taps == edm_layers.NCSNPP.taps else 'ddpmpp'
    fixed = _FIXED | _STYLES[kind]
  elif model_type == 'DhariwalUNet':
    kind = 'adm'
    defaults |= {'attn_resolutions': (32, 16, 8), 'num_blocks': 3}
  else:
    raise errors.UserError(
      f'the network inside the file is a {errors.brief(model_type)}; known:'
      ' SongUNet, DhariwalUNet'
    )
  names = (*_FIELDS, 'augment_dim')
  found = defaults | _fields(options, _GIVEN, names, fixed)
  return edm.EdmConfig(
    network=kind,
    precond=_PRECONDS[network.class_name],
    augment=network.augment if found['augment_dim'] else 0.0,
    **found,
  )


def _check_encoder(
  network: pickle_reader.Network, config: edm.EdmConfig | edm2.Edm2Config
) -> None:
  """Raises UserError where the file scales latents otherwise than we do."""
  latents = isinstance(config, edm2.Edm2Config) and config.latents
  if not latents or network.encoder is None:
    return
  state = network.encoder.state
  encoder = codec.Latents(vae.AutoencoderKL(), sigma_data=config.sigma_data)
  for name, wanted in zip(('scale', 'bias'), encoder.affine(), strict=True):
    got = state.get(name) if isinstance(state, dict) else None
    numbers = isinstance(got, np.ndarray) and got.shape == (wanted.size,)
    if not numbers or not np.allclose(got, wanted.ravel(), rtol=1e-5):
      raise errors.UserError(
        f'the latents of the file have the {name} {errors.brief(got)}; those'
        f' here {wanted.ravel()}: the network is of another autoencoder'
      )


def config_of(
  network: pickle_reader.Network,
) -> edm.EdmConfig | edm2.Edm2Config:
  """Returns the model's config of a released network.

  Raises:
    errors.UserError: no model here is that network, or a size in it is one
      that no network has.
  """
  config = _config_of(network)
  settings.check_recorded(config, 'the network inside the file')
  _check_encoder(network, config)
  return config


def _config_of(
  network: pickle_reader.Network,
) -> edm.EdmConfig | edm2.Edm2Config:
  """Returns the config as the file's arguments give it."""
  if network.class_name == 'Precond':
    found = _fields(
      network.init_kwargs,
      given=('model_channels',),
      names=(*_FIELDS, 'logvar_channels'),
      fixed=_FIXED_EDM2,
    )
    # No image has four channels, and a file may come without its encoder.
    return edm2.Edm2Config(latents=found['image_shape'][-1] == 4, **found)
  if network.class_name in _PRECONDS:
    return _edm_config(network)
  raise errors.UserError(
    f'the file holds a {network.class_name[:80]}; known:'
    f' {", ".join(_PRECONDS)}, Precond (EDM2)'
  )


def taps_of(config: edm.EdmConfig | edm2.Edm2Config) -> tuple[float, ...]:
  """Returns the taps of the resampling filter that the state dict stores.

  EDM2's state dicts store none: ().
  """
  if not isinstance(config, edm.EdmConfig):
    return ()
  if config.network == 'ncsnpp':
    return edm_layers.NCSNPP.taps
  return edm_layers.DDPMPP.taps
