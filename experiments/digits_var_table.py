"""The digits as tokens: DDO against CCA, continued MLE and guidance.

python -m experiments.digits_var_table --workdir=runs/digits_var_table

One tokenizer serves all seeds. Each seed pretrains its transformer once. From
the same weights every setting below plays a round at each of its learning
rates; MLE has the training compute of DDO's round, whose online samples are not
counted. Rates, steps, a method's setting and the guidance scale are chosen for
each seed on its selection stream, and all numbers are then measured on its
reporting streams.
"""

import dataclasses
import pathlib
from typing import Any
from typing import NamedTuple

from absl import app
from absl import flags
from absl import logging as absl_logging
import jax
import numpy as np

from configs import digits_var
from ddo_jax import config as config_lib
from ddo_jax import rng
from ddo_jax.data import sources
from ddo_jax.evaluation import measure
from ddo_jax.method import ddo
from ddo_jax.method import likelihood
from ddo_jax.method import negatives as negatives_lib
from ddo_jax.method import objective as objective_lib
from ddo_jax.method import siblings
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import round as round_lib
from ddo_jax.training import run as run_lib
from ddo_jax.training import workspace
from experiments import controls
from experiments import digits_table

flags.set_default(digits_table.WORKDIR, 'runs/digits_var_table')
flags.set_default(
  digits_table.OUTPUT, 'experiments/results/digits_var_table.json'
)


class Setting(NamedTuple):
  """What a setting changes in the recipe's round.

  Attributes:
    objective: what is minimised.
    rates: the learning rates to try, around the best. The rate is constant
      over the steps, so that a shorter round is an earlier checkpoint.
    negatives: where the second rows come from.
    label_drop: the share of rows trained without their label.
  """

  objective: objective_lib.Objective
  rates: tuple[float, ...]
  negatives: negatives_lib.Negatives = negatives_lib.Online()
  label_drop: float = 0.0


SETTINGS = {
  'mle': Setting(
    objective=objective_lib.MLE(),
    rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
  ),
  'cca_1': Setting(
    objective=siblings.CCA(alpha=(1.0,), beta=(0.1,)),
    rates=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
    negatives=negatives_lib.OtherLabels(),
    label_drop=0.1,
  ),
  'cca_50': Setting(  # as published
    objective=siblings.CCA(alpha=(50.0,), beta=(0.02,), normalize=True),
    rates=(3e-5, 1e-4, 3e-4),
    negatives=negatives_lib.OtherLabels(),
    label_drop=0.1,
  ),
  'ddo_1': Setting(
    objective=ddo.DDO(alpha=(1.0,), beta=(0.1,)),
    rates=(3e-5, 1e-4, 3e-4, 1e-3),
  ),
  'ddo_50': Setting(  # as published
    objective=ddo.DDO(alpha=(50.0,), beta=(0.02,), normalize=True),
    rates=(1e-5, 3e-5, 1e-4),
  ),
  'ddo_1_no_round_trip': Setting(
    objective=ddo.DDO(alpha=(1.0,), beta=(0.1,)),
    rates=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
    negatives=negatives_lib.Online(round_trip=False),
  ),
}
# The rows of the methods: each takes the one of its settings that selection
# prefers.
METHODS = {'CCA': ('cca_1', 'cca_50'), 'DDO': ('ddo_1', 'ddo_50')}
SCALES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
CHOSEN = flags.DEFINE_list('settings', list(SETTINGS), 'The settings to play.')
DEPTH = flags.DEFINE_integer(
  'depth', 0, "The number of the transformer's blocks; 0 is the recipe's."
)
WIDTH = flags.DEFINE_integer(
  'width', 0, "The transformer's channels; 0 is the recipe's."
)
TOKENIZER = flags.DEFINE_string(
  'tokenizer',
  '',
  "The folder of the tokenizer's params; without it the first seed trains one.",
)


def phase_at(
  config: config_lib.Config, setting: Setting, rate: float
) -> config_lib.Phase:
  """Returns the recipe's round under a setting and a learning rate."""
  phase = dataclasses.replace(
    config.ddo,
    objective=setting.objective,
    negatives=setting.negatives,
    label_drop=setting.label_drop,
    optimizer=dataclasses.replace(config.ddo.optimizer, learning_rate=(rate,)),
  )
  if phase.objective.contrastive:
    return phase
  return controls.longer(phase)


def start_of(
  seed: int, workdir: pathlib.Path, tokenizer: str
) -> tuple[workspace.Run, pathlib.Path]:
  """Pretrains a seed's reference.

  Args:
    seed: the seed of the pretraining.
    workdir: the seed's folder.
    tokenizer: the folder of the tokenizer's params; '' trains one.

  Returns:
    The run, and its folder of params.
  """
  config = digits_var.get_config()
  config.seed = seed
  config.tokenizer_from = tokenizer
  config.model.depth = DEPTH.value or config.model.depth
  config.model.width = WIDTH.value or config.model.width
  run = workspace.Run(config, workdir / 'start')
  return run, run_lib.pretrain(run)


def scores_of(run: workspace.Run, params: pathlib.Path) -> dict[str, Any]:
  """Returns the report scores of a folder of params, kept beside it."""
  path = params.parent / 'report.json'
  if not path.exists():
    weights, _ = workspace.load_params(params, run.model, run.executor)
    scores = measure.report_scores(
      evaluator=run.evaluator,
      generator=run.generator(),
      params=weights,
      settings=run.config.evaluation,
      seed=run.config.seed,
    )
    records.write_json(path, scores)
  return records.read_json(path)


def round_trip(run: workspace.Run, start: pathlib.Path) -> dict[str, Any]:
  """Measures what decoding and encoding again does to tokens.

  Args:
    run: the run that pretrained the reference.
    start: the folder of the reference's params.

  Returns:
    'fd_train' of the decoded training images. For the tokens of those images
    ('real'), and for as many samples of the reference ('reference'): the share
    of tokens that a round trip changes, and the reference's mean log p before
    and after it, in nats an image.
  """
  model = run.model
  weights, _ = workspace.load_params(start, model, run.executor)
  frozen = run.frozen
  ids = np.arange(len(run.real))
  images, labels = run.real.read(ids)
  keys = rng.per_example(rng.stream(run.config.seed, 'round trip'), ids)

  @jax.jit
  def log_prob(x):
    batch = likelihood.Batch(x, labels, ids)
    return model.log_prob(weights, frozen, batch, keys)

  @jax.jit
  def trip(x):
    return model.codec.round_trip(frozen, x, keys)

  real = model.codec.encode(frozen, images, keys)
  sampler = run.config.sampler.unguided()
  reference = model.sample(weights, frozen, labels, keys, sampler)
  decoded = sources.ArraySource(
    name='decoded',
    stored=np.asarray(model.codec.decode(frozen, real)),
    classes=labels,
    num_classes=run.real.num_classes,
    pixel_values=run.real.pixel_values,
  )
  measured, _ = measure.read(run.evaluator, decoded)
  scores = run.evaluator.scores(measured, labels)
  found = {'fd_train': scores['fd_train']}
  for name, tokens in (('real', real), ('reference', reference)):
    other = trip(tokens)
    found[name] = {
      'changed': float(np.mean(tokens != other)),
      'log_prob': float(np.mean(log_prob(tokens))),
      'log_prob_after': float(np.mean(log_prob(other))),
    }
  return found


def play(
  run: workspace.Run, start: pathlib.Path, name: str, before: dict[str, Any]
) -> list[dict[str, Any]]:
  """Plays a round at each learning rate of a setting.

  Args:
    run: the run that pretrained the reference.
    start: the folder of the reference's params.
    name: the name of the setting.
    before: the report scores of the reference.

  Returns:
    What each learning rate promoted, the preferred one first.
  """
  setting = SETTINGS[name]
  # Only the preferred rate is measured in full, in `scores_of`.
  small = dataclasses.replace(run.config.evaluation, samples=500, seeds=1)
  results = []
  for rate in setting.rates:
    folder = run.workdir.parent / name / f'{rate:g}'
    config = dataclasses.replace(
      run.config,
      init_from=str(start),
      tokenizer_from=str(run.tokenizer_folder),
      ddo=phase_at(run.config, setting, rate),
      evaluation=small,
    )
    again = workspace.Run(config, folder)
    again.evaluator = run.evaluator  # its classifier is fitted once
    workspace.claim_workdir(config, folder)
    known = {'after': before, 'labels': again.label_rule}
    result = round_lib.play_round(again, 0, start, known)
    params = str(folder / 'round_000' / 'promoted')
    results.append({'rate': rate, 'params': params} | result['promoted'])
  return sorted(results, key=lambda result: result['selection'])


def one_seed(
  seed: int, workdir: pathlib.Path, tokenizer: str
) -> tuple[dict[str, Any], str]:
  """Plays everything from one pretraining seed.

  Args:
    seed: the seed of the pretraining.
    workdir: the seed's folder.
    tokenizer: the folder of the tokenizer's params; '' trains one.

  Returns:
    The means of each row of the table with what was tried for them, and the
    tokenizer's folder.
  """
  run, start = start_of(seed, workdir, tokenizer)
  before = scores_of(run, start)
  tried = {name: play(run, start, name, before) for name in CHOSEN.value}
  scores = {'reference (MLE)': before}
  for name, results in tried.items():
    scores[name] = scores_of(run, pathlib.Path(results[0]['params']))
  config = dataclasses.replace(
    run.config, tokenizer_from=str(run.tokenizer_folder)
  )
  guidance = digits_table.guided(config, workdir, start, SCALES)
  scores['guidance'] = guidance['scores']
  chosen = {}
  for method, names in METHODS.items():
    played = [name for name in names if name in tried]
    if played:
      best = min(played, key=lambda name: tried[name][0]['selection'])
      chosen[method] = best
      scores[method] = scores[best]
  means = {
    row: {metric: score[metric]['mean'] for metric in digits_table.METRICS}
    for row, score in scores.items()
  }
  for results in tried.values():
    for result in results:
      del result['params']
  made = {
    'rows': means,
    'chosen': chosen,
    'tried': tried,
    'round_trip': round_trip(run, start),
    'guidance': guidance['scale'],
  }
  return made, str(run.tokenizer_folder)


def main(_) -> None:
  absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax speaks through absl
  folder = pathlib.Path(digits_table.WORKDIR.value)
  # The settings share their programs.
  jax.config.update('jax_compilation_cache_dir', str(folder / 'xla'))
  results = []
  tokenizer = TOKENIZER.value
  for seed in range(digits_table.SEEDS.value):
    result, tokenizer = one_seed(seed, folder / f'seed_{seed}', tokenizer)
    results.append(result)
  print(digits_table.table(results))
  made = {'results': results, 'environment': devices_lib.environment()}
  records.write_json(pathlib.Path(digits_table.OUTPUT.value), made)


if __name__ == '__main__':
  app.run(main)
