"""Command line: `python -m ddo_jax.main --config=configs/digits.py`.

Flags and dispatch only; a notebook calls `run` with a config of its own.
"""

from collections.abc import Sequence
import dataclasses
import json
import logging
import os
import pathlib
import signal
import sys
from typing import Any

from absl import app
from absl import flags
from absl import logging as absl_logging
import jax
from ml_collections import config_flags
import numpy as np

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import models
from ddo_jax import rng
from ddo_jax.evaluation import score
from ddo_jax.method import generate
from ddo_jax.report import page
from ddo_jax.runtime import records
from ddo_jax.training import loop as loop_lib
from ddo_jax.training import round as round_lib
from ddo_jax.training import run as run_lib
from ddo_jax.weights import download
from ddo_jax.weights import released

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A recipe; --config.x.y=v overrides any of its fields.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
_MODE = flags.DEFINE_enum(
  'mode',
  'selfplay',
  [
    'selfplay',
    'pretrain',
    'sample',
    'evaluate',
    'report',
    'convert',
    'reference',
  ],
  'selfplay: pretrain, play the rounds, report; pretrain .. report: one part of'
  ' it; convert: released weights to a folder of params, and back; reference:'
  ' statistics of the data for --config.evaluation.fid_stats.',
)
_PARAMS = flags.DEFINE_string(
  'params', None, 'sample, evaluate: a folder of params; default the newest.'
)
_NUM_SAMPLES = flags.DEFINE_integer(
  'num_samples', 100, 'sample: how many images.', lower_bound=1
)
_CONTROL = flags.DEFINE_string(
  'control', None, 'report: the workdir of a run whose curve is drawn beside.'
)
_OUTPUT = flags.DEFINE_string(
  'output',
  None,
  'sample, evaluate: folder of the result; default workdir. convert: a folder'
  ' of params, or a .safetensors or .pth file, to write.',
)
_IMAGES = flags.DEFINE_string(
  'images', None, 'evaluate: score these, a folder or zip of PNGs or an .npz.'
)
_AGAINST = flags.DEFINE_string(
  'against', None, 'evaluate: an eval.json; also print the differences to it.'
)
_SAVE_IMAGES = flags.DEFINE_string(
  'save_images',
  None,
  "evaluate: a folder (PNGs in EDM's layout) or .npz (OpenAI's) to write.",
)
_SOURCE = flags.DEFINE_string(
  'source',
  None,
  'convert: a .pkl, .safetensors or .pth by its path, http(s):// or'
  ' hf://owner/name/file; or a folder of params.',
)
_SHA256 = flags.DEFINE_string(
  'sha256', None, 'convert: what the source must hash to.'
)

_LOGGER = logging.getLogger('ddo_jax.main')  # also as __main__


def sample(
  config: config_lib.Config,
  workdir: pathlib.Path,
  params: pathlib.Path | None = None,
  num_samples: int = 100,
  output: pathlib.Path | None = None,
) -> pathlib.Path:
  """Draws class-balanced images: samples.npz and samples.png.

  Args:
    config: `config.sampler.guidance` guides by the model without labels.
    workdir: of a run.
    params: a folder of params; None takes the run's newest.
    num_samples: images to draw.
    output: folder of the result; None is the workdir.

  Returns:
    The path of samples.png.
  """
  run_ = run_lib.Run(config, workdir)
  model = models.build(config, config.ddo)
  folder = params or run_lib.newest_params(workdir)
  weights, meta = run_lib.load_params(folder, model, run_.executor)
  images, labels = run_.generator(model).images(
    weights, rng.stream(config.seed, 'sample'), num_samples
  )
  output = output or workdir
  output.mkdir(parents=True, exist_ok=True)
  origin = json.dumps(meta.get('provenance', {}))
  np.savez(
    output / 'samples.npz', image=images, label=labels, provenance=origin
  )
  generate.save_grid(output / 'samples.png', images, model.pixel_values)
  return output / 'samples.png'


def convert(
  source: str,
  output: pathlib.Path,
  config: config_lib.Config | None = None,
  sha256: str | None = None,
) -> pathlib.Path:
  """Turns released weights into a folder of params, or back into a file.

  Args:
    source: see the flag.
    output: see the flag.
    config: whose model it is, for a file that does not say.
    sha256: what the source must hash to, as hex; None: not known.

  Returns:
    output.

  Raises:
    errors.UserError: the source is missing, refused or of no known network.
  """
  folder = pathlib.Path(source).expanduser()
  if folder.is_dir():
    weights = released.load_folder(folder)
  else:
    path, model = download.fetch(source, sha256), config and config.model
    weights = released.read(path, source, model)
  if 'licence' in weights.provenance:
    _LOGGER.info('licence of the weights: %s', weights.provenance['licence'])
  if output.suffix in released.SUFFIXES:
    released.write(output, weights)
  else:
    released.save_folder(output, weights)
  return output


def run(
  config: config_lib.Config,
  workdir: pathlib.Path,
  mode: str = 'selfplay',
  params: pathlib.Path | None = None,
  num_samples: int = 100,
  output: pathlib.Path | None = None,
  control: pathlib.Path | None = None,
  save_images: pathlib.Path | None = None,
) -> Any:
  """Runs one mode on a run's folder; see the flags."""
  if mode == 'selfplay':
    round_lib.play(config, workdir)
    return workdir / 'report.html'
  if mode == 'pretrain':
    return round_lib.pretrain(run_lib.Run(config, workdir))
  if mode == 'sample':
    return sample(config, workdir, params, num_samples, output)
  if mode == 'evaluate':
    run_ = run_lib.Run(config, workdir)
    return score.score_params(run_, params, output, save_images)
  return page.write(workdir, control)


def _known_fields(override: str) -> str:
  """What could stand in place of an override that names no field."""
  path = override.split('=')[0].removeprefix('--').split('.')[1:]
  holder, name = config_lib.Config(), 'config'
  loaded = flags.FLAGS['config'].value
  holder = loaded if dataclasses.is_dataclass(loaded) else holder
  for part in path:
    known = [field.name for field in dataclasses.fields(holder)]
    if part not in known:
      return f'{name} has no field {part!r}; it has: {", ".join(known)}'
    holder, name = getattr(holder, part), f'{name}.{part}'
    if not dataclasses.is_dataclass(holder):
      return f'{name} is a value, not a group of fields'
  return f'{name} is a group of fields; set one of them'


def _parse_flags(argv: Sequence[str]) -> Sequence[str]:
  """Absl's parser, with one line in place of a traceback."""
  try:
    return app.parse_flags_with_usage(list(argv))
  except Exception as error:
    for arg in argv:
      if arg.lstrip('-').startswith('config.') and 'not found' in str(error):
        sys.exit(f'FATAL {arg}: {_known_fields(arg)}')
    sys.exit(f'FATAL {error}')


def _check_flags(argv: Sequence[str]) -> None:
  """Exits where a mode lacks what it needs."""
  if len(argv) > 1:
    sys.exit(f'FATAL unexpected argument {argv[1]!r}; flags start with --')
  wanted, example = {
    'convert': (
      (_SOURCE, _OUTPUT),
      '--source=edm-cifar10-32x32-uncond-vp.pkl --output=weights/cifar10',
    ),
    'reference': (
      (_CONFIG, _OUTPUT),
      '--config=configs/cifar10_edm_uncond.py --output=references',
    ),
    'report': ((_WORKDIR,), '--workdir=runs/digits'),
  }.get(
    _MODE.value,
    (
      (_CONFIG, _OUTPUT if _IMAGES.value else _WORKDIR),
      '--config=configs/digits.py --workdir=runs/digits',
    ),
  )
  if lost := [f'--{flag.name}' for flag in wanted if not flag.value]:
    sys.exit(
      f'FATAL --mode={_MODE.value} wants {" and ".join(lost)}, e.g. {example}'
    )


def _dispatch() -> Any:
  """Does what the flags say; returns the mode's result."""
  path = lambda flag: (
    pathlib.Path(flag.value).expanduser() if flag.value else None
  )
  config, mode, output = _CONFIG.value, _MODE.value, path(_OUTPUT)
  if mode == 'convert':
    return convert(_SOURCE.value, output, config, _SHA256.value)
  if mode == 'reference':
    return score.write_fid_stats(config.evaluation, config.data, output)
  if mode == 'evaluate' and _IMAGES.value:
    return score.score_images(
      config.evaluation, config.seed, config.data, path(_IMAGES), output
    )
  return run(
    config,
    path(_WORKDIR),
    mode,
    path(_PARAMS),
    _NUM_SAMPLES.value,
    output,
    path(_CONTROL),
    path(_SAVE_IMAGES),
  )


def _print(result: Any) -> None:
  """Scores as a table, what else a mode returns as it is."""
  if not isinstance(result, dict):
    print(result)
    return
  print('\n'.join(score.lines(result)))
  if _AGAINST.value:
    other = records.read_json(pathlib.Path(_AGAINST.value).expanduser())
    for name, gap in score.compare(result, other).items():
      print(f'{name:16} {gap:+.4f} against {_AGAINST.value}')


def _main(argv: Sequence[str]) -> None:
  _check_flags(argv)
  # Orbax's voice; ours is the logger below, jax has its own.
  absl_logging.set_verbosity(absl_logging.ERROR)
  logging.getLogger('ddo_jax').setLevel(logging.INFO)
  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    cache = pathlib.Path('~/.cache/ddo_jax/xla').expanduser()
    jax.config.update('jax_compilation_cache_dir', str(cache))
  # Between training steps nothing needs saving: stages are whole or absent.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(loop_lib.EX_TEMPFAIL))
  try:
    _print(_dispatch())
  except errors.UserError as error:
    sys.exit(f'FATAL {error}')
  except KeyboardInterrupt:
    sys.exit('interrupted; run the same command again to continue')


if __name__ == '__main__':
  app.run(_main, flags_parser=_parse_flags)
