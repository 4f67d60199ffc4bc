"""The probe: the spread of Δ where it is known, and what it proposes."""

import dataclasses
import json
import types
from typing import ClassVar

from flax import struct
import jax.numpy as jnp
import numpy as np
import placing
import pytest
from scipy import stats

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax.data import codec as codec_lib
from ddo_jax.data import sources
from ddo_jax.method import ddo
from ddo_jax.method import likelihood
from ddo_jax.method import noise
from ddo_jax.method import objective
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import loop as loop_lib
from ddo_jax.tuning import signal
from ddo_jax.tuning import sweep as sweep_lib

SHAPE = (2, 2, 1)
PHASE = config_lib.Phase(
  objective=ddo.DDO(alpha=2.0, beta=0.3),
  images=40 * 64,
  batch_size=64,
  optimizer=config_lib.Optimizer(learning_rate=1e-2, warmup_images=40 * 64),
  noise=noise.LogNormal(-0.5, 1.2),
)
NORMAL = stats.norm.ppf((np.arange(4000) + 0.5) / 4000)


def line(gain, loss, rise, spread):
  """Points with margin gain·r − loss·r², fall rise·r² and a known spread.

  Eight noise levels, of which all tell real from fake alike.
  """
  points = []
  for reach in np.geomspace(0.02, 1.5, 30):
    noise_of_row = np.random.RandomState(0).permutation(NORMAL)
    margin = gain * reach - loss * reach**2
    both = spread * reach**1.5 * noise_of_row - rise * reach**2
    bins = np.arange(4000) % 8
    points.append(
      signal.Point(reach, both + margin / 2, both - margin / 2, bins)
    )
  return points


def test_beta_is_one_over_the_spread_where_the_margin_ends():
  # The margin's summit, where it is half of its straight line, is at 0.5.
  proposal = signal.propose(line(4.0, 4.0, 8.0, 30.0), PHASE, 7)
  spread = 30 * 0.5**1.5
  assert proposal.measured['end'] == pytest.approx(0.5, rel=0.05)
  assert proposal.beta.centre == pytest.approx(1 / spread, rel=0.08)
  assert proposal.beta.low < 1 / spread < proposal.beta.high
  assert proposal.learning_rate.centre == pytest.approx(0.15 * 0.5, rel=0.05)
  assert proposal.learning_rate.high < 2.3 * proposal.learning_rate.low
  assert (proposal.fault, proposal.images) == ('', 7)
  # Twice the log-ratio asks for half the β, at the same rate.
  double = signal.propose(line(8.0, 8.0, 16.0, 60.0), PHASE)
  assert double.beta.centre == pytest.approx(proposal.beta.centre / 2)
  assert double.learning_rate == proposal.learning_rate


def test_a_few_rows_that_are_far_out_do_not_move_beta():
  points = line(4.0, 4.0, 8.0, 30.0)
  few = np.arange(4000) % 50 == 0
  moved = []
  for point in points:
    farther = np.where(few, 20 * (point.real - np.mean(point.real[few])), 0.0)
    moved.append(
      dataclasses.replace(
        point, real=point.real + farther, fake=point.fake + farther
      )
    )
  beta = signal.propose(points, PHASE).beta.centre
  assert signal.propose(moved, PHASE).beta.centre == pytest.approx(
    beta, rel=0.1
  )


def test_a_line_that_begins_too_far_out_wants_shorter_steps():
  points = line(4.0, 4.0, 8.0, 30.0)
  assert signal.propose(points[-8:], PHASE) is None


def test_a_margin_without_an_end_ends_where_the_fall_is_ten_times_as_large():
  proposal = signal.propose(line(4.0, 0.0, 100.0, 30.0), PHASE)
  assert proposal.measured['end'] == pytest.approx(10 * 4 / 100, rel=0.6)


def test_without_a_margin_there_is_no_first_order_signal():
  points = line(0.0, 0.0, 8.0, 30.0)
  shaken = np.random.RandomState(1).standard_normal(4000)
  points = [
    dataclasses.replace(point, fake=point.fake + point.reach * shaken)
    for point in points
  ]
  proposal = signal.propose(points, PHASE)
  assert proposal.fault.startswith('no first-order signal')
  assert proposal.centre() == pytest.approx(
    {'alpha': 2.0, 'beta': 0.3, 'learning_rate': 1e-2, 'p_std': 1.2}
  )


def test_p_std_widens_where_high_noise_separates():
  proposal = signal.propose(line(4.0, 4.0, 8.0, 30.0), PHASE)
  assert proposal.p_std == pytest.approx(1.2 * 1.25)


def test_p_std_stays_where_the_highest_noise_tells_nothing():
  points = [
    dataclasses.replace(
      point, fake=np.where(point.noise_bin == 7, point.real, point.fake)
    )
    for point in line(4.0, 4.0, 8.0, 30.0)
  ]
  assert signal.propose(points, PHASE).p_std == pytest.approx(1.2)


def test_p_std_stays_where_the_highest_noise_may_tell_by_chance():
  shaken = 15 * np.random.RandomState(2).permutation(NORMAL)
  points = []
  for point in line(4.0, 4.0, 8.0, 30.0):
    high = point.noise_bin == 7
    moved = np.where(high, shaken - np.mean(shaken[high]), 0.0)
    points.append(dataclasses.replace(point, fake=point.fake + moved))
  proposal = signal.propose(points, PHASE)
  [*_, lower, highest] = proposal.measured['by_noise_level']
  assert highest['separation'] > 0.5 * lower['separation']
  assert 0 < highest['significance'] < 4
  assert proposal.p_std == pytest.approx(1.2)


def test_a_law_without_p_std_has_none_proposed():
  phase = dataclasses.replace(PHASE, noise=noise.UniformTime())
  assert signal.propose(line(4.0, 4.0, 8.0, 30.0), phase).p_std is None


def test_ranges_are_of_the_numbers_that_a_phase_has():
  proposal = signal.propose(line(4.0, 4.0, 8.0, 30.0), PHASE)
  ranges = proposal.ranges()
  assert list(ranges) == ['alpha', 'beta', 'learning_rate', 'p_std']
  for name, value in proposal.centre().items():
    assert ranges[name][0] <= value <= ranges[name][1]
  coupled = signal.coupled({'alpha': 3.0, 'beta': 0.1, 'p_std': 1.2})
  assert coupled == pytest.approx({'alpha': 3.0, 'beta': 0.3, 'p_std': 1.2})


def test_beta_goes_as_one_over_the_dimension():
  assert signal.translate(0.08, 32 * 32 * 3, 64 * 64 * 3) == 0.02


@struct.dataclass
class Gaussian:
  """log p(x) = −‖x − θ‖²/2: at θ_ref + d, Δ is (x − θ_ref)·d − ‖d‖²/2."""

  offers: ClassVar[str] = 'denoise'
  example_shape: ClassVar[tuple[int, ...]] = SHAPE
  num_classes: ClassVar[int] = 0
  num_bins: ClassVar[int] = 1
  codec: ClassVar[codec_lib.Codec] = codec_lib.Pixels(17)
  rules: ClassVar[likelihood.WeightRules] = likelihood.WeightRules()

  def init(self, key):
    del key
    return {'mean': jnp.zeros(SHAPE)}

  def log_ratio(self, params, reference, frozen, batch, keys):
    del frozen, keys
    step = (params['mean'] - reference['mean'])[None]
    from_reference = batch.x - reference['mean'][None]
    ratio = jnp.sum(from_reference * step - step**2 / 2, axis=(1, 2, 3))
    zero = jnp.zeros(len(ratio))
    return ratio, {'noise_bin': zero.astype(jnp.int32), 'mle_loss': zero}


def images(seed, low, high):
  numbers = np.random.default_rng(seed)
  stored = numbers.integers(low, high, (512, *SHAPE), np.uint8)
  return sources.ArraySource(str(seed), stored, np.zeros(512, int), 1, 17)


@pytest.fixture(scope='module')
def executor():
  return devices_lib.Executor(config_lib.Executor())


def gaussian_job(executor, folder, fake):
  params = placing.place_state(executor, {'mean': np.zeros(SHAPE, np.float32)})
  return loop_lib.Job(
    name='round_000',
    folder=folder / 'round_000',
    seed=0,
    phase=PHASE,
    model=Gaussian(),
    start=lambda: params,
    reference=params,
    frozen={},
    real=images(1, 6, 17),
    fake=fake,
    sampler=None,
    executor=executor,
    accumulate=1,
    log=records.MetricsLog(folder),
    evaluate=None,
    metric='fd_train',
  )


def test_a_gaussian_is_measured_as_it_is(executor, tmp_path):
  """All of its pixels are too dark, so that each step of Adam is +λ in each."""
  fake = images(2, 0, 11)
  job = gaussian_job(executor, tmp_path, fake)
  proposal = signal.measure(job)
  x = job.real.stored.reshape(512, -1) / 8 - 1.0
  z = fake.stored.reshape(512, -1) / 8 - 1.0
  for point in proposal.measured['line']:
    reach = point['reach']
    std = reach * np.std(x.sum(axis=1))
    assert point['real_std'] == pytest.approx(std, rel=0.1)
    margin = reach * (x.sum(axis=1).mean() - z.sum(axis=1).mean())
    assert point['margin'] == pytest.approx(margin, rel=0.1)
    mean = reach * x.sum(axis=1).mean() - 4 * reach**2 / 2
    assert point['real_mean'] == pytest.approx(mean, rel=0.1, abs=0.02)
  assert proposal.fault == ''
  assert proposal.p_std == pytest.approx(1.2)
  # It is a pure function of the job, and leaves nothing behind.
  assert signal.measure(job) == proposal
  assert not job.folder.exists()
  again = json.loads(json.dumps(proposal.to_json(), allow_nan=False))
  assert signal.Proposal.from_json(again) == proposal


def test_a_converged_exact_likelihood_has_no_signal(executor, tmp_path):
  job = gaussian_job(executor, tmp_path, images(1, 6, 17))
  assert signal.measure(job).fault.startswith('no first-order signal')


def test_noise_widens_from_the_second_round_on_and_stays_wide(
  executor, tmp_path
):
  config = config_lib.Config(seed=3)
  config.tune.members = 4
  run = types.SimpleNamespace(config=config, training_model=lambda noise: noise)
  job = gaussian_job(executor, tmp_path, images(2, 0, 11))
  proposal = signal.propose(line(4.0, 4.0, 8.0, 30.0), PHASE)
  assert proposal.p_std == pytest.approx(1.5)
  members = sweep_lib._members(run, job, proposal, None)
  assert not any('p_std' in member.settings for member in members)
  winner = members[1].settings | {'p_std': 1.4}
  members = sweep_lib._members(run, job, proposal, winner)
  widths = [member.settings['p_std'] for member in members]
  assert widths == pytest.approx(
    [1.5, 1.4, 1.5, 1.5]
  )  # the winner's is its own
  # The next round begins where this one was, unless its config is wider.
  job = sweep_lib._kept_wide(run, job, winner)
  assert job.phase.noise.p_std == job.model.p_std == 1.4
  assert sweep_lib._kept_wide(run, job, {'p_std': 1.3}) is job
  assert sweep_lib._kept_wide(run, job, None) is job
  phase = dataclasses.replace(PHASE, noise=noise.LogNormal(-0.5, 2.9))
  wide = signal.propose(line(4.0, 4.0, 8.0, 30.0), phase)
  assert wide.p_std == 3.0


def test_what_cannot_be_probed_is_one_line(executor, tmp_path):
  job = gaussian_job(executor, tmp_path, images(2, 0, 11))
  phase = dataclasses.replace(PHASE, objective=objective.MLE())
  with pytest.raises(errors.UserError, match='no β to probe'):
    signal.measure(dataclasses.replace(job, phase=phase))
  phase = dataclasses.replace(PHASE, images=64)
  with pytest.raises(errors.UserError, match='one step'):
    signal.measure(dataclasses.replace(job, phase=phase))
