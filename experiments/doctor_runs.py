"""Runs that are ill, each in one way, as --mode=doctor is to find them.

python -m experiments.doctor_runs --workdir=runs/doctor

The digits are pretrained once. Each run then plays one round from these weights
with one thing broken. What the doctor reads of a run (its config, the numbers
of its log, a part of its fake pool) is copied to tests/tuning/recorded, where
the tests read it. Where the doctor names other settings, the round is played
once more with them.

Two of the breaks turn out otherwise than one would think: a β that is far too
small is dead at first and then runs away, because Adam does not see how small
the gradients are and nothing brakes; and a learning rate that is far too large
does not saturate the logits, but overshoots.
"""

import contextlib
import copy
import dataclasses
import json
import operator
import pathlib
import shutil
import time
from typing import Any
from unittest import mock

from absl import app
from absl import flags
from absl import logging as absl_logging
import numpy as np
from PIL import Image

from configs import digits
from ddo_jax import config as config_lib
from ddo_jax.data import builders
from ddo_jax.data import sources
from ddo_jax.method import negatives
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import run as run_lib
from ddo_jax.training import workspace
from ddo_jax.tuning import doctor
from ddo_jax.tuning import shortcut

ROWS = 500  # of a pool that are kept
SLEEP = 0.05  # seconds that the slow source takes for a batch
DIGITS = 5  # of a number that are kept
POOL = 5_000
SAME_POOL = ('dead', 'saturated', 'fast', 'overshooting', 'starved')
_LEFT_OUT = ('_p5', '_p95', '_mean', 'nn_ratio', 'memorised', 'precision')
TREATED = ('dead', 'saturated', 'fast', 'overshooting')


def _brighter(images: np.ndarray) -> np.ndarray:
  """Every pixel two grey levels up, as by an offset in a reader."""
  return np.minimum(images + 2, 16).astype(np.uint8)


def _framed(images: np.ndarray) -> np.ndarray:
  """A border of zeros, as padding or a careless crop leaves it."""
  inside = np.zeros_like(images)
  inside[:, 1:-1, 1:-1] = images[:, 1:-1, 1:-1]
  return inside


def _blurred(images: np.ndarray) -> np.ndarray:
  """Made half as large and large again, as by resizing once too often."""
  height, width = images.shape[1:3]
  out = np.empty_like(images)
  for row, image in enumerate(images):
    half = (width // 2, height // 2)
    small = Image.fromarray(image[..., 0]).resize(half, Image.Resampling.BOX)
    out[row, ..., 0] = small.resize((width, height), Image.Resampling.BILINEAR)
  return out


def _coarse(images: np.ndarray) -> np.ndarray:
  """Every other grey level alone, as fewer bits leave it."""
  return images // 2 * 2


FAULTS = {
  'brighter': _brighter,
  'framed': _framed,
  'blurred': _blurred,
  'coarse': _coarse,
}


class _SpoiledShards(negatives.FakePool):
  """Spoils what is written to it."""

  fault = ''

  def write(self, shard, stored, labels):
    if self.fault == 'one_class':  # takes the places of two others
      (sevens,) = np.nonzero(labels == 7)
      (others,) = np.nonzero((labels == 1) | (labels == 4))
      stored = stored.copy()
      labels = labels.copy()
      stored[others] = stored[np.resize(sevens, len(others))]
      labels[others] = 7
    else:
      stored = FAULTS[self.fault](stored)
    super().write(shard, stored, labels)


@dataclasses.dataclass(unsafe_hash=True)
class SpoiledPool(negatives.Pool):
  """A pool whose images or labels are spoiled before they are written."""

  fault: str = ''

  def open_pool(self, path, shard_size, identity):
    """Opens the pool; see `negatives.Pool`."""
    pool = _SpoiledShards(path, self.size, shard_size, identity)
    pool.fault = self.fault
    return pool


class _SlowSource(sources.ArraySource):
  """Reads a batch as slowly as a disk far away."""

  def read(self, index):
    time.sleep(SLEEP)
    return super().read(index)


_OPEN = sources.open_source


def _slowly(data: sources.Data, split: str) -> sources.Source:
  source = _OPEN(data, split)
  if split != data.train_split:
    return source
  return _SlowSource(**vars(source))


def recipe(workdir: pathlib.Path) -> config_lib.Config:
  """One round from the weights that all runs share."""
  config = digits.get_config()
  config.rounds = 1
  config.init_from = str(workdir / 'start' / 'pretrain' / 'params')
  config.evaluation.selection_samples = 2_000
  config.evaluation.samples = 1_000
  config.evaluation.seeds = 1
  config.ddo.negatives.size = POOL
  return config


def stretched(path: pathlib.Path) -> None:
  """Writes the digits with their 17 grey levels spread over 0 .. 255."""
  for split, (images, labels) in builders.digits().items():
    spread = (images.astype(int) * 255 // 16).astype(np.uint8)
    np.savez_compressed(path / f'{split}.npz', image=spread, label=labels)


def ill(name: str, workdir: pathlib.Path) -> config_lib.Config:
  """Returns the recipe with one thing broken."""
  config = recipe(workdir)
  objective = config.ddo.objective
  if name == 'dead':
    objective.beta = (1e-5,)
  elif name == 'saturated':
    objective.beta = (100.0,)
  elif name == 'fast':
    config.ddo.optimizer.learning_rate = (0.1,)
  elif name == 'overshooting':
    objective.alpha = (4.0,)
    objective.beta = (0.02,)
  elif name == 'unrounded':
    config.data.source = str(workdir / '{split}.npz')
    config.model.pixel_values = 256
  elif name in (*FAULTS, 'one_class'):
    config.ddo.negatives = SpoiledPool(size=POOL, fault=name)
  return config


RUNS = (
  'healthy',
  'dead',
  'saturated',
  'fast',
  'overshooting',
  'unrounded',
  *FAULTS,
  'one_class',
  'starved',
)


def _rounded(value: Any) -> Any:
  return float(f'{value:.{DIGITS}g}') if isinstance(value, float) else value


def keep(run: pathlib.Path, kept: pathlib.Path, pool: bool) -> None:
  """Copies what the doctor and the report's figures read of a run.

  Args:
    run: its folder.
    kept: the folder of the copy.
    pool: whether a part of the fake pool is copied, too.
  """
  shutil.rmtree(kept, ignore_errors=True)
  kept.mkdir(parents=True)
  # As if it had been played in the default folder.
  config = (run / 'config.json').read_text()
  config = config.replace(str(run.parent), 'runs/doctor')
  (kept / 'config.json').write_text(config)
  with (kept / 'metrics.jsonl').open('w') as file:
    for record in records.read_log(run):
      record = {
        name: _rounded(value)
        for name, value in record.items()
        if not isinstance(value, list) and not name.endswith(_LEFT_OUT)
      }
      file.write(json.dumps(record) + '\n')
  if not pool:
    return
  (kept / 'round_000' / 'fakes').mkdir(parents=True)
  path = run / 'round_000' / 'fakes' / '000000.npz'
  shard = np.load(path)
  np.savez_compressed(
    kept / 'round_000' / 'fakes' / path.name,
    image=shard['image'][:ROWS],
    label=shard['label'][:ROWS],
  )


def combined(run: pathlib.Path) -> float:
  """The AUC of a logistic regression on all trivial statistics of rows."""
  from sklearn import linear_model
  from sklearn import metrics
  from sklearn import model_selection
  from sklearn import pipeline
  from sklearn import preprocessing

  real, _ = builders.digits()['train']
  shards = sorted((run / 'round_000' / 'fakes').glob('*.npz'))
  fake = np.load(shards[0])['image'][: len(real)]
  top = 16
  if fake.max() > top:
    real = real.astype(int) * 255 // top
    top = 255
  columns = []
  for images in (real, fake):
    x = images.astype(np.float32) / (top / 2) - 1
    share = (x == -1).reshape(len(x), -1).mean(axis=1)
    found = shortcut.statistics(x) | {'share of black': share}
    columns.append(np.stack(list(found.values()), axis=1))
  truth = np.repeat([0, 1], [len(real), len(fake)])
  told = model_selection.cross_val_predict(
    pipeline.make_pipeline(
      preprocessing.StandardScaler(),
      linear_model.LogisticRegression(max_iter=1_000),
    ),
    np.concatenate(columns),
    truth,
    cv=5,
    method='decision_function',
  )
  return float(metrics.roc_auc_score(truth, told))


def play(name: str, config: config_lib.Config, run: pathlib.Path) -> None:
  """Plays a run, its images read slowly where it is to starve."""
  slow = contextlib.nullcontext()
  if name == 'starved':
    slow = mock.patch.object(sources, 'open_source', _slowly)
  with slow:
    run_lib.play(config, run)


def told(
  run: pathlib.Path, config: config_lib.Config
) -> tuple[doctor.Stage, dict[str, Any]]:
  """Returns what the doctor says, and as JSON beside the best score."""
  (stage,) = doctor.examine(run, config).stages
  log = records.read_log(run, 'round_000')
  best = min(r['selection'] for r in log if 'selection' in r)
  return stage, {
    'verdict': stage.ill or ['healthy'],
    'best_selection': _rounded(best),
    'findings': [str(each) for each in stage.findings],
  }


def treated(
  config: config_lib.Config, stage: doctor.Stage
) -> tuple[config_lib.Config, tuple[str, ...]]:
  """Returns a config as the first remedy changes it, and its flags."""
  first = next(each for each in stage.findings if each.found)
  config = copy.deepcopy(config)
  for flag in first.flags:
    name, value = flag.removeprefix('--config.').split('=')
    *path, field = name.split('.')
    setattr(operator.attrgetter('.'.join(path))(config), field, (float(value),))
  return config, first.flags


def main(_) -> None:
  absl_logging.set_verbosity(absl_logging.ERROR)
  workdir = pathlib.Path(flags.FLAGS.workdir)
  kept = pathlib.Path(flags.FLAGS.output)
  run_lib.pretrain(workspace.Run(digits.get_config(), workdir / 'start'))
  stretched(workdir)
  results = {}
  for name in flags.FLAGS.only or RUNS:
    config = ill(name, workdir)
    play(name, config, workdir / name)
    keep(workdir / name, kept / name, pool=name not in SAME_POOL)
    stage, results[name] = told(workdir / name, config)
    results[name]['combined_auc'] = _rounded(combined(workdir / name))
    if name in TREATED and stage.ill:
      config, remedy = treated(config, stage)
      run = workdir / f'{name}_again'
      play(name, config, run)
      results[name]['remedy'] = list(remedy)
      _, results[name]['treated'] = told(run, config)
    print(name, json.dumps(results[name], indent=1, ensure_ascii=False))
  if not flags.FLAGS.only:
    results['environment'] = devices_lib.environment()
    records.write_json(pathlib.Path(flags.FLAGS.results), results)


if __name__ == '__main__':
  flags.DEFINE_string('workdir', 'runs/doctor', 'The folder of the runs.')
  flags.DEFINE_string(
    'output', 'tests/tuning/recorded', 'The folder of what is kept of them.'
  )
  flags.DEFINE_string(
    'results', 'experiments/results/doctor_runs.json', 'What the doctor says.'
  )
  flags.DEFINE_list('only', [], 'The names of some runs; default all.')
  app.run(main)
