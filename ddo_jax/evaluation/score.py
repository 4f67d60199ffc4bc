"""The evaluate and fid_stats modes: scores of params, or of finished images."""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import pathlib
import shutil
from typing import Any
import zipfile

from ddo_jax import errors
from ddo_jax.data import files as image_files
from ddo_jax.data import image_writer
from ddo_jax.data import labels as labels_lib
from ddo_jax.data import sources
from ddo_jax.evaluation import evaluator as evaluator_lib
from ddo_jax.evaluation import features
from ddo_jax.evaluation import measure
from ddo_jax.evaluation import protocols
from ddo_jax.evaluation.metrics import frechet
from ddo_jax.evaluation.metrics import statistics
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import processes
from ddo_jax.runtime import records
from ddo_jax.training import workspace
from ddo_jax.weights import fid_stats

_OWN_IMAGES = 50_000  # as published numbers have
_OWN_BLOCKS = 3  # of which a spread is seen
_LOSSY = ('.jpg', '.jpeg', '.webp')


def score_params(
  run: workspace.Run,
  params: pathlib.Path | None = None,
  output: pathlib.Path | None = None,
  save_images: pathlib.Path | None = None,
) -> dict[str, Any]:
  """Scores params on the reporting seeds; writes and returns eval.json.

  A call that was cut off left the features it had made in `output`, and the
  next call goes on with them.

  Args:
    run: the run whose data, model and sampler are used.
    params: a folder of params; None takes the run's newest.
    output: the folder of eval.json; None takes the run's.
    save_images: a folder, or an .npz, that the first block's images are
      written to; all of them are then drawn in this call.
  """
  config = run.config
  settings = config.evaluation
  evaluator = run.evaluator
  folder = params or workspace.newest_params(run.workdir)
  weights, meta = workspace.load_params(folder, run.model, run.executor)
  output = output or run.workdir
  count = measure.num_images(evaluator, settings)
  num_blocks = measure.num_blocks(evaluator, settings)
  sampler: Any = config.sampler  # a dataclass, as every sampler is
  about = {
    'params': str(folder),
    'sha256': meta['sha256'],
    'provenance': meta.get('provenance', {}),
    'sampler': dataclasses.asdict(sampler),
    'samples': count,
    'seeds': num_blocks,
    'labels': run.label_rule,
  } | evaluator.identity()
  kept = output / f'features_{_digest(run, about)}'
  writer = None
  if save_images and processes.is_main():
    writer = image_writer.ImageWriter(save_images)
  blocks = []
  uncertainty = {}
  for rows, labels in measure.report_blocks(
    evaluator,
    run.generator(),
    weights,
    settings,
    config.seed,
    folder=None if save_images else kept,
    keep=writer.add if writer else None,
  ):
    blocks.append(measure.scores(evaluator, rows, labels))
    if not uncertainty and processes.is_main():
      uncertainty = evaluator.uncertainty(rows)
  if writer:
    writer.close()
  last_ids = evaluator.ids(num_blocks - 1, count)
  result = about | {
    'ids': [0, int(last_ids[-1]) + 1],
    'scores': measure.summarize(blocks, evaluator.minima),
    'uncertainty': uncertainty,
    'notes': evaluator.notes(count, num_blocks),
    'environment': devices_lib.environment(),
  }
  records.write_json(output / 'eval.json', result)
  if processes.is_main():
    shutil.rmtree(kept, ignore_errors=True)
  return result


def _digest(run: workspace.Run, about: Mapping[str, Any]) -> str:
  """Hashes all that an image and its features depend on."""
  config = run.config
  depends = dict(about)
  depends['seed'] = config.seed
  depends['model'] = repr(config.model)
  depends['frozen'] = run.frozen_hashes()
  content = json.dumps(depends, sort_keys=True).encode()
  return hashlib.sha256(content).hexdigest()[:16]


def open_images(path: pathlib.Path) -> sources.Source:
  """Opens a set of finished images: a folder, a zip or an .npz.

  Args:
    path: PNGs in a folder or zip, perhaps with EDM's dataset.json; or an .npz
      with `arr_0` (as OpenAI's) or `image`, uint8 [N,H,W,C], and perhaps with
      labels as `arr_1` or `label`.

  Raises:
    errors.UserError: nothing is there, or images that were compressed with
      loss or scaled.
  """
  if path.suffix == '.npz':
    return sources.open_npz(path)
  is_zip = path.is_file() and zipfile.is_zipfile(path)
  if not path.is_dir() and not is_zip:
    raise errors.UserError(
      f'no images at {path}; wanted a folder or zip of PNGs, or an .npz'
    )
  names, _ = image_files.opener(path)
  lossy = [name for name in names if name.lower().endswith(_LOSSY)]
  if lossy:
    raise errors.UserError(
      f'{path} holds {lossy[0]}: compression with loss changes the score by'
      ' more than models differ; write the samples as PNG or .npz'
    )
  return image_files.open_files(path)


def score_images(
  settings: evaluator_lib.Evaluation,
  seed: int,
  data: sources.Data,
  path: pathlib.Path,
  output: pathlib.Path,
) -> dict[str, Any]:
  """Scores images that are there already; writes and returns eval.json.

  Args:
    settings: they name the protocol, or none. Where they state `samples` and
      `seeds`, a set that is large enough is measured in such blocks.
    seed: the run's.
    data: where real images come from; under a protocol only needed for
      `settings.real_images`.
    path: the images; see `open_images`.
    output: the folder of eval.json.

  Raises:
    errors.UserError: the images are not what the evaluator measures.
  """
  evaluator_lib.check(settings)
  source = open_images(path)
  train = None
  if settings.real_images or not settings.protocol:
    train = sources.open_source(data, data.train_split)

  def open_test() -> sources.Source:
    return sources.open_source(data, data.test_split)

  evaluator = measure.open_evaluator(settings, seed, train, open_test)
  blocks = measure.cut(measure.read(evaluator, source), settings)
  scores = [
    measure.scores(evaluator, rows, labels, from_file=True)
    for rows, labels in blocks
  ]
  if not processes.is_main():  # it has no rows to say more of
    return {'scores': scores}
  first, _ = blocks[0]
  count = len(next(iter(first.values())))
  notes = evaluator.notes(count, len(blocks), first)
  if len(blocks) * count < len(source):
    notes.append(
      f'{len(blocks) * count} of {len(source)} images are measured, as many as'
      ' config.evaluation.samples and config.evaluation.seeds state'
    )
  result = evaluator.identity() | {
    'images': str(path),
    'samples': count,
    'seeds': len(blocks),
    'scores': measure.summarize(scores, evaluator.minima),
    'uncertainty': evaluator.uncertainty(first),
    'notes': notes,
    'environment': devices_lib.environment(),
  }
  records.write_json(output / 'eval.json', result)
  return result


def _own_protocol(
  settings: evaluator_lib.Evaluation,
  data: sources.Data,
  source: sources.Source,
  labels: str,
) -> protocols.Protocol:
  """Returns a protocol by which images are compared with those of a source."""
  resize: Any = 'tf1'
  inception_score: Any = ''
  kinds = tuple(settings.features) or ('fid',)
  if settings.protocol:
    base = protocols.get(settings.protocol)
    resize = base.resize
    inception_score = base.inception_score
    kinds = evaluator_lib.kinds(settings)
  known = tuple(fid_stats.WIDTHS)
  errors.require(
    set(kinds) <= set(known),
    'evaluation.features',
    settings.features,
    f'some of {known}',
  )
  shares: tuple[int, ...] = ()
  if source.num_classes:
    shares = labels_lib.Shares.of(labels, source.labels()).counts
  height, width, _ = source.stored_shape
  name = pathlib.Path(data.source).stem.replace('{split}', data.train_split)
  return protocols.Protocol(
    name=f'{name}-{height}x{width}',
    image_shape=source.stored_shape,
    num_images=settings.samples or _OWN_IMAGES,
    num_blocks=settings.seeds or _OWN_BLOCKS,
    labels='shares' if shares else 'random',
    resize=resize,
    fid_stats='',
    features=kinds,
    inception_score=inception_score,
    printed='mean',
    class_shares=shares,
    pixel_values=source.pixel_values,
    data=source.name,
  )


def write_fid_stats(
  settings: evaluator_lib.Evaluation,
  data: sources.Data,
  output: pathlib.Path,
  labels: str = 'data',
) -> pathlib.Path:
  """Makes a protocol of a data set's training split: statistics of it.

  The folder serves as `evaluation.protocol`, wherever a published name may
  stand, or as `evaluation.fid_stats` beside such a name.

  Args:
    settings: `protocol` names one whose features, resize and Inception Score
      are taken; '' takes EDM's, with the kinds of `features`, FID's if there
      are none. `samples` and `seeds` are the protocol's, by default three
      blocks of 50,000 images. They also name the files of weights.
    data: where the images come from.
    output: the folder of protocol.json and `<kind>.npz`, one file for each kind
      of features.
    labels: how often each class is to be drawn, one of `labels.RULES`.

  Returns:
    output.

  Raises:
    errors.UserError: weights are missing, or the data is not of images.
  """
  source = sources.open_source(data, data.train_split)
  protocol = _own_protocol(settings, data, source, labels)
  extractor = features.Extractor(settings, protocol)
  images = features.of_source(source)
  rows = extractor.rows(images, len(source), source.name)
  origin = {'data': source.name, 'resize': extractor.protocol.resize}
  for network, provenance in extractor.provenance.items():
    origin[f'{network}_sha256'] = provenance['sha256']

  def write():
    for kind in extractor.kinds:
      sums = frechet.Statistics.of(rows[kind])
      moments = statistics.Moments.of(sums, origin)
      statistics.save(output / f'{kind}.npz', moments)
    protocols.write(output, protocol)

  processes.decide(f'write {output}', write)  # process 0 has all rows
  return output


def lines(result: Mapping[str, Any]) -> list[str]:
  """Returns an evaluation as lines to print: the scores, then the notes."""
  printed = []
  for name, score in result['scores'].items():
    sd = '' if score['sd'] is None else f' ± {score["sd"]:.4f}'
    mean = f'{score["mean"]:.4f}{sd}'
    text = mean
    if score.get('headline') == 'minimum' and score['sd'] is not None:
      count = len(score['values'])
      text = f'{score["minimum"]:.4f} (minimum of {count}; mean {mean})'
    printed.append(f'{name:16} {text}')
  printed += [f'note: {note}' for note in result.get('notes', [])]
  return printed


def _recorded_scores(result: Mapping[str, Any]) -> dict[str, protocols.Score]:
  """Returns the scores of an eval.json with all that they hang on."""
  if 'protocol' not in result:
    raise errors.UserError(
      'scores without a protocol are compared inside one run only: evaluate'
      ' both with --config.evaluation.protocol'
    )
  protocol = protocols.from_json(result['protocol'])
  files = result['files']
  # Earlier versions called the statistics a reference.
  fid_stats = files['fid_stats'] if 'fid_stats' in files else files['reference']
  for name, score in result['scores'].items():
    if not isinstance(score['mean'], int | float):
      raise TypeError(f'the mean of {name} is {score["mean"]!r}')
  return {
    name: protocols.Score(
      metric=name,
      value=score['mean'],
      protocol=protocol,
      num_images=result['samples'],
      fid_stats_sha256=fid_stats.get('sha256', ''),
    )
    for name, score in result['scores'].items()
  }


def compare(
  result: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, float]:
  """Returns how much higher each score's mean is than the other's.

  Args:
    result: an eval.json.
    other: another one.

  Raises:
    errors.UserError: they are not of one protocol, number of images and file
      of statistics, and the line says what differs; or the other is damaged.
  """
  ours = _recorded_scores(result)
  try:
    theirs = _recorded_scores(other)
    return {
      name: protocols.difference(ours[name], theirs[name])
      for name in ours
      if name in theirs
    }
  except errors.UserError:
    raise
  except (LookupError, TypeError, ValueError, AttributeError) as error:
    raise errors.UserError(
      'what is compared with is no eval.json that --mode=evaluate wrote'
      f' ({type(error).__name__}: {str(error)[:80]}): write it again, or name'
      ' another'
    ) from error
