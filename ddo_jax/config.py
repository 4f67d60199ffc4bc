"""The knobs of a run: typed, with unit, paper symbol and source beside each.

A recipe in `configs/` returns a `Config` that differs from these defaults;
`--config.x.y=v` overrides any field. A model's and a sampler's own dataclass
stand beside their code.
"""

from collections.abc import Iterator
import dataclasses
import json
import math
from typing import Any

from ddo_jax import errors
from ddo_jax.evaluation import evaluator


def _knob(default: Any, *, science: bool = True) -> Any:
  """A field. Science fields must not change inside one run's folder."""
  metadata = {'science': science}
  if dataclasses.is_dataclass(default):
    value = lambda: dataclasses.replace(default)
    return dataclasses.field(default_factory=value, metadata=metadata)
  return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Data:
  """Where real images come from (see `data.open_source`)."""

  # A TFDS name (digits, fashion_mnist and cifar10 need no TensorFlow), or the
  # path of an .npz, or of a folder or zip of images with EDM's dataset.json.
  source: str = _knob('digits')
  # Side that smaller images are padded to with 0 (black), centred; 0: as is.
  pad_to: int = _knob(0)
  train_split: str = _knob('train')
  test_split: str = _knob('test')
  # Where TFDS keeps prepared data; '' is TFDS's own default.
  data_dir: str = _knob('', science=False)
  # Folder of the downloaded files that a builder reads (fashion_mnist: the
  # four *-ubyte.gz; cifar10: cifar-10-binary.tar.gz).
  raw_dir: str = _knob('', science=False)


# Mutable only so that `--config.ddo.x=v` can write it; hashed once it is read.
@dataclasses.dataclass(unsafe_hash=True)
class Phase:
  """One stretch of training: the pretraining, or each round.

  Fields that are tuples hold one value a round; the last entry repeats.
  """

  # 'ddo' (eq. 13, 16) or 'mle' (the control). Baselines whose negatives are
  # the real images under other rows' labels: 'cca', 'dpo', 'unlearning'.
  objective: str = _knob('ddo')
  images: int = _knob(1_500_000)  # real rows seen (the paper: 1.5 M, CIFAR-10)
  batch_size: int = _knob(512)  # real rows a step; as many fakes go with them
  # α of eq. 13: weight of the fakes; λ of CCA.
  alpha: tuple[float, ...] = _knob((4.0,))
  beta: tuple[float, ...] = _knob((0.05,))  # β of eq. 13: scale of log-ratio
  # Divide by max(α, 1), as published for VAR. DPO has no α and is never
  # divided, CCA and unlearning with label_drop only.
  normalize: bool = _knob(False)
  learning_rate: tuple[float, ...] = _knob((1.5e-4,))  # peak
  warmup_images: int = _knob(0)  # linear; the paper: a whole round
  warmup_start: float = _knob(0.0)  # share of the peak at the start; VAR: 0.005
  decay: str = _knob('none')  # 'none' | 'linear' | 'inverse_sqrt' | 'lin0'
  # linear: length of the final descent to 0 [images];
  # inverse_sqrt: images after which the rate falls as 1/√ (EDM2's t_ref·B);
  # lin0: where VAR's schedule ends, perhaps far beyond `images`: flat for 1/20
  # of what follows the warm-up, then linear to decay_end.
  decay_images: int = _knob(0)
  decay_end: float = _knob(0.0)  # lin0: share of the peak; VAR: 0.1, 0.01
  adam_b1: float = _knob(0.9)
  adam_b2: float = _knob(0.999)
  adam_eps: float = _knob(1e-8)
  weight_decay: float = _knob(0.0)  # AdamW's, of the model's `decay_mask`
  clip_norm: float = _knob(0.0)  # global gradient norm; 0 = off
  ema_halflife: tuple[float, ...] = _knob(())  # [images], one EMA profile each
  ema_rampup: float = _knob(0.0)  # half-life ≤ this · images seen; EDM: 0.05
  # σ_rel of power-function EMA profiles, one each (EDM2 tracks 0.05, 0.10).
  ema_width: tuple[float, ...] = _knob(())
  p_mean: tuple[float, ...] = _knob((-1.2,))  # ln σ ~ N(p_mean, p_std²)
  p_std: tuple[float, ...] = _knob((1.2,))
  label_drop: float = _knob(0.0)  # share of rows trained without their label
  # 'pool': drawn before a round; 'online': in every step, one for each real
  # row and of its label, as VAR's are.
  fakes: str = _knob('pool')
  pool_size: int = _knob(50_000)  # reference samples in the pool
  # Online fakes go through pixels (VAR: unrounded) and the encoder again.
  round_trip: bool = _knob(True)
  eval_images: int = _knob(0)  # images between in-round evaluations; 0 = end
  save_images: int = _knob(0, science=False)  # images between saves; 0 = evals
  log_images: int = _knob(25_600, science=False)  # images between log lines

  @property
  def contrasts(self) -> bool:
    """Whether negatives are the real images under other rows' labels."""
    return self.objective not in ('ddo', 'mle')

  def steps(self) -> int:
    """Number of optimizer steps of the phase."""
    return -(-self.images // self.batch_size)

  def static(self) -> 'Phase':
    """What the compiled step depends on: the traced values left out."""
    return dataclasses.replace(self, alpha=(), beta=(), learning_rate=())


Evaluation = evaluator.Evaluation


@dataclasses.dataclass
class Executor:
  """How a step runs on the devices; never changes what it computes."""

  kind: str = _knob('pmap', science=False)  # 'pmap' | 'fsdp'
  accumulate: int = _knob(1, science=False)  # microbatches a step
  remat: bool = _knob(False, science=False)  # recompute activations
  sample_batch: int = _knob(1_000, science=False)  # images a sampler call


@dataclasses.dataclass
class Config:
  """A run."""

  name: str = _knob('run', science=False)
  seed: int = _knob(0)
  rounds: int = _knob(1, science=False)
  init_from: str = _knob('')  # a folder of params; '' pretrains first
  model: Any = None  # a model's own dataclass, e.g. models.toy.ToyConfig
  sampler: Any = None  # a sampler's own dataclass, e.g. samplers.heun.Heun
  # A weaker network that guides where sampler.guidance is not 1: its folder of
  # params, and its model's dataclass if it is not `model`'s. Without it the
  # model itself guides, its label left out.
  guide_from: str = _knob('')
  guide: Any = None
  # The autoencoder of latent models, sd-vae-ft-mse as .safetensors or .bin:
  # only to see or score their images, so that training does without it.
  vae_from: str = _knob('')
  # The frozen tokenizer of a model of tokens: its folder of params. '' trains
  # one first, by the phase `tokenizer`.
  tokenizer_from: str = _knob('')
  data: Data = _knob(Data())
  tokenizer: Phase = _knob(Phase(objective='mle'))
  pretrain: Phase = _knob(Phase(objective='mle'))
  ddo: Phase = _knob(Phase())
  evaluation: Evaluation = _knob(Evaluation())
  executor: Executor = _knob(Executor())


def pick(values: tuple[float, ...], round_index: int) -> float:
  """The value of a round: one entry each, the last repeats."""
  return float(values[min(round_index, len(values) - 1)])


def flatten(config: Any, prefix: str = '') -> Iterator[tuple[str, Any, bool]]:
  """Yields (dotted name, value, is science) of every leaf of a config."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    name = prefix + field.name
    if dataclasses.is_dataclass(value):
      yield f'{name}.type', type(value).__name__, True
      yield from flatten(value, name + '.')
    else:
      yield name, value, field.metadata.get('science', True)


def to_json(config: Config) -> dict[str, Any]:
  """The config as plain JSON values under dotted names."""
  leaves = {name: value for name, value, _ in flatten(config)}
  return json.loads(json.dumps(leaves))


def science_changes(config: Config, recorded: dict[str, Any]) -> list[str]:
  """Lines 'name: recorded -> now' for science fields that differ."""
  now = to_json(config)
  lines = []
  for name, _, science in flatten(config):
    if science and recorded.get(name) != now[name]:
      lines.append(f'{name}: {recorded.get(name)!r} -> {now[name]!r}')
  lines += [
    f'{name}: {recorded[name]!r} -> gone'
    for name in recorded
    if name not in now
  ]
  return lines


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and math.isfinite(value)


def _validate_phase(name: str, phase: Phase) -> None:
  """Checks one phase; raises UserError that names the field."""
  choices = {
    'objective': ('ddo', 'mle', 'cca', 'dpo', 'unlearning'),
    'decay': ('none', 'linear', 'inverse_sqrt', 'lin0'),
    'fakes': ('pool', 'online'),
  }
  for field, allowed in choices.items():
    value = getattr(phase, field)
    errors.require(
      value in allowed, f'{name}.{field}', value, f'one of {allowed}'
    )
  for field in ('alpha', 'beta', 'learning_rate', 'p_std', 'ema_halflife'):
    values = getattr(phase, field)
    good = all(_is_number(v) and v > 0 for v in values)
    good &= bool(values) or field == 'ema_halflife'
    errors.require(
      good, f'{name}.{field}', values, 'positive, one value a round'
    )
  good = bool(phase.p_mean) and all(map(_is_number, phase.p_mean))
  errors.require(good, f'{name}.p_mean', phase.p_mean, 'numbers, one a round')
  for field in ('images', 'batch_size', 'pool_size', 'log_images'):
    value = getattr(phase, field)
    errors.require(value > 0, f'{name}.{field}', value, 'a positive integer')
  good = all(0 < width < 0.288 for width in phase.ema_width)
  errors.require(good, f'{name}.ema_width', phase.ema_width, 'in (0, 0.288)')
  amounts = ('warmup_images', 'decay_images', 'eval_images')
  for field in (*amounts, 'clip_norm', 'ema_rampup', 'weight_decay'):
    value = getattr(phase, field)
    errors.require(value >= 0, f'{name}.{field}', value, '0 or more')
  for field in ('label_drop', 'warmup_start', 'decay_end'):
    value = getattr(phase, field)
    errors.require(0 <= value < 1, f'{name}.{field}', value, 'in [0, 1)')
  if phase.decay != 'none':
    value = phase.decay_images
    least = phase.warmup_images if phase.decay == 'lin0' else 0
    wanted = f'more than {least} to decay'
    errors.require(value > least, f'{name}.decay_images', value, wanted)


def validate(config: Config) -> None:
  """Raises UserError, naming the field, where a value makes no sense."""
  errors.require(config.model is not None, 'model', None, "a model's dataclass")
  errors.require(
    config.sampler is not None, 'sampler', None, "a sampler's dataclass"
  )
  errors.require(
    config.guide is None or bool(config.guide_from),
    'guide_from',
    '',
    "the folder of the guide's params",
  )
  errors.require(config.rounds >= 0, 'rounds', config.rounds, '0 or more')
  errors.require(0 <= config.seed < 2**32, 'seed', config.seed, 'in [0, 2**32)')
  for name in ('tokenizer', 'pretrain', 'ddo'):
    _validate_phase(name, getattr(config, name))
  for name in ('tokenizer', 'pretrain'):
    objective = getattr(config, name).objective
    errors.require(objective == 'mle', f'{name}.objective', objective, "'mle'")
  evaluator.check(config.evaluation)
  executor = config.executor
  kinds = ('pmap', 'fsdp')
  errors.require(
    executor.kind in kinds, 'executor.kind', executor.kind, f'one of {kinds}'
  )
  for field in ('accumulate', 'sample_batch'):
    value = getattr(executor, field)
    errors.require(value > 0, f'executor.{field}', value, 'a positive integer')
