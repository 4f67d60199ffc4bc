"""What the stages of one run share: its folder, data, devices and weights."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import logging
import pathlib
import shutil
import typing
from typing import Any

import jax

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import rng
from ddo_jax import settings
from ddo_jax.assets import download
from ddo_jax.assets import store
from ddo_jax.data import classes as classes_lib
from ddo_jax.data import codec as codec_lib
from ddo_jax.data import labels as labels_lib
from ddo_jax.data import latent_set
from ddo_jax.data import sources
from ddo_jax.data import workers
from ddo_jax.evaluation import evaluator as evaluator_lib
from ddo_jax.evaluation import measure
from ddo_jax.evaluation import protocols
from ddo_jax.method import diffusion
from ddo_jax.method import generate
from ddo_jax.method import likelihood
from ddo_jax.models import vae as vae_lib
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import disk
from ddo_jax.runtime import layout as layout_lib
from ddo_jax.runtime import lock
from ddo_jax.runtime import manifest as manifest_lib
from ddo_jax.runtime import processes
from ddo_jax.runtime import records
from ddo_jax.training import fit as fit_lib
from ddo_jax.training import loop as loop_lib
from ddo_jax.weights import released
from ddo_jax.weights import vae_names

_LOGGER = logging.getLogger(__name__)
# What stages leave in a run's folder that would cost time to make again:
# folders of params, and what is numbered.
_FOLDERS = ('*/params', 'round_*/promoted')
_NUMBERED = (
  '*/checkpoints/*',
  'round_*/members/*/checkpoints/*',
  'round_*/fakes/*.npz',
)
_STAGES = ('tokenizer', 'pretrain', 'round_*')


def costly(workdir: pathlib.Path) -> list[str]:
  """Returns what in a run's folder cost time to make, by its place in it."""
  found = [path for pattern in _FOLDERS for path in workdir.glob(pattern)]
  for pattern in _NUMBERED:
    for path in workdir.glob(pattern):
      # What is cut off, or still being written, has a longer name.
      if path.name.removesuffix('.npz').isdigit():
        found.append(path if path.is_dir() else path.parent)
  return sorted({path.relative_to(workdir).as_posix() for path in found})


@functools.cache
def _warn(line: str) -> None:
  """Logs a warning once, however often a folder is looked at."""
  _LOGGER.warning('%s', line)


def top_manifest(workdir: pathlib.Path) -> manifest_lib.Manifest:
  """Opens the manifest of the files beside a run's stages."""
  names = ('config.json', 'executor.json', 'summary.json')
  return manifest_lib.Manifest(workdir, names, top=True)


def _recorded_config(workdir: pathlib.Path) -> dict[str, Any] | None:
  """Returns the config that a folder was begun with; None for an empty one.

  Where the record of it is gone, it is taken from beside the params of a stage
  that is done.

  Raises:
    errors.UserError: the record is damaged, and no stage is done.
  """
  path = workdir / 'config.json'
  kept = costly(workdir)
  fault = f'{path} is missing'
  if path.exists():
    if not manifest_lib.faults(workdir, path.name):
      with contextlib.suppress(errors.UserError):
        return records.read_json(path)
    fault = f'{path} is damaged'
  elif not kept:
    return None
  for place in reversed(kept):
    if (workdir / place / 'params').exists():
      _warn(f'{fault}: taking the config that {place} records')
      return checkpoint.load_meta(workdir / place)['config']
  if path.exists():
    raise errors.UserError(
      f'{fault}: if this command is the one that the run was begun with, delete'
      ' that file and run it again'
    )
  _warn(f'{fault}: this config is taken for the one that made {kept[-1]}')
  return None


def check_workdir(
  config: config_lib.Config, workdir: pathlib.Path
) -> list[str]:
  """Refuses a folder that holds results of another config; writes nothing.

  Returns:
    How the config differs from the recorded one, in a folder that holds nothing
    that cost time to make.

  Raises:
    errors.UserError: a science field differs from the recorded one, and there
      is something that cost time to make.
  """
  recorded = _recorded_config(workdir)
  if recorded is None:
    return []
  changes = settings.science_changes(config, recorded)
  kept = costly(workdir)
  if not changes or not kept:
    return changes
  now = settings.to_json(config)
  old = [
    name for name in config_lib.RENAMED if name in recorded and name not in now
  ]
  if old:
    raise errors.UserError(
      f'{workdir} holds a run of an earlier version, where'
      f' {config_lib.RENAMED[old[0]]} was {old[0]}: finish it with that'
      ' version, or start another --workdir from its params with'
      ' --config.init_from'
    )
  rest = f' and {len(kept) - 3} more' if len(kept) > 3 else ''
  raise errors.UserError(
    f'{workdir} holds a run of another config ({"; ".join(changes)}), which'
    f' made {", ".join(kept[:3])}{rest}: undo these changes, or choose another'
    ' --workdir'
  )


def claim_workdir(config: config_lib.Config, workdir: pathlib.Path) -> None:
  """Writes config.json: from here on the folder is this config's.

  It is written when all checks have passed and nothing is computed yet. A
  folder is taken for good by the first thing in it that cost time to make
  (`costly`): until then another config may take it over, and what little an
  earlier start left of its stages is removed.

  Raises:
    errors.UserError: see `check_workdir`.
  """
  if check_workdir(config, workdir):
    with disk.guarded(workdir):
      for pattern in _STAGES:
        for folder in workdir.glob(pattern):
          shutil.rmtree(folder)
      (workdir / 'metrics.jsonl').unlink(missing_ok=True)
  manifest = top_manifest(workdir)
  manifest.write_json('config.json', settings.to_json(config))


@contextlib.contextmanager
def claimed(
  config: config_lib.Config,
  workdir: pathlib.Path,
  turn: lock.Turn | None = None,
) -> Iterator[None]:
  """Inside, the folder is this config's, and no other run works in it.

  Args:
    config: the run's.
    workdir: its folder.
    turn: what the processes of a sweep take in turns: they share the folder,
      and inside it is this one's turn. None for a run that is alone.

  Raises:
    errors.UserError: see `claim_workdir`; or another run works in it.
  """

  def enter():
    held.enter_context(lock.held(workdir, shared=turn is not None))

  with contextlib.ExitStack() as held:
    processes.decide(f'enter {workdir}', enter)
    if turn:
      held.enter_context(turn.taken())
    claim = functools.partial(claim_workdir, config, workdir)
    processes.decide(f'claim {workdir}', claim)
    yield


def build_model(
  config: config_lib.Config, noise: Any = None, remat: bool | str = False
) -> likelihood.LikelihoodModel:
  """Returns a config's model, with its guide and its discriminator, if any.

  Args:
    config: the run's.
    noise: the noise law at a round; None for a model that only samples.
    remat: which activations inside a block are recomputed.
  """
  config_lib.require_model(config)
  model = config.model.build(noise=noise, remat=remat)
  if config.guide is not None:
    model = model.guided_by(config.guide.build(noise=noise))
  if config.discriminator_from:
    discriminator = config.discriminator_network.beside(model)
    denoiser = typing.cast(diffusion.Diffusion, model)  # others are refused
    model = denoiser.with_discriminator(discriminator.network)
  return model


def params_target(
  model: likelihood.LikelihoodModel, executor: devices_lib.Executor
) -> Any:
  """Returns the shapes, types and placement of a model's params."""
  shapes = jax.eval_shape(model.init, rng.stream(0))
  return checkpoint.abstract(shapes, executor.state_shardings(shapes))


def load_params(
  folder: pathlib.Path,
  model: likelihood.LikelihoodModel,
  executor: devices_lib.Executor,
  verify: bool = True,
) -> tuple[likelihood.Params, dict[str, Any]]:
  """Returns the params of a folder, on the devices, and their metadata.

  Args:
    folder: the folder.
    model: whose params they are.
    executor: the devices.
    verify: whether their hash is compared with the recorded one.
  """
  target = params_target(model, executor)
  return checkpoint.load_params(folder, target, verify)


def newest_params(workdir: pathlib.Path) -> pathlib.Path:
  """Returns the folder of params that the last finished stage left.

  Raises:
    errors.UserError: no stage has finished.
  """
  folders = sorted(workdir.glob('round_*/promoted'))
  folders = [workdir / 'pretrain' / 'params', *folders]
  finished = [f for f in folders if (f.parent / 'done.json').exists()]
  if not finished:
    raise errors.UserError(
      f'no finished stage in {workdir}; run --mode=selfplay first, or name'
      ' --params'
    )
  return finished[-1]


def open_manifest(folder: pathlib.Path) -> manifest_lib.Manifest:
  """Opens the manifest of a stage's folder."""
  return manifest_lib.Manifest(
    folder,
    ('params', 'reference', 'promoted', 'eval.json', 'done.json', '*.png'),
  )


def is_done(
  manifest: manifest_lib.Manifest,
  result: str,
  following: pathlib.Path,
  spare: tuple[str, ...] = (),
) -> bool:
  """Says whether a stage is done, and whether what it left holds.

  Large files are read only while they may still be used: until the next stage
  is done. What a stage that is done can do without is named in a warning where
  it has changed; it may be deleted.

  Args:
    manifest: the stage's.
    result: the folder of the params that it leaves.
    following: the folder of the next stage.
    spare: what a stage that is done can do without.
  """

  def look() -> bool:
    if not manifest.lists('done.json'):
      return False
    deep = not (following / 'done.json').exists()
    found = manifest.faults(deep=deep)
    unused = {n: f for n, f in found.items() if n.split('/')[0] in spare}
    needed = found.keys() - unused.keys()
    for name in spare:  # which may have a manifest of its own
      own = manifest_lib.faults(manifest.folder / name, deep=deep)
      unused |= {f'{name}/{file}': fault for file, fault in own.items()}
    changed = {n: f for n, f in unused.items() if f != 'is missing'}
    manifest.warn(changed, 'the stage is done and needs it no more')
    return manifest.lists(result) and not needed

  return processes.decide(f'is {manifest.folder} done', look)


def check_source(
  manifest: manifest_lib.Manifest, result: str, steps: int
) -> None:
  """Refuses to train a stage once more because its params are damaged.

  Args:
    manifest: the stage's.
    result: the folder of the params that it leaves.
    steps: its last step, whose checkpoint tells that nothing is left to train.

  Raises:
    errors.UserError: the params were there, and that checkpoint is not.
  """
  source = manifest.folder / 'checkpoints' / str(steps)

  def look() -> None:
    if manifest.lists(result) and not source.is_dir():
      raise errors.UserError(
        f'{manifest.folder / result} is damaged, and {source}, of which it was'
        ' made, is gone: copy one of them from a backup, or delete'
        f' {manifest.folder} to play that stage again'
      )

  processes.decide(f'source of {manifest.folder}', look)


class Run:
  """What the stages of one run share; costly parts are made when needed."""

  def __init__(
    self,
    config: config_lib.Config,
    workdir: pathlib.Path | None,
    layout: layout_lib.Layout | None = None,
    turn: lock.Turn | None = None,
  ):
    """Takes the config as it is; `check` says what is wrong with it.

    Args:
      config: the run's.
      workdir: its folder; None for a run that is only planned.
      layout: devices that need not be there, for a run that is only planned;
        None takes those at hand.
      turn: what the processes that share the folder take in turns; None for
        a run that is alone in it.

    Raises:
      errors.UserError: the folder's path is none that can be made.
    """
    if workdir:
      disk.check_path('--workdir', workdir)
    self.config = config
    self.workdir = workdir
    self._layout = layout
    self._turn = turn

  def turn_passed_on(self) -> contextlib.AbstractContextManager:
    """Inside, other processes that share the folder may have their turn."""
    return self._turn.passed_on() if self._turn else contextlib.nullcontext()

  @property
  def layout(self) -> layout_lib.Layout:
    """What fits is counted for these devices."""
    return self._layout or self.executor

  @functools.cached_property
  def executor(self) -> devices_lib.Executor:
    """The devices."""
    return devices_lib.Executor(self.config.executor)

  @functools.cached_property
  def model(self) -> likelihood.LikelihoodModel:
    """The model, as it samples.

    Raises:
      errors.UserError: its settings fit no model.
    """
    return build_model(self.config)

  @functools.cached_property
  def log(self) -> records.MetricsLog:
    """metrics.jsonl."""
    return records.MetricsLog(self.workdir)

  @functools.cached_property
  def _train(self) -> sources.Source:
    """The training split, whatever the model is."""
    data = self.config.data
    return sources.open_source(data, data.train_split)

  @functools.cached_property
  def held_out(self) -> sources.Source:
    """The held-out images."""
    data = self.config.data
    return sources.open_source(data, data.test_split)

  @functools.cached_property
  def real(self) -> sources.Source:
    """The training split, checked against the model."""
    source = self._train
    codec = self.model.codec
    if isinstance(codec, codec_lib.Latents):
      latent_set.check_range(
        self.config.data.source, codec.image_range, 'config.data.source'
      )
    likelihood.check_source(
      model=self.model,
      name=source.name,
      stored_shape=source.stored_shape,
      num_classes=source.num_classes,
      pixel_values=source.pixel_values,
    )
    if self.model.num_classes:
      odd = classes_lib.describe(
        source.labels(), source.num_classes, source.class_names
      )
      if odd:
        _LOGGER.warning('%s: %s', source.name, odd)
      if source.num_classes < self.model.num_classes:
        _LOGGER.info(
          '%s has labels below %d; the other classes of the model, which has'
          ' %d, are not trained',
          source.name,
          source.num_classes,
          self.model.num_classes,
        )
    return source

  @functools.cached_property
  def evaluator(self) -> evaluator_lib.Evaluator:
    """The metrics: a protocol's, or those of a classifier that is fitted."""

    def open_test() -> sources.Source:
      return self.held_out

    return measure.open_evaluator(
      settings=self.config.evaluation,
      seed=self.config.seed,
      train=self.real,
      open_test=open_test,
      labels=self.config.labels,
    )

  @property
  def label_rule(self) -> str:
    """How often the scores' images are of each class; '' without classes."""
    return self.evaluator.label_rule if self.model.num_classes else ''

  @functools.cached_property
  def shares(self) -> labels_lib.Shares:
    """How often each class is drawn for pools and sheets of samples."""
    if not self.model.num_classes:
      return labels_lib.Shares(())
    rule = self.config.labels
    if self.config.evaluation.protocol:
      protocol = protocols.get(self.config.evaluation.protocol)
      if protocol.labels == 'shares':
        return protocol.shares(self.model.num_classes)
      # The published ones draw all classes equally often, if not in turn.
      rule = 'balanced'
    return labels_lib.Shares.of(rule, self.real.labels())

  @property
  def converted_folder(self) -> pathlib.Path:
    """Where weights are kept that were named, but not by a folder."""
    return self.workdir / 'weights'

  def _folder_named(self, field: str, model: Any) -> pathlib.Path:
    """Returns the folder of params that a field of the config names.

    What is no folder yet is fetched and converted into the run's folder.

    Args:
      field: 'init_from', 'guide_from' or 'tokenizer_from'.
      model: the settings of the model that it names weights of.
    """
    return released.folder_of(
      name=getattr(self.config, field),
      folder=self.converted_folder,
      setting=f'--config.{field}',
      config=model,
    )

  @functools.cached_property
  def start_folder(self) -> pathlib.Path:
    """Where the params are that `init_from` names."""
    return self._folder_named('init_from', self.config.model)

  @functools.cached_property
  def tokenizer_folder(self) -> pathlib.Path:
    """Where the params of the model's tokenizer are, if it has one."""
    if self.config.tokenizer_from:
      return self._folder_named('tokenizer_from', self.config.model)
    return self.workdir / 'tokenizer' / 'params'

  def frozen_models(self) -> dict[str, Any]:
    """Returns the models of the frozen weights, less the autoencoder."""
    config = self.config
    models: dict[str, Any] = {}
    if config.guide_from:
      models['guide'] = (config.guide or config.model).build()
    if config.discriminator_from:
      models['discriminator'] = config.discriminator_network.beside(
        config.model.build()
      )
    learner = config.model.build_tokenizer()
    if learner:
      models['tokenizer'] = learner
    return models

  @property
  def _autoencoder(self) -> vae_lib.AutoencoderKL | None:
    """The model's autoencoder; None for a model of something else."""
    return getattr(self.model.codec, 'autoencoder', None)

  @functools.cached_property
  def _vae_file(self) -> pathlib.Path:
    """The file of the autoencoder."""
    return store.resolve(self.config.vae_from, '--config.vae_from')

  @property
  def vae_sha256(self) -> str:
    """The hash of the autoencoder's file."""
    return download.sha256_of(self._vae_file)

  @functools.cached_property
  def vae(self) -> likelihood.Params:
    """The autoencoder of a latent model, on the host."""
    return vae_names.read(self._vae_file, self._autoencoder)

  def frozen_folder(self, name: str) -> pathlib.Path:
    """Returns where the params of one of `frozen_models` are.

    Raises:
      errors.UserError: there is no discriminator, or what is named cannot be
        had.
    """
    if name == 'tokenizer':
      return self.tokenizer_folder
    if name == 'discriminator':  # there are none of other programs
      folder = pathlib.Path(self.config.discriminator_from)
      # Its parent, the discriminator's folder, has params in it, too.
      if not (folder / 'meta').exists():
        raise errors.UserError(
          f'--config.discriminator_from={folder} holds no params:'
          ' --mode=discriminator trains a discriminator and says where it is'
        )
      return folder
    return self._folder_named(
      'guide_from', self.config.guide or self.config.model
    )

  @functools.cached_property
  def frozen(self) -> likelihood.Frozen:
    """Weights that are neither trained nor the reference."""
    frozen = {}
    for name, model in self.frozen_models().items():
      folder = self.frozen_folder(name)
      frozen[name], _ = load_params(folder, model, self.executor)
    if self.config.vae_from:
      frozen['vae'] = self.executor.replicate(self.vae)
    return frozen

  def frozen_hashes(self) -> dict[str, str]:
    """Returns the hashes of what is frozen, by name."""
    hashes = {}
    for name in self.frozen_models():
      meta = checkpoint.load_meta(self.frozen_folder(name))
      hashes[name] = meta['sha256']
    if self.config.vae_from:
      hashes['vae'] = self.vae_sha256
    return hashes

  def stage(self, name: str) -> fit_lib.Stage:
    """Returns what a phase trains, by its name in the config."""
    config = self.config
    phase = config_lib.at_round(getattr(config, name), 0)
    models = self.frozen_models()
    learner = models.get('tokenizer')
    frozen = {}
    if name != 'tokenizer':
      for part, model in models.items():
        frozen[part] = jax.eval_shape(model.init, rng.stream(0))
      if config.vae_from:
        frozen['vae'] = vae_lib.param_shapes(self._autoencoder)

    def build(remat):
      if name == 'tokenizer':
        return learner
      return build_model(config, phase.noise, remat)

    sampler = self._sampler_of(phase)
    return fit_lib.Stage(name, phase, build, frozen, sampler)

  def _sampler_of(self, phase: config_lib.Phase) -> Any:
    """Returns what draws fakes inside a phase's step; None where nothing does.

    They are samples of p_ref itself, without guidance and filters.
    """
    if phase.used_negatives.needs_sampler:
      return self.config.sampler.unguided()
    return None

  @property
  def phases(self) -> list[str]:
    """The names in the config of the phases that the run plays."""
    names = ['ddo']
    if not self.config.init_from:
      names.append('pretrain')
    if 'tokenizer' in self.frozen_models() and not self.config.tokenizer_from:
      names.append('tokenizer')
    return names

  @functools.cached_property
  def fit(self) -> fit_lib.Fit:
    """How the steps of all phases fit into the devices.

    A run that goes on on equal devices keeps what was found at its start, so
    that it goes on to the bit.

    Raises:
      errors.UserError: see `fit.plan`.
    """
    wanted = dataclasses.replace(self.config.executor)
    kept = self._kept_fit
    if kept:
      wanted.accumulate = kept.accumulate
      wanted.remat = kept.remat
    found = fit_lib.plan(
      [self.stage(name) for name in self.phases], wanted, self.layout
    )
    if found.room:
      _LOGGER.info('%s', found)
    return found

  @property
  def _fit_path(self) -> pathlib.Path:
    return self.workdir / 'executor.json'

  @property
  def _kept_fit(self) -> fit_lib.Fit | None:
    """The fit that an earlier start found on equal devices, if there is one."""
    if self._layout or not self.workdir:
      return None

    def read():
      if not self._fit_path.exists():
        return None
      try:
        return manifest_lib.read_json(self._fit_path)
      except errors.UserError as error:
        _LOGGER.warning('%s', error)
        return None

    kept = processes.decide('executor.json', read)
    if kept is None:
      return None
    if kept.get('settings') != settings.to_json(self.config.executor):
      return None
    if kept.get('devices') != devices_lib.environment()['devices']:
      return None
    return fit_lib.Fit(kept['accumulate'], kept['remat'])

  def keep_fit(self) -> None:
    """Records the fit, for starts to come."""
    if not self.fit.room:  # without a known memory it is always the same
      return
    top_manifest(self.workdir).write_json(
      self._fit_path.name,
      {
        'devices': devices_lib.environment()['devices'],
        'settings': settings.to_json(self.config.executor),
        'accumulate': self.fit.accumulate,
        'remat': self.fit.remat,
      },
    )

  def training_model(self, noise: Any) -> likelihood.LikelihoodModel:
    """Returns the model as it is trained, under a round's noise law."""
    return build_model(self.config, noise, self.fit.remat)

  @functools.cached_property
  def sample_batch(self) -> int:
    """The number of images in a call of the sampler."""
    return fit_lib.call_size(
      stage=self.stage('ddo'),
      sampler=self.config.sampler,
      settings=self.config.executor,
      layout=self.layout,
    )

  def generator(self, guided: bool = True) -> generate.Generator:
    """Returns what draws images with the config's sampler.

    Args:
      guided: whether the sampler's guidance and filters are kept; a sample of
        p_ref itself has none.
    """
    sampler = self.config.sampler
    if not guided:
      sampler = sampler.unguided()
    return generate.Generator(
      model=self.model,
      frozen=self.frozen,
      sampler=sampler,
      executor=self.executor,
      batch=self.sample_batch,
    )

  def job(
    self,
    folder: pathlib.Path,
    phase: config_lib.Phase,
    model: likelihood.LikelihoodModel,
    frozen: likelihood.Frozen,
    start: Callable[[], likelihood.Params],
    reference: likelihood.Params,
    fake: sources.Source | None,
    score: Callable[..., evaluator_lib.Scores] | None = None,
  ) -> loop_lib.Job:
    """Returns the training job of a stage; see `loop.Job`.

    A phase that trains on the pool has `fake` in the place of real images.
    """
    self.keep_fit()
    real: sources.Source = self.real
    if phase.trains_on == config_lib.POOL:
      real = fake
      fake = None
    return loop_lib.Job(
      name=folder.name,
      folder=folder,
      seed=self.config.seed,
      phase=phase,
      model=model,
      start=start,
      reference=reference,
      frozen=frozen,
      real=real,
      fake=fake,
      sampler=self._sampler_of(phase),
      executor=self.executor,
      accumulate=self.fit.accumulate,
      log=self.log,
      evaluate=score,
      metric=self.config.evaluation.metric,
      workers=workers.count(self.config.data.workers),
    )
