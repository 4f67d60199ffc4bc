"""One round: reference -> fake pool -> train -> promote -> evaluate.

Each part leaves its result on disk and returns at once if it is there, so that
resuming a round is playing it again.
"""

from collections.abc import Callable
import dataclasses
import functools
import logging
import pathlib
import shutil
import time
from typing import Any

import numpy as np

from ddo_jax import config as config_lib
from ddo_jax import rng
from ddo_jax import settings
from ddo_jax.data import labels as labels_lib
from ddo_jax.data import sources
from ddo_jax.evaluation import measure
from ddo_jax.method import likelihood
from ddo_jax.method import negatives
from ddo_jax.report import gallery
from ddo_jax.report import run_folder
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import manifest as manifest_lib
from ddo_jax.runtime import processes
from ddo_jax.runtime import progress
from ddo_jax.training import loop as loop_lib
from ddo_jax.training import workspace
from ddo_jax.tuning import findings
from ddo_jax.tuning import sweep as sweep_lib

_LOGGER = logging.getLogger(__name__)


def _reference(
  run: workspace.Run, manifest: manifest_lib.Manifest, origin: pathlib.Path
) -> tuple[likelihood.Params, Callable[[], likelihood.Params], dict[str, Any]]:
  """Copies the round's reference from `origin`, unless it is copied.

  Returns:
    Its params, a function that reads them again, and their metadata.
  """
  copy = manifest.folder / 'reference'
  if manifest.holds('reference', f'copying it again from {origin}'):
    params, meta = workspace.load_params(
      copy, run.model, run.executor, verify=False
    )
  else:
    meta = checkpoint.load_meta(origin)
    manifest.check_params('reference', meta['sha256'])
    target = workspace.params_target(run.model, run.executor)
    params, meta = checkpoint.copy_params(origin, copy, target)
    manifest.add_params('reference', meta['sha256'])

  def read():
    again, _ = workspace.load_params(
      copy, run.model, run.executor, verify=False
    )
    return again

  return params, read, meta


def fake_pool(
  run: workspace.Run,
  folder: pathlib.Path,
  reference: likelihood.Params,
  meta: dict[str, Any],
) -> sources.Source:
  """Returns a round's fake pool, drawing what is missing of it.

  Args:
    run: the run.
    folder: the round's; the images depend on its name.
    reference: θ_ref, on the devices.
    meta: its metadata.
  """
  generator = run.generator(guided=False)
  sampler = dataclasses.asdict(generator.sampler)
  later = {n: sampler.pop(n) for n in negatives.LATER if n in sampler}
  identity = {
    'reference': meta['sha256'],
    'provenance': meta.get('provenance', {}),
    'sampler': sampler,
    **later,
    'stream': [run.config.seed, folder.name],
    'labels': str(run.shares),
  }
  pool = run.config.ddo.negatives.open_pool(
    path=folder / 'fakes',
    shard_size=run.sample_batch,
    identity=identity,
  )
  key = rng.stream(run.config.seed, 'fakes', folder.name)
  generator.fill(pool, reference, key, run.shares)
  return pool.source(run.real.num_classes, run.real.pixel_values)


def _hashes(meta: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
  """Returns the hashes of a round's reference and of its pool."""
  digest = functools.partial(manifest_lib.digest, folder / 'fakes')
  pool = processes.decide(f'hash of {folder / "fakes"}', digest)
  return {'reference_sha256': meta['sha256'], 'pool_sha256': pool}


def _read_done(path: pathlib.Path) -> dict[str, Any]:
  """Returns what a round left in its done.json."""
  return processes.decide(f'read {path}', lambda: run_folder.read_round(path))


def _chosen(
  run: workspace.Run, promotion: loop_lib.Promotion
) -> dict[str, Any]:
  """Returns where in its round a promotion comes from, as JSON values."""
  return {
    'step': promotion.step,
    'images': promotion.step * run.config.ddo.batch_size,
    'profile': promotion.profile,
    'selection': promotion.selection,
    **promotion.about,
  }


def _kept_promotion(
  run: workspace.Run, manifest: manifest_lib.Manifest
) -> loop_lib.Promotion | None:
  """Returns what an earlier call promoted; None unless that is whole."""
  if not manifest.holds('promoted'):
    return None
  params, meta = workspace.load_params(
    manifest.folder / 'promoted', run.model, run.executor, verify=False
  )
  chosen = dict(meta['promoted'])
  del chosen['images']
  fields = {name: chosen.pop(name) for name in ('step', 'profile', 'selection')}
  return loop_lib.Promotion(params, **fields, about=chosen)


def _save_promoted(
  run: workspace.Run,
  manifest: manifest_lib.Manifest,
  promotion: loop_lib.Promotion,
  provenance: dict[str, str],
) -> None:
  """Saves the round's result."""
  folder = manifest.folder
  meta = {
    'stage': folder.name,
    'promoted': _chosen(run, promotion),
    'provenance': provenance,
    'class_shares': run.shares.counts,
    'config': settings.to_json(run.config),
  }
  sha256 = checkpoint.save_params(folder / 'promoted', promotion.params, meta)
  manifest.add_params('promoted', sha256)


def _draw_sheets(
  run: workspace.Run,
  manifest: manifest_lib.Manifest,
  weights: dict[str, likelihood.Params],
  set_size: int,
) -> dict[str, Any]:
  """Draws the same seeds from each of the weights; see `gallery.write`.

  Calls are of the size that the scores, from `set_size` images, have compiled.
  """
  generator = run.generator()
  key = rng.stream(run.config.seed, 'grid')
  ids = np.arange(gallery.COUNT)
  labels = run.shares.labels(ids)
  drawn = {}
  with progress.follow('sheets', len(ids) * len(weights)) as bar:
    for name, params in weights.items():
      parts = list(generator.stream(params, key, ids, labels, set_size))
      drawn[name] = np.concatenate(parts)
      bar.update(len(ids))
  about = gallery.write(
    folder=manifest.folder,
    source=run.real,
    render=generator.render,
    labels=labels if run.model.num_classes else None,
    drawn=drawn,
    seed=rng.order_seed(run.config.seed, 'grid', 'real'),
  )
  manifest.add(*[path.name for path in manifest.folder.glob('*.png')])
  return about


def _report_scores(
  run: workspace.Run,
  manifest: manifest_lib.Manifest,
  reference: likelihood.Params,
  promotion: loop_lib.Promotion,
  before: dict[str, Any] | None,
) -> dict[str, Any]:
  """Scores the round's start and end and draws images: eval.json."""
  folder = manifest.folder
  evaluation = run.config.evaluation
  scores = functools.partial(
    measure.report_scores,
    run.evaluator,
    run.generator(),
    settings=evaluation,
    seed=run.config.seed,
  )
  kept = folder / 'evaluation'  # of a call that is cut off
  count = measure.num_images(run.evaluator, evaluation)
  weights = {'after': promotion.params}
  if before is None:  # no earlier round has scored and drawn these
    weights['before'] = reference
  result = manifest.read_json('eval.json')
  if result is not None:
    sheets = {n: f for n, f in manifest.faults().items() if '.png' in n}
    manifest.warn(sheets, 'drawing it again')
    if sheets:
      _draw_sheets(run, manifest, weights, count)
    return result
  if before is None:
    before = scores(reference, folder=kept / 'before')
  after = before
  if promotion.step:
    after = scores(promotion.params, folder=kept / 'after')
  num_blocks = measure.num_blocks(run.evaluator, evaluation)
  result = {
    'before': before,
    'after': after,
    'samples': count,
    'evaluator': run.evaluator.identity(),
    'notes': run.evaluator.notes(count, num_blocks),
    'labels': run.label_rule,
    'sheets': _draw_sheets(run, manifest, weights, count),
  }
  manifest.write_json('eval.json', result)
  if processes.is_main():
    shutil.rmtree(kept, ignore_errors=True)
  return result


def _numbers(phase: config_lib.Phase) -> dict[str, float]:
  """Returns the numbers of a phase at its round; see `findings.of_log`."""
  numbers = {
    name: value
    for name, value in vars(phase.objective).items()
    if isinstance(value, float)
  }
  return numbers | {'learning_rate': phase.optimizer.learning_rate}


def _known_scores(
  run: workspace.Run, previous: dict[str, Any] | None
) -> dict[str, Any] | None:
  """Returns the scores that a round begins with; None to measure them.

  They are the last ones of the round before, unless its images were drawn of
  other classes: an earlier version drew every class equally often where no
  protocol has a rule, and did not say so.
  """
  if previous is None:
    return None
  unrecorded = run.label_rule
  if unrecorded and not run.config.evaluation.protocol:
    unrecorded = labels_lib.EQUAL
  if previous.get('labels', unrecorded) != run.label_rule:
    return None
  return previous['after']


def play_round(
  run: workspace.Run,
  index: int,
  origin: pathlib.Path,
  previous: dict[str, Any] | None,
) -> dict[str, Any]:
  """Plays one round, or returns what it left when it was played.

  Args:
    run: the run.
    index: the number of the round, from 0.
    origin: the folder of the params that become the reference.
    previous: the result of the round before, if there is one.

  Returns:
    {'round', 'before', 'after', 'promoted', 'provenance', 'warnings',
    'seconds', 'environment', 'samples', 'evaluator', 'notes', 'labels',
    'sheets'}; see `evaluator.Evaluator` and `gallery.write` for the last four.
  """
  folder = run.workdir / f'round_{index:03d}'
  done = folder / 'done.json'
  manifest = workspace.open_manifest(folder)
  following = run.workdir / f'round_{index + 1:03d}'
  spare = ('reference', 'fakes')
  if workspace.is_done(manifest, 'promoted', following, spare):
    return _read_done(done)
  phase = config_lib.at_round(run.config.ddo, index)
  model = run.training_model(phase.noise)
  clock = [time.perf_counter()]

  # The evaluator comes first: a missing file of statistics should not cost the
  # pool.
  score = functools.partial(
    measure.selection_scores,
    run.evaluator,
    run.generator(),
    settings=run.config.evaluation,
    seed=run.config.seed,
  )
  params, start, meta = _reference(run, manifest, origin)
  reference = run.executor.make_state(
    model.rules.reduce, params, part='reference'
  )
  del params
  provenance = meta.get('provenance', {})
  promotion = _kept_promotion(run, manifest)
  fake = None
  tuned = run.config.tune.members > 0
  if promotion is None:
    if not tuned:  # what members leave stays there
      workspace.check_source(manifest, 'promoted', phase.steps())
    if phase.used_negatives.needs_pool:
      fake = fake_pool(run, folder, reference, meta)
  clock.append(time.perf_counter())

  if promotion is None:
    job = run.job(
      folder=folder,
      phase=phase,
      model=model,
      frozen=run.frozen,
      start=start,
      reference=reference,
      fake=fake,
      score=score,
    )
    if not tuned:
      promotion = loop_lib.run(job)
    else:
      winner = previous and previous['promoted'].get('settings')
      sweep = sweep_lib.Sweep(run, job, manifest, winner)
      with run.turn_passed_on():
        sweep.play_members()
      # Another process may have had its turn, and ended the round.
      manifest = workspace.open_manifest(folder)
      if workspace.is_done(manifest, 'promoted', following, spare):
        return _read_done(done)
      promotion = _kept_promotion(run, manifest)
      if promotion is None:
        promotion = sweep.promote(manifest, _hashes(meta, folder))
    _save_promoted(run, manifest, promotion, provenance)
  clock.append(time.perf_counter())

  scores = _report_scores(
    run, manifest, reference, promotion, _known_scores(run, previous)
  )
  clock.append(time.perf_counter())

  parts = ('fakes', 'train', 'evaluate')
  numbers = _numbers(phase) | promotion.about.get('settings', {})
  result = {
    'round': index,
    'promoted': _chosen(run, promotion),
    'provenance': provenance,
    'environment': devices_lib.environment(),
    **scores,
    'seconds': dict(zip(parts, np.diff(clock).tolist(), strict=True)),
    'warnings': processes.decide(
      f'warnings of {folder.name}',
      lambda: findings.warnings(run.log.read(folder.name), numbers),
    ),
  }
  for warning in result['warnings']:
    _LOGGER.warning('%s: %s', folder.name, warning)
  manifest.holds('done.json')  # of an earlier call; it says so if not
  manifest.write_json('done.json', result)
  return result
