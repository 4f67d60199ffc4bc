"""The evaluate mode: scores of params, or of images that are there already."""

import dataclasses
import hashlib
import json
import pathlib
import shutil
from typing import Any
import zipfile

import numpy as np

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import models
from ddo_jax import rng
from ddo_jax.data import files as image_files
from ddo_jax.data import image_writer
from ddo_jax.data import sources
from ddo_jax.evaluation import evaluator as evaluator_lib
from ddo_jax.evaluation import features
from ddo_jax.evaluation import fidelity
from ddo_jax.evaluation import protocols
from ddo_jax.evaluation.metrics import statistics
from ddo_jax.method import generate
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import run as run_lib

_LOSSY = ('.jpg', '.jpeg', '.webp')


def score_params(
  config: config_lib.Config,
  workdir: pathlib.Path,
  params: pathlib.Path | None = None,
  output: pathlib.Path | None = None,
  save_images: pathlib.Path | None = None,
) -> dict[str, Any]:
  """Scores params on the reporting seeds; writes and returns eval.json.

  Args:
    config: of the run.
    workdir: its folder.
    params: a folder of params; None takes the run's newest.
    output: where eval.json goes; None is the workdir.
    save_images: a folder, or an .npz, that the images go to; under a protocol.
  """
  run = run_lib.Run(config, workdir)
  model = models.build(config, config.ddo)
  folder = params or run_lib.newest_params(workdir)
  weights, meta = run_lib.load_params(folder, model, run.executor)
  generator = run.generator(model)
  output = output or workdir
  result = {
    'params': str(folder),
    'sha256': meta['sha256'],
    'provenance': meta.get('provenance', {}),
    'sampler': dataclasses.asdict(config.sampler),
    'samples': evaluator_lib.sizes(run.evaluator, config)[0],
  }
  if isinstance(run.evaluator, fidelity.Evaluator):
    result |= _under_protocol(
      run.evaluator, generator, weights, config, output, result, save_images
    )
  else:
    result['scores'] = evaluator_lib.report_scores(
      run.evaluator, generator, weights, config
    )
  result['environment'] = devices_lib.environment()
  records.write_json(output / 'eval.json', result)
  return result


def _under_protocol(
  evaluator: fidelity.Evaluator,
  generator: generate.Generator,
  weights: Any,
  config: config_lib.Config,
  output: pathlib.Path,
  identity: dict[str, Any],
  save_images: pathlib.Path | None,
) -> dict[str, Any]:
  """The blocks' scores; goes on with the features that a cut-off run left."""
  (count, num_blocks), blocks = evaluator_lib.sizes(evaluator, config), []
  identity |= _about(evaluator) | {'seed': config.seed}
  digest = hashlib.sha256(json.dumps(identity).encode())
  kept = output / f'features_{digest.hexdigest()[:16]}'
  writer = save_images and image_writer.ImageWriter(save_images)
  for block in range(num_blocks):
    key = rng.stream(config.seed, 'report', block)
    folder = None if writer else kept / f'block_{block}'
    keep = writer.add if writer and block == 0 else None
    rows = evaluator.draw(
      generator, weights, key, block, count, folder=folder, keep=keep
    )
    blocks.append(evaluator.scores(rows))
    if block == 0:
      spread = evaluator.uncertainty(rows)
  if writer:
    writer.close()
  shutil.rmtree(kept, ignore_errors=True)
  return _about(evaluator) | {
    'ids': [0, num_blocks * count],
    'scores': evaluator_lib.summarize(blocks),
    'uncertainty': spread,
    'notes': evaluator.notes(count),
  }


def _about(evaluator: fidelity.Evaluator) -> dict[str, Any]:
  """The protocol, and the files that the number hangs on."""
  protocol = dataclasses.asdict(evaluator.extractor.protocol)
  return json.loads(
    json.dumps({'protocol': protocol, 'files': evaluator.files})
  )


def open_images(path: pathlib.Path) -> sources.Source:
  """Opens a set of finished images: a folder, a zip or an .npz.

  Args:
    path: PNGs in a folder or zip, or an .npz with `arr_0` (as OpenAI's) or
      `image`, uint8 [N,H,W,3], and maybe labels.

  Raises:
    errors.UserError: nothing is there, or images that were compressed with
      loss or scaled.
  """
  if path.suffix == '.npz':
    arrays = statistics.read_npz(path)
    images = arrays.get('arr_0', arrays.get('image', arrays.get('images')))
    if images is None:
      raise errors.UserError(
        f'{path} has the arrays {", ".join(arrays)}; wanted arr_0 or image,'
        ' uint8 [N,H,W,3]'
      )
    return sources.ArraySource(
      str(path), images, np.zeros(len(images), np.int32)
    )
  if not path.is_dir() and not zipfile.is_zipfile(path):
    raise errors.UserError(
      f'no images at {path}; wanted a folder or zip of PNGs, or an .npz'
    )
  names, _ = image_files.opener(path)
  if lossy := [name for name in names if name.lower().endswith(_LOSSY)]:
    raise errors.UserError(
      f'{path} holds {lossy[0]}: compression with loss changes the score by'
      ' more than models differ; write the samples as PNG or .npz'
    )
  return sources.open_source(config_lib.Data(source=str(path)), 'train')


def score_images(
  config: config_lib.Config, path: pathlib.Path, output: pathlib.Path
) -> dict[str, Any]:
  """Scores images that are there already; writes and returns eval.json.

  Raises:
    errors.UserError: the images are not what the protocol measures.
  """
  source = open_images(path)
  evaluator = fidelity.Evaluator(config)
  rows = evaluator.extractor.read(source, np.arange(len(source)))
  result = _about(evaluator) | {
    'images': str(path),
    'samples': len(source),
    'scores': evaluator_lib.summarize([evaluator.scores(rows)]),
    'uncertainty': evaluator.uncertainty(rows),
    'notes': evaluator.notes(len(source)),
    'environment': devices_lib.environment(),
  }
  records.write_json(output / 'eval.json', result)
  return result


def write_reference(
  config: config_lib.Config, output: pathlib.Path
) -> pathlib.Path:
  """Writes the statistics of a data set as reference files.

  Args:
    config: of the data (its training split) and of the protocol.
    output: folder of `<kind>.npz`, one for each kind of features.

  Returns:
    output.
  """
  extractor = features.Extractor(config)
  source = sources.open_source(config.data, config.data.train_split)
  rows = extractor.read(source, np.arange(len(source)))
  origin = {
    'data': source.name,
    'resize': extractor.protocol.resize,
    **{f'{k}_sha256': v['sha256'] for k, v in extractor.provenance.items()},
  }
  for kind in extractor.kinds:
    sums = features.sums(rows[kind])
    moments = statistics.Moments.of(sums, origin)
    statistics.save(output / f'{kind}.npz', moments)
  return output


def compare(result: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
  """How much higher each score's mean is than the other's of its name.

  Args:
    result: an eval.json.
    other: another one.

  Raises:
    errors.UserError: they are not of one protocol, number of images and
      reference; the line says what differs.
  """

  def read(values):
    if 'protocol' not in values:
      raise errors.UserError(
        'scores without a protocol are compared inside one run only: evaluate'
        ' both with --config.evaluation.protocol'
      )
    fields = {
      name: tuple(value) if isinstance(value, list) else value
      for name, value in values['protocol'].items()
    }
    reference = values['files']['reference'].get('sha256', '')
    return {
      name: protocols.Score(
        name,
        score['mean'],
        protocols.Protocol(**fields),
        values['samples'],
        reference,
      )
      for name, score in values['scores'].items()
    }

  ours, theirs = read(result), read(other)
  return {
    name: protocols.difference(ours[name], theirs[name])
    for name in ours
    if name in theirs
  }
