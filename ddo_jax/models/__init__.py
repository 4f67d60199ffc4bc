"""Models: the table from a config's dataclass to a LikelihoodModel."""

from ddo_jax import config as config_lib
from ddo_jax import likelihood
from ddo_jax.models import edm
from ddo_jax.models import edm2
from ddo_jax.models import toy


def build(
  config: config_lib.Config, phase: config_lib.Phase, round_index: int = 0
) -> likelihood.LikelihoodModel:
  """Returns the model of `config.model` with the phase's noise law.

  Raises:
    config.UserError: the dataclass is of no known model.
  """
  p_mean = config_lib.pick(phase.p_mean, round_index)
  p_std = config_lib.pick(phase.p_std, round_index)
  arguments = (config.model, p_mean, p_std, config.executor.remat)
  match config.model:
    case toy.ToyConfig():
      return toy.build(*arguments)
    case edm.EdmConfig():
      return edm.build(*arguments)
    case edm2.Edm2Config():
      return edm2.build(*arguments)
  raise config_lib.UserError(
    f'config.model is a {type(config.model).__name__}; known: ToyConfig,'
    ' EdmConfig, Edm2Config'
  )
