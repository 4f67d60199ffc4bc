"""The config of a released network, from the arguments inside its file."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ddo_jax import errors
from ddo_jax.models import edm
from ddo_jax.models import edm2
from ddo_jax.models import edm_layers
from ddo_jax.weights import pickle_reader

_PRECONDS = {
  'EDMPrecond': 'edm',
  'VPPrecond': 'vp',
  'VEPrecond': 've',
  'iDDPMPrecond': 'iddpm',
}
# What tells DDPM++ from NCSN++.
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
# How it is run, not what it is: the precision, and the sampler's range.
_IGNORED = ('model_type', 'use_fp16', 'sigma_min', 'sigma_max')
# Arguments that the networks here have fixed, at their published values.
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
# Arguments that every released network of EDM gives; the rest has defaults.
_GIVEN = ('model_channels', 'channel_mult', 'dropout')


def _plain(value: Any) -> Any:
  return tuple(value) if isinstance(value, list) else value


def _fields(
  options: Mapping[str, Any],
  given: tuple[str, ...],
  names: tuple[str, ...],
  fixed: Mapping[str, Any],
) -> dict[str, Any]:
  """The config's fields among a constructor's arguments.

  Args:
    options: the arguments.
    given: those that must be among them, besides the interface's.
    names: those that are fields of the config.
    fixed: those that must have the value that they have here.

  Raises:
    errors.UserError: an argument is missing, or asks for another network.
  """
  options = {k: _plain(v) for k, v in options.items() if k not in _IGNORED}
  try:
    side = options.pop('img_resolution')
    shape = (side, side, options.pop('img_channels'))
    found = {
      'image_shape': shape,
      'num_classes': options.pop('label_dim'),
      **{name: options[name] for name in given},
    }
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
        f'the network inside the file has {name}={str(value)[:80]}; the'
        f' networks here have {fixed.get(name, "no such argument")}'
      )
  return found


def _edm(network: pickle_reader.Network) -> edm.EdmConfig:
  options = dict(network.init_kwargs)
  kind, fixed = 'adm', _FIXED
  if options.get('model_type') == 'SongUNet':
    taps = _plain(options.get('resample_filter'))
    kind = 'ncsnpp' if taps == edm_layers.NCSNPP.taps else 'ddpmpp'
    fixed = _FIXED | _STYLES[kind]
  elif options.get('model_type') != 'DhariwalUNet':
    raise errors.UserError(
      f'the network inside the file is a {options.get("model_type")}; known:'
      ' SongUNet, DhariwalUNet'
    )
  found = _fields(options, _GIVEN, (*_FIELDS, 'augment_dim'), fixed)
  if kind == 'adm':  # its constructor's own
    found = {'attn_resolutions': (32, 16, 8), 'num_blocks': 3} | found
  found = {'augment_dim': 0} | found
  return edm.EdmConfig(
    network=kind,
    precond=_PRECONDS[network.class_name],
    augment=network.augment if found['augment_dim'] else 0.0,
    **found,
  )


def _check_encoder(
  network: pickle_reader.Network, config: edm2.Edm2Config
) -> None:
  """Raises UserError where the file scales latents otherwise than here."""
  if not config.latents or network.encoder is None:
    return
  state = network.encoder.state
  encoder = edm2.build(config, 0.0, 1.0, remat=False).encoder
  for name, wanted in zip(('scale', 'bias'), encoder.affine(), strict=True):
    got = state.get(name) if isinstance(state, dict) else None
    numbers = isinstance(got, np.ndarray) and got.shape == (wanted.size,)
    if not numbers or not np.allclose(got, wanted.ravel(), rtol=1e-5):
      raise errors.UserError(
        f'the latents of the file have the {name} {str(got)[:80]}; those here'
        f' {wanted.ravel()}: the network is of another autoencoder'
      )


def config_of(
  network: pickle_reader.Network,
) -> edm.EdmConfig | edm2.Edm2Config:
  """The model's config of a released network.

  Raises:
    errors.UserError: it is a network that is not built here.
  """
  if network.class_name == 'Precond':
    given, names = ('model_channels',), (*_FIELDS, 'logvar_channels')
    found = _fields(network.init_kwargs, given, names, _FIXED_EDM2)
    # No image has four channels, and a file may come without its encoder.
    config = edm2.Edm2Config(latents=found['image_shape'][-1] == 4, **found)
    _check_encoder(network, config)
    return config
  if network.class_name in _PRECONDS:
    return _edm(network)
  raise errors.UserError(
    f'the file holds a {network.class_name[:80]}; known:'
    f' {", ".join(_PRECONDS)}, Precond (EDM2)'
  )


def taps_of(config: edm.EdmConfig | edm2.Edm2Config) -> tuple[int, ...]:
  """Of the resampling filter that the model's state dict stores."""
  if not isinstance(config, edm.EdmConfig):
    return ()
  ncsnpp = config.network == 'ncsnpp'
  return (edm_layers.NCSNPP if ncsnpp else edm_layers.DDPMPP).taps
