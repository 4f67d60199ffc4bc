"""Rounds: reference -> fakes -> train -> promote -> evaluate.

Each stage leaves its result on disk and returns at once if it is there, so
resuming, and adding a round, are running the same command again.
"""

from collections.abc import Callable
import dataclasses
import functools
import logging
import pathlib
import time
from typing import Any

import numpy as np

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import models
from ddo_jax import rng
from ddo_jax.data import pool as pool_lib
from ddo_jax.data import sources
from ddo_jax.evaluation import measure
from ddo_jax.method import generate
from ddo_jax.method import likelihood
from ddo_jax.report import page
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import loop as loop_lib
from ddo_jax.training import run as run_lib

_LOGGER = logging.getLogger(__name__)
GRID = 80  # images of a sample grid


def _learn(
  run: run_lib.Run,
  name: str,
  phase: config_lib.Phase,
  model: likelihood.LikelihoodModel,
  frozen: likelihood.Frozen,
) -> pathlib.Path:
  """Trains by MLE from scratch; returns the folder of params."""
  folder = run.workdir / name
  params_folder, done = folder / 'params', folder / 'done.json'
  if done.exists():
    return params_folder
  start = time.perf_counter()
  key = rng.stream(run.config.seed, 'init')
  init = functools.partial(run.executor.make_state, model.init, key)
  job = run.job(folder, phase, 0, model, frozen, init, init(), fake=None)
  promotion = loop_lib.run(job)
  meta = {'stage': name, 'config': config_lib.to_json(run.config)}
  checkpoint.save_params(params_folder, promotion.params, meta)
  records.write_json(done, {'seconds': time.perf_counter() - start})
  return params_folder


def pretrain(run: run_lib.Run) -> pathlib.Path:
  """Trains by MLE from scratch, unless `init_from` names weights.

  A model of tokens has its tokenizer trained before, unless `tokenizer_from`
  names one.

  Returns:
    The folder of params that the first round starts from.

  Raises:
    errors.UserError: weights are named, and not the tokenizer they go with.
  """
  config = run.config
  run_lib.claim_workdir(config, run.workdir)
  learner = models.tokenizer(config.model)
  if learner and not config.tokenizer_from:
    if config.init_from:
      raise errors.UserError(
        f'config.init_from={config.init_from} holds a model of tokens: name'
        ' the folder of its tokenizer too, with --config.tokenizer_from'
      )
    _learn(run, 'tokenizer', config.tokenizer, learner, {})
  if config.init_from:
    return pathlib.Path(config.init_from).expanduser()
  model = models.build(config, config.pretrain)
  return _learn(run, 'pretrain', config.pretrain, model, run.frozen)


def _reference(
  run: run_lib.Run,
  folder: pathlib.Path,
  origin: pathlib.Path,
  model: likelihood.LikelihoodModel,
) -> tuple[Callable[[], likelihood.Params], dict[str, Any]]:
  """How to read the round's reference, copied from `origin`; its metadata."""
  load = functools.partial(
    run_lib.load_params, model=model, executor=run.executor
  )
  if not (folder / 'reference').exists():
    checkpoint.save_params(folder / 'reference', *load(origin))
  read = lambda: load(folder / 'reference')[0]
  return read, checkpoint.load_meta(folder / 'reference')


def _fake_pool(
  run: run_lib.Run,
  folder: pathlib.Path,
  model: likelihood.LikelihoodModel,
  reference: likelihood.Params,
  meta: dict[str, Any],
) -> sources.Source:
  """The round's offline pool, drawn as far as it is missing."""
  generator = run.generator(model, guided=False)
  identity = {
    'reference': meta['sha256'],
    'provenance': meta.get('provenance', {}),
    'sampler': dataclasses.asdict(generator.sampler),
    'stream': [run.config.seed, folder.name],
  }
  batch = run.config.executor.sample_batch
  pool = pool_lib.Pool(
    folder / 'fakes', run.config.ddo.pool_size, batch, identity
  )
  key = rng.stream(run.config.seed, 'fakes', folder.name)
  generator.fill(pool, reference, key)
  return pool.source(run.real.num_classes, run.real.pixel_values)


def _promote(
  run: run_lib.Run,
  folder: pathlib.Path,
  promotion: loop_lib.Promotion,
  provenance: dict[str, str],
) -> dict[str, Any]:
  """Saves the round's result; returns where in the round it comes from."""
  chosen = {
    'step': promotion.step,
    'images': promotion.step * run.config.ddo.batch_size,
    'profile': promotion.profile,
    'selection': promotion.selection,
  }
  meta = {'stage': folder.name, 'promoted': chosen, 'provenance': provenance}
  meta['config'] = config_lib.to_json(run.config)
  checkpoint.save_params(folder / 'promoted', promotion.params, meta)
  return chosen


def _report_scores(
  run: run_lib.Run,
  folder: pathlib.Path,
  generator: generate.Generator,
  reference: likelihood.Params,
  promotion: loop_lib.Promotion,
  before: dict[str, Any] | None,
) -> dict[str, Any]:
  """Scores and sample grids of the round's start and end: eval.json."""
  settings = run.config.evaluation
  scores = functools.partial(
    measure.report_scores,
    run.evaluator,
    generator,
    settings=settings,
    seed=run.config.seed,
  )
  before = before or scores(reference)
  after = scores(promotion.params) if promotion.step else before
  for name, params in (('before', reference), ('after', promotion.params)):
    key = rng.stream(run.config.seed, 'grid')
    images, _ = generator.images(params, key, GRID, name)
    generate.save_grid(folder / f'{name}.png', images, run.real.pixel_values)
  count = measure.num_images(run.evaluator, settings)
  result = {'before': before, 'after': after, 'samples': count}
  records.write_json(folder / 'eval.json', result)
  return result


def warnings(job_records: list[dict[str, Any]]) -> list[str]:
  """What the train records of a round say of its discriminator's health."""
  late = [r for r in job_records if r['kind'] == 'train' and 'accuracy' in r]
  late = late[len(late) // 2 :]
  if not late:
    return []
  mean = lambda name: float(np.mean([r[name] for r in late]))
  accuracy, saturated = mean('accuracy'), mean('saturated')
  if saturated > 0.5:
    return [
      f'the discriminator saturates (|βΔ| > 4 on {saturated:.0%} of the rows):'
      ' lower beta or the learning rate, or shorten the round'
    ]
  if accuracy < 0.505:
    return [
      f'the discriminator stays at chance (accuracy {accuracy:.3f}): raise'
      ' beta or the learning rate, or lengthen the round'
    ]
  return []


def play_round(
  run: run_lib.Run,
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
    {'round', 'before', 'after', 'promoted', 'provenance', 'warnings',
    'seconds', 'environment'}.
  """
  folder = run.workdir / f'round_{index:03d}'
  done = folder / 'done.json'
  if done.exists():
    return records.read_json(done)
  clock, phase = [time.perf_counter()], run.config.ddo
  model = models.build(run.config, phase, index)
  generator, fake = run.generator(model), None
  # Now, as a missing reference file should not cost the pool.
  score = functools.partial(
    measure.selection_scores,
    run.evaluator,
    generator,
    settings=run.config.evaluation,
    seed=run.config.seed,
  )
  start, meta = _reference(run, folder, origin, model)
  reference = run.executor.make_state(model.reduced, start())
  if phase.objective == 'ddo' and phase.fakes == 'pool':
    fake = _fake_pool(run, folder, model, reference, meta)
  clock.append(time.perf_counter())
  args = (model, run.frozen, start, reference, fake, score)
  job = run.job(folder, phase, index, *args)
  promotion = loop_lib.run(job)
  provenance = meta.get('provenance', {})
  chosen = _promote(run, folder, promotion, provenance)
  clock.append(time.perf_counter())
  result = {'round': index, 'promoted': chosen, 'provenance': provenance}
  result['environment'] = devices_lib.environment()
  result |= _report_scores(run, folder, generator, reference, promotion, before)
  clock.append(time.perf_counter())
  stages, spent = ('fakes', 'train', 'evaluate'), np.diff(clock).tolist()
  result['seconds'] = dict(zip(stages, spent, strict=True))
  result['warnings'] = warnings(run.log.read(folder.name))
  for warning in result['warnings']:
    _LOGGER.warning('%s: %s', folder.name, warning)
  records.write_json(done, result)
  return result


def play(config: config_lib.Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Pretrains and plays all rounds; writes summary.json and report.html.

  Returns:
    The summary: {'name', 'rounds': [see `play_round`], 'seconds'}.
  """
  run = run_lib.Run(config, workdir)
  origin, before, rounds = pretrain(run), None, []
  for index in range(config.rounds):
    result = play_round(run, index, origin, before)
    rounds.append(result)
    origin = workdir / f'round_{index:03d}' / 'promoted'
    before = result['after']
    metric = config.evaluation.metric
    _LOGGER.info(
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
  for name in ('tokenizer', 'pretrain'):
    done = workdir / name / 'done.json'
    if done.exists():
      seconds[name] = records.read_json(done)['seconds']
  seconds['total'] = sum(seconds.values())
  summary = {'name': config.name, 'rounds': rounds, 'seconds': seconds}
  records.write_json(workdir / 'summary.json', summary)
  page.write(workdir)
  return summary
