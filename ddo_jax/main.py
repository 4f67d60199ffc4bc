"""Command line: `python -m ddo_jax.main --config=… --workdir=…`."""

import json
import pathlib

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

from ddo_jax import selfplay

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A recipe; --config.x.y=v overrides any of its fields.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')


def main(argv):
  del argv
  logging.set_verbosity(logging.INFO)
  s = selfplay.play(_CONFIG.value, pathlib.Path(_WORKDIR.value))
  print(json.dumps(s, indent=1)[:3000])


if __name__ == '__main__':
  app.run(main)
