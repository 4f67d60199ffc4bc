"""Scores of few samples: how far each is off, how it scatters, what it tells.

python -m experiments.cheap_scores --workdir=runs/cheap_scores

From each of three pretraining seeds the digits' recipe plays one round. 50,000
images are drawn of the reference, of what was promoted, and of the merge nine
tenths of the way to it, all of the same noise, and cut into sets of 1,000 and
of 5,000. Each score is taken of every set:

* bias: the mean over sets, less the score of all 50,000 (of a limit: the limit
  of all of them), as a share of it;
* spread: the standard deviation from set to set, likewise;
* paired: that of the difference between the promoted model and the merge, both
  drawn of the same noise, as checkpoints of a round are compared;
* z: their difference over it. Below two, a set of that size cannot tell them
  apart.
"""

from collections.abc import Callable
import dataclasses
import pathlib
import time
from typing import Any

from absl import app
from absl import flags
from absl import logging as absl_logging
import numpy as np

from configs import digits
from ddo_jax import rng
from ddo_jax.evaluation import measure
from ddo_jax.evaluation.metrics import frechet
from ddo_jax.evaluation.metrics import mind
from ddo_jax.evaluation.metrics import uncertainty
from ddo_jax.evaluation.networks import classifier
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import run as run_lib
from ddo_jax.training import workspace
from ddo_jax.tuning import candidates

COUNT = 50_000
SIZES = (1_000, 5_000)
NEAR = 0.9  # of the way from the reference to the promoted model
MODELS = ('reference', 'near', 'promoted')

# (real features, fake features) -> score
Score = Callable[[np.ndarray, np.ndarray], float]


def fd_train(real: np.ndarray, fake: np.ndarray) -> float:
  """Returns the Fréchet distance."""
  return frechet.distance(
    frechet.Statistics.of(fake), frechet.Statistics.of(real)
  )


def fd_train_inf(real: np.ndarray, fake: np.ndarray) -> float:
  """Returns its limit of infinitely many fakes."""
  statistics = frechet.Statistics.of(real)
  return uncertainty.limit_of_distance(fake, statistics).value


SCORES: dict[str, Score] = {
  'fd_train': fd_train,
  'fd_train_inf': fd_train_inf,
  'mind': mind.mind,
}


def draw_features(seed: int, workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns features [N, D] of the training images and of each model's images.

  They are kept in the folder, so that a later call goes on with them.

  Args:
    seed: the pretraining seed.
    workdir: the seed's folder.
  """
  config = dataclasses.replace(digits.get_config(), seed=seed, rounds=1)
  run_lib.play(config, workdir / 'run')
  run = workspace.Run(config, workdir / 'run')

  def load(name):
    folder = workdir / 'run' / 'round_000' / name
    params, _ = workspace.load_params(folder, run.model, run.executor)
    return params

  reference = load('reference')
  promoted = load('promoted')
  merged = candidates.merges(
    reference, promoted, (0.0, NEAR, 1.0), run.model.rules, run.executor
  )
  found = {}
  for name, (_, params) in zip(MODELS, merged, strict=True):
    path = workdir / f'{name}.npy'
    if not path.exists():
      rows, _ = measure.draw(
        run.evaluator,
        run.generator(),
        params,
        key=rng.stream(seed, 'cheap_scores'),
        ids=np.arange(COUNT),
      )
      np.save(path, rows['features'])
    found[name] = np.load(path)
  path = workdir / 'real.npy'
  if not path.exists():
    rows, _ = measure.read(run.evaluator, run.real)
    np.save(path, rows['features'])
  return found | {'real': np.load(path)}


def one_seed(features: dict[str, np.ndarray]) -> dict[str, Any]:
  """Returns {score: {size: {model: [scores of its sets]}}} and seconds a call.

  The sizes are as text, as JSON has them; the last is that of all images.
  """
  assert features['real'].shape[1] == classifier.FEATURES
  values = {}
  seconds = {}
  for name, score in SCORES.items():
    values[name] = {}
    for size in (*SIZES, COUNT):
      start = time.process_time()
      values[name][str(size)] = {
        model: [
          score(features['real'], part)
          for part in np.split(features[model], COUNT // size)
        ]
        for model in MODELS
      }
      calls = len(MODELS) * (COUNT // size)
      spent = time.process_time() - start
      seconds[f'{name} of {size}'] = spent / calls
  return {'values': values, 'seconds': seconds}


def summarize(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns the rows of the table, each a mean over the pretraining seeds."""
  rows = []
  for name in SCORES:
    for size in SIZES:
      measured = []
      for result in results:
        values = result['values'][name]
        sets = {m: np.array(values[str(size)][m]) for m in MODELS}
        (truth,) = values[str(COUNT)]['promoted']
        gap = sets['near'] - sets['promoted']
        (true_gap,) = np.array(values[str(COUNT)]['near']) - truth
        measured.append(
          {
            'score': truth,
            'bias': sets['promoted'].mean() / truth - 1,
            'spread': sets['promoted'].std(ddof=1) / truth,
            'gap': true_gap,
            'paired': gap.std(ddof=1) / truth,
            'z': true_gap / gap.std(ddof=1),
            'seconds': result['seconds'][f'{name} of {size}'],
          }
        )
      mean = {
        key: float(np.mean([one[key] for one in measured]))
        for key in measured[0]
      }
      rows.append({'name': name, 'size': size} | mean)
  return rows


def table(rows: list[dict[str, Any]]) -> str:
  """Returns the rows as Markdown."""
  lines = [
    '| score | samples | of 50,000 | bias | spread | paired | z | CPU s |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for row in rows:
    lines.append(
      f'| {row["name"]} | {row["size"]:,} | {row["score"]:.3f}'
      f' | {row["bias"]:+.1%} | {row["spread"]:.1%} | {row["paired"]:.1%}'
      f' | {row["z"]:.1f} | {row["seconds"]:.3f} |'
    )
  return '\n'.join(lines)


def main(_) -> None:
  absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax speaks through absl
  folder = pathlib.Path(flags.FLAGS.workdir)
  results = []
  for seed in range(flags.FLAGS.seeds):
    path = folder / f'seed_{seed}' / 'scores.json'
    if not path.exists():
      features = draw_features(seed, folder / f'seed_{seed}')
      records.write_json(path, one_seed(features))
    results.append(records.read_json(path))
  rows = summarize(results)
  print(table(rows))
  made = {
    'rows': rows,
    'results': results,
    'environment': devices_lib.environment(),
  }
  records.write_json(pathlib.Path(flags.FLAGS.output), made)


if __name__ == '__main__':
  flags.DEFINE_string('workdir', 'runs/cheap_scores', 'The folder of all runs.')
  flags.DEFINE_integer('seeds', 3, 'The number of pretraining seeds.')
  flags.DEFINE_string(
    'output', 'experiments/results/cheap_scores.json', 'The file to write.'
  )
  app.run(main)
