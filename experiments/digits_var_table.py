"""The digits as tokens: DDO against CCA, continued MLE and guidance.

python -m experiments.digits_var_table --workdir=runs/digits_var_table

One tokenizer serves all seeds. A seed pretrains its transformer once. From the
same weights DDO goes on by the recipe, CCA and MLE at the better of two
learning rates each for the training compute of DDO's round (its online samples
are not counted); guidance takes the best of four scales. All choices are made
on the selection seed, all numbers are measured on the reporting seeds.
"""

import dataclasses
import pathlib
from typing import Any

from absl import app
from absl import flags
from absl import logging as absl_logging

from configs import digits_var
from ddo_jax import config as config_lib
from ddo_jax import parallel
from ddo_jax import records
from ddo_jax import selfplay
from ddo_jax import workspace
from experiments import digits_table

flags.set_default(digits_table.WORKDIR, 'runs/digits_var_table')
flags.set_default(
  digits_table.OUTPUT, 'experiments/results/digits_var_table.json'
)

SCALES = (0.25, 0.5, 1.0, 1.5)
# A DDO or CCA step takes 8/3 of an MLE step's compute; CCA has DDO's pairs.
METHODS = {
  'DDO': {},
  'continued MLE': {'objective': 'mle'},
  'CCA': {
    'objective': 'cca',
    'beta': (0.02,),
    'alpha': (50.0,),
    'normalize': True,
    'label_drop': 0.1,
  },
}
RATES = {'DDO': (3e-4,), 'continued MLE': (3e-4, 1e-3), 'CCA': (3e-4, 1e-4)}


def one_method(
  config: config_lib.Config, workdir: pathlib.Path, name: str
) -> dict[str, Any]:
  """The round of a method at the learning rate the selection seed prefers."""
  phase = dataclasses.replace(config.ddo, **METHODS[name])
  if phase.objective == 'mle':
    scaled = lambda images: round(images * digits_table.COMPUTE)
    phase.images = scaled(phase.images)
    phase.eval_images = scaled(phase.eval_images)
  results = []
  for rate in RATES[name]:
    again = dataclasses.replace(
      config, ddo=dataclasses.replace(phase, learning_rate=(rate,))
    )
    folder = workdir / f'{phase.objective}_{rate:g}'
    results += selfplay.play(again, folder)['rounds']
  return min(results, key=lambda r: r['promoted']['selection'])


def one_seed(
  seed: int, workdir: pathlib.Path, tokenizer: str
) -> tuple[dict[str, Any], str]:
  """Every row of the table for one pretraining seed: {row: {metric: mean}}.

  Args:
    seed: of the pretraining.
    workdir: of the seed.
    tokenizer: its folder; '' trains one.

  Returns:
    The rows and what was chosen; the tokenizer's folder.
  """
  config = digits_var.get_config()
  config.seed, config.tokenizer_from = seed, tokenizer
  run = workspace.Run(config, workdir / 'ddo')
  start = selfplay.pretrain(run)
  tokenizer = str(run.tokenizer_folder)
  guidance = digits_table.guided(
    dataclasses.replace(config), workdir, start, SCALES
  )
  config = dataclasses.replace(
    config, init_from=str(start), tokenizer_from=tokenizer
  )
  results = {name: one_method(config, workdir, name) for name in METHODS}
  rows = {
    'reference (MLE)': results['DDO']['before'],
    'reference, classifier-free guidance': guidance['scores'],
  }
  rows |= {name: result['after'] for name, result in results.items()}
  means = {
    row: {metric: scores[metric]['mean'] for metric in digits_table.METRICS}
    for row, scores in rows.items()
  }
  chosen = {name: result['promoted'] for name, result in results.items()}
  made = {'rows': means, 'guidance': guidance['scale'], 'promoted': chosen}
  return made, tokenizer


def main(_) -> None:
  absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax's voice
  folder = pathlib.Path(digits_table.WORKDIR.value)
  results, tokenizer = [], ''
  for seed in range(digits_table.SEEDS.value):
    result, tokenizer = one_seed(seed, folder / f'seed_{seed}', tokenizer)
    results.append(result)
  print(digits_table.table(results))
  made = {'results': results, 'environment': parallel.environment()}
  records.write_json(pathlib.Path(digits_table.OUTPUT.value), made)


if __name__ == '__main__':
  app.run(main)
