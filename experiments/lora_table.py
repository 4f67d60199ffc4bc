r"""A round of low rank beside one that trains the weights themselves.

python -m experiments.lora_table --config=configs/digits.py \
  --workdir=runs/lora_digits --output=experiments/results/lora_digits.json

Each seed pretrains once. From the same weights one round is played at each
rank, 0 being the weights themselves, and with every number else the recipe's.
Checkpoints are chosen on the selection seed, and what is promoted is measured
on the reporting seeds. Memory is counted, and steps are timed one way after
the other in this process.
"""

import dataclasses
import pathlib
from typing import Any

from absl import app
from absl import flags
from absl import logging as absl_logging
import jax
from ml_collections import config_flags

from ddo_jax import config as config_lib
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import fit as fit_lib
from ddo_jax.training import lora as lora_lib
from ddo_jax.training import probe as probe_lib
from ddo_jax.training import run as run_lib
from ddo_jax.training import workspace
from experiments import tables

_TIMED = 5  # probes of a step, which a busy machine makes longer
_METRICS = ('fd_train', 'fd_test', 'accuracy', 'precision', 'recall')


def at_rank(config: config_lib.Config, rank: int) -> config_lib.Config:
  """Returns a recipe whose rounds train a difference of a rank."""
  phase = dataclasses.replace(config.ddo, lora=lora_lib.Lora(rank))
  return dataclasses.replace(config, ddo=phase)


def one_seed(
  config: config_lib.Config, workdir: pathlib.Path, ranks: list[int]
) -> dict[str, Any]:
  """Pretrains from one seed, and plays a round at each rank.

  Returns:
    {'reference' or the rank: {'scores': {metric: mean}, and of a rank
    'promoted': see `round.play_round`}}.
  """
  base = workdir / 'base'
  run_lib.play(dataclasses.replace(config, rounds=0), base)
  given = {'rounds': 1, 'init_from': str(base / 'pretrain' / 'params')}
  if config.model.build_tokenizer():
    given['tokenizer_from'] = str(base / 'tokenizer' / 'params')

  def means(scores):
    return {name: scores[name]['mean'] for name in _METRICS}

  found: dict[str, Any] = {}
  for rank in ranks:
    again = dataclasses.replace(at_rank(config, rank), **given)
    [result] = run_lib.play(again, workdir / f'rank_{rank}')['rounds']
    found['reference'] = {'scores': means(result['before'])}
    found[str(rank)] = {
      'scores': means(result['after']),
      'promoted': result['promoted'],
    }
  return found


def costs(config: config_lib.Config, ranks: list[int]) -> dict[str, Any]:
  """Returns what a round trains, holds and takes at each rank.

  Returns:
    {rank: {'trained': the numbers trained, 'bytes': see `fit.standing`,
    'seconds': of a step, the least of some probes}}.
  """
  found = {}
  for rank in ranks:
    run = workspace.Run(at_rank(config, rank), workdir=None)
    stage = run.stage('ddo')
    trained = jax.tree.leaves(fit_lib.state_shapes(stage).params)
    times = [
      probe_lib.step(stage, run.executor, run.fit).seconds
      for _ in range(_TIMED)
    ]
    found[str(rank)] = {
      'trained': sum(leaf.size for leaf in trained),
      'bytes': fit_lib.standing(stage, run.layout),
      'seconds': min(times),
    }
  return found


def table(results: list[dict[str, Any]], cost: dict[str, Any]) -> str:
  """Returns Markdown: a row a rank, mean ± sd over the pretraining seeds."""
  columns = (*_METRICS, 'numbers trained', 'state and reference', 'step')
  rows = {}
  whole = cost['0']['seconds']
  for row in results[0]:
    cells = [
      tables.mean_and_sd([result[row]['scores'][metric] for result in results])
      for metric in _METRICS
    ]
    if row in cost:
      size = sum(cost[row]['bytes'].values()) / 2**10
      cells += [
        f'{cost[row]["trained"]:,}',
        f'{size:,.0f} KiB',
        f'{cost[row]["seconds"] / whole:.2f}',
      ]
    else:
      cells += [''] * 3
    name = {'0': 'weights', 'reference': row}.get(row, f'rank {row}')
    rows[name] = cells
  return tables.markdown(columns, rows)


if __name__ == '__main__':
  _CONFIG = config_flags.DEFINE_config_file('config', 'configs/digits.py')
  _WORKDIR = flags.DEFINE_string(
    'workdir', 'runs/lora_digits', 'The folder of all runs.'
  )
  _SEEDS = flags.DEFINE_integer('seeds', 3, 'The number of pretraining seeds.')
  _RANKS = flags.DEFINE_list('ranks', ['1', '4', '16'], 'The ranks to try.')
  _OUTPUT = flags.DEFINE_string(
    'output', 'experiments/results/lora_digits.json', 'The file to write.'
  )

  def main(_) -> None:
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax speaks through absl
    ranks = [0, *(int(rank) for rank in _RANKS.value)]
    results = []
    for seed in range(_SEEDS.value):
      config = dataclasses.replace(_CONFIG.value, seed=seed)
      folder = pathlib.Path(_WORKDIR.value) / f'seed_{seed}'
      results.append(one_seed(config, folder, ranks))
    cost = costs(_CONFIG.value, ranks)
    print(table(results, cost))
    made = {
      'results': results,
      'cost': cost,
      'environment': devices_lib.environment(),
    }
    records.write_json(pathlib.Path(_OUTPUT.value), made)

  app.run(main)
