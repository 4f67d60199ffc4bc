"""Rounds: reference -> fakes -> train -> promote -> evaluate.

Each stage leaves its result on disk and returns at once if it is there, so
resuming, and adding a round, are running the same command again.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Any

from absl import logging
import jax
import numpy as np

from ddo_jax import checkpoint
from ddo_jax import config as config_lib
from ddo_jax import data
from ddo_jax import evaluate
from ddo_jax import fakes
from ddo_jax import generate
from ddo_jax import likelihood
from ddo_jax import models
from ddo_jax import parallel
from ddo_jax import records
from ddo_jax import report
from ddo_jax import rng
from ddo_jax import train

GRID = 80  # images of a sample grid


def claim_workdir(config: config_lib.Config, workdir: pathlib.Path) -> None:
  """Writes config.json, or checks that it agrees with this config.

  Raises:
    config.UserError: a science field differs from the recorded one.
  """
  path = workdir / 'config.json'
  if path.exists():
    changes = config_lib.science_changes(config, records.read_json(path))
    if changes:
      raise config_lib.UserError(
        f'{workdir} holds a run of another config ({"; ".join(changes)}): undo'
        ' these changes, or choose another --workdir'
      )
  records.write_json(path, config_lib.to_json(config))


def load_params(
  folder: pathlib.Path,
  model: likelihood.LikelihoodModel,
  executor: parallel.Executor,
) -> tuple[likelihood.Params, dict[str, Any]]:
  """Params of a folder, on the devices, and what is recorded beside them."""
  shapes = jax.eval_shape(model.init, rng.stream(0))
  target = checkpoint.abstract(shapes, executor.state_shardings(shapes))
  return checkpoint.load_params(folder, target)


class Run:
  """What the stages of one run share; the costly parts when first needed."""

  def __init__(self, config: config_lib.Config, workdir: pathlib.Path):
    """Checks the config, the devices and the folder."""
    config_lib.validate(config)
    self.config = config
    self.workdir = workdir
    self.executor = parallel.Executor(config.executor)
    for phase in (config.pretrain, config.ddo):
      self.executor.check_batch(phase.batch_size, config.executor.accumulate)
    claim_workdir(config, workdir)
    self.log = records.MetricsLog(workdir)

  @functools.cached_property
  def real(self) -> data.Source:
    """The training split, checked against the model."""
    source = data.open_source(self.config.data, self.config.data.train_split)
    model = models.build(self.config, self.config.pretrain)
    model.check_source(
      source.name, source.image_shape, source.num_classes, source.levels
    )
    return source

  @functools.cached_property
  def evaluator(self) -> evaluate.Evaluator:
    """The metrics; fits their classifier."""
    test = data.open_source(self.config.data, self.config.data.test_split)
    return evaluate.Evaluator(self.real, test)

  def generator(self, model: likelihood.LikelihoodModel) -> generate.Generator:
    """Draws images of a model with the config's sampler."""
    batch = self.config.executor.sample_batch
    return generate.Generator(
      model, {}, self.config.sampler, self.executor, batch
    )

  def job(self, **fields: Any) -> train.Job:
    """A training job with the fields that all phases share."""
    return train.Job(
      seed=self.config.seed,
      frozen={},
      real=self.real,
      executor=self.executor,
      accumulate=self.config.executor.accumulate,
      log=self.log,
      metric=self.config.evaluation.metric,
      **fields,
    )


def pretrain(run: Run) -> pathlib.Path:
  """Trains by MLE from scratch, unless `init_from` names weights.

  Returns:
    The folder of params that the first round starts from.
  """
  if run.config.init_from:
    return pathlib.Path(run.config.init_from).expanduser()
  folder, phase = run.workdir / 'pretrain', run.config.pretrain
  params_folder, done = folder / 'params', folder / 'done.json'
  if done.exists():
    return params_folder
  start = time.perf_counter()
  model = models.build(run.config, phase)
  key = rng.stream(run.config.seed, 'init')
  params = run.executor.place_state(jax.jit(model.init)(key))
  promotion = train.run(
    run.job(
      name='pretrain',
      folder=folder,
      phase=phase,
      round_index=0,
      model=model,
      reference=params,
      fake=None,
      evaluate=None,
    )
  )
  meta = {'stage': 'pretrain', 'config': config_lib.to_json(run.config)}
  checkpoint.save_params(params_folder, promotion.params, meta)
  records.write_json(done, {'seconds': time.perf_counter() - start})
  return params_folder


def _fake_pool(
  run: Run,
  folder: pathlib.Path,
  generator: generate.Generator,
  reference: likelihood.Params,
  sha256: str,
) -> data.Source:
  """The round's offline pool, drawn as far as it is missing."""
  identity = {
    'reference': sha256,
    'sampler': dataclasses.asdict(run.config.sampler),
    'stream': [run.config.seed, folder.name],
  }
  batch = run.config.executor.sample_batch
  pool = fakes.Pool(folder / 'fakes', run.config.ddo.pool_size, batch, identity)
  key = rng.stream(run.config.seed, 'fakes', folder.name)
  generator.fill(pool, reference, key)
  return pool.source(run.real.num_classes, run.real.levels)


def _save_grid(
  run: Run,
  path: pathlib.Path,
  generator: generate.Generator,
  params: likelihood.Params,
) -> None:
  key = rng.stream(run.config.seed, 'grid')
  images, _ = generator.images(params, key, GRID, path.stem)
  generate.save_grid(path, images, run.real.levels)


def play_round(
  run: Run,
  index: int,
  origin: pathlib.Path,
  before: dict[str, Any] | None,
) -> dict[str, Any]:
  """Plays one round, or returns what it left when it was played.

  Args:
    run: the run.
    index: of the round, from 0.
    origin: folder of params that become the reference.
    before: report scores of those params; None to measure them.

  Returns:
    {'round', 'before', 'after', 'promoted', 'warnings', 'seconds'}.
  """
  folder = run.workdir / f'round_{index:03d}'
  done = folder / 'done.json'
  if done.exists():
    return records.read_json(done)
  clock = [time.perf_counter()]
  phase = run.config.ddo
  model = models.build(run.config, phase, index)
  generator = run.generator(model)
  if not (folder / 'reference').exists():
    params, meta = load_params(origin, model, run.executor)
    checkpoint.save_params(folder / 'reference', params, meta)
  reference, meta = load_params(folder / 'reference', model, run.executor)
  fake = None
  if phase.objective == 'ddo':
    fake = _fake_pool(run, folder, generator, reference, meta['sha256'])
  clock.append(time.perf_counter())
  promotion = train.run(
    run.job(
      name=folder.name,
      folder=folder,
      phase=phase,
      round_index=index,
      model=model,
      reference=reference,
      fake=fake,
      evaluate=lambda params: evaluate.selection_scores(
        run.evaluator, generator, params, run.config
      ),
    )
  )
  chosen = {
    'step': promotion.step,
    'images': promotion.step * phase.batch_size,
    'profile': promotion.profile,
    'selection': promotion.selection,
  }
  meta = meta | {'stage': folder.name, 'promoted': chosen}
  checkpoint.save_params(folder / 'promoted', promotion.params, meta)
  clock.append(time.perf_counter())
  scores = functools.partial(
    evaluate.report_scores, run.evaluator, generator, config=run.config
  )
  before = before or scores(reference)
  after = scores(promotion.params) if promotion.step else before
  _save_grid(run, folder / 'before.png', generator, reference)
  _save_grid(run, folder / 'after.png', generator, promotion.params)
  clock.append(time.perf_counter())
  records.write_json(folder / 'eval.json', {'before': before, 'after': after})
  spent = dict(zip(('fakes', 'train', 'evaluate'), np.diff(clock).tolist()))
  warnings = train.warnings(run.log.read(folder.name))
  result = {
    'round': index,
    'before': before,
    'after': after,
    'promoted': chosen,
    'warnings': warnings,
    'seconds': spent,
  }
  for warning in warnings:
    logging.warning('%s: %s', folder.name, warning)
  records.write_json(done, result)
  return result


def play(config: config_lib.Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Pretrains and plays all rounds; writes summary.json and report.html.

  Returns:
    The summary: {'name', 'rounds': [see `play_round`], 'seconds'}.
  """
  run = Run(config, workdir)
  origin, before, rounds = pretrain(run), None, []
  for index in range(config.rounds):
    result = play_round(run, index, origin, before)
    rounds.append(result)
    origin = workdir / f'round_{index:03d}' / 'promoted'
    before = result['after']
    metric = config.evaluation.metric
    logging.info(
      'round %d: %s %.4g -> %.4g (step %d promoted)',
      index,
      metric,
      result['before'][metric]['mean'],
      before[metric]['mean'],
      result['promoted']['step'],
    )
  seconds = {
    f'round_{r["round"]:03d}': sum(r['seconds'].values()) for r in rounds
  }
  pretrained = workdir / 'pretrain' / 'done.json'
  if pretrained.exists():
    seconds['pretrain'] = records.read_json(pretrained)['seconds']
  seconds['total'] = sum(seconds.values())
  summary = {'name': config.name, 'rounds': rounds, 'seconds': seconds}
  records.write_json(workdir / 'summary.json', summary)
  report.write(workdir)
  return summary
