"""Direct Discriminative Optimization from the command line.

  python -m ddo_jax.main --config=configs/digits.py --workdir=runs/digits

A recipe, given by its path or the name of one in configs/ (--config=digits),
names every knob; --config.x.y=v overrides one. Each --mode takes the flags
beside it and no others:

  selfplay    --config --workdir
              Pretrains, plays the rounds, writes the report (the default).
  tune        --config --workdir
              selfplay with config.tune.members in each round, which any number
              of processes play together: each gives this command.
  check       --config --workdir
              Lists all that selfplay would miss, or what it found; then stops.
  plan        --config [--chip=h100 --num_devices=8, or --probe; --workdir]
              What selfplay will take: memory, arithmetic and hours, on chips
              that need not be there, or measured here; needs no data.
  pretrain    --config --workdir
              The pretraining alone.
  discriminator  --config --workdir [--round]
              Trains a discriminator of real images against a round's pool, for
              config.discriminator_from and config.sampler.discriminator.
  sample      --config --workdir [--params --output]
              [--num_samples, or --seeds=0-15; --classes=3,7]
              Draws images of the newest params, or of --params: for each seed
              one, or one of each class that is named.
  evaluate    --config --workdir [--params --output --against --save_images]
              --config --images --output [--against]
              Scores params, or images that are there already.
  report      --workdir [--control]
              Writes report.html again; beside the curves of a control run.
  doctor      --workdir [--config]
              Says what a run is, finished or going on: healthy, dead,
              saturated, overshooting, starved, or led astray by a shortcut;
              with the numbers and a remedy. Exits with 2 if it is ill.
  convert     --source --output [--config --sha256]
              Released weights to a folder of params, and back to a file.
  encode      --config --output [--mirrored]
              The training images as latents, for a recipe of a latent model;
              their folder then serves as --config.data.source.
  fid_stats   --config --output
              Statistics of the data; their folder then serves as
              --config.evaluation.protocol.

A notebook calls the function of the mode's name with a config of its own.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import logging
import os
import pathlib
import re
import shlex
import sys
from typing import Any
from typing import NamedTuple
from typing import NoReturn

from absl import app
from absl import flags
from absl import logging as absl_logging
import jax
from ml_collections import config_flags

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import recipes
from ddo_jax import settings
from ddo_jax.assets import store
from ddo_jax.evaluation import score
from ddo_jax.method import likelihood
from ddo_jax.method import negatives
from ddo_jax.method import noise
from ddo_jax.method import objective
from ddo_jax.method import siblings  # noqa: F401 (the command line names them)
from ddo_jax.report import page
from ddo_jax.runtime import chips
from ddo_jax.runtime import disk
from ddo_jax.runtime import interruption
from ddo_jax.runtime import processes
from ddo_jax.runtime import records
from ddo_jax.samplers import contract
from ddo_jax.training import check as check_lib
from ddo_jax.training import discriminator as discriminator_lib
from ddo_jax.training import encode as encode_lib
from ddo_jax.training import plan as plan_lib
from ddo_jax.training import run as run_lib
from ddo_jax.training import samples
from ddo_jax.training import workspace
from ddo_jax.tuning import doctor as doctor_lib
from ddo_jax.weights import released


class _ObjectParser(flags.ArgumentParser):
  """Parses a field that holds an object, see `settings.parse_object`."""

  def __init__(self, base: type):
    super().__init__()
    self.base = base
    self.syntactic_help = f'a {base.__name__}'

  def parse(self, argument: Any) -> Any:
    if not isinstance(argument, str):  # absl also parses the default
      return argument
    return settings.parse_object(self.base, argument)

  def flag_type(self) -> str:
    return self.base.__name__


class _OrAutoParser(flags.ArgumentParser):
  """Parses a number, or yes or no, or 'auto'."""

  syntactic_help = "a whole number, true, false or 'auto'"

  def parse(self, argument: Any) -> Any:
    if not isinstance(argument, str):  # absl also parses the default
      return argument
    return settings.parse_or_auto(argument)


class _IntegerParser(flags.IntegerParser):
  """Parses a whole number, which people also write as 1e5."""

  def convert(self, argument: Any) -> int:
    try:
      return super().convert(argument)
    except ValueError:
      number = float(argument)
      if not number.is_integer():
        raise ValueError(f'{argument} is no whole number') from None
      return int(number)


class _RecipeParser(flags.ArgumentParser):
  """Loads a recipe by name or path, see `recipes.find`."""

  def __init__(self, loader: flags.ArgumentParser):
    super().__init__()
    self.loader = loader

  def parse(self, path: str) -> config_lib.Config:
    found = recipes.find(path)
    try:
      with recipes.neighbours(found):
        return self.loader.parse(found)
    except Exception as error:  # a recipe is a program
      raise errors.UserError(recipes.fault(path, error)) from error


config_flags.register_flag_parser_for_type(int, _IntegerParser())
# Fields of these types can be replaced whole: --config.sampler='Heun()'.
for _base in (
  contract.Sampler,
  likelihood.ModelConfig,
  negatives.Negatives,
  noise.NoiseLaw,
  objective.Objective,
):
  config_flags.register_flag_parser_for_type(_base, _ObjectParser(_base))
config_flags.register_flag_parser_for_type(settings.OrAuto, _OrAutoParser())

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'A recipe, by its name or path; --config.x.y=v overrides any of its fields.',
)
_flag = flags.FLAGS['config']
_flag.parser = _RecipeParser(_flag.parser)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
_PARAMS = flags.DEFINE_string(
  'params',
  None,
  'sample, evaluate: a folder of params, a released file or its published name;'
  ' default the newest.',
)
_ROUND = flags.DEFINE_integer(
  'round', 0, 'discriminator: of the pool of which round.', lower_bound=0
)
_NUM_SAMPLES = flags.DEFINE_integer(
  'num_samples', 100, 'sample: takes seeds 0, 1, ….', lower_bound=1
)
_SEEDS = flags.DEFINE_string(
  'seeds', None, 'sample: which seeds, such as 0-15 or 3,7.'
)
_CLASSES = flags.DEFINE_string(
  'classes', None, 'sample: draws each seed for each of these, such as 3,7.'
)
_CONTROL = flags.DEFINE_string(
  'control', None, 'report: the workdir of a run whose curve is drawn beside.'
)
_OUTPUT = flags.DEFINE_string(
  'output',
  None,
  'sample, evaluate: folder of the result; default the workdir. convert: a'
  ' folder of params, or a .safetensors or .pth file, to write. encode: the'
  ' folder of the latents. fid_stats: the folder of the statistics.',
)
_MIRRORED = flags.DEFINE_bool(
  'mirrored',
  False,
  'encode: each image a second time, mirrored, as DiT and SiT were trained.',
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
_CHIP = flags.DEFINE_string(
  'chip',
  None,
  f'plan: for which devices, one of {", ".join(chips.CHIPS)}; default those at'
  ' hand.',
)
_NUM_DEVICES = flags.DEFINE_integer(
  'num_devices', 0, 'plan: how many of --chip; default 1.', lower_bound=0
)
_PROBE = flags.DEFINE_bool(
  'probe', False, 'plan: time ten steps and a call of the sampler here.'
)
_SOURCE = flags.DEFINE_string(
  'source',
  None,
  'convert: a .pkl, .safetensors or .pth by its path, its published name,'
  ' http(s):// or hf://owner/name/file; or a folder of params.',
)
_SHA256 = flags.DEFINE_string(
  'sha256', None, 'convert: what the source must hash to.'
)

_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  'Several processes: host:port of process 0. Under SLURM, Open MPI, Kubernetes'
  ' and on TPU pods this flag and the next two are found out.',
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Several processes: how many; 1 looks for no others.'
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, "Several processes: this one's number, from 0."
)

_LOGGER = logging.getLogger('ddo_jax.main')  # also as __main__
_ILL = 2  # the exit status where the doctor found something


def selfplay(
  config: config_lib.Config, workdir: pathlib.Path, command: str = ''
) -> pathlib.Path:
  """Pretrains, plays all rounds and reports.

  Args:
    config: the run's.
    workdir: its folder.
    command: the command line that the report names; '' for none.

  Returns:
    The path of report.html.
  """
  run_lib.play(config, workdir, command)
  return workdir / 'report.html'


def tune(
  config: config_lib.Config, workdir: pathlib.Path, command: str = ''
) -> pathlib.Path:
  """Does what `selfplay` does, beside other processes that make this call.

  Args:
    config: the run's, with `config.tune.members`.
    workdir: its folder, which the processes share.
    command: the command line that the report names; '' for none.

  Returns:
    The path of report.html.

  Raises:
    errors.UserError: there are no members.
  """
  members = config.tune.members
  errors.require(
    members > 0, 'tune.members', members, 'positive for --mode=tune'
  )
  run_lib.play(config, workdir, command, peers=True)
  return workdir / 'report.html'


def check(config: config_lib.Config, workdir: pathlib.Path) -> str:
  """Checks all that `selfplay` would need, and does nothing else.

  Returns:
    A line for each check: its name and what was found.

  Raises:
    errors.UserError: something is missing or wrong; there is a line for each.
  """
  return '\n'.join(check_lib.training(workspace.Run(config, workdir)))


def plan(
  config: config_lib.Config,
  chip: str = '',
  num_devices: int = 0,
  probe: bool = False,
  workdir: pathlib.Path | None = None,
) -> plan_lib.Plan:
  """Plans what `selfplay` would take; see `plan.plan` for the arguments.

  Returns:
    A plan, which prints as tables.

  Raises:
    errors.UserError: the config makes no sense, the chip is not known, or the
      run does not fit into its devices; the line says what would.
  """
  return plan_lib.plan(config, chip, num_devices, probe, workdir)


def pretrain(config: config_lib.Config, workdir: pathlib.Path) -> pathlib.Path:
  """Pretrains; returns the folder of params that a first round starts from."""
  return run_lib.pretrain(workspace.Run(config, workdir))


def discriminator(
  config: config_lib.Config, workdir: pathlib.Path, index: int = 0
) -> pathlib.Path:
  """Trains a discriminator of real images against the pool of a round.

  Args:
    config: the run's; `config.discriminator` says how it is trained.
    workdir: its folder, in which the round has begun.
    index: the number of the round.

  Returns:
    The folder of its params, for `config.discriminator_from`; see
    `training.discriminator.fit`.
  """
  config_lib.validate(config)
  with workspace.claimed(config, workdir):
    return discriminator_lib.train(workspace.Run(config, workdir), index)


def params_folder(
  params: pathlib.Path | str | None,
  config: config_lib.Config,
  output: pathlib.Path,
) -> pathlib.Path | None:
  """Returns the folder of params that --params means.

  A folder, or None for a run's newest params, is returned as it is. Anything
  else is fetched, if need be, and converted into a folder in `output`/weights.
  """
  if params is None:
    return None
  return released.folder_of(
    name=str(params),
    folder=output / 'weights',
    setting='--params',
    config=config.model,
  )


def sample(
  config: config_lib.Config,
  workdir: pathlib.Path,
  params: pathlib.Path | str | None = None,
  num_samples: int = 100,
  output: pathlib.Path | None = None,
  seeds: Sequence[int] = (),
  classes: Sequence[int] = (),
) -> pathlib.Path:
  """Draws images: samples.npz and samples.png; see `samples.draw`.

  Args:
    config: `config.sampler.guidance` guides by the model without labels.
    workdir: the folder of a run.
    params: a folder of params, a released file or its name; None takes the
      run's newest.
    num_samples: how many seeds are drawn where none are named, from 0 on.
    output: the folder of the result; None is the workdir.
    seeds: the images' seeds.
    classes: each seed is drawn for each of these; () draws it once.

  Returns:
    The path of samples.png.
  """
  run = workspace.Run(config, workdir)
  output = output or workdir
  seeds = seeds or range(num_samples)
  samples.check(run, seeds, classes)
  check_lib.sampling(run, params, scored=False)
  folder = params_folder(params, config, output)
  folder = folder or workspace.newest_params(workdir)
  return samples.draw(run, folder, output, seeds, classes)


def evaluate(
  config: config_lib.Config,
  workdir: pathlib.Path,
  params: pathlib.Path | str | None = None,
  output: pathlib.Path | None = None,
  save_images: pathlib.Path | None = None,
) -> dict[str, Any]:
  """Scores params; see `score.score_params`.

  `params` may be a released file, or the name of one: from a .pkl to its FID is
  one command.
  """
  run = workspace.Run(config, workdir)
  check_lib.sampling(run, params, scored=True)
  folder = params_folder(params, config, output or workdir)
  return score.score_params(run, folder, output, save_images)


def report(
  workdir: pathlib.Path, control: pathlib.Path | None = None
) -> pathlib.Path:
  """Writes report.html of a run, finished or not; returns its path."""
  return page.write(workdir, control)


def doctor(
  workdir: pathlib.Path, config: config_lib.Config | None = None
) -> doctor_lib.Diagnosis:
  """Says what a run is; see `doctor.examine`.

  Args:
    workdir: its folder, in which nothing is written and no lock is taken.
    config: where data and model are to be taken from, if what the run recorded
      is not at hand.

  Returns:
    A diagnosis, which prints as lines.
  """
  return doctor_lib.examine(workdir, config)


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
    config: a recipe with the model, for a file that does not say which it is.
    sha256: what the source must hash to, as hex; None if that is not known.

  Returns:
    output.

  Raises:
    errors.UserError: the source is missing, refused or of no known network.
  """
  model = config.model if config else None
  folder = pathlib.Path(source).expanduser()
  if folder.is_dir():
    weights = released.load_folder(folder, model)
  else:
    asset = store.asset_of(source)
    path = store.resolve(source, '--source', sha256)
    weights = released.read(path, asset.address if asset else source, model)
  if 'licence' in weights.provenance:
    _LOGGER.info('licence of the weights: %s', weights.provenance['licence'])
  if output.suffix in released.SUFFIXES:
    released.write(output, weights)
  else:
    released.save_folder(output, weights)
  return output


def encode(
  config: config_lib.Config, output: pathlib.Path, mirrored: bool = False
) -> pathlib.Path:
  """Writes images as latents; see `encode.write`.

  Args:
    config: a recipe of a model of latents, whose `data` names images.
    output: the folder of the set; a call that was cut off goes on in it.
    mirrored: whether each image is there a second time, mirrored.

  Returns:
    output.
  """
  return encode_lib.write(workspace.Run(config, None), output, mirrored)


def fid_stats(config: config_lib.Config, output: pathlib.Path) -> pathlib.Path:
  """Makes a protocol of a data set; returns its folder."""
  return score.write_fid_stats(
    config.evaluation, config.data, output, config.labels
  )


def _path(flag: flags.FlagHolder) -> pathlib.Path | None:
  if not flag.value:
    return None
  path = pathlib.Path(flag.value).expanduser()
  disk.check_path(f'--{flag.name}', path)
  return path


def _command() -> str:
  """Returns the command line, which is the same for all processes of a run."""
  own = re.compile(r' --?process_id[= ]\S+')
  return own.sub('', f'python -m ddo_jax.main {shlex.join(sys.argv[1:])}')


def _selfplay() -> Any:
  return selfplay(_CONFIG.value, _path(_WORKDIR), _command())


def _tune() -> Any:
  return tune(_CONFIG.value, _path(_WORKDIR), _command())


def _check() -> Any:
  return check(_CONFIG.value, _path(_WORKDIR))


def _plan() -> Any:
  return plan(
    config=_CONFIG.value,
    chip=_CHIP.value or '',
    num_devices=_NUM_DEVICES.value,
    probe=_PROBE.value,
    workdir=_path(_WORKDIR),
  )


def _pretrain() -> Any:
  return pretrain(_CONFIG.value, _path(_WORKDIR))


def _discriminator() -> Any:
  return discriminator(_CONFIG.value, _path(_WORKDIR), _ROUND.value)


def _numbers(flag: flags.FlagHolder) -> tuple[int, ...]:
  return samples.parse_numbers(flag.name, flag.value) if flag.value else ()


def _sample() -> Any:
  if flags.FLAGS['num_samples'].present and _SEEDS.value:
    raise errors.UserError('--num_samples and --seeds: give one of them')
  return sample(
    config=_CONFIG.value,
    workdir=_path(_WORKDIR),
    params=_PARAMS.value or None,
    num_samples=_NUM_SAMPLES.value,
    output=_path(_OUTPUT),
    seeds=_numbers(_SEEDS),
    classes=_numbers(_CLASSES),
  )


def _evaluate() -> Any:
  if _IMAGES.value:
    config = _CONFIG.value
    return score.score_images(
      settings=config.evaluation,
      seed=config.seed,
      data=config.data,
      path=_path(_IMAGES),
      output=_path(_OUTPUT),
    )
  return evaluate(
    config=_CONFIG.value,
    workdir=_path(_WORKDIR),
    params=_PARAMS.value or None,
    output=_path(_OUTPUT),
    save_images=_path(_SAVE_IMAGES),
  )


def _report() -> Any:
  write = functools.partial(report, _path(_WORKDIR), _path(_CONTROL))
  return processes.decide('report', lambda: str(write()))


def _doctor() -> Any:
  # A run that is going holds the accelerator.
  jax.config.update('jax_platforms', 'cpu')
  return doctor(_path(_WORKDIR), _CONFIG.value)


def _convert() -> Any:
  write = functools.partial(
    convert,
    source=_SOURCE.value,
    output=_path(_OUTPUT),
    config=_CONFIG.value,
    sha256=_SHA256.value,
  )
  return processes.decide('convert', lambda: str(write()))


def _encode() -> Any:
  return encode(_CONFIG.value, _path(_OUTPUT), _MIRRORED.value)


def _fid_stats() -> Any:
  return fid_stats(_CONFIG.value, _path(_OUTPUT))


class _Mode(NamedTuple):
  """How a mode is called.

  Attributes:
    run: calls it with the flags.
    needs: the flags that it cannot do without.
    takes: the flags that it also reads.
    example: a command line of it, after --mode.
  """

  run: Callable[[], Any]
  needs: tuple[flags.FlagHolder, ...]
  takes: tuple[flags.FlagHolder, ...]
  example: str


_RUN = '--config=configs/digits.py --workdir=runs/digits'
_MODES = {
  'selfplay': _Mode(_selfplay, (_CONFIG, _WORKDIR), (), _RUN),
  'tune': _Mode(
    _tune, (_CONFIG, _WORKDIR), (), f'{_RUN} --config.tune.members=8'
  ),
  'check': _Mode(_check, (_CONFIG, _WORKDIR), (), _RUN),
  'plan': _Mode(
    _plan,
    (_CONFIG,),
    (_WORKDIR, _CHIP, _NUM_DEVICES, _PROBE),
    '--config=configs/digits.py --chip=h100 --num_devices=8',
  ),
  'pretrain': _Mode(_pretrain, (_CONFIG, _WORKDIR), (), _RUN),
  'discriminator': _Mode(_discriminator, (_CONFIG, _WORKDIR), (_ROUND,), _RUN),
  'sample': _Mode(
    _sample,
    (_CONFIG, _WORKDIR),
    (_PARAMS, _NUM_SAMPLES, _SEEDS, _CLASSES, _OUTPUT),
    _RUN,
  ),
  'evaluate': _Mode(
    _evaluate,
    (_CONFIG, _WORKDIR),
    (_PARAMS, _OUTPUT, _AGAINST, _SAVE_IMAGES),
    _RUN,
  ),
  'report': _Mode(_report, (_WORKDIR,), (_CONTROL,), '--workdir=runs/digits'),
  'doctor': _Mode(_doctor, (_WORKDIR,), (_CONFIG,), '--workdir=runs/digits'),
  'convert': _Mode(
    _convert,
    (_SOURCE, _OUTPUT),
    (_CONFIG, _SHA256),
    '--source=edm-cifar10-32x32-uncond-vp.pkl --output=weights/cifar10',
  ),
  'encode': _Mode(
    _encode,
    (_CONFIG, _OUTPUT),
    (_MIRRORED,),
    '--config=configs/imagenet256_dit_xl2.py --config.data.source=images'
    ' --output=latents',
  ),
  'fid_stats': _Mode(
    _fid_stats,
    (_CONFIG, _OUTPUT),
    (),
    '--config=configs/cifar10_edm_uncond.py --output=fid_stats',
  ),
}
_EVALUATE_IMAGES = _Mode(
  _evaluate,
  (_CONFIG, _IMAGES, _OUTPUT),
  (_AGAINST,),
  '--config=configs/cifar10_edm_uncond.py --images=samples.npz --output=scores',
)
_MODE = flags.DEFINE_enum(
  'mode', 'selfplay', list(_MODES), 'What to do; --help lists their flags.'
)
_RENAMED_MODES = {'reference': 'fid_stats'}


def _mode() -> _Mode:
  if _MODE.value == 'evaluate' and _IMAGES.value:
    return _EVALUATE_IMAGES
  return _MODES[_MODE.value]


def _known_fields(override: str) -> str:
  """Returns what could stand in place of an override that names no field."""
  dotted = override.split('=')[0].lstrip('-').partition('.')[2]
  if dotted in config_lib.RENAMED:
    return f'this is now --config.{config_lib.RENAMED[dotted]}'
  loaded = flags.FLAGS['config'].value
  holder = loaded if dataclasses.is_dataclass(loaded) else config_lib.Config()
  name = 'config'
  for part in dotted.split('.'):
    known = [field.name for field in dataclasses.fields(holder)]
    if part not in known:
      kind = type(holder).__name__
      near = errors.near_miss(part, known)
      return (
        f'{name} ({kind}) has no field {part!r}; it has {", ".join(known)}'
        f'{near}'
      )
    holder = getattr(holder, part)
    name = f'{name}.{part}'
    if not dataclasses.is_dataclass(holder):
      return f'{name} is a value, not a group of fields'
  return f'{name} is a group of fields; set one of them'


def _parse_flags(argv: Sequence[str]) -> Sequence[str]:
  """Runs absl's parser, with one line in place of a traceback."""
  for before, after in _RENAMED_MODES.items():
    if f'--mode={before}' in argv:
      sys.exit(f'FATAL --mode={before} is now --mode={after}')
  try:
    return flags.FLAGS(list(argv))
  except Exception as error:
    for arg in argv:
      if arg.lstrip('-').startswith('config.') and 'not found' in str(error):
        sys.exit(f'FATAL {arg}: {_known_fields(arg)}')
    sys.exit(f'FATAL {error}')


def _check_flags(argv: Sequence[str]) -> None:
  """Exits where a mode lacks a flag, or is given another mode's."""
  if len(argv) > 1:
    sys.exit(f'FATAL unexpected argument {argv[1]!r}; flags start with --')
  mode = _mode()
  lost = [f'--{flag.name}' for flag in mode.needs if not flag.value]
  if lost:
    sys.exit(
      f'FATAL --mode={_MODE.value} wants {" and ".join(lost)}, e.g.'
      f' {mode.example}'
    )
  read = [flag.name for flag in (*mode.needs, *mode.takes)]
  ours = {flag.name for other in _MODES.values() for flag in other.takes}
  ours |= {flag.name for other in _MODES.values() for flag in other.needs}
  for name in sorted(ours | {_IMAGES.name}):
    if flags.FLAGS[name].present and name not in read:
      known = ', '.join(f'--{flag}' for flag in read)
      sys.exit(
        f'FATAL --mode={_MODE.value} does not read --{name}; it reads {known}'
      )


def _print(result: Any) -> None:
  """Prints scores as a table, and what else a mode returns as it is."""
  if not isinstance(result, dict):
    print(result)
    return
  print('\n'.join(score.lines(result)))
  if _AGAINST.value:
    other = records.read_json(_path(_AGAINST))
    for name, gap in score.compare(result, other).items():
      print(f'{name:16} {gap:+.4f} against {_AGAINST.value}')


def _fail(error: errors.UserError) -> NoReturn:
  """Ends the program at once, with the lines of a mistake.

  Python would wait for its threads: after a save that failed, those of Orbax
  wait for minutes, and then print tracebacks.
  """
  sys.stdout.flush()
  for line in str(error).splitlines():
    print(f'FATAL {line}', file=sys.stderr)
  sys.stderr.flush()
  os._exit(1)


def _main(argv: Sequence[str]) -> None:
  _check_flags(argv)
  # Orbax speaks through absl, we through the logger below, jax has its own.
  # What goes wrong in Orbax is also raised.
  absl_logging.set_verbosity(absl_logging.FATAL)
  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    cache = pathlib.Path('~/.cache/ddo_jax/xla').expanduser()
    jax.config.update('jax_compilation_cache_dir', str(cache))
  try:
    processes.initialize(
      _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    )
    # Of several processes, one speaks.
    level = logging.INFO if processes.is_main() else logging.ERROR
    logging.getLogger('ddo_jax').setLevel(level)
    with processes.ending_together(), interruption.handled():
      processes.check_equal('the command line', _command())
      result = _mode().run()
      if processes.is_main():
        _print(result)
  except errors.UserError as error:
    _fail(error)
  if isinstance(result, doctor_lib.Diagnosis) and result.is_ill:
    sys.exit(_ILL)


if __name__ == '__main__':
  app.run(_main, flags_parser=_parse_flags)
