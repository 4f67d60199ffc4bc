"""All that a run needs, checked before anything is computed or written.

Each check is a function of a `Plan` that says in a few words what it found, ''
if there was nothing to look for, or raises UserError. All of them are made,
whatever the others find, so that a user hears of everything that is missing or
wrong at once. They are cheap: what is opened is kept in the run, and networks
are traced, not run. What is published is fetched, since the run would fetch it.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import rng
from ddo_jax import settings as settings_lib
from ddo_jax.assets import store
from ddo_jax.evaluation import evaluator as evaluator_lib
from ddo_jax.evaluation import measure
from ddo_jax.evaluation import protocols
from ddo_jax.method import likelihood
from ddo_jax.method import negatives
from ddo_jax.method import objective
from ddo_jax.report import cost
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import devices
from ddo_jax.runtime import memory
from ddo_jax.training import ending
from ddo_jax.training import published
from ddo_jax.training import state as state_lib
from ddo_jax.training import workspace
from ddo_jax.weights import released

# Checkpoints of a stage that stay: its newest two, its best, and the one that a
# rollback would go back to.
_KEPT = {'stop': 3, 'skip': 3, 'rollback': 4}


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is to be done.

  Attributes:
    run: the run.
    stages: the stages that are still to be done, by name, with their phases.
    params: where nothing is trained, a folder of params, or a released file,
      that is sampled; None takes the run's newest.
  """

  run: workspace.Run
  stages: dict[str, config_lib.Phase]
  params: pathlib.Path | str | None = None

  @property
  def phases(self) -> dict[str, config_lib.Phase]:
    """The phases of the stages, by their names in the config."""
    return {phase_of(name): phase for name, phase in self.stages.items()}

  @functools.cached_property
  def target(self) -> Any:
    """The shapes of the model's params."""
    return workspace.params_target(self.run.model, self.run.executor)

  @functools.cached_property
  def frozen(self) -> dict[str, Any]:
    """The shapes of the weights beside them, less those of the autoencoder."""
    return {
      name: workspace.params_target(model, self.run.executor)
      for name, model in self.run.frozen_models().items()
    }

  def trace(self, function: Callable[..., Any]) -> Any:
    """Returns the shapes of function(params, frozen)."""
    frozen = dict(self.frozen)
    if self.run.config.vae_from:
      frozen['vae'] = self.run.vae
    return jax.eval_shape(function, self.target, frozen)

  @functools.cached_property
  def image(self) -> jax.ShapeDtypeStruct:
    """The shape and type of an image [1,H,W,C] that the model draws."""
    run = self.run
    label = jnp.zeros(1, jnp.int32)
    keys = _row_keys()

    def draw(params, frozen):
      sampler = run.config.sampler
      stored = run.model.draw(params, frozen, label, keys, sampler)
      return run.model.codec.render(frozen, stored)

    return self.trace(draw)


def phase_of(stage: str) -> str:
  """Returns the name in the config of a stage's phase."""
  return 'ddo' if stage.startswith('round_') else stage


def _row_keys() -> jax.Array:
  """Returns the keys [1] of one row."""
  return rng.per_example(rng.stream(0), jnp.zeros(1, jnp.uint32))


def stages(run: workspace.Run, rounds: bool) -> dict[str, config_lib.Phase]:
  """Returns the stages of a run that are still to be done, and their phases.

  Args:
    run: the run; of one without a folder, nothing is done.
    rounds: whether the rounds count, or the pretraining alone.
  """
  config = run.config
  planned = {}
  # What is wrong with the model is said by its own check.
  with contextlib.suppress(errors.UserError):
    if 'tokenizer' in run.frozen_models() and not config.tokenizer_from:
      planned['tokenizer'] = config.tokenizer
  if not config.init_from:
    planned['pretrain'] = config.pretrain
  left = {
    name: phase
    for name, phase in planned.items()
    if not run.workdir or not (run.workdir / name / 'done.json').exists()
  }
  if rounds:
    for index in ending.planned(config, run.workdir):
      left[f'round_{index:03d}'] = config.ddo
  return left


def _settings(plan: Plan) -> str:
  """The config against itself."""
  config = plan.run.config
  config_lib.validate(config)
  left = ', '.join(plan.stages)
  return f'{config.name}, seed {config.seed}' + (left and f'; to do: {left}')


def _check_labels(name: str, phase: config_lib.Phase, num_classes: int) -> None:
  """Raises UserError where a model without classes is to go by labels."""
  by_labels = phase.used_negatives.needs_other_label
  if not num_classes and (by_labels or phase.label_drop):
    raise errors.UserError(
      f'config.{name} has negatives {phase.negatives} and label_drop'
      f' {phase.label_drop}, which go by labels, and the model has no classes:'
      ' take other negatives, and label_drop 0'
    )


def _model(plan: Plan) -> str:
  """The model, and the sampler and the labels that go with it."""
  config = plan.run.config
  model = plan.run.model
  problems = errors.Problems()
  with problems.gather():
    likelihood.check_sampler(model, config.sampler)
  for name in ('pretrain', 'ddo'):
    with problems.gather():
      _check_labels(name, getattr(config, name), model.num_classes)
  problems.raise_any()
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(plan.target))
  return (
    f'{type(config.model).__name__}, {count:,} params; sampler'
    f' {type(config.sampler).__name__}'
  )


def _data(plan: Plan) -> str:
  """The training images."""
  source = plan.run.real
  shape = '×'.join(str(side) for side in source.stored_shape)
  return (
    f'{source.name}, {len(source):,} images {shape},'
    f' {source.num_classes} classes'
  )


def _steps(plan: Plan) -> str:
  """The rows of every step, which are split over the devices."""
  run = plan.run
  accumulate = run.config.executor.accumulate
  problems = errors.Problems()
  found = [devices.environment()['devices']]
  for name, phase in plan.phases.items():
    with problems.gather():
      errors.require_integer(f'{name}.images', phase.images, 1)
    with problems.gather():
      rows = phase.batch_size
      field = f'{name}.batch_size'
      errors.require_integer(field, rows, 1)
      parts = 1 if accumulate == settings_lib.AUTO else accumulate
      run.executor.check_batch(rows, parts, f'config.{field}')
      found.append(f'{name} {phase.steps():,} steps × {rows:,} images')
  problems.raise_any()
  return '; '.join(found)


def _memory(plan: Plan) -> str:
  """The devices' memory, where it is known, against what a step takes."""
  return str(plan.run.fit)


def _files(plan: Plan) -> str:
  """The published files that are asked for, fetched where they are missing."""
  run = plan.run
  evaluator_lib.check(run.config.evaluation)
  fetched = published.fetch(run.config, run.converted_folder)
  return ', '.join(fetched)


def _named(plan: Plan) -> dict[str, tuple[str, Any]]:
  """Returns the weights that are named, with the shapes that they must have."""
  config = plan.run.config
  named = {}
  if plan.stages and config.init_from:
    named['init_from'] = (config.init_from, plan.target)
  if config.guide_from:
    named['guide_from'] = (config.guide_from, plan.frozen['guide'])
  if config.tokenizer_from:
    named['tokenizer_from'] = (
      config.tokenizer_from,
      plan.frozen.get('tokenizer'),
    )
  return named


def _weights(plan: Plan) -> str:
  """The weights that are named, against the models that they are for."""
  config = plan.run.config
  problems = errors.Problems()
  found = []
  for field, (name, target) in _named(plan).items():
    with problems.gather():
      folder = released.found(name, plan.run.converted_folder)
      if folder is not None:
        checkpoint.check_params(folder, target)
      else:  # it is converted once all else is right
        store.resolve(name, f'--config.{field}')
      found.append(f'{field} {name}')
  if config.discriminator_from:
    with problems.gather():
      folder = plan.run.frozen_folder('discriminator')
      checkpoint.check_params(folder, plan.frozen['discriminator'])
      found.append(f'discriminator_from {folder}')
  if config.vae_from:
    with problems.gather():
      _ = plan.run.vae
      found.append(f'vae_from {config.vae_from}')
  if 'tokenizer' in plan.frozen and config.init_from:
    with problems.gather():
      errors.require(
        bool(config.tokenizer_from),
        'tokenizer_from',
        '',
        'the folder of the tokenizer that goes with the model of tokens in'
        f' config.init_from={config.init_from}',
      )
  problems.raise_any()
  return ', '.join(found)


def _params(plan: Plan) -> str:
  """The params that are sampled."""
  folder = plan.params or workspace.newest_params(plan.run.workdir)
  folder = pathlib.Path(folder)
  if folder.is_dir():  # a released file is checked as it is converted
    checkpoint.check_params(folder, plan.target)
  return str(folder)


def _converted(plan: Plan) -> str:
  """The weights that are named and no folders yet, converted."""
  run = plan.run
  found = []
  for field, (_, target) in _named(plan).items():
    if field == 'init_from':
      folder = run.start_folder
    else:
      folder = run.frozen_folder(field.removesuffix('_from'))
    checkpoint.check_params(folder, target)
    found.append(str(folder))
  return ', '.join(found)


def _evaluation(plan: Plan) -> str:
  """The evaluator, its files and the held-out images."""
  run = plan.run
  settings = run.config.evaluation
  problems = errors.Problems()
  if not settings.protocol:
    with problems.gather():
      _ = run.held_out
  elif plan.stages:
    with problems.gather():  # before the files, which may be missing
      stored, _ = run.real.read(np.arange(1))
      if stored.dtype == np.uint8:
        protocol = protocols.get(settings.protocol)
        protocol.check_images(stored.dtype, stored.shape[1:])
  with problems.gather():
    run.evaluator.labels(np.arange(1), run.model.num_classes)
  problems.raise_any()
  evaluator = run.evaluator
  count = measure.num_images(evaluator, settings)
  blocks = measure.num_blocks(evaluator, settings)
  by = f'protocol {settings.protocol}'
  if not settings.protocol:
    by = 'a classifier of the training images'
  return f'{settings.metric} by {by}, {count:,} images × {blocks}'


def _free(workdir: pathlib.Path) -> tuple[pathlib.Path, int]:
  """Returns the lowest folder that is there of a path, and its free bytes.

  Raises:
    errors.UserError: the path is no folder, or may not be written.
  """
  folder = workdir.absolute()
  while not folder.exists():
    folder = folder.parent
  if not folder.is_dir() or not os.access(folder, os.W_OK):
    fault = 'may not be written' if folder.is_dir() else 'is a file'
    raise errors.UserError(
      f'--workdir={workdir}: {folder} {fault}; choose another --workdir'
    )
  return folder, shutil.disk_usage(folder).free


def _phase_bytes(
  plan: Plan, name: str, phase: config_lib.Phase
) -> tuple[int, int, int]:
  """Returns the bytes of a phase's fake pool, its params and a checkpoint."""
  run = plan.run
  model = run.model
  params = plan.target
  if name == 'tokenizer':
    model = run.frozen_models()[name]
    params = plan.frozen[name]

  now = config_lib.at_round(phase, 0)

  def create(params):
    return state_lib.at_start(params, model.rules, now)

  pool = 0
  second = phase.used_negatives
  if isinstance(second, negatives.Pool):
    row, _ = run.real.read(np.arange(1))
    pool = row.nbytes * second.size
  state = jax.eval_shape(create, params)
  return pool, memory.size_of(params), memory.size_of(state)


def _disk(plan: Plan) -> str:
  """The room for what the stages keep."""
  workdir = plan.run.workdir
  folder, free = _free(workdir)
  pools = 0
  needed = 0
  largest = 0  # a checkpoint is written before an older one is deleted
  # All rounds are alike.
  bytes_of = {
    name: _phase_bytes(plan, name, phase) for name, phase in plan.phases.items()
  }
  for name, phase in plan.stages.items():
    pool, params, state = bytes_of[phase_of(name)]
    kept = _KEPT[phase.bad_numbers.policy]
    copies = 1
    if name.startswith('round_'):  # reference and promoted, and each member's
      copies = 2 + plan.run.config.tune.members
    files = [path for path in (workdir / name).rglob('*') if path.is_file()]
    pools += pool
    needed += pool + copies * params + kept * state
    needed -= sum(path.stat().st_size for path in files)
    largest = max(largest, state)
  needed = max(needed, 0) + largest
  found = (
    f'{cost.short(needed)}B to be written, {cost.short(pools)}B of it fake'
    f' pools; {cost.short(free)}B free in {folder}'
  )
  if needed > free:
    raise errors.UserError(
      f'{found}: free some, take a --workdir on a larger disk, or play fewer'
      ' rounds at first (config.rounds, or the ceiling tune.max_rounds of'
      ' rounds=auto, may be raised later)'
    )
  return found


def _workdir(plan: Plan) -> str:
  """The run's folder."""
  run = plan.run
  workspace.check_workdir(run.config, run.workdir)
  kept = workspace.costly(run.workdir)
  if not kept:
    return f'{run.workdir}, nothing is in it yet'
  return f'{run.workdir} goes on from {kept[-1]}'


def _losses(plan: Plan) -> str:
  """The loss of every phase, traced for one row."""
  config = plan.run.config
  stored, label = plan.run.real.read(np.arange(1))
  keys = _row_keys()

  def loss(phase, params, frozen):
    model = workspace.build_model(config, phase.noise)
    x = model.codec.encode(frozen, jnp.asarray(stored), keys)
    batch = likelihood.Batch(x, jnp.asarray(label), jnp.zeros(1, jnp.uint32))
    if not phase.objective.contrastive:
      return model.mle_loss(params, frozen, batch, keys)
    ratio, _ = model.log_ratio(params, params, frozen, batch, keys)
    terms = phase.objective.loss(ratio, ratio, objective.Rows.plain(1))
    return terms, phase.objective.logit(ratio)

  found = []
  for name, phase in plan.phases.items():
    if name != 'tokenizer':
      now = config_lib.at_round(phase, 0)
      plan.trace(functools.partial(loss, now))
      found.append(f'{name} {type(phase.objective).__name__}')
  return ', '.join(found)


def _samples(plan: Plan) -> str:
  """A sample and its image, traced for one row."""
  shape = plan.image.shape[1:]
  return 'images ' + '×'.join(str(side) for side in shape)


def _measured(plan: Plan) -> str:
  """The images of samples, which the evaluator must take."""
  image = plan.image
  plan.run.evaluator.check_images(image.dtype, image.shape[1:])
  return ''


_Checks = dict[str, Callable[[Plan], str]]


def _make(plan: Plan, *groups: _Checks) -> list[str]:
  """Makes the checks of each group, unless one before it found a fault.

  Returns:
    A line for each check: its name and what was found.

  Raises:
    errors.UserError: a line for each fault.
  """
  lines = []
  for group in groups:
    problems = errors.Problems()
    for name, check in group.items():
      with problems.gather():
        found = check(plan)
        if found:
          lines.append(f'✓ {name:10} {found}')
    problems.raise_any()
  return lines


def training(run: workspace.Run, rounds: bool = True) -> list[str]:
  """Checks all that is needed by the stages that are still to be done.

  Args:
    run: the run; what is opened is kept in it.
    rounds: whether the rounds are played, or the pretraining alone.

  Returns:
    A line for each check: its name and what was found.

  Raises:
    errors.UserError: something is missing or wrong; there is a line for each.
  """
  plan = Plan(run, stages(run, rounds))
  checks: _Checks = {'settings': _settings}
  deeper: _Checks = {}
  if plan.stages:
    checks |= {
      'model': _model,
      'files': _files,
      'data': _data,
      'steps': _steps,
      'weights': _weights,
    }
    deeper |= {
      'memory': _memory,
      'disk': _disk,
      'converted': _converted,
      'losses': _losses,
    }
  if 'ddo' in plan.phases:
    checks |= {'evaluation': _evaluation}
    deeper |= {'samples': _samples, 'measured': _measured}
  checks |= {'workdir': _workdir}
  return _make(plan, checks, deeper)


def sampling(
  run: workspace.Run, params: pathlib.Path | str | None, scored: bool
) -> list[str]:
  """Checks all that is needed to draw images.

  Args:
    run: the run; what is opened is kept in it.
    params: a folder of params, or a released file; None takes the run's newest.
    scored: whether the images are measured.

  Returns:
    A line for each check: its name and what was found.

  Raises:
    errors.UserError: something is missing or wrong; there is a line for each.
  """
  plan = Plan(run, {}, params)
  checks: _Checks = {
    'settings': _settings,
    'model': _model,
    'params': _params,
    'weights': _weights,
  }
  deeper: _Checks = {'samples': _samples}
  if scored:
    checks |= {'evaluation': _evaluation}
    deeper |= {'measured': _measured}
  return _make(plan, checks, deeper)
