"""Models: the table from a config's dataclass to a LikelihoodModel."""

import dataclasses
from typing import Any

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax.method import diffusion
from ddo_jax.method import likelihood
from ddo_jax.models import edm
from ddo_jax.models import edm2
from ddo_jax.models import toy
from ddo_jax.models import var
from ddo_jax.models import vqvae
from ddo_jax.models import vqvae_learner

CONFIGS = (toy.ToyConfig, edm.EdmConfig, edm2.Edm2Config, var.VarConfig)
_PARTS = (*CONFIGS, vqvae.VqvaeConfig)  # what a recorded config may hold


def from_json(recorded: dict[str, Any]) -> Any:
  """The model's config among what `config.to_json` wrote of a run.

  Raises:
    errors.UserError: it is of no known model, or of another version.
  """
  name = recorded.get('model.type')
  try:
    return _from_json(recorded, 'model.')
  except (KeyError, TypeError) as error:
    raise errors.UserError(
      f'the weights were written with the model {name!r} ({error}), which is'
      f' not known here; known: {", ".join(c.__name__ for c in CONFIGS)}'
    ) from error


def _from_json(recorded: dict[str, Any], prefix: str) -> Any:
  """The dataclass whose fields, and those of its parts, have the prefix."""
  inside = {
    name.removeprefix(prefix): tuple(v) if isinstance(v, list) else v
    for name, v in recorded.items()
    if name.startswith(prefix)
  }
  fields = {name: v for name, v in inside.items() if '.' not in name}
  for part in {name.split('.')[0] for name in inside if '.' in name}:
    fields[part] = _from_json(recorded, f'{prefix}{part}.')
  kinds = {kind.__name__: kind for kind in _PARTS}
  return kinds[fields.pop('type')](**fields)


def build(
  config: config_lib.Config, phase: config_lib.Phase, round_index: int = 0
) -> likelihood.LikelihoodModel:
  """Returns the model of `config.model` with the phase's noise law.

  Raises:
    errors.UserError: the dataclass is of no known model, or has no use for
      the guide.
  """
  p_mean = config_lib.pick(phase.p_mean, round_index)
  p_std = config_lib.pick(phase.p_std, round_index)
  arguments = (p_mean, p_std, config.executor.remat)
  model = _build(config.model, *arguments)
  if config.guide is None:
    return model
  guide = _build(config.guide, *arguments)
  for part in (model, guide):
    if not isinstance(part, diffusion.Diffusion):
      raise errors.UserError(
        f'config.guide goes with denoisers, not with {type(part).__name__}'
        ' models: unset it and config.guide_from'
      )
  return dataclasses.replace(model, guide=guide.denoiser)


def tokenizer(config: Any) -> vqvae_learner.Learner | None:
  """What trains the tokenizer of a model's config; None if it has none."""
  if not isinstance(config, var.VarConfig):
    return None
  return vqvae_learner.build(config.tokenizer)


def _build(
  config: Any, p_mean: float, p_std: float, remat: bool
) -> likelihood.LikelihoodModel:
  """The table."""
  match config:
    case toy.ToyConfig():
      return toy.build(config, p_mean, p_std, remat)
    case edm.EdmConfig():
      return edm.build(config, p_mean, p_std, remat)
    case edm2.Edm2Config():
      return edm2.build(config, p_mean, p_std, remat)
    case var.VarConfig():
      return var.build(config, remat)
  raise errors.UserError(
    f'the model is a {type(config).__name__}; known:'
    f' {", ".join(c.__name__ for c in CONFIGS)}'
  )
