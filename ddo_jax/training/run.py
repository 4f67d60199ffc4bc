"""What the stages of one run share: its folder, data, devices and weights."""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
from typing import Any

import jax

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import models
from ddo_jax import rng
from ddo_jax.data import sources
from ddo_jax.evaluation import evaluator as evaluator_lib
from ddo_jax.evaluation import measure
from ddo_jax.method import generate
from ddo_jax.method import likelihood
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import loop as loop_lib
from ddo_jax.weights import vae_names


def claim_workdir(config: config_lib.Config, workdir: pathlib.Path) -> None:
  """Writes config.json, or checks that it agrees with this config.

  Raises:
    errors.UserError: a science field differs from the recorded one.
  """
  path = workdir / 'config.json'
  if path.exists():
    changes = config_lib.science_changes(config, records.read_json(path))
    if changes:
      raise errors.UserError(
        f'{workdir} holds a run of another config ({"; ".join(changes)}): undo'
        ' these changes, or choose another --workdir'
      )
  records.write_json(path, config_lib.to_json(config))


def load_params(
  folder: pathlib.Path,
  model: likelihood.LikelihoodModel,
  executor: devices_lib.Executor,
) -> tuple[likelihood.Params, dict[str, Any]]:
  """Params of a folder, on the devices, and what is recorded beside them."""
  shapes = jax.eval_shape(model.init, rng.stream(0))
  target = checkpoint.abstract(shapes, executor.state_shardings(shapes))
  return checkpoint.load_params(folder, target)


def newest_params(workdir: pathlib.Path) -> pathlib.Path:
  """The folder of params that the last finished stage of a run left.

  Raises:
    errors.UserError: no stage has finished.
  """
  folders = sorted(workdir.glob('round_*/promoted'))
  folders = [workdir / 'pretrain' / 'params', *folders]
  folders = [f for f in folders if (f.parent / 'done.json').exists()]
  if not folders:
    raise errors.UserError(
      f'no finished stage in {workdir}; run --mode=selfplay first, or name'
      ' --params'
    )
  return folders[-1]


def _check_labels(name: str, phase: config_lib.Phase, num_classes: int) -> None:
  """Raises UserError where a model without classes is to go by labels."""
  if not num_classes and (phase.contrasts or phase.label_drop):
    raise errors.UserError(
      f'config.{name} has objective {phase.objective!r} and label_drop'
      f' {phase.label_drop}, which go by labels, and the model has no classes:'
      ' take objective ddo or mle, and label_drop 0'
    )


class Run:
  """What the stages of one run share; the costly parts when first needed."""

  def __init__(self, config: config_lib.Config, workdir: pathlib.Path):
    """Checks the config, the devices and the folder."""
    config_lib.validate(config)
    self.config = config
    self.workdir = workdir
    self.executor = devices_lib.Executor(config.executor)
    model = models.build(config, config.ddo)
    model.unguided(config.sampler)  # or it is another family's
    for name in ('pretrain', 'ddo'):
      phase = getattr(config, name)
      self.executor.check_batch(phase.batch_size, config.executor.accumulate)
      _check_labels(name, phase, model.num_classes)

  @functools.cached_property
  def log(self) -> records.MetricsLog:
    """metrics.jsonl."""
    return records.MetricsLog(self.workdir)

  @functools.cached_property
  def real(self) -> sources.Source:
    """The training split, checked against the model."""
    source = sources.open_source(self.config.data, self.config.data.train_split)
    model = models.build(self.config, self.config.pretrain)
    model.check_source(
      source.name, source.image_shape, source.num_classes, source.pixel_values
    )
    return source

  @functools.cached_property
  def evaluator(self) -> evaluator_lib.Evaluator:
    """The metrics: a protocol's, or those of a classifier that is fitted."""
    data = self.config.data
    return measure.open_evaluator(
      self.config.evaluation,
      self.config.seed,
      self.real,
      functools.partial(sources.open_source, data, data.test_split),
    )

  @property
  def tokenizer_folder(self) -> pathlib.Path:
    """Where the params of the model's tokenizer are, if it has one."""
    if self.config.tokenizer_from:
      return pathlib.Path(self.config.tokenizer_from).expanduser()
    return self.workdir / 'tokenizer' / 'params'

  @functools.cached_property
  def frozen(self) -> likelihood.Frozen:
    """Weights that are neither trained nor the reference."""
    config, frozen = self.config, {}
    if config.guide_from:
      guide = config.guide or config.model
      folder = pathlib.Path(config.guide_from).expanduser()
      config = dataclasses.replace(config, model=guide, guide=None)
      model = models.build(config, config.ddo)
      frozen['guide'] = load_params(folder, model, self.executor)[0]
    if learner := models.tokenizer(self.config.model):
      folder = self.tokenizer_folder
      frozen['tokenizer'] = load_params(folder, learner, self.executor)[0]
    if config.vae_from:
      weights = vae_names.read(pathlib.Path(config.vae_from).expanduser())
      frozen['vae'] = self.executor.replicate(weights)
    return frozen

  def generator(
    self, model: likelihood.LikelihoodModel, guided: bool = True
  ) -> generate.Generator:
    """Draws images with the config's sampler; p_ref is meant unguided."""
    batch, sampler = self.config.executor.sample_batch, self.config.sampler
    if not guided:
      sampler = model.unguided(sampler)
    return generate.Generator(model, self.frozen, sampler, self.executor, batch)

  def job(
    self,
    folder: pathlib.Path,
    phase: config_lib.Phase,
    round_index: int,
    model: likelihood.LikelihoodModel,
    frozen: likelihood.Frozen,
    start: Callable[[], likelihood.Params],
    reference: likelihood.Params,
    fake: sources.Source | None,
    score: Callable[[likelihood.Params], evaluator_lib.Scores] | None = None,
  ) -> loop_lib.Job:
    """The training job of a stage; see `train.Job`."""
    return loop_lib.Job(
      name=folder.name,
      folder=folder,
      seed=self.config.seed,
      phase=phase,
      round_index=round_index,
      model=model,
      start=start,
      reference=reference,
      frozen=frozen,
      real=self.real,
      fake=fake,
      sampler=(
        model.unguided(self.config.sampler) if phase.fakes == 'online' else None
      ),
      executor=self.executor,
      accumulate=self.config.executor.accumulate,
      log=self.log,
      evaluate=score,
      metric=self.config.evaluation.metric,
    )
