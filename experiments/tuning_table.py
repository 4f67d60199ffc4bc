r"""A round that tunes itself, against a full sweep of twenty members.

python -m experiments.tuning_table --config=configs/digits.py \
  --workdir=runs/tuning_digits --output=experiments/results/tuning_digits.json

Each seed pretrains once. From the same weights one round is played twice: as a
full sweep of twenty members, none of which is ended early, between ranges that
a paper or an earlier study gives; and as the probe, halving and the alarms
play it, which are given no range. Members are chosen on the selection seeds,
and what is promoted is measured on the reporting seeds.
"""

import dataclasses
import pathlib
from typing import Any

from absl import app
from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags
import numpy as np

from ddo_jax import config as config_lib
from ddo_jax.report import page
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import run as run_lib
from ddo_jax.tuning import alarms
from ddo_jax.tuning import tune as tune_lib
from experiments import tables

_METRICS = ('fd_train', 'fd_test', 'accuracy', 'precision', 'recall')
_NO_ALARMS = alarms.Alarms(margin=0, mle_rise=0, recall_fall=0, saturated=0)


def full(beta: tuple[float, float]) -> tune_lib.Tune:
  """Returns twenty members that all train to their end.

  Args:
    beta: the range of β.
  """
  return tune_lib.Tune(
    members=20,
    alpha=(0.5, 4.0),
    beta=beta,
    learning_rate=(3e-4, 3e-3),
    reduction=1,
    alarms=_NO_ALARMS,
  )


def itself(members: int) -> tune_lib.Tune:
  """Returns a sweep that is given no range."""
  return tune_lib.Tune(members=members, reduction=2, merges=(0.75, 1.25, 1.5))


def one_seed(
  config: config_lib.Config,
  workdir: pathlib.Path,
  ways: dict[str, tune_lib.Tune],
) -> dict[str, Any]:
  """Pretrains from one seed, and plays a round in each of the ways.

  Args:
    config: the recipe, under its seed.
    workdir: the seed's folder.
    ways: how the round is tuned, by name.

  Returns:
    {way: {'scores': {metric: mean}, 'cost': see `ledger.make`, 'promoted',
    'seconds'}}, and the reference's scores as 'reference'.
  """
  base = dataclasses.replace(config, rounds=0)
  run_lib.play(base, workdir / 'base')
  params = workdir / 'base' / 'pretrain' / 'params'
  found: dict[str, Any] = {}
  for way, tune in ways.items():
    again = dataclasses.replace(
      config, rounds=1, init_from=str(params), tune=tune
    )
    folder = workdir / way
    [result] = run_lib.play(again, folder)['rounds']
    page.write(folder)
    ledger = records.read_json(folder / 'round_000' / 'ledger.json')

    def means(scores):
      return {name: scores[name]['mean'] for name in _METRICS}

    found['reference'] = {'scores': means(result['before'])}
    found[way] = {
      'scores': means(result['after']),
      'cost': ledger['cost'],
      'promoted': ledger['promoted'],
      'ended': [member['ended'] for member in ledger['members']],
      'seconds': sum(result['seconds'].values()),
    }
  return found


def table(results: list[dict[str, Any]]) -> str:
  """Returns Markdown: a row a way, mean ± sd over the pretraining seeds."""
  columns = (*_METRICS, 'real and pool images', 'forward-equivalents')
  rows = {}
  for way in results[0]:
    cells = [
      tables.mean_and_sd([result[way]['scores'][metric] for result in results])
      for metric in _METRICS
    ]
    for amount in (images, forwards):
      if 'cost' not in results[0][way]:
        cells.append('')
        continue
      values = [amount(result[way]['cost']) for result in results]
      cells.append(f'{np.mean(values):,.0f}')
    rows[way] = cells
  return tables.markdown(columns, rows)


def images(cost: dict[str, float]) -> float:
  """Returns the real images trained on, the pool's, and the probe's.

  The probe counts as the training steps, of 8 forward passes a real row, that
  its arithmetic would have paid for.
  """
  return cost['real'] + cost['pool'] + cost['probe_forwards'] / 8


def forwards(cost: dict[str, float]) -> float:
  """Returns all of the arithmetic, evaluations included."""
  return cost['forwards']


if __name__ == '__main__':
  _CONFIG = config_flags.DEFINE_config_file('config', 'configs/digits.py')
  _WORKDIR = flags.DEFINE_string(
    'workdir', 'runs/tuning_digits', 'The folder of all runs.'
  )
  _SEEDS = flags.DEFINE_integer('seeds', 3, 'The number of pretraining seeds.')
  _MEMBERS = flags.DEFINE_integer('members', 6, 'Of the sweep that is halved.')
  _BETA = flags.DEFINE_list('beta', ['0.02', '0.5'], 'Of the full sweep.')
  _OUTPUT = flags.DEFINE_string(
    'output', 'experiments/results/tuning_digits.json', 'The file to write.'
  )

  def main(_) -> None:
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax speaks through absl
    low, high = (float(value) for value in _BETA.value)
    ways = {
      'full sweep of 20': full((low, high)),
      'probe and halving': itself(_MEMBERS.value),
    }
    results = []
    for seed in range(_SEEDS.value):
      config = dataclasses.replace(_CONFIG.value, seed=seed)
      folder = pathlib.Path(_WORKDIR.value) / f'seed_{seed}'
      results.append(one_seed(config, folder, ways))
    print(table(results))
    made = {'results': results, 'environment': devices_lib.environment()}
    records.write_json(pathlib.Path(_OUTPUT.value), made)

  app.run(main)
