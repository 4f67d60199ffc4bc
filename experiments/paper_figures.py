"""The paper's figures, on any recipe that plays rounds of DDO.

python -m experiments.paper_figures --rounds=3
python -m experiments.paper_figures --config=configs/cifar10_edm_cond.py
--workdir=runs/cifar10_figures --second=recall
--config.evaluation.real_images=10000 --config.guide_from=PARAMS

* rounds (5a): the score after each round;
* alpha, beta (5b, 5c): the score inside the first round, at several α and at
  several β;
* best_alpha (6c): the best score of each α, at the recipe's β;
* guidance (6a): the score against a second one, over the scale of guidance, of
  the reference and of what the last round promoted;
* cost (4): score, parameters and time an image of the reference, of the
  reference under classifier-free guidance, under discriminator guidance and
  under autoguidance, and of DDO. The discriminator is trained on the first
  round's pool.

All rounds begin at the same weights, and draw noise and rows alike. What is
done is kept in the folder, and a later call goes on with it.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import pathlib
import shutil
import time
from typing import Any

from absl import app
from absl import flags
from absl import logging as absl_logging
import jax
from ml_collections import config_flags
import numpy as np

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.evaluation import measure
from ddo_jax.method import generate
from ddo_jax.method import negatives
from ddo_jax.report import cost
from ddo_jax.report import figures
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import discriminator as discriminator_lib
from ddo_jax.training import run as run_lib
from ddo_jax.training import workspace

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the recipe's α and β
SCALES = (1.0, 1.1, 1.25, 1.5, 2.0)
WEIGHTS = (0.5, 1.0, 2.0, 3.0)  # of a discriminator
_GUIDE = 16  # the guide is trained on so many times fewer images
_TIMED = 20  # calls, of which the fastest counts
_SIZE = (4.2, 3.0)  # of a figure, in inches


def kept(path: pathlib.Path, make: Callable[[], Any]) -> Any:
  """Returns the table in a JSON file, making it first where it is not there."""
  if not path.exists():
    records.write_json(path, make())
  return records.read_json(path)


@dataclasses.dataclass(frozen=True)
class Study:
  """A recipe, and the folder in which its figures are made.

  Attributes:
    config: the recipe.
    workdir: the folder.
    second: the score beside the metric in 6a.
  """

  config: config_lib.Config
  workdir: pathlib.Path
  second: str

  @property
  def metric(self) -> str:
    """The score that is drawn: the one that chooses checkpoints."""
    return self.config.evaluation.metric

  @property
  def folder(self) -> pathlib.Path:
    """The folder of the run that has all rounds."""
    return self.workdir / 'run'

  @property
  def start(self) -> pathlib.Path:
    """The params that every round begins with."""
    return self.folder / 'round_000' / 'reference'

  @property
  def promoted(self) -> pathlib.Path:
    """What the last round promoted."""
    return workspace.newest_params(self.folder)

  def play(self) -> dict[str, Any]:
    """Plays all rounds; returns their summary."""
    return run_lib.play(self.config, self.folder)

  def begin(self) -> None:
    """Plays until there is a first round, with its reference and pool."""
    if not (self.folder / 'round_000' / 'done.json').exists():
      self.play()


# --- What is computed ---------------------------------------------------------


def rounds(study: Study) -> dict[str, list[float]]:
  """Returns {'mean': [...], 'sd': [...]} of the start and after each round."""
  summary = study.play()
  scores = [summary['rounds'][0]['before']]
  scores += [result['after'] for result in summary['rounds']]
  return {
    'mean': [score[study.metric]['mean'] for score in scores],
    'sd': [score[study.metric]['sd'] or 0.0 for score in scores],
  }


def one_round(study: Study, name: str, value: float) -> dict[str, list[float]]:
  """Returns the curve of the first round with another α or β.

  The pool of the run's first round, of the same reference and noise, is its
  own: it is not drawn again.

  Args:
    study: the recipe.
    name: 'alpha' or 'beta'.
    value: its number.
  """
  config = study.config
  objective = dataclasses.replace(config.ddo.objective, **{name: (value,)})
  config = dataclasses.replace(
    config,
    rounds=1,
    init_from=str(study.start),
    ddo=dataclasses.replace(config.ddo, objective=objective),
    evaluation=dataclasses.replace(config.evaluation, seeds=1),
  )
  folder = study.workdir / f'{name}_{value:g}'
  pool = folder / 'round_000' / 'fakes'
  source = study.folder / 'round_000' / 'fakes'
  if source.exists() and not pool.exists():
    shutil.copytree(source, pool)
  run_lib.play(config, folder)
  return curve_of(folder)


def curve_of(folder: pathlib.Path) -> dict[str, list[float]]:
  """Returns {'images', 'score'} of the evaluations in a run's first round."""
  log = records.MetricsLog(folder).read('round_000')
  evaluations = [record for record in log if record['kind'] == 'eval']
  return {
    'images': [record['images'] for record in evaluations],
    'score': [record['selection'] for record in evaluations],
  }


def sweep(study: Study, name: str) -> dict[str, dict[str, list[float]]]:
  """Returns {value: {'images', 'score'}} of rounds at several α or β."""
  study.begin()
  standard = config_lib.at_round(study.config.ddo.objective, 0)
  found = {}
  for factor in FACTORS:
    value = factor * getattr(standard, name)
    make = functools.partial(one_round, study, name, value)
    if factor == 1:  # that is the run's own round
      make = functools.partial(curve_of, study.folder)
    found[f'{value:g}'] = kept(study.workdir / f'{name}_{value:g}.json', make)
  return found


def opened(
  config: config_lib.Config, study: Study, folder: pathlib.Path
) -> tuple[workspace.Run, Any]:
  """Returns a run that only samples, and the params of a folder."""
  run = workspace.Run(config, study.folder)
  params, _ = workspace.load_params(folder, run.model, run.executor)
  return run, params


def generator_at(
  run: workspace.Run, scale: float, field: str = 'guidance'
) -> generate.Generator:
  """Returns a run's generator under a scale of guidance.

  Args:
    run: the run.
    scale: the scale.
    field: the sampler's field that holds it, 'guidance' or 'discriminator'.
  """
  generator = run.generator()
  generator.sampler = dataclasses.replace(generator.sampler, **{field: scale})
  return generator


def over_scales(
  study: Study,
  config: config_lib.Config,
  folder: pathlib.Path,
  label: str,
  field: str = 'guidance',
) -> dict[str, dict[str, float]]:
  """Returns {scale: the selection's scores} of params.

  Args:
    study: the recipe.
    config: it, or one with a guide or a discriminator.
    folder: the params.
    label: a word for the files that keep the scores.
    field: see `generator_at`.
  """
  run, params = opened(config, study, folder)
  guide = 'by_network' if config.guide_from else 'by_label'
  scales = SCALES
  if field == 'discriminator':
    guide = 'by_discriminator'
    scales = WEIGHTS
  found = {}
  for scale in scales:
    score = functools.partial(
      measure.selection_scores,
      evaluator=run.evaluator,
      generator=generator_at(run, scale, field),
      params=params,
      settings=config.evaluation,
      seed=config.seed,
    )
    path = study.workdir / f'guidance_{label}_{guide}_{scale:g}.json'
    found[f'{scale:g}'] = kept(path, score)
  return found


def guidance(study: Study) -> dict[str, dict[str, dict[str, float]]]:
  """Returns {'reference' or 'DDO': {scale: its scores}}.

  Raises:
    errors.UserError: nothing guides the model, or a score is not measured.
  """
  config = study.config
  if not (config.guide_from or config.model.num_classes):
    raise errors.UserError(
      'a model without classes is guided by a weaker network alone: set'
      ' --config.guide_from, or leave guidance and cost out by --figure'
    )
  study.begin()
  found = {'reference': over_scales(study, config, study.start, 'reference')}
  study.play()
  found['DDO'] = over_scales(study, config, study.promoted, 'ddo')
  scores = found['DDO']['1']
  if study.second not in scores:
    raise errors.UserError(
      f'--second is {study.second}; these images are scored by'
      f' {", ".join(scores)}'
    )
  return found


def guide_of(study: Study) -> config_lib.Config | None:
  """Returns the recipe with a guide: its own, or one that is trained here.

  That is the same network, pretrained on a sixteenth of the images. A recipe
  that starts from given weights trains none: None, unless it names a guide.
  """
  config = study.config
  if config.guide_from:
    return config
  if config.init_from:
    return None
  phase = config.pretrain
  optimizer = dataclasses.replace(
    phase.optimizer, decay_images=phase.optimizer.decay_images // _GUIDE
  )
  shorter = dataclasses.replace(
    phase, images=phase.images // _GUIDE, optimizer=optimizer
  )
  weaker = dataclasses.replace(config, rounds=0, pretrain=shorter)
  run_lib.play(weaker, study.workdir / 'guide')
  params = study.workdir / 'guide' / 'pretrain' / 'params'
  return dataclasses.replace(config, guide_from=str(params))


def with_discriminator(study: Study) -> config_lib.Config | None:
  """Returns the recipe with a discriminator of its first round's pool.

  None where the model draws tokens, or the round has no pool.
  """
  run = workspace.Run(study.config, study.folder)
  pools = isinstance(study.config.ddo.negatives, negatives.Pool)
  if 'denoise' not in run.model.offers or not pools:
    return None
  params = discriminator_lib.train(run)
  return dataclasses.replace(study.config, discriminator_from=str(params))


def milliseconds(
  run: workspace.Run, generator: generate.Generator, params: Any
) -> float:
  """Returns the time to draw an image, in calls of full size.

  It is that of the fastest call, which other work disturbs least.
  """
  ids = np.arange(generator.batch)
  labels = run.shares.labels(ids)
  key = rng.stream(0, 'timed')
  times = []
  for _ in range(_TIMED):  # the first one compiles
    start = time.perf_counter()
    for _ in generator.stream(params, key, ids, labels):
      pass
    times.append(time.perf_counter() - start)
  return 1_000 * min(times) / len(ids)


def method_cost(
  study: Study,
  config: config_lib.Config,
  folder: pathlib.Path,
  scale: float,
  field: str = 'guidance',
) -> dict[str, float]:
  """Returns what a method costs and reaches, on the reporting seeds.

  Args:
    study: the recipe.
    config: it, or one with a guide or a discriminator.
    folder: the params.
    scale: that of guidance; 1 is without.
    field: see `generator_at`.
  """
  run, params = opened(config, study, folder)
  generator = generator_at(run, scale, field)
  scores = measure.report_scores(
    evaluator=run.evaluator,
    generator=generator,
    params=params,
    settings=config.evaluation,
    seed=config.seed,
  )
  stored, _ = run.real.read(np.arange(1))
  own = cost.describe(
    run.training_model(config_lib.at_round(config.ddo.noise, 0)),
    run.frozen,
    stored,
  )
  beside = []
  if field == 'discriminator':
    beside = jax.tree.leaves(run.frozen['discriminator'])
  elif scale != 1 and config.guide_from:
    beside = jax.tree.leaves(run.frozen['guide'])
  parameters = own['parameters'] + sum(leaf.size for leaf in beside)
  score = scores[study.metric]
  return {
    'score': score[score['headline']],
    'sd': score['sd'] or 0.0,
    'scale': scale,
    'parameters': parameters,
    'milliseconds': milliseconds(run, generator, params),
  }


def costs(study: Study) -> dict[str, dict[str, float]]:
  """Returns {method: see `method_cost`}, at the scales that selection likes."""
  study.play()

  def best(config, field='guidance'):
    found = over_scales(study, config, study.start, 'reference', field)
    return float(min(found, key=lambda scale: found[scale][study.metric]))

  plain = dataclasses.replace(study.config, guide_from='', guide=None)
  rows: dict[str, tuple] = {'reference': (plain, study.start, 1.0)}
  if plain.model.num_classes:
    scale = best(plain)
    rows['classifier-free guidance'] = (plain, study.start, scale)
  judged = with_discriminator(study)
  if judged:
    field = 'discriminator'
    row = (judged, study.start, best(judged, field), field)
    rows['discriminator guidance'] = row
  guide = guide_of(study)
  if guide:
    scale = best(guide)
    rows['autoguidance'] = (guide, study.start, scale)
  rows['DDO'] = (plain, study.promoted, 1.0)
  found = {}
  for name, row in rows.items():
    path = study.workdir / f'cost_{name.replace(" ", "_")}.json'
    found[name] = kept(path, functools.partial(method_cost, study, *row))
  return found


# --- What is drawn ------------------------------------------------------------


@contextlib.contextmanager
def picture(path: pathlib.Path, title: str, x: str, y: str) -> Iterator[Any]:
  """Yields the axes of a figure, which is then written as a PNG."""
  import matplotlib
  import matplotlib.figure

  with matplotlib.rc_context(figures.STYLE):
    figure = matplotlib.figure.Figure(_SIZE, layout='constrained')
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    yield axes
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=figures.DPI)


def _colors(count: int) -> np.ndarray:
  """Returns RGBA [count, 4], from dark to light."""
  import matplotlib

  return matplotlib.colormaps['viridis'](np.linspace(0.08, 0.8, count))


def draw_rounds(study: Study, found: Any, path: pathlib.Path) -> None:
  """5a: the score after each round."""
  with picture(path, 'Self-play', 'round', study.metric) as axes:
    count = np.arange(len(found['mean']))
    axes.errorbar(
      count, found['mean'], found['sd'], fmt='-o', capsize=3, color=figures.REAL
    )
    axes.set_xticks(count, ['reference', *map(str, count[1:])])
    axes.set_ylim(bottom=0)


def draw_alphas(study: Study, found: Any, path: pathlib.Path) -> None:
  """5b: the score inside the round, at several α."""
  draw_sweep(study, found, path, 'α')


def draw_betas(study: Study, found: Any, path: pathlib.Path) -> None:
  """5c: the score inside the round, at several β."""
  draw_sweep(study, found, path, 'β')


def draw_sweep(
  study: Study, found: Any, path: pathlib.Path, symbol: str
) -> None:
  """Draws the score inside the round, at several α or β."""
  from matplotlib import ticker

  title = f'One round at several {symbol}'
  with picture(path, title, 'real images seen', study.metric) as axes:
    for (value, curve), color in zip(
      found.items(), _colors(len(found)), strict=True
    ):
      score = np.array(curve['score'])
      best = score.argmin()
      label = f'{symbol} = {value}'
      axes.plot(curve['images'], score, '-o', ms=3, color=color, label=label)
      axes.plot(
        curve['images'][best], score[best], 'o', ms=9, mfc='none', color=color
      )
    scores = [score for curve in found.values() for score in curve['score']]
    start = next(iter(found.values()))['score'][0]  # every curve's
    axes.set_yscale('log')
    axes.set_ylim(0.8 * min(scores), 1.2 * min(max(scores), 2 * start))
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
    axes.legend()


def draw_best_alpha(study: Study, found: Any, path: pathlib.Path) -> None:
  """6c: the best score of each α."""
  beta = config_lib.at_round(study.config.ddo.objective, 0).beta
  title = f'Best of a round, β = {beta:g}'
  with picture(path, title, 'α', study.metric) as axes:
    values = [float(value) for value in found]
    best = [min(curve['score']) for curve in found.values()]
    axes.plot(values, best, '-o', color=figures.REAL)
    axes.set_xscale('log', base=2)
    axes.set_xticks(values, list(found))
    axes.set_ylim(bottom=0)


def draw_guidance(study: Study, found: Any, path: pathlib.Path) -> None:
  """6a: the score against the second one, over the scale of guidance."""
  colors = {'reference': figures.REAL, 'DDO': figures.FAKE}
  with picture(path, 'Guidance', study.second, study.metric) as axes:
    for name, scores in found.items():
      x = [score[study.second] for score in scores.values()]
      y = [score[study.metric] for score in scores.values()]
      axes.plot(x, y, '-o', ms=4, color=colors[name], label=name)
      for scale, *place in zip(scores, x, y, strict=True):
        axes.annotate(
          scale,
          place,
          xytext=(4, 4),
          textcoords='offset points',
          fontsize=7,
          color=colors[name],
        )
    axes.legend(title='labels: scale', title_fontsize=8)
    axes.set_ylim(bottom=0)


def draw_costs(study: Study, found: Any, path: pathlib.Path) -> None:
  """4: the score against the time of an image, by parameters."""
  marks = 'osv^D'
  x = 'milliseconds an image'
  with picture(path, 'Cost of a sample', x, study.metric) as axes:
    for (name, row), mark, color in zip(
      found.items(), marks, _colors(len(marks)), strict=False
    ):
      label = f'{name} ({cost.short(row["parameters"])})'
      axes.errorbar(
        row['milliseconds'],
        row['score'],
        row['sd'],
        fmt=mark,
        ms=7,
        capsize=3,
        color=color,
        label=label,
      )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(title='parameters in brackets', title_fontsize=8)


def alphas(study: Study) -> dict[str, dict[str, list[float]]]:
  """Returns the sweep over α."""
  return sweep(study, 'alpha')


def betas(study: Study) -> dict[str, dict[str, list[float]]]:
  """Returns the sweep over β."""
  return sweep(study, 'beta')


FIGURES = {
  'rounds': (rounds, draw_rounds),
  'alpha': (alphas, draw_alphas),
  'beta': (betas, draw_betas),
  'best_alpha': (alphas, draw_best_alpha),
  'guidance': (guidance, draw_guidance),
  'cost': (costs, draw_costs),
}


def main(_) -> None:
  absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax speaks through absl
  options = flags.FLAGS
  config = options.config
  if options.rounds:
    config.rounds = options.rounds
  study = Study(config, pathlib.Path(options.workdir), options.second)
  output = pathlib.Path(options.output)
  found: dict[str, Any] = {}
  for name in options.figure or FIGURES:
    make, draw = FIGURES[name]
    found[name] = make(study)
    path = output / f'{config.name}_{name}.png'
    draw(study, found[name], path)
    print(path)
  path = output / f'{config.name}.json'
  before = records.read_json(path) if path.exists() else {}
  about = {'environment': devices_lib.environment(), 'metric': study.metric}
  records.write_json(path, before | found | about)


if __name__ == '__main__':
  config_flags.DEFINE_config_file('config', 'configs/digits.py', 'The recipe.')
  flags.DEFINE_string(
    'workdir', 'runs/paper_figures', 'The folder of all runs.'
  )
  flags.DEFINE_string(
    'output', 'experiments/results/figures', 'The folder of the pictures.'
  )
  flags.DEFINE_integer('rounds', 0, "How many are played; 0: the recipe's.")
  flags.DEFINE_string('second', 'accuracy', 'The second score of 6a.')
  flags.DEFINE_multi_string('figure', [], 'Which figures; all if none.')
  app.run(main)
