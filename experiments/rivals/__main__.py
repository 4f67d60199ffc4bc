r"""Every rival of DDO from one reference and one pool, at equal compute.

python -m experiments.rivals --config=configs/digits.py \
  --workdir=runs/rivals_digits --seeds=3 \
  --output=experiments/results/rivals_digits.json

Each seed pretrains once and draws one fake pool, of which every method makes
what it can. All have the compute of the recipe's round, its pool included, and
the same number of looks on the selection seed; what that prefers is measured on
the reporting seeds. A driver that was stopped goes on by the same command.

It writes the output, and beside it a table (.md) and two pictures: scores
against compute (.png), and samples of all methods (_samples.png).
"""

import dataclasses
import logging
import pathlib
import time
from typing import Any

from absl import app
from absl import flags
from absl import logging as absl_logging
import jax
from ml_collections import config_flags

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import check
from ddo_jax.training import run as run_lib
from ddo_jax.training import workspace
from experiments.rivals import bench as bench_lib
from experiments.rivals import methods as methods_lib
from experiments.rivals import show

_LOGGER = logging.getLogger(__name__)
# Those whose score is measured under shorter sampling, too.
_CURVES = ('reference', 'ddo', 'neon', 'sims', 'autoguidance', 'cfg', 'dg')


def play(bench: bench_lib.Bench, name: str) -> dict[str, Any]:
  """Plays a method, unless its result is there; returns that."""
  path = bench.folder / name / 'result.json'
  if path.exists():
    return records.read_json(path)
  title, method = methods_lib.METHODS[name]
  begin = time.perf_counter()
  try:
    played = method(bench)
    found = bench.report(name, played)
    if name in _CURVES and not bench.tokens:
      best = played.best
      found['curve'] = bench.curve(best.params(), best.generator)
  except bench_lib.Unfit as reason:
    found = {'unfit': str(reason)}
  found = {
    'name': name,
    'title': title,
    'seconds': time.perf_counter() - begin,
  } | found
  records.write_json(path, found)
  score = found['scores'][bench.metric] if 'scores' in found else 'n/a'
  _LOGGER.info('%s: %s, %.0f s', name, score, found['seconds'])
  return found


def one_seed(
  config: config_lib.Config,
  folder: pathlib.Path,
  names: list[str],
) -> dict[str, Any]:
  """Plays methods from one pretraining seed.

  Args:
    config: the recipe, under its seed.
    folder: the seed's.
    names: of the methods.

  Returns:
    {'seed', 'budget', 'pool', 'parameters', 'pixel_values', 'first_look': the
    reference's score on the selection seed, 'methods': see `play`}.
  """
  base = folder / 'base'
  check.training(workspace.Run(dataclasses.replace(config, rounds=1), base))
  run_lib.play(dataclasses.replace(config, rounds=0), base)
  run = workspace.Run(config, base)
  origin = run.start_folder if config.init_from else base / 'pretrain/params'
  bench = bench_lib.Bench(run, origin, folder)
  played = [play(bench, name) for name in names]
  return {
    'seed': config.seed,
    'budget': bench.budget,
    'pool': bench.pool_cost,
    'parameters': bench_lib.count_of(bench.reference),
    'pixel_values': run.real.pixel_values,
    'first_look': bench.first_look[bench.metric],
    'methods': {found['name']: found for found in played},
  }


def main(_) -> None:
  absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax speaks through absl
  logging.basicConfig(level=logging.WARNING, format='%(asctime)s %(message)s')
  _LOGGER.setLevel(logging.INFO)
  workdir = pathlib.Path(_WORKDIR.value)
  # The seeds share their programs.
  jax.config.update('jax_compilation_cache_dir', str(workdir / 'xla'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
  output = pathlib.Path(_OUTPUT.value)
  results = []
  for seed in range(_SEEDS.value):
    config = dataclasses.replace(_CONFIG.value, seed=seed)
    folder = workdir / f'seed_{seed}'
    try:
      played = one_seed(config, folder, _METHODS.value)
    except errors.UserError as error:
      raise SystemExit(f'error: {error}') from error
    results.append(played)
    made = {'results': results, 'environment': devices_lib.environment()}
    records.write_json(output, made)
    metric = config.evaluation.metric
    show.write(output, results, metric, workdir)
  print(output.with_suffix('.md').read_text())


if __name__ == '__main__':
  _CONFIG = config_flags.DEFINE_config_file('config', 'configs/digits.py')
  _WORKDIR = flags.DEFINE_string(
    'workdir', 'runs/rivals_digits', 'The folder of all that is made.'
  )
  _SEEDS = flags.DEFINE_integer('seeds', 3, 'The number of pretraining seeds.')
  _METHODS = flags.DEFINE_list(
    'methods', list(methods_lib.METHODS), 'Those to play, by name.'
  )
  flags.register_validator(
    'methods',
    lambda names: set(names) <= methods_lib.METHODS.keys(),
    f'wanted some of {", ".join(methods_lib.METHODS)}',
  )
  _OUTPUT = flags.DEFINE_string(
    'output', 'experiments/results/rivals_digits.json', 'The file to write.'
  )
  app.run(main)
