"""The published files that a run asks for, fetched before it begins."""

import pathlib

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax.assets import store
from ddo_jax.data import builders
from ddo_jax.evaluation import fidelity
from ddo_jax.weights import released


def wanted(
  config: config_lib.Config, folder: pathlib.Path
) -> list[store.Wanted]:
  """Returns the published files that a run asks for.

  Args:
    config: the run's.
    folder: where it keeps converted weights, which are not asked for again.
  """
  named = {'--config.vae_from': config.vae_from}
  for field in ('init_from', 'guide_from', 'tokenizer_from'):
    name = getattr(config, field)
    if name and released.found(name, folder) is None:
      named[f'--config.{field}'] = name
  data = config.data
  return [
    *store.wanted(named),
    *builders.wanted(data.source, data.data_dir, data.raw_dir),
    *fidelity.wanted(config.evaluation),
  ]


def fetch(config: config_lib.Config, folder: pathlib.Path) -> list[str]:
  """Fetches the published files that a run asks for; returns their names.

  Args:
    config: the run's.
    folder: where it keeps converted weights.

  Raises:
    errors.UserError: some are not here and cannot be fetched; there is a line
      for each.
  """
  files = wanted(config, folder)
  lines = store.fetch_all(files)
  if lines:
    raise errors.UserError('\n'.join(lines))
  return [asset.name for asset, _ in files]
