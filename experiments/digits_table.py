"""The digits table: DDO against continued MLE and guidance, on three seeds.

python -m experiments.digits_table --workdir=runs/digits_table

Each seed pretrains once and plays its rounds. From the same weights the control
goes on by MLE for the same training compute, at the best of three learning
rates, and guidance takes the best of four scales. Every choice is made on the
selection seed, and every number is measured on the reporting seeds.
"""

import dataclasses
import pathlib
from typing import Any

from absl import app
from absl import flags
from absl import logging as absl_logging

from configs import digits
from ddo_jax import config as config_lib
from ddo_jax.evaluation import measure
from ddo_jax.method import generate
from ddo_jax.report import page
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import run as run_lib
from ddo_jax.training import workspace
from experiments import controls
from experiments import tables

WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/digits_table', 'The folder of all runs.'
)
SEEDS = flags.DEFINE_integer('seeds', 3, 'The number of pretraining seeds.')
OUTPUT = flags.DEFINE_string(
  'output', 'experiments/results/digits_table.json', 'The file to write.'
)

LEARNING_RATES = (1e-3, 3e-4, 1e-4)
SCALES = (1.1, 1.25, 1.5, 2.0)
METRICS = (
  'fd_train',
  'fd_test',
  'accuracy',
  'precision',
  'recall',
  'nn_ratio',
  'memorised',
)


def digits_config(seed: int) -> config_lib.Config:
  """Returns the recipe under another seed."""
  config = digits.get_config()
  config.seed = seed
  return config


def control(
  config: config_lib.Config, workdir: pathlib.Path, params: pathlib.Path
) -> tuple[pathlib.Path, list[dict[str, Any]]]:
  """Continues MLE at each learning rate and keeps the preferred one.

  Args:
    config: the recipe.
    workdir: the seed's folder.
    params: the folder of the pretrained params.

  Returns:
    The workdir and the rounds of the run that the selection seed prefers.
  """
  runs = []
  for rate in LEARNING_RATES:
    again = dataclasses.replace(
      config,
      name='continued MLE',
      ddo=controls.continued(config, rate),
      init_from=str(params),
    )
    folder = workdir / f'mle_{rate:g}'
    summary = run_lib.play(again, folder)
    runs.append((folder, summary['rounds']))

  def selection(run):
    _, rounds = run
    return rounds[-1]['promoted']['selection']

  return min(runs, key=selection)


def generator_at(run: workspace.Run, scale: float) -> generate.Generator:
  """Returns a run's generator under a guidance scale."""
  generator = run.generator()
  generator.sampler = dataclasses.replace(generator.sampler, guidance=scale)
  return generator


def guided(
  config: config_lib.Config,
  workdir: pathlib.Path,
  params: pathlib.Path,
  scales: tuple[float, ...] = SCALES,
) -> dict[str, Any]:
  """Scores the weights under the guidance scale that selection prefers.

  Args:
    config: the recipe.
    workdir: the seed's folder; guided.json there keeps the result.
    params: the folder of the weights.
    scales: the guidance scales to try.

  Returns:
    {'scale', 'scores'}, where the scores are of the reporting seeds.
  """
  path = workdir / 'guided.json'
  if path.exists():
    return records.read_json(path)
  run = workspace.Run(config, workdir / 'ddo')
  weights, _ = workspace.load_params(params, run.model, run.executor)
  selection = {}
  for scale in scales:
    scores = measure.selection_scores(
      evaluator=run.evaluator,
      generator=generator_at(run, scale),
      params=weights,
      settings=config.evaluation,
      seed=config.seed,
    )
    selection[scale] = scores['fd_train']
  scale = min(selection, key=selection.get)
  scores = measure.report_scores(
    evaluator=run.evaluator,
    generator=generator_at(run, scale),
    params=weights,
    settings=config.evaluation,
    seed=config.seed,
  )
  result = {'scale': scale, 'scores': scores}
  records.write_json(path, result)
  return result


def _rounds(result: dict[str, Any]) -> str:
  """Returns '1 round', '2 rounds', … at the end of a round."""
  count = result['round'] + 1
  return '1 round' if count == 1 else f'{count} rounds'


def one_seed(seed: int, workdir: pathlib.Path) -> dict[str, Any]:
  """Plays everything from one pretraining seed.

  Returns:
    {'rows': {row of the table: {metric: mean}}, 'guidance': the scale chosen,
    'seconds': of each round}.
  """
  rounds = run_lib.play(digits_config(seed), workdir / 'ddo')['rounds']
  params = workdir / 'ddo' / 'pretrain' / 'params'
  folder, mle = control(digits_config(seed), workdir, params)
  page.write(workdir / 'ddo', control=folder)
  guidance = guided(digits_config(seed), workdir, params)
  rows = {'reference (MLE)': rounds[0]['before']}
  for result in mle:
    rows[f'continued MLE, compute of {_rounds(result)}'] = result['after']
  rows['reference, classifier-free guidance'] = guidance['scores']
  for result in rounds:
    rows[f'DDO, {_rounds(result)}'] = result['after']
  means = {
    row: {metric: scores[metric]['mean'] for metric in METRICS}
    for row, scores in rows.items()
  }
  seconds = [result['seconds'] for result in rounds]
  return {'rows': means, 'guidance': guidance['scale'], 'seconds': seconds}


def table(results: list[dict[str, Any]]) -> str:
  """Returns Markdown: a row a method, mean ± sd over the pretraining seeds."""

  def cell(row, metric):
    values = [result['rows'][row][metric] for result in results]
    return tables.mean_and_sd(values)

  rows = {
    row: [cell(row, metric) for metric in METRICS] for row in results[0]['rows']
  }
  return tables.markdown(METRICS, rows)


def main(_) -> None:
  absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax speaks through absl
  folder = pathlib.Path(WORKDIR.value)
  results = []
  for seed in range(SEEDS.value):
    results.append(one_seed(seed, folder / f'seed_{seed}'))
  print(table(results))
  made = {'results': results, 'environment': devices_lib.environment()}
  records.write_json(pathlib.Path(OUTPUT.value), made)


if __name__ == '__main__':
  app.run(main)
