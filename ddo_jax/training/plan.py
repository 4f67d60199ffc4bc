"""What a run will take: memory, arithmetic and hours, before anything starts.

All of it is counted from shapes, for devices that need not be there; or the
hours are measured on the devices at hand (`probe`). Nothing is read, fetched or
written.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import functools
import math
import pathlib
import textwrap
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import rng
from ddo_jax import settings as settings_lib
from ddo_jax.evaluation import classifier_evaluator
from ddo_jax.evaluation import evaluator as evaluator_lib
from ddo_jax.evaluation import features
from ddo_jax.evaluation import measure
from ddo_jax.evaluation import protocols
from ddo_jax.evaluation.networks import extract
from ddo_jax.method import generate
from ddo_jax.method import likelihood
from ddo_jax.method import negatives
from ddo_jax.report import cost
from ddo_jax.report import gallery
from ddo_jax.runtime import chips
from ddo_jax.runtime import layout as layout_lib
from ddo_jax.runtime import work as work_lib
from ddo_jax.training import check
from ddo_jax.training import fit as fit_lib
from ddo_jax.training import loop as loop_lib
from ddo_jax.training import probe as probe_lib
from ddo_jax.training import step as step_lib
from ddo_jax.training import workspace

_SWEPT = ('training', 'selection', 'report')  # a setting's parts of a round
_WIDTH = 80  # columns
_FIRST = 'first '  # begins the name of a call's tracing and compiling


class Call(NamedTuple):
  """A compiled call, which a run makes many times.

  Attributes:
    images: the images that it takes or makes, over all devices.
    work: what it does on one device.
  """

  images: int
  work: work_lib.Work


class Part(NamedTuple):
  """A part of a run.

  Attributes:
    name: what it is called.
    times: how many times it is played, such as the number of rounds.
    images: the images of one time: seen in training, else drawn.
    calls: how many of each call one time takes.
  """

  name: str
  times: int
  images: int
  calls: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run's plan; as text, it is what --mode=plan prints.

  Attributes:
    name: the run's.
    devices: which and how many they are.
    num_devices: their number.
    parameters: the number of the model's.
    flops_an_image: of a forward pass of one image.
    settings: the settings of the executor, those found out among them.
    memory: the bytes a device of each phase and of 'sampling', by part.
    room: the bytes that there are of a device; None where that is not known.
    calls: the calls by name.
    parts: what the run is made of, in its order.
    seconds: the time of a call by name; {} where nobody knows it.
    notes: what the numbers stand for.
  """

  name: str
  devices: str
  num_devices: int
  parameters: int
  flops_an_image: int
  settings: dict[str, Any]
  memory: dict[str, dict[str, int]]
  room: int | None
  calls: dict[str, Call]
  parts: list[Part]
  seconds: dict[str, float]
  notes: list[str]

  @property
  def most_bytes(self) -> int:
    """The most bytes that are taken of a device."""
    return max(sum(parts.values()) for parts in self.memory.values())

  def flops(self, part: Part) -> float:
    """Returns the additions and multiplications of a part, all its times."""
    once = sum(
      count * self.calls[name].work.total for name, count in part.calls.items()
    )
    return part.times * once * self.num_devices

  def hours(self, part: Part) -> float:
    """Returns the hours of a part, all its times."""
    once = sum(
      count * self.seconds.get(name, 0.0) for name, count in part.calls.items()
    )
    return part.times * once / 3_600

  @property
  def total_hours(self) -> float:
    """The hours of the whole run."""
    return sum(self.hours(part) for part in self.parts)

  def __str__(self) -> str:
    """The plan as tables of at most 80 columns."""
    head = (
      f'{self.name} on {self.devices}: {self.parameters:,} params,'
      f' {cost.short(self.flops_an_image)}FLOP a forward pass of an image'
    )
    given = ' '.join(f'{key}={value}' for key, value in self.settings.items())
    sections = [
      textwrap.fill(head, _WIDTH),
      textwrap.fill(f'executor: {given}', _WIDTH),
      _table(self._memory_rows()),
      _table(self._part_rows()),
      '\n'.join(
        textwrap.fill(f'* {note}', _WIDTH, subsequent_indent='  ')
        for note in self.notes
      ),
    ]
    return '\n\n'.join(sections)

  def _memory_rows(self) -> list[list[str]]:
    columns = list(self.memory)
    unit, size = ('GiB', 2**30) if self.most_bytes >= 2**28 else ('MiB', 2**20)

    def cells(numbers):
      return [
        '' if number is None else f'{number / size:,.2f}' for number in numbers
      ]

    rows = [[f'{unit} a device', *columns]]
    names = {part: None for column in columns for part in self.memory[column]}
    for name in names:
      sizes = [self.memory[column].get(name) for column in columns]
      if any(sizes):
        rows.append([name, *cells(sizes)])
    totals = [sum(self.memory[column].values()) for column in columns]
    rows.append(['total', *cells(totals)])
    if self.room is not None:
      rows.append(['room', *cells([self.room] * len(columns))])
    return rows

  def _part_rows(self) -> list[list[str]]:
    unit, seconds = _clock(self.total_hours)

    def row(name, times, images, flops, hours):
      spent = f'{hours * 3_600 / seconds:,.2f}' if self.seconds else '?'
      return [name, times, images, cost.short(flops), spent]

    rows = [['part', 'times', 'images each', 'FLOP', unit]]
    for part in self.parts:
      times = f'{part.times}'
      images = f'{part.images:,}' if part.images else ''
      rows.append(
        row(part.name, times, images, self.flops(part), self.hours(part))
      )
    flops = sum(self.flops(part) for part in self.parts)
    rows.append(row('total', '', '', flops, self.total_hours))
    return rows


def _clock(hours: float) -> tuple[str, int]:
  """Returns the unit in which a time is well read, and its seconds."""
  if hours >= 1:
    return 'hours', 3_600
  if hours >= 1 / 60:
    return 'minutes', 60
  return 'seconds', 1


def duration(hours: float) -> str:
  """Returns a time as it is well read, such as '12.9 hours'."""
  unit, seconds = _clock(hours)
  return f'{hours * 3_600 / seconds:,.3g} {unit}'


def _table(rows: list[list[str]]) -> str:
  """Returns rows as lines, all columns but the first to the right."""
  widths = [
    max(len(cell) for cell in column) for column in zip(*rows, strict=True)
  ]
  lines = []
  for row in rows:
    cells = [row[0].ljust(widths[0])]
    cells += [
      cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
    ]
    lines.append('  '.join(cells).rstrip())
  return '\n'.join(lines)


@functools.lru_cache(maxsize=64)
def _step_work(
  stage: fit_lib.Stage, num_devices: int, accumulate: int, remat: bool | str
) -> work_lib.Work:
  """Returns what a training step does on one device."""
  model = stage.build(remat)
  state = fit_lib.state_shapes(stage)
  count = math.ceil(stage.phase.batch_size / num_devices)
  rows = fit_lib.make_rows(stage, model, count)

  def step(state, reference, frozen, real, fake):
    return step_lib.train_step(
      state,
      reference,
      frozen,
      real,
      fake,
      model,
      stage.phase,
      rng.stream(0),
      sampler=stage.sampler,
      accumulate=accumulate,
    )

  return work_lib.of(
    step,
    state,
    fit_lib.reference_shapes(stage),
    stage.frozen,
    rows.real,
    rows.fake,
  )


@functools.lru_cache(maxsize=64)
def _sample_work(
  stage: fit_lib.Stage, sampler: Any, rows: int
) -> work_lib.Work:
  """Returns what a call of the sampler does on one device that draws `rows`."""
  draw, shapes = fit_lib.sample_call(stage, sampler, rows)
  return work_lib.of(draw, *shapes)


def _stored(model: likelihood.LikelihoodModel, rows: int) -> Any:
  """Returns the shape of rows as they are stored."""
  shape = model.codec.stored_shape(model.example_shape)
  dtype = fit_lib.stored_dtype(model)
  return jax.ShapeDtypeStruct((rows, *shape), dtype)


def _image(run: workspace.Run) -> jax.ShapeDtypeStruct:
  """Returns the shape and type of an image [1,H,W,C] that is measured."""
  frozen = run.stage('ddo').frozen
  return jax.eval_shape(run.model.codec.render, frozen, _stored(run.model, 1))


def _networks_work(run: workspace.Run) -> work_lib.Work:
  """Returns what a protocol's networks do with a block of images."""
  settings = run.config.evaluation
  kinds = evaluator_lib.kinds(settings)
  protocol = protocols.get(settings.protocol)
  shape = _image(run).shape[1:]

  def apply(params, images):
    return features.apply(params, images, protocol, kinds)

  images = jax.ShapeDtypeStruct((extract.ROWS, *shape), jnp.uint8)
  return work_lib.of(apply, features.param_shapes(kinds), images)


def _calls(run: workspace.Run) -> dict[str, Call]:
  """Returns the calls of a run, by name.

  They are the step of each phase, 'fake' and 'sample' (of the sampler, without
  guidance and with it), 'render' where stored rows are no images, and 'scores'
  of a block of images on every device.
  """
  config = run.config
  num_devices = run.layout.num_devices
  stage = run.stage('ddo')
  calls = {}
  for name in run.phases:
    trained = run.stage(name)
    work = _step_work(trained, num_devices, run.fit.accumulate, run.fit.remat)
    calls[f'{name} step'] = Call(trained.phase.batch_size, work)
  rows = math.ceil(run.sample_batch / num_devices)
  work = _sample_work(stage, config.sampler, rows)
  calls['sample'] = Call(rows * num_devices, work)
  calls['fake'] = calls['sample']
  unguided = config.sampler.unguided()
  if unguided != config.sampler:
    work = _sample_work(stage, unguided, rows)
    calls['fake'] = Call(rows * num_devices, work)
  rows = math.ceil(generate.RENDERED / num_devices)
  stored = _stored(run.model, rows)
  if stored.dtype != jnp.uint8:
    work = work_lib.of(run.model.codec.render, stage.frozen, stored)
    calls['render'] = Call(rows * num_devices, work)
  work = work_lib.Work({}, 0, 0)  # a classifier's is next to nothing
  if config.evaluation.protocol:
    work = _networks_work(run)
  calls['scores'] = Call(extract.ROWS * num_devices, work)
  return calls


def _drawn(run: workspace.Run, count: int, set_size: int = 0) -> int:
  """Returns the images that are drawn for `count`, in whole calls.

  Args:
    run: the run.
    count: the images that are wanted.
    set_size: the size of the set that they are of, see `generate.call_size`.
  """
  num_devices = run.layout.num_devices
  size = generate.call_size(set_size or count, run.sample_batch, num_devices)
  size = math.ceil(size / num_devices) * num_devices
  return math.ceil(count / size) * size


def _scored(
  run: workspace.Run, calls: dict[str, Call], count: int, times: int
) -> dict[str, float]:
  """Returns the calls that draw and measure `count` images, `times` times."""
  sample = _drawn(run, count) / calls['sample'].images
  made: dict[str, float] = {'sample': times * sample}
  for name in ('render', 'scores'):
    if name in calls:
      made[name] = times * math.ceil(count / calls[name].images)
  return made


def _parts(
  run: workspace.Run, calls: dict[str, Call], left: dict[str, config_lib.Phase]
) -> list[Part]:
  """Returns what is left to do of a run.

  Args:
    run: the run.
    calls: its calls.
    left: its stages that are to be done, see `check.stages`.
  """
  config = run.config
  evaluation = config.evaluation
  parts = []
  for name in ('tokenizer', 'pretrain'):
    if name in left:
      phase = left[name]
      seen = phase.steps() * phase.batch_size
      parts.append(Part(name, 1, seen, {f'{name} step': phase.steps()}))
  rounds = sum(name.startswith('round_') for name in left)
  if not rounds:
    return parts

  phase = config.ddo
  second = phase.used_negatives
  if isinstance(second, negatives.Pool):
    size = second.size
    sample = _drawn(run, size) / calls['fake'].images
    parts.append(Part('fake pool', rounds, size, {'fake': sample}))
  tune = config.tune
  played = rounds * (tune.members or 1)
  seen = phase.steps() * phase.batch_size
  parts.append(Part('training', played, seen, {'ddo step': phase.steps()}))
  candidates = len(phase.averages.names()) or 1
  times = loop_lib.evaluations(phase) * candidates
  count = evaluation.selection_samples
  made = _scored(run, calls, count, times)
  parts.append(Part('selection', played, times * count, made))

  protocol: Any = classifier_evaluator.ClassifierEvaluator
  if evaluation.protocol:
    protocol = protocols.get(evaluation.protocol)
  if tune.members:
    finalists = min(tune.finalists, tune.members)
    times = 1 + finalists * (1 + len(tune.merges) + len(tune.widths))
    count = measure.final_images(protocol, evaluation)
    made = _scored(run, calls, count, times)
    parts.append(Part('finals', rounds, times * count, made))
  count = measure.num_images(protocol, evaluation)
  blocks = measure.num_blocks(protocol, evaluation)
  made = _scored(run, calls, count, blocks)
  sheet = _drawn(run, gallery.COUNT, set_size=count)
  made['sample'] += sheet / calls['sample'].images
  # What a round begins with is measured before the first one only.
  times = rounds + ('round_000' in left)
  parts.append(Part('report', times, blocks * count, made))
  return parts


def _memory(run: workspace.Run) -> dict[str, dict[str, int]]:
  """Returns the bytes a device of each phase and of sampling, by part."""
  fit = run.fit
  layout = run.layout
  memory = {}
  for name in run.phases[::-1]:
    stage = run.stage(name)
    memory[name] = fit_lib.step_parts(stage, layout, fit.accumulate, fit.remat)
  stage = run.stage('ddo')
  rows = math.ceil(run.sample_batch / layout.num_devices)
  drawn = fit_lib.sample_bytes(stage, run.config.sampler, rows)
  standing = fit_lib.standing_to_sample(stage, layout)
  return memory | {'sampling': standing | {'activations': drawn}}


def _settings(run: workspace.Run) -> dict[str, Any]:
  """Returns the executor's settings that differ, and those that were found."""
  given = dataclasses.asdict(run.config.executor)
  standard = dataclasses.asdict(layout_lib.ExecutorConfig())
  found = {
    'kind': given.pop('kind'),
    'accumulate': run.fit.accumulate,
    'remat': run.fit.remat,
    'sample_batch': run.sample_batch,
  }
  given.pop('device_memory_gib')
  for name, value in given.items():
    if name not in found and value != standard[name]:
      found[name] = value
  return found


def _check_sampling(run: workspace.Run, memory: dict[str, int]) -> None:
  """Raises UserError where a call of the sampler is known not to fit."""
  room = run.layout.room()
  taken = sum(memory.values())
  if room is None or taken <= room:
    return
  auto = dataclasses.replace(
    run.config.executor, sample_batch=settings_lib.AUTO
  )
  found = fit_lib.call_size(
    run.stage('ddo'), run.config.sampler, auto, run.layout
  )
  raise errors.UserError(
    f'a call of the sampler needs {fit_lib.gib(taken)} GiB a device of'
    f' {fit_lib.gib(room)} (executor.sample_batch={run.sample_batch}): try'
    f' --config.executor.sample_batch={found}'
  )


def _counted(run: workspace.Run) -> dict[str, dict[str, int]]:
  """Returns `_memory`.

  Raises:
    errors.UserError: it is known to be more than there is.
  """
  memory = _memory(run)
  _check_sampling(run, memory['sampling'])
  return memory


def on_chips(
  config: config_lib.Config,
  chip: chips.Chip,
  num_devices: int,
  workdir: pathlib.Path | None = None,
) -> workspace.Run:
  """Returns a run that is fitted to chips, which need not be there."""
  executor = dataclasses.replace(config.executor)
  executor.device_memory_gib = executor.device_memory_gib or chip.room_gib
  layout = layout_lib.Layout(executor, num_devices)
  return workspace.Run(config, workdir, layout)


def what_fits(
  config: config_lib.Config, chip: chips.Chip, num_devices: int
) -> tuple[workspace.Run, int] | None:
  """Finds settings of the executor with which a run fits.

  Args:
    config: the run's.
    chip: the kind of devices.
    num_devices: their least number, which is doubled until the run fits.

  Returns:
    A run that fits and the number of devices; None if none was found.
  """
  rows = min(getattr(config, name).batch_size for name in config_lib.PHASES)
  while num_devices <= rows:
    for kind in layout_lib.SPLIT if num_devices > 1 else ('pmap',):
      executor = dataclasses.replace(
        config.executor,
        kind=kind,
        fsdp_devices=0,
        accumulate=settings_lib.AUTO,
        remat=settings_lib.AUTO,
        sample_batch=settings_lib.AUTO,
      )
      other = dataclasses.replace(config, executor=executor)
      run = on_chips(other, chip, num_devices)
      standing = max(
        sum(fit_lib.standing(run.stage(name), run.layout).values())
        for name in run.phases
      )
      if standing > run.layout.room():
        continue  # which is counted in no time
      with contextlib.suppress(errors.UserError):
        _counted(run)
        return run, num_devices
    num_devices *= 2
  return None


def _flags(settings: dict[str, Any]) -> str:
  """Returns settings of the executor as flags."""
  return ' '.join(
    f'--config.executor.{name}={value}' for name, value in settings.items()
  )


def _check(config: config_lib.Config) -> None:
  """Checks a config as far as its plan goes; asks for nothing outside of it."""
  config_lib.validate(config)
  likelihood.check_sampler(workspace.build_model(config), config.sampler)


def _probed(
  run: workspace.Run, calls: dict[str, Call]
) -> tuple[dict[str, float], list[str]]:
  """Measures calls here; returns their seconds, and notes."""
  config = run.config
  times = {
    f'{name} step': probe_lib.step(run.stage(name), run.executor, run.fit)
    for name in run.phases
  }
  times['sample'] = probe_lib.sample(run, config.sampler)
  times['fake'] = probe_lib.Times(times['sample'].seconds, 0.0)
  if calls['fake'] != calls['sample']:
    times['fake'] = probe_lib.sample(run, config.sampler.unguided())
  if 'render' in calls:
    times['render'] = probe_lib.render(run)
  notes = []
  if config.evaluation.protocol:
    times['scores'] = probe_lib.networks(config.evaluation, _image(run))
  else:
    try:
      found = probe_lib.scores(run)
      blocks = math.ceil(
        config.evaluation.selection_samples / calls['scores'].images
      )
      times['scores'] = found._replace(seconds=found.seconds / blocks)
    except errors.UserError as error:
      notes.append(f'not in the hours: the scores, for {error}')
  seconds = {name: found.seconds for name, found in times.items()}
  for name, found in times.items():
    seconds[f'{_FIRST}{name}'] = found.first
  taken = probe_lib.most_bytes()
  if taken:
    notes.append(f'the probe took {fit_lib.gib(taken)} GiB of a device')
  return seconds, notes


def plan(
  config: config_lib.Config,
  chip: str = '',
  num_devices: int = 0,
  probe: bool = False,
  workdir: pathlib.Path | None = None,
) -> Plan:
  """Plans a run.

  Args:
    config: the run's.
    chip: the name of one of `chips.CHIPS`; '' takes the devices at hand.
    num_devices: the number of chips; 0 is one. It goes with `chip`.
    probe: whether the calls are timed on the devices at hand.
    workdir: the run's folder, what is done in which is left out; None for none.

  Raises:
    errors.UserError: the config makes no sense, the chip is not known, or the
      run does not fit into its devices; the line says what would.
  """
  _check(config)
  if chip and probe:
    raise errors.UserError('--chip and --probe: give one of them')
  if num_devices and not chip:
    raise errors.UserError(
      '--num_devices goes with --chip; without one the plan is for the devices'
      ' at hand'
    )
  if chip:
    known = chips.get(chip)
    count = num_devices or 1
    title = known.title
    run = on_chips(config, known, count, workdir)
  else:
    run = workspace.Run(config, workdir)
    count = run.layout.num_devices
    kind = jax.devices()[0].device_kind
    known = chips.of_device(kind)
    title = kind
  try:
    memory = _counted(run)
  except errors.UserError as error:
    other = known and what_fits(config, known, count)
    if not other or 'would fit' in str(error):
      raise
    found, needed = other
    raise errors.UserError(
      f'{error}; {needed} × {title} would do with {_flags(_settings(found))}'
    ) from error
  return _filled(run, f'{count} × {title}', memory, known, probe)


def _filled(
  run: workspace.Run,
  devices: str,
  memory: dict[str, dict[str, int]],
  chip: chips.Chip | None,
  probe: bool,
) -> Plan:
  """Returns the plan of a run whose memory is counted."""
  calls = _calls(run)
  parts = _parts(run, calls, check.stages(run, rounds=True))
  outside = 'reading data, checkpoints'
  if not run.config.evaluation.protocol and not probe:
    outside += ", the classifier's scores"
  notes = []
  seconds = {}
  if probe:
    seconds, notes = _probed(run, calls)
    first = {name: 1.0 for name in seconds if name.startswith(_FIRST)}
    calls |= dict.fromkeys(first, Call(0, work_lib.Work({}, 0, 0)))
    parts.insert(0, Part('compiling', 1, 0, first))
    notes.insert(0, 'hours as measured here, by ten steps and a call of each')
  elif chip:
    seconds = {name: chip.seconds(call.work) for name, call in calls.items()}
    outside += ', compiling, what devices send each other'
    notes.append(
      f'hours at {chips.UTILISATION:.0%} of published rates: {chip.source}'
    )
  else:
    notes.append('hours: --probe measures them here, --chip=h100 counts them')
  if seconds:
    notes.append(f'not in the hours: {outside}')
  if chip and chip.share < 1:
    notes.append(
      f'room: jax takes {chip.share:.0%} of a GPU unless'
      ' XLA_CLIENT_MEM_FRACTION says otherwise'
    )
  rank = run.config.ddo.lora.rank
  if rank:
    trained = fit_lib.state_shapes(run.stage('ddo')).params
    count = sum(leaf.size for leaf in jax.tree.leaves(trained))
    notes.append(
      f'a round trains {count:,} numbers, factors of rank {rank};'
      ' its activations hold the merged weights, and gradients of whole'
      ' matrices'
    )
  about = cost.describe(
    run.stage('ddo').build(False),
    run.stage('ddo').frozen,
    _stored(run.model, 1),
  )
  made = Plan(
    name=run.config.name,
    devices=devices,
    num_devices=run.layout.num_devices,
    parameters=about['parameters'],
    flops_an_image=about['flops'],
    settings=_settings(run),
    memory=memory,
    room=run.layout.room(),
    calls=calls,
    parts=parts,
    seconds=seconds,
    notes=notes,
  )
  swept = [part for part in parts if part.name in _SWEPT]
  members = run.config.tune.members
  if members:
    notes.append(
      f'a sweep of {members} members a round, as if none of them were ended'
      ' early; halving ends most of them'
    )
  elif seconds and swept:
    hours = sum(made.hours(part) / part.times for part in swept)
    notes.append(
      'a sweep over alpha and beta: each further setting of a round takes'
      f' {duration(hours)}, on the same pool'
    )
  return made
