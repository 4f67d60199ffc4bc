"""The samplers against runs of the original programs, call by call.

The denoiser of these runs is the posterior mean of a Gaussian mixture, so
what is compared is the samplers alone. `out` is what a run returned, `call_x`,
`call_sigma`, `call_D` and `call_Dguide` what went in and out of the denoiser.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.data import labels as labels_lib
from ddo_jax.samplers import ablation
from ddo_jax.samplers import dpm_solver_v3
from ddo_jax.samplers import guidance
from ddo_jax.samplers import heun

pytestmark = pytest.mark.golden

FOLDER = pathlib.Path(__file__).parents[1] / 'golden'
HEUN = np.load(FOLDER / 'sampler_heun.npz')
ABLATION = np.load(FOLDER / 'sampler_ablation.npz')
DPM = np.load(FOLDER / 'sampler_dpmv3.npz')
LABELS = np.load(FOLDER / 'seeding_labels.npz')


def mixture(golden, kind, labelled):
  """D(x; σ) of Σ_k w_k N(mu_k, s_k²); `labelled`: w depends on the row."""
  mu, s = golden[f'{kind}_mu'], golden[f'{kind}_s']
  logw = np.tile(golden[f'{kind}_base_logw'], (3, 1))
  if labelled:
    logw = logw + golden['labels'] @ golden['gm_label_logw']

  def denoise(x, sigma):
    mean, x = jnp.asarray(mu, x.dtype)[None], x[:, None]  # [1|B,K,3,2,2]
    noise = (sigma**2)[:, None]
    own = jnp.asarray(s**2, x.dtype)[None]
    distance = jnp.sum((x - mean) ** 2, axis=(2, 3, 4)) / (own + noise)
    logits = -0.5 * distance - mu[0].size / 2 * jnp.log(own + noise)
    logits += jnp.asarray(logw, x.dtype)

    def spread(a):
      return a[:, :, None, None, None]

    each = (mean * spread(noise) + x * spread(own)) / spread(own + noise)
    return jnp.sum(spread(jax.nn.softmax(logits, axis=1)) * each, axis=1)

  return denoise


class Recorder:
  """A denoiser that keeps what went in and out, also under jit and scan."""

  def __init__(self, denoise):
    self.denoise = denoise
    self.calls = []

  def __call__(self, x, sigma):
    d = self.denoise(x, sigma)

    def keep(*call):
      return self.calls.append([np.array(a) for a in call])

    jax.debug.callback(keep, x, sigma, d, ordered=True)
    return d

  def columns(self):
    """x, sigma (the same for all rows) and D of all calls."""
    jax.effects_barrier()
    x, sigma, d = (np.stack(column) for column in zip(*self.calls, strict=True))
    assert (sigma == sigma[:, :1]).all()
    return x, sigma[:, 0], d


def settings(golden, run):
  """A run's options as fields of our dataclasses."""
  names = {
    'S_churn': 'churn',
    'S_min': 'churn_min',
    'S_max': 'churn_max',
    'S_noise': 'churn_noise',
  }
  options = json.loads(str(golden[f'{run}/opts']))
  return {names.get(name, name): value for name, value in options.items()}


def no_noise(step):
  raise AssertionError(f'a deterministic sampler drew noise at step {step}')


def banked(bank):
  return lambda step: jnp.asarray(bank)[step]


def check_calls(golden, run, recorder, atol):
  x, sigma, d = recorder.columns()
  np.testing.assert_allclose(sigma, golden[f'{run}/call_sigma'], rtol=atol)
  np.testing.assert_allclose(x, golden[f'{run}/call_x'], rtol=0, atol=atol)
  if f'{run}/call_D' in golden:
    np.testing.assert_allclose(d, golden[f'{run}/call_D'], rtol=0, atol=atol)


@pytest.mark.parametrize('golden', [HEUN, ABLATION, DPM])
def test_the_mixture_is_the_one_of_the_runs(golden):
  sigmas = golden['check_sigma'].astype(np.float32)  # as those calls had it
  with jax.enable_x64(True):
    for kind, labelled, expected in (
      ('gm', True, golden['check_D']),
      ('guide', False, golden['check_D_guide']),
    ):
      denoise = jax.jit(mixture(golden, kind, labelled))
      for sigma, d in zip(sigmas, expected, strict=True):
        got = denoise(golden['check_x'], np.full(3, sigma, np.float64))
        np.testing.assert_allclose(got, d, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
  'run', ['heun18', 'heun5_custom', 'churn10', 'edm2_churn10']
)
def test_heun(run):
  """sampler_heun.npz, in float64 at 1e-12."""
  sampler = heun.Heun(**settings(HEUN, run))
  noise = no_noise
  if sampler.churn:
    bank = HEUN[f'{run}/noise_bank']
    sigma = sampler.sigmas()[:-1]
    active = (sampler.churn_min <= sigma) & (sigma <= sampler.churn_max)
    if run.startswith('edm2'):  # that program draws at active steps only
      assert active.sum() == HEUN[f'{run}/draws_used'] < len(active)
      bank = bank[np.cumsum(active) - active]
    noise = banked(bank)
  recorder = Recorder(mixture(HEUN, 'gm', True))
  with jax.enable_x64(True):
    x = jax.jit(lambda z: sampler.integrate(recorder, z, noise))(HEUN['noise'])
  np.testing.assert_allclose(x, HEUN[f'{run}/out'], rtol=0, atol=1e-12)
  check_calls(HEUN, run, recorder, 1e-12)


def test_guided_heun():
  """sampler_heun.npz: the guide sees the model's own x and σ."""
  run = 'edm2_guided12'
  sampler = heun.Heun(**settings(HEUN, run))
  strong = Recorder(mixture(HEUN, 'gm', True))
  weak = Recorder(mixture(HEUN, 'guide', False))
  denoise = guidance.guided(strong, weak, sampler.guidance)
  with jax.enable_x64(True):
    x = jax.jit(lambda z: sampler.integrate(denoise, z, no_noise))(
      HEUN['noise']
    )
  np.testing.assert_allclose(x, HEUN[f'{run}/out'], rtol=0, atol=1e-12)
  check_calls(HEUN, run, strong, 1e-12)
  expected = HEUN[f'{run}/call_Dguide']
  np.testing.assert_allclose(weak.columns()[2], expected, rtol=0, atol=1e-12)


def test_guided_heun_in_float32():
  """sampler_heun.npz, as users run it; the grid is rounded once."""
  run = 'edm2_guided12'
  sampler = heun.Heun(**settings(HEUN, run))
  strong = Recorder(mixture(HEUN, 'gm', True))
  weak = mixture(HEUN, 'guide', False)
  denoise = guidance.guided(strong, weak, sampler.guidance)
  start = HEUN['noise'].astype(np.float32)
  x = jax.jit(lambda z: sampler.integrate(denoise, z, no_noise))(start)
  assert x.dtype == jnp.float32
  np.testing.assert_allclose(x, HEUN[f'{run}/out_f32'], rtol=0, atol=5e-6)
  sigma = strong.columns()[1]
  exact = HEUN[f'{run}/call_sigma'].astype(np.float32)
  np.testing.assert_array_equal(sigma, exact)
  # The original works its grid out in float32: x ** 7 multiplies roundings.
  np.testing.assert_allclose(sigma, HEUN[f'{run}/sigma_f32'], rtol=2e-6)


ABLATION_RUNS = sorted({name.split('/')[0] for name in ABLATION if '/' in name})


class RecordedLevels(ablation.Ablation):
  """On the noise levels of iddpm_heun, which hold torch's float32 sine."""

  def sigmas(self):
    return np.delete(ABLATION['iddpm_heun/call_sigma'], np.s_[2::2])


@pytest.mark.parametrize('run', ABLATION_RUNS)
def test_ablation(run):
  """sampler_ablation.npz, in float64 at 1e-10."""
  kind = RecordedLevels if run == 'iddpm_heun' else ablation.Ablation
  sampler = kind(**settings(ABLATION, run))
  noise = banked(ABLATION[f'{run}/noise_bank']) if sampler.churn else no_noise
  recorder = Recorder(mixture(ABLATION, 'gm', True))
  with jax.enable_x64(True):
    x = jax.jit(lambda z: sampler.integrate(recorder, z, noise))(
      ABLATION['noise']
    )
  np.testing.assert_allclose(x, ABLATION[f'{run}/out'], rtol=0, atol=1e-10)
  check_calls(ABLATION, run, recorder, 1e-10)


def test_the_levels_of_iddpm():
  """sampler_ablation.npz: the same indices, to the rounding of a sine."""
  options = settings(ABLATION, 'iddpm_heun')
  recorded = RecordedLevels(**options).sigmas()
  np.testing.assert_allclose(
    ablation.Ablation(**options).sigmas(), recorded, rtol=2e-7
  )


class OriginalGrid(dpm_solver_v3.DPMSolverV3):
  """On the grid and times of the original run, which went through float32."""

  def steps(self):
    grid, (_, nodes) = DPM['lambda_grid'], self.grid()
    times = DPM[f's{self.num_steps}/timesteps']
    ours = dpm_solver_v3.coefficients(grid, nodes)
    # Its slopes are over differences of −ln t, ours of the grid's λ.
    ratio = np.diff(grid[nodes]) / -np.diff(np.log(times))
    ratio = np.append(1.0, ratio[:-1])
    return dataclasses.replace(
      ours,
      sigma=times[:-1],
      predict=ours.predict * ratio,
      correct=ours.correct * ratio,
    )


# Tolerances of the end and of what is on the way.
DPM_GRIDS = {
  'original': (OriginalGrid, 2e-8, 2e-8),
  'float64': (dpm_solver_v3.DPMSolverV3, 2e-6, 5e-5),
}


@pytest.mark.parametrize('grid', DPM_GRIDS)
@pytest.mark.parametrize('run', ['s10', 's25', 's10_guided'])
def test_dpm_solver_v3(run, grid):
  """sampler_dpmv3.npz, in float64, on the file's grid and on ours."""
  kind, atol, calls_atol = DPM_GRIDS[grid]
  nodes = DPM[f'{run}/indexes']
  sampler = kind(num_steps=len(nodes) - 1)
  np.testing.assert_array_equal(sampler.grid()[1], nodes)
  recorder = denoise = Recorder(mixture(DPM, 'gm', True))
  if run == 's10_guided':
    weak = Recorder(mixture(DPM, 'guide', False))
    denoise = guidance.guided(recorder, weak, 1.5)
  with jax.enable_x64(True):
    x, states = jax.jit(lambda z: sampler.integrate(denoise, z))(DPM['noise'])
  np.testing.assert_allclose(x, DPM[f'{run}/out'], rtol=0, atol=atol)

  def compare(got, name):
    return np.testing.assert_allclose(
      got, DPM[f'{run}/{name}'], rtol=0, atol=calls_atol
    )

  called_x, sigma, d = recorder.columns()
  compare(called_x, 'call_x')
  compare(sigma, 'call_sigma')
  compare(d, 'call_D')
  compare(states, 'x_after_corrector')
  if run == 's10_guided':
    compare(weak.columns()[2], 'call_Dguide')


@pytest.mark.parametrize('case', ['A', 'B', 'Cshort'])
def test_balanced_labels(case):
  """seeding_labels.npz: the i-th image of a set is of class i mod classes."""

  def get(name):
    return LABELS[f'labels_{case}/{name}']

  classes, count, _, _ = get('args')
  shares = labels_lib.Shares([1] * int(classes))
  labels = shares.labels(np.arange(count))
  # Only a multiple of the classes had labels for every image.
  labelled = count - count % classes
  np.testing.assert_array_equal(labels[:labelled], get('labels_flat'))
  assert get('batch_sizes').sum() == count
  assert get('label_sizes').sum() == labelled
  # By batches of the original's sizes: an image's label is its id's alone.
  ends = np.cumsum(get('batch_sizes'))[:-1]
  parts = np.split(np.arange(count), ends)
  parts = [shares.labels(ids) for ids in parts]
  np.testing.assert_array_equal(np.concatenate(parts), labels)
