"""The loop of one phase: promotion, what stops it, what it fetches."""

import contextlib
import dataclasses
import functools
import io
import json
import shutil
import signal
import time
import types
import zipfile

import chex
import interruption
import jax
import numpy as np
from PIL import Image
import placing
import pytest

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.data import files
from ddo_jax.data import sources
from ddo_jax.method import ddo
from ddo_jax.method import noise
from ddo_jax.models import toy
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import interruption as interruption_lib
from ddo_jax.runtime import records
from ddo_jax.training import loop as loop_lib

BATCH, STEPS = 16, 12
SHAPE, CLASSES = (4, 4, 1), 3
MODEL = toy.ToyConfig('mlp', 8, 1, SHAPE, CLASSES).build(
  noise=noise.LogNormal(-0.5, 1.2)
)
PHASE = config_lib.Phase(
  objective=ddo.DDO(alpha=2.0, beta=0.1),
  images=STEPS * BATCH,
  batch_size=BATCH,
  optimizer=config_lib.Optimizer(learning_rate=1e-2),
  averages=config_lib.Averages(halflife=(30.0, 60.0)),
  rhythm=config_lib.Rhythm(
    eval_images=6 * BATCH, save_images=3 * BATCH, log_images=2 * BATCH
  ),
)


def make_source(name, seed):
  numbers = np.random.default_rng(seed)
  images = numbers.integers(0, 17, (64, *SHAPE), np.uint8)
  return sources.ArraySource(name, images, np.arange(64) % CLASSES, CLASSES, 17)


@pytest.fixture(scope='module')
def executor():
  """Of all devices; it keeps the compiled step."""
  return devices_lib.Executor(config_lib.Executor())


def make_params(executor):
  """Params of MODEL on the devices."""
  shapes = jax.eval_shape(MODEL.init, rng.stream(0))
  numbers = np.random.default_rng(0)

  def normal(s):
    return 0.3 * numbers.standard_normal(s.shape, np.float32)

  return placing.place_state(executor, jax.tree.map(normal, shapes))


def new_job(executor, folder, scores=None):
  """Returns a job of a round."""
  params = make_params(executor)
  return loop_lib.Job(
    name='round_000',
    folder=folder / 'round_000',
    seed=0,
    phase=PHASE,
    model=MODEL,
    start=lambda: params,
    reference=params,
    frozen={},
    real=make_source('real', 1),
    fake=make_source('fake', 2),
    sampler=None,
    executor=executor,
    accumulate=1,
    log=records.MetricsLog(folder),
    evaluate=scores,
    metric='fd_train',
  )


@pytest.fixture
def make_job(executor, tmp_path):
  """Makes a job of a round; all of one test share their folder."""
  return functools.partial(new_job, executor, tmp_path)


class Judge:
  """Gives the scores of a list, and keeps the hash of what it judged."""

  def __init__(self, *scores):
    self.scores, self.judged = list(scores), []

  def __call__(self, params, folder):
    del folder
    self.judged.append(checkpoint.tree_hash(params))
    return {'fd_train': self.scores[len(self.judged) - 1]}


@pytest.mark.parametrize(
  ('scores', 'best', 'profile'),
  [
    # Two averages at each of steps 0, 6 and 12.
    ((1, 1, 2, 3, 4, 5), 0, 'params'),  # the reference stays
    ((7, 7, 2, 1, 4, 5), 3, 'halflife_60'),
    ((7, 7, 3, 2, 1, 4), 4, 'halflife_30'),
  ],
)
def test_promotion_takes_the_best(make_job, scores, best, profile):
  judge = Judge(*map(float, scores))
  promotion = loop_lib.run(make_job(judge))
  got = (promotion.step, promotion.profile, promotion.selection)
  assert got == (6 * (best // 2), profile, 1.0)
  assert checkpoint.tree_hash(promotion.params) == judge.judged[best]
  assert len(set(judge.judged)) == 5  # the averages start out equal


def test_promotion_takes_one_of_two_equal_ones(make_job):
  judge = Judge(7.0, 7.0, 1.0, 2.0, 3.0, 1.0)
  promotion = loop_lib.run(make_job(judge))
  assert promotion.selection == 1.0
  sha256 = checkpoint.tree_hash(promotion.params)
  assert sha256 in (judge.judged[2], judge.judged[5])


def test_the_last_state_is_promoted_where_nothing_is_evaluated(make_job):
  promotion = loop_lib.run(make_job())
  assert (promotion.step, promotion.selection) == (STEPS, None)


def test_law_4_pmap_resumes_as_fsdp(make_job, tmp_path):
  expected = loop_lib.run(make_job())
  log = records.read_log(tmp_path)
  job = dataclasses.replace(make_job(), folder=tmp_path / 'other')
  interruption.interrupted(job, 7)
  first_half = records.read_log(tmp_path)[:3]  # steps 0, 2, 4; 6 was saved
  fsdp = devices_lib.Executor(config_lib.Executor(kind='fsdp'))
  reference = placing.place_state(fsdp, job.reference)
  promotion = loop_lib.run(
    # Where a checkpoint is, nothing is read of the start.
    dataclasses.replace(job, executor=fsdp, reference=reference, start=None)
  )
  again = records.read_log(tmp_path)
  assert again[:3] == first_half != log[:3]  # images/s tells them apart
  assert [r['step'] for r in again] == [r['step'] for r in log]
  losses = [[r['loss'] for r in part] for part in (again, log)]
  np.testing.assert_allclose(*losses, rtol=1e-4)
  kernels = [a for a in jax.tree.leaves(promotion.params) if a.ndim == 2]
  assert any(not a.sharding.is_fully_replicated for a in kernels)
  params = (jax.device_get(p.params) for p in (promotion, expected))
  chex.assert_trees_all_close(*params, rtol=1e-3, atol=1e-4)


def at_step(patch, wanted, act):
  """Calls `act` when a step is under way."""
  push = loop_lib._Logger.push

  def acting(logger, step, *args):
    if step == wanted:
      act()
    push(logger, step, *args)

  patch.setattr(loop_lib._Logger, 'push', acting)


def interrupt_twice():
  signal.raise_signal(signal.SIGINT)
  signal.raise_signal(signal.SIGINT)


def elsewhere(job, folder):
  return dataclasses.replace(job, folder=folder, log=records.MetricsLog(folder))


def kept(job):
  folder = job.folder / 'checkpoints'
  return sorted(int(path.name) for path in folder.glob('[0-9]*'))


def test_law_4_signals_save_first(make_job, tmp_path, monkeypatch, capfd):
  whole = loop_lib.run(make_job(Judge(9.0, 9.0, 9.0, 8.0, 5.0, 6.0)))
  log = records.read_log(tmp_path)

  def make(*scores):
    return elsewhere(make_job(Judge(*scores)), tmp_path / 'other')

  job = make(9.0, 9.0)
  with monkeypatch.context() as patch:
    at_step(patch, 0, lambda: signal.raise_signal(signal.SIGHUP))
    with pytest.raises(SystemExit) as left:
      loop_lib.run(job)
  assert left.value.code == interruption_lib.EX_TEMPFAIL == 75
  assert kept(job) == [1]
  # The second Ctrl-C does not wait for a save.
  with monkeypatch.context() as patch:
    at_step(patch, 4, interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
      loop_lib.run(make())
  assert kept(job) == [1, 3]
  assert 'SIGINT: saving before leaving; Ctrl-C again' in capfd.readouterr().err
  # An evaluation ends at once, for its state is saved, and so are its rows.
  found = []

  def cut_off(params, folder):
    found.append(folder.relative_to(job.folder))
    folder.mkdir(parents=True)
    signal.raise_signal(signal.SIGTERM)
    raise AssertionError('not left')

  with pytest.raises(SystemExit):
    loop_lib.run(dataclasses.replace(job, evaluate=cut_off))
  assert kept(job) == [3, 6]
  (rows,) = found
  assert str(rows) == 'selection/6/halflife_30'
  (job.folder / 'selection' / '5').mkdir()  # of a state that was not saved
  judge = Judge(9.0, 8.0)

  def resumed(params, folder):
    assert folder.exists() == (len(judge.judged) == 0)
    assert not (job.folder / 'selection' / '5').exists()
    return judge(params, folder)

  with monkeypatch.context() as patch:
    at_step(patch, 8, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
      loop_lib.run(dataclasses.replace(job, evaluate=resumed))
  assert kept(job) == [6, 9]
  promotion = loop_lib.run(make(5.0, 6.0))
  assert kept(job) == [6, 9, 12]
  assert not (job.folder / 'selection').exists()
  assert (promotion.step, promotion.profile) == (12, 'halflife_30')
  again, expected = (checkpoint.tree_hash(p.params) for p in (promotion, whole))
  assert again == expected
  found = records.read_log(job.folder)
  assert [r['step'] for r in found] == [r['step'] for r in log]


SCORES = (9.0, 9.0, 5.0, 4.0, 8.0, 7.0)  # of two averages at 0, 6 and 12
BEST = (6, 'halflife_60', 4.0)


def outcome(job, promotion):
  """What a phase leaves, less what the clock says of it."""
  log = records.read_log(job.folder)
  for record in log:
    record.pop('images_per_second', None)
    record.pop('waiting', None)
  sha256 = checkpoint.tree_hash(promotion.params)
  chosen = (promotion.step, promotion.profile, promotion.selection)
  return chosen, sha256, log


@pytest.fixture(scope='module')
def finished(executor, tmp_path_factory):
  """A phase that is done, and what it left; nobody may change its folder."""
  folder = tmp_path_factory.mktemp('finished')
  job = elsewhere(new_job(executor, folder, Judge(*SCORES)), folder)
  promotion = loop_lib.run(job)
  expected = outcome(job, promotion)
  assert expected[0] == BEST
  assert kept(job) == [6, 9, 12]
  return folder, expected


@pytest.fixture
def play_again(finished, make_job, tmp_path):
  """Plays the phase again, and holds what it leaves against what it left."""
  folder, expected = finished
  copy = shutil.copytree(folder, tmp_path / 'copy')

  def play(*scores):
    judge = Judge(*scores)
    job = elsewhere(make_job(judge), copy)
    got = outcome(job, loop_lib.run(job))
    assert got == expected
    assert len(judge.judged) == len(scores)
    assert kept(job) == [6, 9, 12]
    assert not (copy / 'damaged').exists()

  return copy, play


def damage_checkpoint(folder, step):
  (path,) = (folder / 'checkpoints' / str(step)).glob('ema/manifest.ocdbt')
  path.write_bytes(b'')


def test_a_phase_that_is_done_computes_nothing(play_again):
  _, play = play_again
  play()


def test_a_damaged_newest_checkpoint_is_made_again(play_again, caplog):
  folder, play = play_again
  damage_checkpoint(folder, 12)
  play(8.0, 7.0)  # of step 12
  assert f'{folder}/checkpoints/12 is damaged (it cannot be read' in caplog.text


def test_a_damaged_best_checkpoint_is_made_again(play_again, caplog):
  folder, play = play_again
  damage_checkpoint(folder, 6)
  play(*SCORES[2:])
  assert f'{folder}/checkpoints/6 is damaged (it cannot be read' in caplog.text
  assert 'step 6 is to be promoted and is made again' in caplog.text


def test_where_no_checkpoint_holds_the_phase_begins_again(play_again, caplog):
  folder, play = play_again
  for step in (6, 9, 12):
    damage_checkpoint(folder, step)
  play(*SCORES[2:])
  assert 'none is left; it begins again' in caplog.text


def test_a_disk_that_keeps_nothing_ends_the_phase(make_job, monkeypatch):
  def restore(checkpoints, step, target):
    raise checkpoint.DamagedError('so it is')

  job = make_job(Judge(*SCORES, *SCORES[2:]))
  monkeypatch.setattr(checkpoint.Checkpoints, 'restore', restore)
  with pytest.raises(errors.UserError, match=r'damaged soon after .* twice'):
    loop_lib.run(job)


def edit(path, old, new):
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new))


def test_the_log_decides_nothing(play_again):
  folder, play = play_again
  log = folder / 'metrics.jsonl'
  edit(log, '"selection": 9.0', '"selection": 0.5')
  play()
  lines = log.read_text().splitlines(keepends=True)
  log.write_text(''.join(line for line in lines if '"eval"' not in line))
  play()
  edit(log, '"stage"', '"stagé"')
  with pytest.raises(AssertionError):
    play()
  found = records.read_log(folder)
  assert [record['kind'] for record in found] == ['eval'] * 3


@pytest.mark.parametrize('damage', ['deleted', 'edited'])
def test_evaluations_come_back_from_the_checkpoint(play_again, damage):
  folder, play = play_again
  path = folder / 'evaluations.json'
  if damage == 'deleted':
    path.unlink()
  else:
    edit(path, '9.0', '0.5')
  play(8.0, 7.0)  # of step 12, which is saved before it is evaluated


def test_a_run_of_an_earlier_version_goes_on(play_again):
  """Its checkpoints have no record, and its log alone the evaluations."""
  folder, play = play_again
  (folder / 'evaluations.json').unlink()
  for step in (6, 9, 12):
    shutil.rmtree(folder / 'checkpoints' / str(step) / 'record')
  play()


def by_the_clock(job, minutes):
  """Runs a job whose steps take some minutes each and its scores an hour.

  Returns:
    The promotion, and the steps that were saved.
  """
  clock = types.SimpleNamespace(now=0.0, perf_counter=time.perf_counter)
  clock.monotonic = lambda: clock.now
  steps = []
  save = checkpoint.Checkpoints.save
  push = loop_lib._Logger.push
  judge = job.evaluate

  def slow_push(*args):
    clock.now += 60 * minutes
    push(*args)

  def slow_judge(params, folder):
    clock.now += 60 * 60
    return judge(params, folder)

  def counted(checkpoints, state, step, **kept):
    steps.append(step)
    save(checkpoints, state, step, **kept)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop_lib, 'time', clock)
    patch.setattr(loop_lib._Logger, 'push', slow_push)
    patch.setattr(checkpoint.Checkpoints, 'save', counted)
    promotion = loop_lib.run(dataclasses.replace(job, evaluate=slow_judge))
  return promotion, steps


def test_saves_by_the_clock_change_nothing(make_job, tmp_path):
  outcomes = []
  saves = []
  for minutes in (0, 6):
    judge = Judge(7.0, 7.0, 2.0, 1.0, 4.0, 5.0)
    job = elsewhere(make_job(judge), tmp_path / str(minutes))
    promotion, steps = by_the_clock(job, minutes)
    sha256 = checkpoint.tree_hash(promotion.params)
    best, _, newest = kept(job)
    outcomes.append((best, newest, promotion.profile, sha256))
    assert promotion.step == best
    saves.append(steps)
  assert outcomes[0] == outcomes[1]
  assert outcomes[0][:2] == (6, 12)
  assert saves[0] == [3, 6, 9, 12]
  # Twelve minutes of training after a save there is another one.
  assert saves[1] == [2, 3, 5, 6, 8, 9, 11, 12]


def test_an_undefined_score_stops_the_run(make_job):
  with pytest.raises(errors.UserError, match='round_000 step 6: fd_train'):
    loop_lib.run(make_job(Judge(1.0, 1.0, 2.0, float('nan'))))


def test_a_loss_that_is_not_finite_stops_the_run(make_job):
  job = make_job()
  interruption.interrupted(job, 4)
  wild = dataclasses.replace(
    job.phase, optimizer=config_lib.Optimizer(learning_rate=1e30)
  )
  with pytest.raises(errors.UserError) as caught:
    loop_lib.run(dataclasses.replace(job, phase=wild))
  line = str(caught.value)
  assert line.startswith('round_000 step 4: ')
  assert f'last good checkpoint: {job.folder / "checkpoints" / "3"};' in line
  assert line.endswith(' or set bad_numbers.policy=skip')


def test_a_round_that_is_hopeless_is_ended_early(make_job, caplog):
  job = make_job(Judge(*SCORES))
  weak = ddo.DDO(alpha=2.0, beta=1e-9)
  phase = dataclasses.replace(job.phase, objective=weak)
  with pytest.raises(errors.UserError) as caught:
    loop_lib.run(dataclasses.replace(job, phase=phase))
  line = str(caught.value)
  assert line.startswith('round_000 step 4: the discriminator does nothing')
  assert line.endswith('--config.ddo.if_hopeless=warn')
  # It goes on from there if that is wanted, and says so once.
  phase = dataclasses.replace(phase, if_hopeless='warn')
  loop_lib.run(dataclasses.replace(job, phase=phase))
  assert caplog.text.count('the discriminator does nothing') == 1


def test_law_1_a_start_that_is_not_at_chance_stops_the_run(
  make_job, monkeypatch
):
  fetch = devices_lib.fetch
  for name, factor in (('loss', 1.01), ('max_abs_logit', 1)):

    def changed(tree, name=name, factor=factor):
      metrics, unjudged = fetch(tree)
      return metrics | {name: metrics[name] * factor + 2e-3}, unjudged

    with monkeypatch.context() as patch:
      patch.setattr(devices_lib, 'fetch', changed)
      with pytest.raises(errors.UserError, match=r'step 0: .* two passes'):
        loop_lib.run(make_job())


def test_the_log_tells_of_waiting_for_rows(finished):
  folder, _ = finished
  log = records.read_log(folder)
  shares = [record['waiting'] for record in log if record['kind'] == 'train']
  assert len(shares) == 6
  assert all(0 < share < 1 for share in shares)


@pytest.mark.parametrize('ready', [False, True])
def test_rows_that_come_while_the_devices_work_cost_nothing(make_job, ready):
  """Devices are asked whether they are done, and not waited for."""

  def slowly():
    time.sleep(0.05)
    yield 'rows'

  logger = loop_lib._Logger(make_job(), None, [])
  loss = types.SimpleNamespace(is_ready=lambda: ready)
  logger.push(0, {'loss': loss}, log=False)
  assert logger.next(slowly()) == 'rows'
  assert (logger._waited > 0.04) == ready


def test_law_7_what_the_loop_fetches(make_job, monkeypatch):
  job = make_job(Judge(*map(float, range(6))))
  fetched, fetch = [], devices_lib.fetch

  def counted(tree):
    fetched.append(tree)
    return fetch(tree)

  monkeypatch.setattr(devices_lib, 'fetch', counted)
  loop_lib.run(job)
  # Logged: 0, 2, 4, 6, 8, 10. Checked before an evaluation: 5, 11. Checked
  # before a save: 2 and 8 (logged), 5, 11.
  assert len(fetched) == 8 < STEPS


def test_law_7_the_loop_forbids_implicit_transfers(make_job, monkeypatch):
  job = make_job()

  def stack(leaf):
    return leaf.reshape(8, -1, *leaf.shape[1:])

  def place(rows):
    return jax.tree.map(stack, rows)

  monkeypatch.setattr(job.executor, 'place_batch', place)
  with pytest.raises(Exception, match='Disallowed host-to-device'):
    loop_lib.run(job)


def test_law_7_rows_that_processes_read_train_the_same(
  finished, make_job, tmp_path
):
  """Nothing goes to the devices unasked, and nothing is retraced."""
  _, expected = finished
  job = elsewhere(make_job(Judge(*SCORES)), tmp_path)
  images = {}
  for i, image in enumerate(job.real.stored):
    content = io.BytesIO()
    Image.fromarray(image[..., 0]).save(content, 'PNG')
    images[f'{i:03d}.png'] = content.getvalue()
  classes = zip(images, job.real.classes.tolist(), strict=True)
  with zipfile.ZipFile(tmp_path / 'real.zip', 'w') as archive:
    archive.writestr('dataset.json', json.dumps({'labels': list(classes)}))
    for name, content in images.items():
      archive.writestr(name, content)
  real = files.open_files(tmp_path / 'real.zip')
  compiled = len(job.executor._compiled)
  job = dataclasses.replace(job, real=real, workers=1)
  assert outcome(job, loop_lib.run(job)) == expected
  assert len(job.executor._compiled) == compiled


class Watch:
  """Ends a phase at a step, and keeps what it was asked."""

  def __init__(self, end):
    self.end, self.asked = end, []

  def __call__(self, evaluations, train):
    self.asked.append(([r['step'] for r in evaluations], len(train)))
    return 'it is enough' if evaluations[-1]['step'] == self.end else None


def test_a_watched_phase_ends_where_it_is_told(make_job, tmp_path):
  watch = Watch(6)
  job = elsewhere(make_job(Judge(*SCORES)), tmp_path)
  job = dataclasses.replace(job, watch=watch)
  promotion = loop_lib.run(job)
  assert len(records.read_log(tmp_path)) == 5  # 3 steps, 2 scores
  assert (promotion.step, promotion.profile, promotion.selection) == BEST
  assert promotion.ended == 'it is enough'
  assert [r['step'] for r in promotion.evaluations] == [0, 6]
  assert kept(job) == [3, 6]
  assert watch.asked == [([0], 0), ([0, 6], 3)]
  # It does not go on, and nobody is asked again.
  again = loop_lib.run(dataclasses.replace(job, evaluate=Judge(), watch=Watch))
  assert outcome(job, again) == outcome(job, promotion)
  assert again.ended == promotion.ended


def test_a_watched_phase_that_is_killed_asks_again(make_job, tmp_path):
  """Between an evaluation and the answer to it."""
  first = elsewhere(make_job(Judge(*SCORES)), tmp_path / 'first')
  whole = dataclasses.replace(first, watch=Watch(6))
  expected = outcome(whole, loop_lib.run(whole))

  def killed(evaluations, train):
    if evaluations[-1]['step'] == 6:
      raise KeyboardInterrupt

  job = elsewhere(make_job(Judge(*SCORES)), tmp_path / 'second')
  job = dataclasses.replace(job, watch=killed)
  with pytest.raises(KeyboardInterrupt):
    loop_lib.run(job)
  watch = Watch(6)
  job = dataclasses.replace(job, watch=watch, evaluate=Judge())
  assert outcome(job, loop_lib.run(job)) == expected
  assert watch.asked == [([0, 6], 3)]


@pytest.mark.parametrize('scores', [SCORES[:4], (*SCORES[:4], np.nan)])
def test_bad_numbers_end_a_watched_phase(make_job, monkeypatch, scores):
  """A loss at step 8, or a score at step 12, on every start."""

  def fail():
    raise loop_lib.BadNumbersError('round_000 step 8: loss is nan')

  if len(scores) == 4:
    at_step(monkeypatch, 8, fail)
  job = make_job(Judge(*scores, *[np.nan] * 9))
  with pytest.raises(loop_lib.BadNumbersError):
    loop_lib.run(job)
  for _ in range(2):
    promotion = loop_lib.run(dataclasses.replace(job, watch=Watch(-1)))
    assert (promotion.step, promotion.profile, promotion.selection) == BEST
    assert ' is nan' in promotion.ended


def test_phases_of_one_clock_see_the_same_rows_and_noise(make_job):
  def first_loss(name, clock=None):
    job = dataclasses.replace(make_job(), name=name, clock=clock)
    with contextlib.closing(loop_lib.batches(job, 0)) as rows:
      real, fake = next(rows)
    images = jax.device_get(real['stored']).tolist()
    # Of the reference, whose loss says nothing: after a first step.
    state = loop_lib._fresh_state(job)
    step = loop_lib._compile_step(job)
    for _ in range(2):
      state, metrics = step(state, real, fake)
    return images, float(jax.device_get(metrics['loss']))

  images, loss = first_loss('round_000')
  assert first_loss('a', 'round_000') == (images, loss)
  other_images, other_loss = first_loss('b')
  assert other_images != images and other_loss != loss
