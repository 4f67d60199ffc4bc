"""The digits as tokens: DDO against CCA, continued MLE and guidance.

python -m experiments.digits_var_table --workdir=runs/digits_var_table

One tokenizer serves all seeds. A seed pretrains its transformer once; from the
same weights each setting below plays a round at each of its learning rates, by
MLE for the training compute of DDO's round (its online samples are not
counted). Rates, steps, a method's setting and the guidance scale are chosen
for each seed on its selection stream; all numbers are then measured on its
reporting streams.
"""

import dataclasses
import pathlib
from typing import Any

from absl import app
from absl import flags
from absl import logging as absl_logging
import jax
import numpy as np

from configs import digits_var
from ddo_jax import models
from ddo_jax import rng
from ddo_jax.evaluation import evaluator as evaluator_lib
from ddo_jax.method import likelihood
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import round as round_lib
from ddo_jax.training import run as run_lib
from experiments import digits_table

flags.set_default(digits_table.WORKDIR, 'runs/digits_var_table')
flags.set_default(
  digits_table.OUTPUT, 'experiments/results/digits_var_table.json'
)
_ONE = {'alpha': (1.0,), 'beta': (0.1,)}
_FIFTY = {'alpha': (50.0,), 'beta': (0.02,), 'normalize': True}  # as published
_CCA = {'objective': 'cca', 'label_drop': 0.1}
# Changes of the recipe's round, and learning rates around the best. All steps
# are constant in rate, so that a shorter round is an earlier checkpoint.
SETTINGS = {
  'mle': ({'objective': 'mle'}, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
  'cca_1': (_CCA | _ONE, (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)),
  'cca_50': (_CCA | _FIFTY, (3e-5, 1e-4, 3e-4)),
  'ddo_1': (_ONE, (3e-5, 1e-4, 3e-4, 1e-3)),
  'ddo_50': (_FIFTY, (1e-5, 3e-5, 1e-4)),
  'ddo_1_no_round_trip': (
    _ONE | {'round_trip': False},
    (1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
  ),
}
# The rows of the methods: of their settings the one that selection prefers.
METHODS = {'CCA': ('cca_1', 'cca_50'), 'DDO': ('ddo_1', 'ddo_50')}
SCALES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
CHOSEN = flags.DEFINE_list('settings', list(SETTINGS), 'Settings to play.')
DEPTH = flags.DEFINE_integer('depth', 0, "Blocks; 0: the recipe's.")
WIDTH = flags.DEFINE_integer('width', 0, "Channels; 0: the recipe's.")
TOKENIZER = flags.DEFINE_string(
  'tokenizer', '', 'Folder of its params; empty: the first seed trains it.'
)


def start_of(
  seed: int, workdir: pathlib.Path, tokenizer: str
) -> tuple[run_lib.Run, pathlib.Path]:
  """The run that pretrains a seed's reference, and its folder of params."""
  config = digits_var.get_config()
  config.seed, config.tokenizer_from = seed, tokenizer
  config.model.depth = DEPTH.value or config.model.depth
  config.model.width = WIDTH.value or config.model.width
  run = run_lib.Run(config, workdir / 'start')
  return run, round_lib.pretrain(run)


def scores_of(run: run_lib.Run, params: pathlib.Path) -> dict[str, Any]:
  """Report scores of a folder of params; kept beside it."""
  path = params.parent / 'report.json'
  if not path.exists():
    model = models.build(run.config, run.config.ddo)
    weights, _ = run_lib.load_params(params, model, run.executor)
    scores = evaluator_lib.report_scores(
      run.evaluator, run.generator(model), weights, run.config
    )
    records.write_json(path, scores)
  return records.read_json(path)


def round_trip(run: run_lib.Run, start: pathlib.Path) -> dict[str, Any]:
  """What decoding and encoding again does to real and to reference tokens.

  Returns:
    fd_train of the decoded training images; for the tokens of both kinds, one
    of the reference for each image: the share that a round trip changes, and
    the reference's mean log p before and after [nats an image].
  """
  model = models.build(run.config, run.config.ddo)
  weights, _ = run_lib.load_params(start, model, run.executor)
  frozen, sampler = run.frozen, model.unguided(run.config.sampler)
  ids = np.arange(len(run.real))
  images, labels = run.real.read(ids)
  keys = rng.per_example(rng.stream(run.config.seed, 'round trip'), ids)
  log_prob = jax.jit(
    lambda x: model.log_prob(
      weights, frozen, likelihood.Batch(x, labels, ids), keys
    )
  )
  again = jax.jit(lambda x: model.round_trip(frozen, x, keys))
  real = model.encode(frozen, images, keys)
  kinds = {
    'real': real,
    'reference': model.sample(weights, frozen, labels, keys, sampler),
  }
  decoded = np.asarray(model.decode(frozen, real))
  found = {'fd_train': run.evaluator.scores(decoded, labels)['fd_train']}
  for name, tokens in kinds.items():
    other = again(tokens)
    found[name] = {
      'changed': float(np.mean(tokens != other)),
      'log_prob': float(np.mean(log_prob(tokens))),
      'log_prob_after': float(np.mean(log_prob(other))),
    }
  return found


def play(
  run: run_lib.Run, start: pathlib.Path, name: str, before: dict[str, Any]
) -> list[dict[str, Any]]:
  """What each learning rate of a setting promoted, the preferred one first."""
  changes, rates = SETTINGS[name]
  phase = dataclasses.replace(run.config.ddo, **changes)
  if phase.objective == 'mle':
    phase.images = round(phase.images * digits_table.COMPUTE)
    phase.eval_images = round(phase.eval_images * digits_table.COMPUTE)
  # Only the preferred rate is measured in full, in `scores_of`.
  small = dataclasses.replace(run.config.evaluation, samples=500, seeds=1)
  results = []
  for rate in rates:
    folder = run.workdir.parent / name / f'{rate:g}'
    config = dataclasses.replace(
      run.config,
      init_from=str(start),
      tokenizer_from=str(run.tokenizer_folder),
      ddo=dataclasses.replace(phase, learning_rate=(rate,)),
      evaluation=small,
    )
    again = run_lib.Run(config, folder)
    again.evaluator = run.evaluator  # fitted once
    run_lib.claim_workdir(config, folder)
    promoted = round_lib.play_round(again, 0, start, before)['promoted']
    params = str(folder / 'round_000' / 'promoted')
    results.append({'rate': rate, 'params': params} | promoted)
  return sorted(results, key=lambda result: result['selection'])


def one_seed(
  seed: int, workdir: pathlib.Path, tokenizer: str
) -> tuple[dict[str, Any], str]:
  """Every row of the table for one pretraining seed: {row: {metric: mean}}.

  Args:
    seed: of the pretraining.
    workdir: of the seed.
    tokenizer: its folder; '' trains one.

  Returns:
    The rows and what was tried for them; the tokenizer's folder.
  """
  run, start = start_of(seed, workdir, tokenizer)
  before = scores_of(run, start)
  tried = {name: play(run, start, name, before) for name in CHOSEN.value}
  scores = {'reference (MLE)': before}
  for name, results in tried.items():
    params = pathlib.Path(results[0]['params'])
    scores[name] = scores_of(run, params)
  config = dataclasses.replace(
    run.config, tokenizer_from=str(run.tokenizer_folder)
  )
  guidance = digits_table.guided(config, workdir, start, SCALES)
  scores['guidance'] = guidance['scores']
  chosen = {}
  for method, names in METHODS.items():
    names = [name for name in names if name in tried]
    if names:
      best = min(names, key=lambda name: tried[name][0]['selection'])
      chosen[method], scores[method] = best, scores[best]
  means = {
    row: {metric: score[metric]['mean'] for metric in digits_table.METRICS}
    for row, score in scores.items()
  }
  for results in tried.values():
    for result in results:
      del result['params']
  made = {'rows': means, 'chosen': chosen, 'tried': tried}
  made['round_trip'] = round_trip(run, start)
  return made | {'guidance': guidance['scale']}, str(run.tokenizer_folder)


def main(_) -> None:
  absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax's voice
  folder = pathlib.Path(digits_table.WORKDIR.value)
  # The settings share their programs.
  jax.config.update('jax_compilation_cache_dir', str(folder / 'xla'))
  results, tokenizer = [], TOKENIZER.value
  for seed in range(digits_table.SEEDS.value):
    result, tokenizer = one_seed(seed, folder / f'seed_{seed}', tokenizer)
    results.append(result)
  print(digits_table.table(results))
  made = {'results': results, 'environment': devices_lib.environment()}
  records.write_json(pathlib.Path(digits_table.OUTPUT.value), made)


if __name__ == '__main__':
  app.run(main)
