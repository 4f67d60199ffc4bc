"""What the rivals of one seed share: reference, pool, budget and looks.

A method either trains, and each evaluation of its training is a look
(`Bench.train`), or it searches among candidates that cost no training
(`Bench.search`). Both come to a `Played`, of which `Bench.report` makes the
method's row. All work is counted in forward-equivalents F, the arithmetic of
one forward pass of the model on one image.
"""

from collections.abc import Callable
from collections.abc import Iterable
import dataclasses
import functools
import math
import pathlib
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.data import sources
from ddo_jax.evaluation import measure
from ddo_jax.method import generate
from ddo_jax.method import likelihood
from ddo_jax.method import negatives
from ddo_jax.report import gallery
from ddo_jax.report import grid
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import records
from ddo_jax.samplers import contract
from ddo_jax.training import evaluations as evaluations_lib
from ddo_jax.training import loop as loop_lib
from ddo_jax.training import round as round_lib
from ddo_jax.training import workspace
from ddo_jax.tuning import ledger
from experiments import controls

LOOKS = 12  # of each method, on the selection seed
SHOWN = 20  # images of a method on the sheet of all
_STAGE = 'round_000'  # of which all take the noise and the order of rows
_POOL_GUIDANCE = 0.5  # of a pool that is drawn for a model of tokens
_SHORTER = (0.75, 0.5, 0.33, 0.2)  # of a sampler's steps, in the picture


class Unfit(Exception):
  """A method has no place in this recipe; the text says why."""


class Candidate(NamedTuple):
  """Something to look at that costs no training of its own.

  Attributes:
    settings: what tells it from the method's others, JSON values.
    params: returns its weights.
    generator: draws its images.
    training: the forward-equivalents behind it, a pool's among them.
  """

  settings: dict[str, Any]
  params: Callable[[], likelihood.Params]
  generator: generate.Generator
  training: float


class Played(NamedTuple):
  """What a method came to.

  Attributes:
    best: what selection prefers.
    looks: {'settings', 'training', 'selection', 'sampling'} of each look.
    trained: the forward-equivalents of all that was trained, the pool's among
      them, whether preferred or not.
    ended: why a training ended before its end; '' where none did.
  """

  best: Candidate
  looks: list[dict[str, Any]]
  trained: float
  ended: str = ''


class Snapshot(NamedTuple):
  """The weights of a training at one of its evaluations.

  Attributes:
    images: seen up to there.
    params: returns the weights.
    training: the forward-equivalents up to there, a pool's among them.
  """

  images: int
  params: Callable[[], likelihood.Params]
  training: float


def levels(sampler: contract.DenoiseSampler) -> np.ndarray:
  """Returns the noise levels at which a sampler evaluates, in its order."""
  found: list[float] = []

  def keep(level):
    found.append(float(level))

  def denoise(x, told):
    sigma = sampler.level(told)[0]
    jax.debug.callback(keep, sigma, ordered=True)
    return x

  keys = rng.per_example(rng.stream(0), np.zeros(1, np.uint32))
  jax.block_until_ready(sampler(denoise, (1, 1, 1), keys))
  jax.effects_barrier()
  return np.array(found)


def _never(evaluations: Any, train: Any) -> str | None:
  """Ends no phase; but of one that is watched, bad numbers end it alone."""
  del evaluations, train
  return None


class Bench:
  """The rivals of one seed.

  Attributes:
    run: the recipe's, whose pretraining is done.
    folder: where the methods leave what they make.
    phase: the recipe's round, with its numbers.
    model: the model as it is trained.
    reference: θ_ref.
  """

  def __init__(
    self,
    run: workspace.Run,
    origin: pathlib.Path,
    folder: pathlib.Path,
  ):
    """Takes the reference from the folder of params `origin`."""
    self.run = run
    self.folder = folder
    self.phase = config_lib.at_round(run.config.ddo, 0)
    self.model = run.training_model(self.phase.noise)
    self._origin = origin
    self.reference, self._meta = workspace.load_params(
      origin, run.model, run.executor
    )
    self._forwards: dict[Any, float] = {}

  # What is shared.

  @property
  def metric(self) -> str:
    """The name of the score that selects; lower is better."""
    return self.run.config.evaluation.metric

  @property
  def tokens(self) -> bool:
    """Whether the model is one of tokens."""
    return 'stages' in self.model.offers

  @functools.cached_property
  def pool(self) -> sources.Source:
    """The fake pool: the recipe's own, or of its reference under guidance.

    A recipe that draws its fakes inside the step has no pool. The rivals that
    need one then have a guided pool, because the reference's own samples tell
    an exact likelihood nothing: E_ref ∇ log p_ref = 0.
    """
    if isinstance(self.phase.negatives, negatives.Pool):
      return round_lib.fake_pool(
        self.run, self.run.workdir / _STAGE, self.reference, self._meta
      )
    generator = self.guided(_POOL_GUIDANCE)
    pool = negatives.FakePool(
      folder=self.folder / 'fakes',
      size=self.pool_size,
      shard_size=self.run.sample_batch,
      identity={
        'reference': self._meta['sha256'],
        'sampler': dataclasses.asdict(generator.sampler),
        'stream': [self.run.config.seed, 'guided'],
        'labels': str(self.run.shares),
      },
    )
    key = rng.stream(self.run.config.seed, 'fakes', 'guided')
    generator.fill(pool, self.reference, key, self.run.shares)
    real = self.run.real
    return pool.source(real.num_classes, real.pixel_values)

  @property
  def pool_size(self) -> int:
    """The number of images in the pool."""
    own = self.phase.negatives
    if isinstance(own, negatives.Pool):
      return own.size
    return len(self.run.real)

  @functools.cached_property
  def pool_cost(self) -> float:
    """The forward-equivalents of the pool."""
    generator = self.run.generator(guided=False)
    if not isinstance(self.phase.negatives, negatives.Pool):
      generator = self.guided(_POOL_GUIDANCE)
    return self.pool_size * self.forwards(generator)

  @functools.cached_property
  def budget(self) -> float:
    """The forward-equivalents of the recipe's round, which every method has."""
    shared = self.pool_cost if self.phase.used_negatives.needs_pool else 0.0
    return shared + self.phase.images * self.step_cost(self.phase)

  # Arithmetic.

  def forwards(self, generator: generate.Generator) -> float:
    """Returns the forward-equivalents of drawing an image.

    A guide, or a discriminator, that is asked within an interval only counts at
    the noise levels in it. A model of tokens draws an image by one pass, and
    its guide by another; the tokenizer is left out, here as in training.
    """
    sampler = generator.sampler
    if self.tokens:
      if not sampler.guides:
        return 1.0
      return 1.0 + self.share(generator.frozen.get('guide', self.reference))
    beside = {
      name: getattr(generator.model, name, None)
      for name in ('guide', 'discriminator')
    }
    key = (sampler, *beside.values())
    if key not in self._forwards:
      self._forwards[key] = self._count(generator, sampler, beside)
    return self._forwards[key]

  def _count(
    self, generator: Any, sampler: Any, beside: dict[str, Any]
  ) -> float:
    model = self.model
    if any(beside.values()):
      model = dataclasses.replace(model, **beside)
    stored, _ = self.run.real.read(np.arange(1))
    count = functools.partial(
      ledger.forwards_an_image, model, generator.frozen, stored
    )
    full = count(sampler)
    if sampler == sampler.unguided():
      return full
    low, high = sampler.guidance_min, sampler.guidance_max
    if sampler.discriminator:
      low, high = sampler.discriminator_min, sampler.discriminator_max
    sigma = levels(sampler)
    inside = (low < sigma) & (sigma <= high)
    plain = count(sampler.unguided())
    return plain + float(np.mean(inside)) * (full - plain)

  def share(self, params: likelihood.Params) -> float:
    """Returns the number of parameters, in units of the reference's."""
    return count_of(params) / count_of(self.reference)

  def step_cost(self, phase: config_lib.Phase) -> float:
    """Returns the forward-equivalents of training on a row of real images."""
    second = phase.used_negatives
    drawn = 0.0
    if second.needs_sampler:
      drawn = self.forwards(self.run.generator(guided=False))
    if phase.objective.contrastive:
      return controls.DDO_STEP + drawn
    return controls.MLE_STEP

  def before(self, phase: config_lib.Phase) -> float:
    """Returns the forward-equivalents that a phase's data cost: of its pool."""
    return self.pool_cost if phase.used_negatives.needs_pool else 0.0

  def sized(
    self, phase: config_lib.Phase, looks: int, budget: float = 0.0
  ) -> config_lib.Phase:
    """Returns a phase that spends the budget and is looked at `looks` times.

    Its warm-up takes the share of it that it took.

    Args:
      phase: the phase, at its round.
      looks: how often it is evaluated, its last step included.
      budget: in forward-equivalents; 0 for that of all.
    """
    left = (budget or self.budget) - self.before(phase)
    images = math.floor(left / self.step_cost(phase))
    steps = max(looks, images // phase.batch_size)
    optimizer = phase.optimizer
    warmup = optimizer.warmup_images * steps * phase.batch_size / phase.images
    return dataclasses.replace(
      phase,
      images=steps * phase.batch_size,
      optimizer=dataclasses.replace(optimizer, warmup_images=round(warmup)),
      rhythm=dataclasses.replace(
        phase.rhythm, eval_images=math.ceil(steps / looks) * phase.batch_size
      ),
      if_hopeless='warn',
    )

  # Looks.

  def look(
    self,
    params: likelihood.Params,
    folder: pathlib.Path | None = None,
    generator: generate.Generator | None = None,
  ) -> dict[str, float]:
    """Returns scores on the selection seed."""
    return measure.selection_scores(
      evaluator=self.run.evaluator,
      generator=generator or self.run.generator(),
      params=params,
      settings=self.run.config.evaluation,
      seed=self.run.config.seed,
      folder=folder,
    )

  @functools.cached_property
  def first_look(self) -> dict[str, float]:
    """The scores of the reference on the selection seed, kept in the folder."""
    path = self.folder / 'first_look.json'
    if not path.exists():
      records.write_json(path, self.look(self.reference))
    return records.read_json(path)

  def train(
    self,
    name: str,
    phase: config_lib.Phase,
    model: Any = None,
    start: Callable[[], likelihood.Params] | None = None,
  ) -> loop_lib.Promotion:
    """Trains a phase from θ_ref, or goes on; every evaluation is a look.

    Args:
      name: of its folder. Rows and noise are those of all other trainings.
      phase: the phase. Its power-function averages are kept, see `snapshots`.
      model: what is trained in place of the recipe's model, which nobody looks
        at while it trains; its snapshots are what is wanted.
      start: returns its params at the start.
    """
    folder = self.folder / name
    own = model is None
    fake = self.pool if phase.used_negatives.needs_pool else None
    job = self.run.job(
      folder=folder,
      phase=phase,
      model=self.run.training_model(phase.noise) if own else model,
      frozen=self.run.frozen,
      start=start or (lambda: self.reference),
      reference=self.reference if own else start(),
      fake=fake,
      score=self.look if own else self._unseen,
    )
    job = dataclasses.replace(
      job,
      name=name,
      clock=_STAGE,
      log=records.MetricsLog(folder),
      watch=_never,
      keep_averages=bool(phase.averages.width),
    )
    if own and not (folder / 'evaluations.json').exists():
      record = self.first_look | {
        'stage': name,
        'kind': 'eval',
        'step': 0,
        'images': 0,
        'profile': 'params',
        'selection': self.first_look[self.metric],
      }
      evaluations_lib.Evaluations(folder, name).add(record)
    return loop_lib.run(job)

  def _unseen(self, params: Any, folder: Any = None) -> dict[str, float]:
    """Scores all alike, for a training of which no checkpoint is chosen."""
    del params, folder
    return {self.metric: 0.0}

  def snapshots(
    self, name: str, phase: config_lib.Phase, model: Any = None
  ) -> list[Snapshot]:
    """Returns the averages of a training that `train` has made, in time."""
    target = workspace.params_target(model or self.run.model, self.run.executor)
    [profile] = phase.averages.power_names()
    period = phase.rhythm.eval_images // phase.batch_size
    steps = [*range(period, phase.steps(), period), phase.steps()]
    found = []
    for step in steps:
      folder = loop_lib.averages_folder(self.folder / name, step) / profile
      if not folder.exists():
        continue  # the training ended before

      def read(folder=folder):
        return checkpoint.load_params(folder, target)[0]

      images = step * phase.batch_size
      training = self.before(phase) + images * self.step_cost(phase)
      found.append(Snapshot(images, read, training))
    return found

  def trained(
    self, name: str, phases: dict[str, config_lib.Phase], start: bool = True
  ) -> Played:
    """Trains each phase and takes the best checkpoint of all.

    Args:
      name: the method's.
      phases: by what tells them from each other.
      start: whether θ_ref may be preferred to all of them; where it may not,
        the phases keep snapshots.
    """
    generator = self.run.generator()
    looks = []
    trained = 0.0
    ended = ''
    found: list[tuple[float, Candidate]] = []
    for cell, phase in phases.items():
      promotion = self.train(f'{name}/{cell}', phase)
      ended = ended or promotion.ended
      shared = self.before(phase)

      def spent(record, shared=shared, phase=phase):
        return shared + record['images'] * self.step_cost(phase)

      later = [record for record in promotion.evaluations if record['step']]
      looks += [
        {
          'settings': {'cell': cell, 'step': record['step']},
          'training': spent(record),
          'sampling': self.forwards(generator),
          'selection': record['selection'],
        }
        for record in later
      ]
      last = spent(promotion.evaluations[-1])
      trained += last - shared if trained else last
      params = functools.partial(_same, promotion.params)
      if start or promotion.step:
        [best] = [
          record
          for record in promotion.evaluations
          if record['step'] == promotion.step
        ]
      elif later:
        best = min(later, key=lambda record: record['selection'])
        [params] = [
          snapshot.params
          for snapshot in self.snapshots(f'{name}/{cell}', phase)
          if snapshot.images == best['images']
        ]
      else:  # bad numbers ended it before its first look
        continue
      settings = {'cell': cell, 'step': best['step']}
      candidate = Candidate(settings, params, generator, spent(best))
      found.append((best['selection'], candidate))
    _, candidate = min(found, key=lambda one: one[0])
    return Played(candidate, looks, trained, ended)

  def search(
    self, name: str, candidates: Iterable[Candidate], trained: float = 0.0
  ) -> Played:
    """Looks at each candidate, and takes the best; goes on where it stopped.

    Args:
      name: the method's.
      candidates: what is looked at.
      trained: the forward-equivalents of all that was trained for them.
    """
    path = self.folder / name / 'looks.json'
    known = records.read_json(path)['looks'] if path.exists() else []
    looks: list[dict[str, Any]] = []
    best: tuple[float, Candidate] | None = None
    for candidate in candidates:
      if len(looks) < len(known):
        look = known[len(looks)]
      else:
        scores = self.look(candidate.params(), generator=candidate.generator)
        look = {
          'settings': candidate.settings,
          'training': candidate.training,
          'sampling': self.forwards(candidate.generator),
          'selection': scores[self.metric],
        }
      if look['settings'] != candidate.settings:
        raise errors.UserError(f'{path} is of other candidates: delete it')
      looks.append(look)
      if len(looks) > len(known):
        records.write_json(path, {'looks': looks})
      if best is None or look['selection'] < best[0]:
        best = (look['selection'], candidate)
    return Played(best[1], looks, trained)

  # Guidance and merges.

  def guided(
    self,
    strength: float,
    guide: likelihood.Params | None = None,
    model: Any = None,
    **interval: float,
  ) -> generate.Generator:
    """Returns what draws D + s (D − D_guide).

    Args:
      strength: s; 0 is no guidance.
      guide: the weights of the guide; None for the model without its labels.
      model: the guide's model, if that is another one than the recipe's.
      **interval: guidance_min and guidance_max.

    Raises:
      Unfit: the model cannot be guided so.
    """
    generator = self.run.generator()
    sampler = generator.sampler
    if sampler.guides:
      raise Unfit('the recipe is guided already')
    if guide is None and not self.model.num_classes:
      raise Unfit('the model has no labels to leave out')
    if guide is not None:
      generator.frozen = generator.frozen | {'guide': guide}
      if self.tokens:  # a strength is that of all stages, as of all σ
        sampler = dataclasses.replace(sampler, convention='constant')
    if model is not None:
      generator.model = generator.model.guided_by(model)
    neutral = sampler.unguided().guidance
    generator.sampler = dataclasses.replace(
      sampler, guidance=neutral + strength, **interval
    )
    return generator

  # The row.

  def report(self, name: str, played: Played) -> dict[str, Any]:
    """Measures what selection prefers, on the reporting seeds."""
    evaluation = self.run.config.evaluation
    candidate = played.best
    params = candidate.params()
    generator = candidate.generator
    full = functools.partial(self._report, params)
    sampling = self.forwards(generator)
    found = {
      'settings': candidate.settings,
      'scores': full(generator),
      'training': candidate.training,
      'trained': played.trained,
      'selection': evaluation.selection_samples
      * sum(look['sampling'] for look in played.looks),
      'sampling': sampling,
      'looks': played.looks,
      'ended': played.ended,
    }
    alike = self._within(generator, self.forwards(self.run.generator()))
    if alike is None:
      found['equal_sampling'] = None
    elif alike is not generator:
      found['equal_sampling'] = {
        'scores': full(alike),
        'sampling': self.forwards(alike),
        'num_steps': alike.sampler.num_steps,
      }
    self._draw(name, params, generator)
    return found

  def _report(
    self,
    params: likelihood.Params,
    generator: generate.Generator,
    blocks: int = 0,
  ) -> dict[str, float]:
    """Returns the means of the report's scores."""
    settings = self.run.config.evaluation
    if blocks:
      settings = dataclasses.replace(settings, seeds=blocks)
    scores = measure.report_scores(
      evaluator=self.run.evaluator,
      generator=generator,
      params=params,
      settings=settings,
      seed=self.run.config.seed,
    )
    return {name: score['mean'] for name, score in scores.items()}

  def _within(
    self, generator: generate.Generator, most: float
  ) -> generate.Generator | None:
    """Returns a generator of fewer steps that costs no more than `most`.

    None is returned where a single step costs more, or there are no steps.
    """
    while self.forwards(generator) > most * (1 + 1e-6):
      if self.tokens or generator.sampler.num_steps == 1:
        return None
      generator = _with_steps(generator, generator.sampler.num_steps - 1)
    return generator

  def curve(
    self, params: likelihood.Params, generator: generate.Generator
  ) -> list[dict[str, float]]:
    """Returns the score of one reported block against the sampler's steps."""
    found = []
    for share in (1.0, *_SHORTER):
      steps = max(2, round(share * generator.sampler.num_steps))
      shorter = _with_steps(generator, steps)
      scores = self._report(params, shorter, blocks=1)
      found.append(
        {'sampling': self.forwards(shorter), 'score': scores[self.metric]}
      )
    return found

  def _draw(
    self, name: str, params: likelihood.Params, generator: generate.Generator
  ) -> None:
    """Writes a sheet of the method's samples, and the first of them."""
    run = self.run
    count = measure.num_images(run.evaluator, run.config.evaluation)
    ids = np.arange(gallery.COUNT)
    parts = generator.stream(
      params,
      rng.stream(run.config.seed, 'grid'),
      ids,
      run.shares.labels(ids),
      set_size=count,
    )
    images = generator.render(np.concatenate(list(parts)))
    grid.save(self.folder / name / 'samples.png', images, run.real.pixel_values)
    np.save(self.folder / name / 'first.npy', images[:SHOWN])


def count_of(params: likelihood.Params) -> int:
  """Returns the number of parameters."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def _same(params: likelihood.Params) -> likelihood.Params:
  """Returns params, as `Candidate.params` does."""
  return params


def _with_steps(
  generator: generate.Generator, steps: int
) -> generate.Generator:
  """Returns what draws with another number of steps."""
  return generate.Generator(
    model=generator.model,
    frozen=generator.frozen,
    sampler=dataclasses.replace(generator.sampler, num_steps=steps),
    executor=generator.executor,
    batch=generator.batch,
  )
