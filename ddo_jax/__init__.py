"""Direct Discriminative Optimization (arXiv 2503.01103) in JAX and Flax.

The names here are what a training loop of one's own needs: the objectives, and
the families that give them log-ratios. Runs are played by `ddo_jax.main`.
"""

import importlib
from typing import Any
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from ddo_jax.method.autoregressive import Autoregressive
  from ddo_jax.method.ddo import DDO
  from ddo_jax.method.diffusion import Diffusion
  from ddo_jax.method.likelihood import Batch
  from ddo_jax.method.likelihood import LikelihoodModel
  from ddo_jax.method.objective import MLE
  from ddo_jax.method.objective import Objective
  from ddo_jax.method.objective import Rows
  from ddo_jax.method.siblings import CCA
  from ddo_jax.method.siblings import DPO
  from ddo_jax.method.siblings import FDivergence
  from ddo_jax.method.siblings import Unlearning

__version__ = '0.1.0'

__all__ = [
  'CCA',
  'DDO',
  'DPO',
  'MLE',
  'Autoregressive',
  'Batch',
  'Diffusion',
  'FDivergence',
  'LikelihoodModel',
  'Objective',
  'Rows',
  'Unlearning',
]

_HOMES = {
  'CCA': 'siblings',
  'DDO': 'ddo',
  'DPO': 'siblings',
  'MLE': 'objective',
  'Autoregressive': 'autoregressive',
  'Batch': 'likelihood',
  'Diffusion': 'diffusion',
  'FDivergence': 'siblings',
  'LikelihoodModel': 'likelihood',
  'Objective': 'objective',
  'Rows': 'objective',
  'Unlearning': 'siblings',
}


def __getattr__(name: str) -> Any:
  """Imports a name's module when it is asked for.

  The processes that read images (`data.workers`) so start without JAX, which
  takes a second and 130 MB.
  """
  if name not in _HOMES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module = importlib.import_module(f'{__name__}.method.{_HOMES[name]}')
  return getattr(module, name)
