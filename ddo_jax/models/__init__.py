"""Models: the table from a config's dataclass to a LikelihoodModel."""

import dataclasses
from typing import Any

from ddo_jax import config as config_lib
from ddo_jax import likelihood
from ddo_jax.models import edm
from ddo_jax.models import edm2
from ddo_jax.models import toy

CONFIGS = (toy.ToyConfig, edm.EdmConfig, edm2.Edm2Config)


def from_json(recorded: dict[str, Any]) -> Any:
  """The model's config among what `config.to_json` wrote of a run.

  Raises:
    config.UserError: it is of no known model, or of another version.
  """
  fields = {
    name.removeprefix('model.'): tuple(v) if isinstance(v, list) else v
    for name, v in recorded.items()
    if name.startswith('model.')
  }
  name = fields.pop('type', None)
  try:
    return {kind.__name__: kind for kind in CONFIGS}[name](**fields)
  except (KeyError, TypeError) as error:
    raise config_lib.UserError(
      f'the weights were written with the model {name!r} ({error}), which is'
      f' not known here; known: {", ".join(c.__name__ for c in CONFIGS)}'
    ) from error


def build(
  config: config_lib.Config, phase: config_lib.Phase, round_index: int = 0
) -> likelihood.LikelihoodModel:
  """Returns the model of `config.model` with the phase's noise law.

  Raises:
    config.UserError: the dataclass is of no known model.
  """
  p_mean = config_lib.pick(phase.p_mean, round_index)
  p_std = config_lib.pick(phase.p_std, round_index)
  arguments = (p_mean, p_std, config.executor.remat)
  model = _build(config.model, *arguments)
  if config.guide is None:
    return model
  guide = _build(config.guide, *arguments)
  return dataclasses.replace(model, guide=guide.denoiser)


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
  raise config_lib.UserError(
    f'the model is a {type(config).__name__}; known:'
    f' {", ".join(c.__name__ for c in CONFIGS)}'
  )
