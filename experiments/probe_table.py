r"""The probe's β against the best of a grid, on references of several kinds.

python -m experiments.probe_table --workdir=runs/probe_table \
  --cases=digits_0,digits_1,digits_2,short,wide

Each case pretrains a reference, draws its pool, probes it, and plays one round
at each β of the grid, from the same weights on the same rows and noise. A round
scores by its best checkpoint on the selection seed; a β is good where it lacks
at most a tenth of the way from the reference to the best (`GOOD`). What is
there already is kept.
"""

import dataclasses
import functools
import importlib
import pathlib
from typing import Any

from absl import app
from absl import flags
from absl import logging as absl_logging
import numpy as np

from configs import digits
from ddo_jax import config as config_lib
from ddo_jax import rng
from ddo_jax.evaluation import measure
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import loop as loop_lib
from ddo_jax.training import run as run_lib
from ddo_jax.training import workspace
from ddo_jax.tuning import signal

BETAS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
GOOD = 0.1  # of the way from the reference to the best: what a good β may lack


def recipe(case: str) -> config_lib.Config:
  """Returns the recipe of a case.

  Args:
    case: 'digits_SEED'; 'short', a quarter of the pretraining; 'wide', a net of
      twice the width; or the name of a recipe.
  """
  config = digits.get_config()
  if case.startswith('digits_'):
    config.seed = int(case.removeprefix('digits_'))
  elif case == 'short':
    config.pretrain.images //= 4
    config.pretrain.optimizer.decay_images //= 4
  elif case == 'wide':
    config.model.hidden *= 2
  else:
    config = importlib.import_module(f'configs.{case}').get_config()
  return config


def job_of(run: workspace.Run) -> loop_lib.Job:
  """Returns the job of a run's first round, which draws its pool."""
  config = run.config
  folder = run.workdir / 'pretrain' / 'params'
  read = functools.partial(
    workspace.load_params, folder, run.model, run.executor
  )
  reference, meta = read()
  pool = config.ddo.negatives.open_pool(
    path=run.workdir / 'fakes',
    shard_size=run.sample_batch,
    identity={'reference': meta['sha256']},
  )
  key = rng.stream(config.seed, 'fakes', 'round_000')
  run.generator(guided=False).fill(pool, reference, key, run.shares)
  phase = config_lib.at_round(config.ddo, 0)
  return run.job(
    folder=run.workdir / 'round_000',
    phase=phase,
    model=run.training_model(phase.noise),
    frozen=run.frozen,
    start=lambda: read()[0],
    reference=reference,
    fake=pool.source(run.real.num_classes, run.real.pixel_values),
    score=functools.partial(
      measure.selection_scores,
      run.evaluator,
      run.generator(),
      settings=config.evaluation,
      seed=config.seed,
    ),
  )


def play(job: loop_lib.Job, beta: float) -> dict[str, Any]:
  """Plays a round at a β; returns its scores by images, and the best."""
  phase = job.phase
  objective = dataclasses.replace(phase.objective, alpha=1.0, beta=beta)
  phase = dataclasses.replace(phase, objective=objective)
  name = f'beta_{beta:g}'
  folder = job.folder.parent / name
  job = dataclasses.replace(
    job, name=name, folder=folder, phase=phase, clock='round_000'
  )
  best = loop_lib.run(job)
  found = records.read_json(folder / 'evaluations.json')['evaluations']
  curve = {record['images']: record['selection'] for record in found}
  return {'best': best.selection, 'images': best.step * phase.batch_size} | {
    'curve': curve
  }


def one_case(
  case: str, workdir: pathlib.Path, samples: int, evaluations: int
) -> dict[str, Any]:
  """Pretrains, probes, and plays the grid.

  Args:
    case: see `recipe`.
    workdir: the folder of all cases.
    samples: the images of an evaluation.
    evaluations: the number of them in a round, after its start.
  """
  folder = workdir / case
  run_lib.pretrain(workspace.Run(recipe(case), folder))
  config = recipe(case)
  config.evaluation.selection_samples = samples
  config.ddo.rhythm.eval_images = config.ddo.images // evaluations
  job = job_of(workspace.Run(config, folder))
  proposal = signal.measure(job)
  records.write_json(folder / 'probe.json', proposal.to_json())
  grid = {f'{beta:g}': play(job, beta) for beta in BETAS}
  before = next(iter(grid.values()))['curve'][0]
  return {
    'proposed': dataclasses.asdict(proposal.beta),
    'learning_rate': dataclasses.asdict(proposal.learning_rate),
    'p_std': proposal.p_std,
    'fault': proposal.fault,
    'probe_images': proposal.images,
    'before': before,
    'grid': grid,
    'samples': samples,
  }


def at(result: dict[str, Any], beta: float) -> float:
  """Returns a case's best score at a β, between those of the grid."""
  scores = [result['grid'][f'{b:g}']['best'] for b in BETAS]
  return float(np.interp(np.log(beta), np.log(BETAS), scores))


def good(result: dict[str, Any]) -> list[float]:
  """Returns the β of the grid that are nearly as good as the best."""
  scores = {beta: at(result, beta) for beta in BETAS}
  best = min(scores.values())
  limit = best + GOOD * (result['before'] - best)
  return [beta for beta, score in scores.items() if score <= limit]


def table(results: dict[str, dict[str, Any]]) -> str:
  """Returns Markdown: a row a case."""
  head = ('case', 'before', *(f'β {beta:g}' for beta in BETAS))
  head += ('good β', 'probe: β', 'its range', 'score at β', 'lr')
  lines = ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
  for case, result in results.items():
    beta = result['proposed']
    best = good(result)
    cells = [case, f'{result["before"]:.3f}']
    cells += [f'{at(result, b):.3f}' for b in BETAS]
    cells += [
      f'{min(best):g} to {max(best):g}',
      f'{beta["centre"]:.3g}',
      f'{beta["low"]:.2g} to {beta["high"]:.2g}',
      f'{at(result, beta["centre"]):.3f}',
      f'{result["learning_rate"]["centre"]:.2g}',
    ]
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def main(_) -> None:
  absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax speaks through absl
  options = flags.FLAGS
  output = pathlib.Path(options.output)
  results = {}
  if output.exists():
    results = records.read_json(output)['results']
  for case in options.cases:
    results[case] = one_case(
      case, pathlib.Path(options.workdir), options.samples, options.evaluations
    )
    made = {'results': results, 'environment': devices_lib.environment()}
    records.write_json(output, made)
    output.with_suffix('.md').write_text(table(results) + '\n')
  print(table(results))


if __name__ == '__main__':
  flags.DEFINE_string('workdir', 'runs/probe_table', 'The folder of all runs.')
  flags.DEFINE_list(
    'cases', ['digits_0', 'digits_1', 'digits_2', 'short', 'wide'], 'The cases.'
  )
  flags.DEFINE_integer('samples', 2_000, 'The images of an evaluation.')
  flags.DEFINE_integer('evaluations', 4, 'Their number in a round.')
  flags.DEFINE_string(
    'output', 'experiments/results/probe.json', 'The file to write.'
  )
  app.run(main)
