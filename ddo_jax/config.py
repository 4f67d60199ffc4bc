"""The knobs of a run: one dataclass a group, each beside the code it sets.

A recipe in `configs/` returns a `Config` that differs from these defaults;
`--config.x.y=v` overrides any field, and `--config.ddo.objective=mle` or
`--config.ddo.objective='DDO(alpha=(2.0,), beta=(0.1,))'` replaces an object.
"""

import copy
import dataclasses
import functools
from typing import Any

import jax

from ddo_jax import errors
from ddo_jax import settings
from ddo_jax.data import labels as labels_lib
from ddo_jax.data import sources
from ddo_jax.evaluation import evaluator as evaluator_lib
from ddo_jax.method import ddo
from ddo_jax.method import likelihood
from ddo_jax.method import negatives as negatives_lib
from ddo_jax.method import noise as noise_lib
from ddo_jax.method import objective as objective_lib
from ddo_jax.models import discriminator as discriminator_lib
from ddo_jax.runtime import layout
from ddo_jax.samplers import contract
from ddo_jax.training import bad_numbers
from ddo_jax.training import first_steps
from ddo_jax.training import lora as lora_lib
from ddo_jax.training import state as state_lib
from ddo_jax.tuning import tune as tune_lib


def _group(default: Any, *, science: bool = True) -> Any:
  """A field that holds a group of knobs, each config its own copy.

  A science field must not change inside one run's folder.
  """
  return dataclasses.field(
    default_factory=functools.partial(copy.deepcopy, default),
    metadata={'science': science},
  )


def _static_group(default: Any) -> Any:
  """A group of knobs that is part of what the step compiles."""
  return dataclasses.field(
    default_factory=functools.partial(copy.deepcopy, default),
    metadata={'static': True},
  )


def _knob(default: Any, *, science: bool = True) -> Any:
  """A field with one value; see `_group` for `science`."""
  return dataclasses.field(default=default, metadata={'science': science})


def _static(default: Any) -> Any:
  """A knob that is part of what the step compiles."""
  return dataclasses.field(default=default, metadata={'static': True})


# The groups that stand beside their code.
Averages = state_lib.Averages
BadNumbers = bad_numbers.BadNumbers
Data = sources.Data
Executor = layout.ExecutorConfig
Evaluation = evaluator_lib.Evaluation
Lora = lora_lib.Lora
Optimizer = state_lib.Optimizer
Tune = tune_lib.Tune


@dataclasses.dataclass(unsafe_hash=True)
class Rhythm:
  """When a phase is evaluated, saved and logged.

  Attributes:
    eval_images: images between evaluations in a phase; 0: at its end.
    save_images: images between saves; 0: at evaluations.
    save_minutes: minutes after which a state is saved in any case; 0: never.
    log_images: images between log lines.
  """

  eval_images: int = _knob(0)
  save_images: int = _knob(0, science=False)
  save_minutes: float = _knob(10.0, science=False)
  log_images: int = _knob(25_600, science=False)


# What a phase may train on, see `Phase.trains_on`.
POOL = 'pool'
_TRAINS_ON = ('real', POOL)


# A phase is a pytree: what a round may vary (the numbers of the objective and
# of the noise law, the peak learning rate) are leaves, the rest is static.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(unsafe_hash=True)
class Phase:
  """One stretch of training: the pretraining, or each round.

  Numbers that are tuples hold one value a round; the last one repeats.

  Attributes:
    objective: what is minimised: `ddo.DDO`, a sibling, or `objective.MLE`.
    negatives: where the second rows come from; of no account to MLE on real
      images.
    trains_on: what MLE minimises its loss on, 'real' images, or the fake
      'pool' in their place, by the same road. An objective of log-ratios
      needs both kinds, and takes 'real'.
    optimizer: Adam and its schedule.
    averages: the averages of the weights.
    lora: whether the weights themselves are trained, or a low-rank difference
      to the reference's, which only a round has.
    noise: the law of σ; of no account to models of tokens.
    images: real rows seen (the paper: 1.5 M on CIFAR-10).
    batch_size: real rows a step; as many second rows go with them.
    label_drop: the share of rows trained without their label.
    bad_numbers: what becomes of a step whose loss or gradient is not finite.
    if_hopeless: 'stop' ends a round whose first steps saturate or do nothing,
      with one line; 'warn' says it and goes on. See `training.first_steps`.
    rhythm: when the phase is evaluated, saved and logged.
  """

  objective: objective_lib.Objective = _group(ddo.DDO())
  negatives: negatives_lib.Negatives = _static_group(negatives_lib.Pool())
  trains_on: str = _static('real')
  optimizer: Optimizer = _group(Optimizer())
  averages: Averages = _static_group(Averages())
  lora: Lora = _static_group(Lora())
  noise: noise_lib.NoiseLaw = _group(noise_lib.LogNormal())
  images: int = _static(1_500_000)
  batch_size: int = _static(512)
  label_drop: float = _static(0.0)
  bad_numbers: BadNumbers = _static_group(BadNumbers())
  if_hopeless: str = dataclasses.field(
    default='stop', metadata={'static': True, 'science': False}
  )
  rhythm: Rhythm = _static_group(Rhythm())

  @property
  def used_negatives(self) -> negatives_lib.Negatives:
    """The negatives, or ones that need nothing where nothing uses them."""
    if self.objective.contrastive or self.trains_on == POOL:
      return self.negatives
    return negatives_lib.Negatives()

  def steps(self) -> int:
    """Returns the number of optimizer steps of the phase."""
    return -(-self.images // self.batch_size)


# What a discriminator learns is DDO's loss with its logit for the log-ratio.
_DISCRIMINATOR = Phase(
  objective=ddo.DDO(alpha=(1.0,), beta=(1.0,)),
  optimizer=Optimizer(learning_rate=(3e-4,)),
  noise=noise_lib.LogUniform(),
  images=2_000 * 256,
  batch_size=256,
  if_hopeless='warn',
  rhythm=Rhythm(eval_images=100 * 256),
)


@dataclasses.dataclass
class Config:
  """A run.

  Attributes:
    name: what the report calls it.
    seed: everything random follows from it.
    rounds: the number of rounds; raising it continues a finished run. 'auto'
      plays them until one gains no more than its noise, `tune.max_rounds` at
      most; see `training.ending`.
    init_from: what to start from: a folder of params; or weights that are
      converted on the way, by the name of an asset (see `assets.table`), a
      path or an address. '' pretrains first.
    model: a model's settings, e.g. `models.toy.ToyConfig`.
    sampler: a sampler's settings, e.g. `samplers.heun.Heun`.
    guide_from: the params of a weaker network, named as in `init_from`, which
      guides where `sampler.guidance` is not 1. Without it the model itself, its
      label left out, is the guide.
    guide: the guide's model settings, if they are not those of `model`.
    discriminator_from: the params of a discriminator of real against drawn
      images, a folder that --mode=discriminator left. It corrects samples where
      `sampler.discriminator` is not 0.
    discriminator_network: its size.
    discriminator: how --mode=discriminator trains one, on the pool of a round.
    vae_from: the autoencoder of latent models, 'sd-vae-ft-mse' or the path of
      its .safetensors or .bin. Only seeing or scoring their images needs it;
      training does not.
    tokenizer_from: the params of the frozen tokenizer of a model of tokens,
      named as in `init_from`. '' trains one first, by the phase `tokenizer`.
    data: where real images come from.
    labels: how often each class is drawn, for the fake pools and the scores.
      'data': as often as in the training images, where classes that occur
      nearly equally often (the rarest nine tenths as often as the commonest)
      count as equal; 'balanced': every class of theirs equally often. Under a
      protocol its rule holds.
    tokenizer: how a tokenizer is trained, where one is.
    pretrain: the pretraining.
    ddo: each round.
    tune: how many members a round tries with other numbers, and which is kept.
    evaluation: how checkpoints are chosen and reported.
    executor: how a step runs on the devices.
  """

  name: str = _knob('run', science=False)
  seed: int = _knob(0)
  rounds: settings.OrAuto = _knob(1, science=False)
  init_from: str = _knob('')
  model: likelihood.ModelConfig | None = None
  sampler: contract.Sampler | None = None
  guide_from: str = _knob('')
  guide: likelihood.ModelConfig | None = None
  discriminator_from: str = _knob('')
  discriminator_network: discriminator_lib.DiscriminatorConfig = _group(
    discriminator_lib.DiscriminatorConfig(), science=False
  )
  discriminator: Phase = _group(_DISCRIMINATOR, science=False)
  vae_from: str = _knob('')
  tokenizer_from: str = _knob('')
  data: Data = _group(Data())
  labels: str = _knob('data')
  tokenizer: Phase = _group(Phase(objective=objective_lib.MLE()))
  pretrain: Phase = _group(Phase(objective=objective_lib.MLE()))
  ddo: Phase = _group(Phase())
  tune: Tune = _group(Tune())
  evaluation: Evaluation = _group(Evaluation())
  executor: Executor = _group(Executor(), science=False)


PHASES = ('tokenizer', 'pretrain', 'ddo')


def at_round(group: Any, round_index: int) -> Any:
  """Returns a pytree of knobs with each tuple replaced by a round's value.

  Args:
    group: a phase, an objective, a noise law or an optimizer of a config. Its
      leaves are tuples with one entry a round, the last of which repeats, or
      numbers that hold in every round.
    round_index: the round, from 0.
  """

  def pick(values):
    if not isinstance(values, tuple):
      return values
    return float(values[min(round_index, len(values) - 1)])

  return jax.tree.map(pick, group, is_leaf=lambda leaf: isinstance(leaf, tuple))


# Where a field of a phase stood before it was part of a group, and the others
# that were renamed: old name -> new name.
_GROUPS = {
  'objective': ('alpha', 'beta', 'normalize'),
  'optimizer': (
    'learning_rate',
    'warmup_images',
    'warmup_start',
    'decay',
    'decay_images',
    'decay_end',
    'adam_b1',
    'adam_b2',
    'adam_eps',
    'weight_decay',
    'clip_norm',
  ),
  'noise': ('p_mean', 'p_std'),
  'rhythm': ('eval_images', 'save_images', 'log_images'),
}
_RENAMED_IN_PHASE = {
  'ema_halflife': 'averages.halflife',
  'ema_rampup': 'averages.rampup',
  'ema_width': 'averages.width',
  'fakes': 'negatives',
  'pool_size': 'negatives.size',
  'round_trip': 'negatives.round_trip',
} | {field: f'{group}.{field}' for group in _GROUPS for field in _GROUPS[group]}
RENAMED = {
  'model.levels': 'model.pixel_values',
  'model.tokenizer.levels': 'model.tokenizer.pixel_values',
  'guide.levels': 'guide.pixel_values',
  'evaluation.reference': 'evaluation.fid_stats',
} | {
  f'{phase}.{before}': f'{phase}.{after}'
  for phase in PHASES
  for before, after in _RENAMED_IN_PHASE.items()
}


def _validate_phase(problems: errors.Problems, name: str, phase: Phase) -> None:
  """Gathers what makes no sense in one phase."""
  groups = ('objective', 'negatives', 'optimizer', 'averages', 'noise')
  for group in (*groups, 'lora', 'bad_numbers'):
    with problems.gather():
      getattr(phase, group).check(f'{name}.{group}')
  rhythm = phase.rhythm
  integers = {
    'images': (phase.images, 1),
    'batch_size': (phase.batch_size, 1),
    'rhythm.log_images': (rhythm.log_images, 1),
    'rhythm.eval_images': (rhythm.eval_images, 0),
    'rhythm.save_images': (rhythm.save_images, 0),
  }
  for field, (value, lowest) in integers.items():
    with problems.gather():
      errors.require_integer(f'{name}.{field}', value, lowest)
  with problems.gather():
    minutes = rhythm.save_minutes
    field = f'{name}.rhythm.save_minutes'
    errors.require(minutes >= 0, field, minutes, '0 or more')
  with problems.gather():
    errors.require(
      phase.bad_numbers.policy != 'rollback' or rhythm.save_images > 0,
      f'{name}.rhythm.save_images',
      rhythm.save_images,
      'positive: bad_numbers.policy=rollback goes back to a save',
    )
  with problems.gather():
    field = f'{name}.if_hopeless'
    errors.require_choice(field, phase.if_hopeless, first_steps.POLICIES)
  with problems.gather():
    errors.require(
      name == 'ddo' or not phase.lora.rank,
      f'{name}.lora.rank',
      phase.lora.rank,
      '0: only a round has a reference to which a difference is trained',
    )
  drop = phase.label_drop
  objective = phase.objective
  with problems.gather():
    errors.require(0 <= drop < 1, f'{name}.label_drop', drop, 'in [0, 1)')
  with problems.gather():
    if objective.compares_labels and not phase.negatives.needs_other_label:
      raise errors.UserError(
        f'config.{name}.objective is {objective}, which compares labels, with'
        f' {phase.negatives}: set --config.{name}.negatives=other_labels'
      )
  with problems.gather():
    field = f'{name}.trains_on'
    errors.require_choice(field, phase.trains_on, _TRAINS_ON)
    errors.require(
      phase.trains_on != POOL
      or (
        name == 'ddo'
        and not objective.contrastive
        and phase.negatives.needs_pool
      ),
      field,
      phase.trains_on,
      f"'real', or in a round objective=mle and negatives=pool, for it has"
      f' {objective} and {phase.negatives}',
    )
  with problems.gather():
    errors.require(
      name in ('ddo', 'discriminator') or not objective.contrastive,
      f'{name}.objective',
      objective,
      'MLE()',
    )


def require_model(config: Config) -> None:
  """Raises UserError unless a config has a model and a sampler."""
  for field, example in (
    ('model', 'models.toy.ToyConfig'),
    ('sampler', 'samplers.heun.Heun'),
  ):
    value = getattr(config, field)
    errors.require(value is not None, field, value, f'set, e.g. to {example}()')


def validate(config: Config) -> None:
  """Checks a config against itself.

  Raises:
    errors.UserError: values make no sense; a line names each field.
  """
  problems = errors.Problems()
  with problems.gather():
    require_model(config)
  with problems.gather():
    errors.require(
      config.guide is None or bool(config.guide_from),
      'guide_from',
      '',
      "the folder of the guide's params",
    )
  with problems.gather():
    if config.rounds != settings.AUTO:
      errors.require_integer('rounds', config.rounds, 0)
    elif evaluator_lib.stated_blocks(config.evaluation) == 1:
      errors.require(
        False,
        'evaluation.seeds',
        config.evaluation.seeds,
        "2 or more: rounds='auto' holds a gain against their spread",
      )
  with problems.gather():
    errors.require_choice('labels', config.labels, labels_lib.RULES)
  with problems.gather():
    seed = config.seed
    errors.require(0 <= seed < 2**32, 'seed', seed, 'in [0, 2**32)')
  for name in (*PHASES, 'discriminator'):
    _validate_phase(problems, name, getattr(config, name))
  with problems.gather():
    config.discriminator_network.check('discriminator_network')
  with problems.gather():
    phase = config.discriminator
    errors.require(
      phase.objective.contrastive and phase.negatives.needs_pool,
      'discriminator.objective',
      phase.objective,
      f'one that compares real images with a pool, such as DDO(), and not with'
      f' {phase.negatives}',
    )
  with problems.gather():
    config.tune.check('tune')
  with problems.gather():
    errors.require(
      config.tune.members < 2
      or hasattr(config.ddo.objective, 'beta')
      or bool(config.tune.given()),
      'tune.members',
      config.tune.members,
      'at most 1 where the objective has no β, and no range is given, such as'
      " --config.tune.learning_rate='(1e-4, 1e-3)': nothing would vary",
    )
  with problems.gather():
    errors.require(
      not config.tune.members or config.ddo.rhythm.eval_images > 0,
      'ddo.rhythm.eval_images',
      config.ddo.rhythm.eval_images,
      'positive where config.tune.members is',
    )
  with problems.gather():
    given = config.tune.given() == tuple(tune_lib.RANGES)
    errors.require(
      not config.tune.members or not config.ddo.lora.rank or given,
      'ddo.lora.rank',
      config.ddo.lora.rank,
      '0 where the probe is asked, which moves the weights themselves: give'
      f' config.tune all of {", ".join(tune_lib.RANGES)}',
    )
  with problems.gather():
    errors.require(
      not config.tune.widths or bool(config.ddo.averages.width),
      'ddo.averages.width',
      config.ddo.averages.width,
      'one or more widths, of which those in config.tune.widths are made',
    )
  with problems.gather():
    config.data.check()
  with problems.gather():
    evaluator_lib.check(config.evaluation)
  with problems.gather():
    config.executor.check()
  problems.raise_any()
