"""Law 4: a run that is killed anywhere ends as one that was not."""

import collections
import dataclasses
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
import pytest

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax.evaluation import classifier_evaluator
from ddo_jax.method import ddo
from ddo_jax.method import negatives
from ddo_jax.method import noise
from ddo_jax.method import objective
from ddo_jax.models import llamagen
from ddo_jax.models import toy
from ddo_jax.report import page
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import interruption
from ddo_jax.runtime import records
from ddo_jax.samplers import ancestral
from ddo_jax.samplers import heun
from ddo_jax.training import loop as loop_lib
from ddo_jax.training import run as run_lib
from ddo_jax.training import step as step_lib
from ddo_jax.training import workspace

Evaluator = classifier_evaluator.ClassifierEvaluator
BATCH = 16
PRETRAIN_STEPS, ROUND_STEPS = 10, 12


def write_images(folder):
  """Three classes of noisy 4×4 patterns, as {split}.npz."""
  numbers = np.random.default_rng(0)
  patterns = numbers.integers(30, 220, (3, 4, 4, 1))
  for split, count in (('train', 96), ('test', 48)):
    label = np.arange(count) % 3
    noise = numbers.integers(-30, 31, (count, 4, 4, 1))
    image = (patterns[label] + noise).astype(np.uint8)
    np.savez(folder / f'{split}.npz', image=image, label=label)


def make_config(images, **fields):
  """Two rounds of 12 steps; the pool has three shards."""
  pretrain = config_lib.Phase(
    objective=objective.MLE(),
    images=PRETRAIN_STEPS * BATCH,
    batch_size=BATCH,
    label_drop=0.1,
    optimizer=config_lib.Optimizer(learning_rate=(1e-2,)),
    rhythm=config_lib.Rhythm(save_images=4 * BATCH, log_images=2 * BATCH),
  )
  rounds = config_lib.Phase(
    objective=ddo.DDO(alpha=(1.0, 2.0), beta=(0.1, 0.09)),
    negatives=negatives.Pool(size=160),
    images=ROUND_STEPS * BATCH,
    batch_size=BATCH,
    optimizer=config_lib.Optimizer(learning_rate=(3e-2, 1e-2)),
    averages=config_lib.Averages(halflife=(30.0, 60.0)),
    # The noise law changes with the round: nothing is compiled anew.
    noise=noise.LogNormal(p_mean=(-1.2,), p_std=(1.2, 1.6)),
    rhythm=config_lib.Rhythm(
      eval_images=6 * BATCH, save_images=3 * BATCH, log_images=2 * BATCH
    ),
  )
  return config_lib.Config(
    rounds=fields.pop('rounds', 2),
    model=toy.ToyConfig('mlp', 8, 1, (4, 4, 1), 3, pixel_values=256),
    sampler=heun.Heun(3, 0.02, 10.0),
    data=config_lib.Data(source=f'{images}/{{split}}.npz'),
    pretrain=pretrain,
    ddo=dataclasses.replace(rounds, **fields.pop('ddo', {})),
    evaluation=config_lib.Evaluation(selection_samples=64, samples=64, seeds=2),
    executor=config_lib.Executor(sample_batch=64, **fields.pop('executor', {})),
    **fields,
  )


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  folder = tmp_path_factory.mktemp('images')
  write_images(folder)
  return folder


@pytest.fixture(scope='module')
def compiled(tmp_path_factory):
  """A folder of compiled programs, shared with other processes."""
  folder = str(tmp_path_factory.mktemp('compiled'))
  options = {
    'jax_compilation_cache_dir': folder,
    'jax_persistent_cache_min_compile_time_secs': 0,
  }
  before = {name: getattr(jax.config, name) for name in options}
  for values in (options, before):
    for name, value in values.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    if values is options:
      yield {name.upper(): str(value) for name, value in options.items()}


@pytest.fixture(scope='module', autouse=True)
def traces(compiled):
  """One executor a kind, and one fitted classifier, for all runs here.

  Returns:
    A list that gets the objective each time a step is traced.
  """
  del compiled
  traced, step, make = [], step_lib.train_step, devices_lib.Executor

  def counted(*args, **static):
    phase = args[6]
    traced.append(type(phase.objective).__name__)
    return step(*args, **static)

  by_kind = functools.cache(lambda kind: make(config_lib.Executor(kind=kind)))
  evaluator = functools.cache(Evaluator)
  first = []

  def shared(*arguments):
    first[:] = first or arguments
    return evaluator(*first)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step_lib, 'train_step', counted)
    patch.setattr(devices_lib, 'Executor', lambda config: by_kind(config.kind))
    patch.setattr(classifier_evaluator, 'ClassifierEvaluator', shared)
    patch.setattr(page, 'write', lambda workdir: None)
    yield traced


@pytest.fixture(scope='module')
def whole(images, tmp_path_factory, traces):
  """The run that nothing interrupts; nobody may change its folder."""
  workdir = tmp_path_factory.mktemp('whole')
  run_lib.play(make_config(images), workdir)
  # Law 7: each objective once, whatever the round's α, β and learning rate.
  assert traces == ['MLE', 'DDO']
  return workdir


def without(value, *names):
  """A JSON value less some fields, at any depth."""
  if isinstance(value, dict):
    kept = {k: v for k, v in value.items() if k not in names}
    return {k: without(v, *names) for k, v in kept.items()}
  if isinstance(value, list):
    return [without(v, *names) for v in value]
  return value


def log_of(workdir):
  log = records.MetricsLog(workdir).read()
  return without(log, 'images_per_second', 'waiting')


def outcome(workdir):
  """All that a run leaves, less what the wall clock says."""
  folders = ['pretrain/params']
  for part in ('reference', 'promoted'):
    found = sorted(workdir.glob(f'round_*/{part}'))
    folders += [str(path.relative_to(workdir)) for path in found]
  pool = sorted(workdir.glob('round_*/fakes/*.npz'))
  arrays = {}
  for path in pool:
    with np.load(path) as file:
      name = str(path.relative_to(workdir))
      arrays[name] = {k: file[k].tolist() for k in file}
  return {
    'params': {f: checkpoint.load_meta(workdir / f)['sha256'] for f in folders},
    'pool': arrays,
    'log': log_of(workdir),
    'summary': without(records.read_json(workdir / 'summary.json'), 'seconds'),
  }


def assert_same(workdir, whole):
  got, expected = outcome(workdir), outcome(whole)
  for part in expected:
    assert got[part] == expected[part], part


def at_call(patch, owner, name, call, action):
  """Runs `action` in place of the call-th call, from 1, of owner.name."""
  function, calls = getattr(owner, name), []

  def counted(*args, **kwargs):
    calls.append(name)
    if len(calls) == call:
      action()
    return function(*args, **kwargs)

  patch.setattr(owner, name, counted)


def interrupt():
  raise KeyboardInterrupt


def test_the_whole_run_is_worth_comparing(whole):
  result = outcome(whole)
  assert len(result['params']) == 5
  assert len(set(result['params'].values())) >= 2
  assert len(result['pool']) == 6
  counts = collections.Counter((r['stage'], r['kind']) for r in result['log'])
  # Every second step is logged; a round is evaluated at 0, 6 and 12.
  assert counts == {
    ('pretrain', 'train'): 5,
    ('round_000', 'train'): 6,
    ('round_000', 'eval'): 3,
    ('round_001', 'train'): 6,
    ('round_001', 'eval'): 3,
  }
  rounds = result['summary']['rounds']
  assert rounds[0]['after'] == rounds[1]['before']
  sheets = {str(path.relative_to(whole)) for path in whole.glob('*/*.png')}
  assert sheets == {
    'round_000/after.png',
    'round_000/before.png',  # no other round has it: its start is an end
    'round_000/neighbours.png',
    'round_000/real.png',
    'round_001/after.png',
    'round_001/neighbours.png',
  }


# Where one run is killed, time after time; calls count from its restart.
KILLS = [
  ('pretraining', loop_lib._Logger, 'push', 7),
  ('pool', negatives.FakePool, 'write', 2),
  ('evaluation of the reference', Evaluator, 'scores', 1),
  ('round, before a save', loop_lib._Logger, 'push', 2),
  ('round', loop_lib._Logger, 'push', 6),
  ('evaluation', Evaluator, 'scores', 1),
  ('saving', checkpoint.Checkpoints, 'save', 2),
  ('last evaluation', Evaluator, 'scores', 2),
  ('promotion', checkpoint, 'save_params', 1),
  ('report', Evaluator, 'scores', 2),
]
SECOND_KILLS = [
  ('between rounds', checkpoint, 'copy_params', 1),
  ('second pool', negatives.FakePool, 'write', 3),
  ('second round', loop_lib._Logger, 'push', 5),
]


def kill(place, config, workdir, whole):
  """Plays to the place, and compares what was logged until then."""
  name, *call = place
  with pytest.MonkeyPatch.context() as patch:
    at_call(patch, *call, interrupt)
    with pytest.raises(KeyboardInterrupt):
      run_lib.play(config, workdir)
  got, expected = log_of(workdir), log_of(whole)
  assert got == expected[: len(got)], f'killed in {name}'


def test_law_4_a_run_killed_anywhere_ends_as_the_whole_one(
  images, whole, tmp_path
):
  one, two = (make_config(images, rounds=rounds) for rounds in (1, 2))
  for place in KILLS:
    kill(place, one, tmp_path, whole)
  assert not (tmp_path / 'summary.json').exists()
  # What a report had measured when it was cut off is there for the next one.
  assert list(tmp_path.glob('round_000/evaluation/before/block_1/*.rows'))
  assert len(run_lib.play(one, tmp_path)['rounds']) == 1
  # Another round is the same command with a larger number.
  for place in SECOND_KILLS:
    kill(place, two, tmp_path, whole)
  assert len(run_lib.play(two, tmp_path)['rounds']) == 2
  assert not list(tmp_path.glob('round_*/evaluation'))
  assert_same(tmp_path, whole)


def test_law_4_a_raster_model_whose_fakes_are_drawn_in_the_step(
  images, tmp_path
):
  """LlamaGen's transformer, killed in pretraining and in its round."""
  config = make_config(images, rounds=1)
  config.model = llamagen.PixelGptConfig(
    image_shape=(4, 4, 1),
    pixel_values=256,
    num_classes=3,
    depth=1,
    width=8,
    heads=2,
    hidden=8,
  )
  config.sampler = ancestral.Ancestral()
  config.ddo.negatives = negatives.Online()
  config.ddo.noise = noise.LogNormal()
  whole, cut = tmp_path / 'whole', tmp_path / 'cut'
  run_lib.play(config, whole)
  for place in (('pretraining', 7), ('round', 12)):
    name, call = place
    kill((name, loop_lib._Logger, 'push', call), config, cut, whole)
  assert (cut / 'pretrain/params').exists()
  assert not (cut / 'round_000/promoted').exists()
  run_lib.play(config, cut)
  assert_same(cut, whole)


def test_a_finished_run_returns_at_once(images, whole, tmp_path, monkeypatch):
  shutil.copytree(whole, tmp_path / 'run')
  monkeypatch.setattr(loop_lib, 'run', interrupt)
  monkeypatch.setattr(Evaluator, 'scores', interrupt)
  run_lib.play(make_config(images), tmp_path / 'run')
  assert_same(tmp_path / 'run', whole)


def test_rounds_that_end_by_themselves_take_up_those_that_are_there(
  images, whole, tmp_path, monkeypatch
):
  shutil.copytree(whole, tmp_path / 'run')
  monkeypatch.setattr(loop_lib, 'run', interrupt)
  monkeypatch.setattr(Evaluator, 'scores', interrupt)
  config = make_config(images, rounds='auto')
  config.tune.max_rounds = 2
  summary = run_lib.play(config, tmp_path / 'run')
  assert len(summary['rounds']) == 2
  assert (
    'round 1 gained' in summary['ended'] or 'is reached' in summary['ended']
  )


def child(workdir, images, call, signum):
  """Plays in a process of its own; it sends itself a signal at a step."""
  if signum:
    send = functools.partial(os.kill, os.getpid(), signum)
    at_call(pytest.MonkeyPatch(), loop_lib._Logger, 'push', call, send)
  with interruption.handled():
    run_lib.play(make_config(images), pathlib.Path(workdir))


def run_child(environment, workdir, images, call=0, signum=0):
  """Returns the finished process."""
  arguments = (str(workdir), str(images), call, int(signum))
  here = pathlib.Path(__file__)
  folders = [str(here.parent), str(here.parents[1])]
  code = (
    f'import sys; sys.path += {folders!r}\n'
    f'import conftest, test_resume; test_resume.child(*{arguments!r})'
  )
  return subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    timeout=1_800,  # three minutes each on two cores that have ten others to do
    env=os.environ | environment,
  )


def test_law_4_with_real_signals(compiled, images, whole, tmp_path):
  run = functools.partial(run_child, compiled, tmp_path, images)
  done = run(7, signal.SIGINT)
  assert done.returncode == 130, done.stderr[-2000:]
  assert 'pretrain: SIGINT; saved step 7 of 10, run the same' in done.stderr
  assert 'Traceback' not in done.stderr
  # Of the resumed run: 3 steps of pretraining, then 8 of the round.
  done = run(11, signal.SIGKILL)
  assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
  steps = [r['step'] for r in log_of(tmp_path) if r['stage'] == 'round_000']
  assert 6 <= max(steps) < ROUND_STEPS
  done = run()
  assert done.returncode == 0, done.stderr[-2000:]
  assert_same(tmp_path, whole)


def test_a_changed_science_field_is_refused(images, whole):
  changed = ddo.DDO(alpha=(3.0,), beta=(0.1, 0.09))
  config = make_config(images, seed=1, ddo={'objective': changed})
  before = (whole / 'config.json').read_bytes()
  with pytest.raises(errors.UserError) as caught:
    run_lib.play(config, whole)
  line = str(caught.value)
  assert 'seed: 0 -> 1' in line and str(whole) in line
  assert 'ddo.objective.alpha: [1.0, 2.0] -> [3.0]' in line
  assert (whole / 'config.json').read_bytes() == before


def test_init_from_names_the_weights(images, whole, tmp_path):
  origin = whole / 'pretrain' / 'params'
  config = make_config(images, rounds=0, init_from=str(origin))
  assert run_lib.pretrain(workspace.Run(config, tmp_path)) == origin
  missing = dataclasses.replace(config, rounds=1, init_from=str(tmp_path))
  with pytest.raises(errors.UserError, match=f'no params in {tmp_path}'):
    run_lib.play(missing, tmp_path / 'run')


def test_weights_of_another_architecture_are_refused(images, whole, tmp_path):
  origin = str(whole / 'pretrain' / 'params')
  config = make_config(images, init_from=origin)
  config.model.hidden = 16
  with pytest.raises(errors.UserError, match='another architecture') as e:
    run_lib.play(config, tmp_path)
  assert 'wanted (16,)' in str(e.value) and origin in str(e.value)


def test_the_pool_of_another_reference_is_refused(images, whole, tmp_path):
  shutil.copytree(whole, tmp_path / 'run')
  first, second = (tmp_path / 'run' / f'round_{i:03d}' for i in range(2))
  for name in ('done.json', 'manifest.json'):  # as of an earlier version
    (second / name).unlink()
  for name in ('reference', 'promoted'):
    shutil.rmtree(second / name)
  shutil.copytree(whole / 'pretrain' / 'params', second / 'reference')
  with pytest.raises(errors.UserError, match='drawn with reference') as e:
    run_lib.play(make_config(images), tmp_path / 'run')
  assert str(second / 'fakes') in str(e.value) and first.exists()
