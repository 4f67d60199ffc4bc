"""The published files that a run asks for, fetched before it begins."""

import pathlib

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax.assets import store
from ddo_jax.data import builders
from ddo_jax.evaluation import fidelity


def wanted(
  config: config_lib.Config, workdir: pathlib.Path
) -> list[store.Wanted]:
  """Returns the published files that a run asks for and has not converted."""
  weights = store.wanted(
    {
      '--config.init_from': config.init_from,
      '--config.guide_from': config.guide_from,
      '--config.tokenizer_from': config.tokenizer_from,
      '--config.vae_from': config.vae_from,
    }
  )
  made = workdir / 'weights'
  missing = [want for want in weights if not (made / want.asset.name).exists()]
  data = config.data
  return [
    *missing,
    *builders.wanted(data.source, data.data_dir, data.raw_dir),
    *fidelity.wanted(config.evaluation),
  ]


def fetch(config: config_lib.Config, workdir: pathlib.Path) -> None:
  """Fetches the published files that a run asks for.

  Raises:
    errors.UserError: some are not here and cannot be fetched; there is a line
      for each.
  """
  lines = store.fetch_all(wanted(config, workdir))
  if lines:
    raise errors.UserError('\n'.join(lines))
