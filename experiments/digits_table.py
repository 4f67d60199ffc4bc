"""The digits table: DDO against continued MLE and guidance, 3 seeds.

python -m experiments.digits_table --workdir=runs/digits_table

A seed pretrains once and plays its rounds. From the same weights the control
goes on by MLE for the same training compute, at the best of three learning
rates; guidance takes the best of four scales. All choices are made on the
selection seed, all numbers are measured on the reporting seeds.
"""

import dataclasses
import pathlib
from typing import Any

from absl import app
from absl import flags
from absl import logging as absl_logging
import numpy as np

from configs import digits
from ddo_jax import config as config_lib
from ddo_jax import models
from ddo_jax.evaluation import evaluator as evaluator_lib
from ddo_jax.report import page
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import round as round_lib
from ddo_jax.training import run as run_lib

WORKDIR = flags.DEFINE_string('workdir', 'runs/digits_table', 'Folder.')
SEEDS = flags.DEFINE_integer('seeds', 3, 'Pretraining seeds.')
OUTPUT = flags.DEFINE_string(
  'output', 'experiments/results/digits_table.json', 'Result.'
)

# A DDO step on B real and B fake rows: forward and backward of θ on 2B rows
# and forward of the reference, 2 + 4 + 2 units; an MLE step on B rows: 3.
COMPUTE = 8 / 3
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
  """The recipe under another seed."""
  config = digits.get_config()
  config.seed = seed
  return config


def control(
  config: config_lib.Config, workdir: pathlib.Path, params: pathlib.Path
) -> tuple[pathlib.Path, list[dict[str, Any]]]:
  """Continued MLE at the learning rate the selection seed prefers.

  Returns:
    The workdir and the rounds of that run.
  """
  runs = []
  for rate in LEARNING_RATES:
    mle = dataclasses.replace(
      config.ddo,
      objective='mle',
      images=round(config.ddo.images * COMPUTE),
      eval_images=round(config.ddo.eval_images * COMPUTE),
      warmup_images=0,
      learning_rate=(rate,),
      p_mean=config.pretrain.p_mean,
      label_drop=config.pretrain.label_drop,
      ema_halflife=config.pretrain.ema_halflife,
    )
    again = dataclasses.replace(
      config, name='continued MLE', ddo=mle, init_from=str(params)
    )
    folder = workdir / f'mle_{rate:g}'
    runs.append((folder, round_lib.play(again, folder)['rounds']))
  selection = lambda run: run[1][-1]['promoted']['selection']
  return min(runs, key=selection)


def guided(
  config: config_lib.Config,
  workdir: pathlib.Path,
  params: pathlib.Path,
  scales: tuple[float, ...] = SCALES,
) -> dict[str, Any]:
  """Report scores of the weights under the preferred guidance scale."""
  path = workdir / 'guided.json'
  if path.exists():
    return records.read_json(path)
  run = run_lib.Run(config, workdir / 'ddo')
  model = models.build(config, config.ddo)
  weights, _ = run_lib.load_params(params, model, run.executor)
  choices = []
  for scale in scales:
    run.config.sampler = dataclasses.replace(config.sampler, guidance=scale)
    generator = run.generator(model)
    scores = evaluator_lib.selection_scores(
      run.evaluator, generator, weights, config
    )
    choices.append((scores['fd_train'], scale, generator))
  _, scale, generator = min(choices, key=lambda choice: choice[0])
  scores = evaluator_lib.report_scores(
    run.evaluator, generator, weights, config
  )
  result = {'scale': scale, 'scores': scores}
  records.write_json(path, result)
  return result


def _rounds(result: dict[str, Any]) -> str:
  count = result['round'] + 1
  return f'{count} round' + 's' * (count > 1)


def one_seed(seed: int, workdir: pathlib.Path) -> dict[str, Any]:
  """Every row of the table for one pretraining seed: {row: {metric: mean}}."""
  rounds = round_lib.play(digits_config(seed), workdir / 'ddo')['rounds']
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
  """Markdown: a row a method, mean ± sd over the pretraining seeds."""
  lines = [
    '| | ' + ' | '.join(METRICS) + ' |',
    '|---' * (len(METRICS) + 1) + '|',
  ]
  for row in results[0]['rows']:
    cells = []
    for metric in METRICS:
      values = [result['rows'][row][metric] for result in results]
      sd = np.std(values, ddof=1) if len(values) > 1 else 0.0
      cells.append(f'{np.mean(values):.3f} ± {sd:.3f}')
    lines.append(f'| {row} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def main(_) -> None:
  absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax's voice
  folder = pathlib.Path(WORKDIR.value)
  results = [
    one_seed(seed, folder / f'seed_{seed}') for seed in range(SEEDS.value)
  ]
  text = table(results)
  print(text)
  made = {'results': results, 'environment': devices_lib.environment()}
  records.write_json(pathlib.Path(OUTPUT.value), made)


if __name__ == '__main__':
  app.run(main)
