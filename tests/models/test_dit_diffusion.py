"""DiT's noise process, denoiser, loss and samplers against the original's."""

import functools
import math

import by_hand
from flax import linen as nn
import golden_io
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ddo_jax import errors
from ddo_jax.method import likelihood
from ddo_jax.method import noise
from ddo_jax.models import dit
from ddo_jax.samplers import ddim
from ddo_jax.samplers import ddpm
from ddo_jax.samplers import guidance
from ddo_jax.samplers import heun
from ddo_jax.samplers import schedules
from ddo_jax.weights import dit_names

pytestmark = pytest.mark.golden

FILE = 'dit_diffusion.npz'
NET = 'dit_forward.npz'  # has the network
CONFIG = dit.DitConfig(
  image_shape=(8, 8, 4), num_classes=4, patch=2, width=48, depth=2, heads=4
)
MODEL = CONFIG.build(noise.LinearBetas())


@functools.lru_cache
def params_of(dtype):
  state = golden_io.state_dict(golden_io.load(NET))
  tree = dit_names.to_flax(state, grid=(4, 4))
  return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), tree)


def rows(name, dtype):
  return golden_io.nhwc(golden_io.load(FILE)[name]).astype(dtype)


def labels(name='y'):
  return golden_io.load(FILE)[name].astype(np.int32)


def at(table, index):
  """Rows of columns, as arrays that multiply x."""
  return {k: v[index][:, None, None, None] for k, v in table.items()}


@functools.lru_cache
def forward():
  """The network, compiled."""
  network = MODEL.denoiser.network

  @jax.jit
  def run(params, x, t, label):
    return network.apply({'params': params['network']}, x, t, label)

  return run


class Known(nn.Module):
  """The golden network, compiled once whatever is built around it."""

  def __call__(self, x, c_noise, label):
    return forward()(params_of(x.dtype.type), x, c_noise, label)


# A model around the compiled network; it has no params.
KNOWN = MODEL.replace(denoiser=dit.DitPrecond(Known()))


def with_variance(x, sigma, label):
  """D and v [B,H,W,2C]."""
  sigma = jnp.asarray(sigma)
  return KNOWN.driven({}, label, ddpm.DDPM())(jnp.asarray(x), sigma)


def close(got, wanted, rtol):
  """To a share of the largest value, or of 1."""
  scale = max(1.0, float(np.abs(wanted).max()))
  assert golden_io.max_error(got, wanted) <= rtol * scale


def test_tables():
  """dit_diffusion.npz: table/*, at 1e-12."""
  golden = golden_io.load(FILE)
  alpha_bar = schedules.ddpm_alpha_bar()
  table = ddpm.columns(alpha_bar)
  variance = np.exp(table['log_posterior'])
  variance[0] = 0  # of which the logarithm is replaced
  got = {
    'alphas_cumprod': alpha_bar,
    'betas': table['beta'],
    'sigma': table['sigma'],
    'posterior_variance': variance,
    'posterior_log_variance_clipped': table['log_posterior'],
    'posterior_mean_coef1': table['from_x0'],
    'posterior_mean_coef2': table['from_x'],
  }
  wanted = {name for name in golden if name.startswith('table/')}
  assert wanted == {f'table/{name}' for name in got}
  for name, value in got.items():
    assert golden_io.max_error(value, golden[f'table/{name}']) <= 1e-12, name


@pytest.mark.parametrize(
  'spacing', ['250', '50', '10', 'ddim50', 'ddim25', '10,10,5']
)
def test_respacing(spacing):
  """dit_diffusion.npz: spaced/*, the numbers of the steps to the bit."""
  golden = golden_io.load(FILE)
  kept = schedules.respaced(spacing, 1000)
  np.testing.assert_array_equal(kept, golden[f'spaced/{spacing}/timestep_map'])
  table = ddpm.columns(schedules.ddpm_alpha_bar()[kept])
  for ours, theirs in (
    ('beta', 'betas'),
    ('log_posterior', 'posterior_log_variance_clipped'),
  ):
    wanted = golden[f'spaced/{spacing}/{theirs}']
    assert golden_io.max_error(table[ours], wanted) <= 1e-12, theirs


@pytest.mark.parametrize('spacing', ['', 'ten', '0', '1001', 'ddim999', '5,-1'])
def test_no_such_spacing(spacing):
  with pytest.raises(errors.UserError, match='wanted a number of steps'):
    schedules.respaced(spacing, 1000)


@pytest.mark.parametrize('precision', ['f64', 'f32'])
def test_a_step_back(precision):
  """dit_diffusion.npz: q_sample, pmv/*, pmv_clip/*, pmv250/*."""
  golden = golden_io.load(FILE)
  alpha_bar = schedules.ddpm_alpha_bar()
  spaced = alpha_bar[schedules.respaced('250', 1000)]
  cases = (
    ('pmv', alpha_bar, golden['t'], False),
    ('pmv_clip', alpha_bar, golden['t'], True),
    ('pmv250', spaced, golden['pmv250/index'], False),
  )
  for name, kept, index, clip in cases:
    now = at(ddpm.columns(kept), index)
    with golden_io.precision(precision) as dtype:
      now = {k: v.astype(dtype) for k, v in now.items()}
      noisy = rows('x0', dtype) + now['sigma'] * rows('noise', dtype)
      sigma = now['sigma'].ravel()
      out = with_variance(noisy, sigma, labels())
      x0, share = np.split(np.asarray(out), 2, axis=-1)
      x = noisy / now['grow']
      step = ddpm.back(x, np.clip(x0, -1, 1) if clip else x0, share, now)
    if name == 'pmv':
      wanted = golden_io.nhwc(golden[f'q_sample_{precision}'])
      close(x, wanted, {'f64': 1e-10, 'f32': 1e-6}[precision])

    def wanted_of(what, name=name):
      return golden_io.nhwc(golden[f'{name}/{what}_{precision}'])

    f64 = precision == 'f64'
    close(step.mean, wanted_of('mean'), 1e-10 if f64 else 5e-6)
    if not clip:
      wanted = wanted_of('log_variance')
      close(step.log_variance, wanted, 1e-10 if f64 else 1e-5)
    wanted = wanted_of('pred_xstart')
    if f64:
      close(step.x0, wanted, 1e-10)
      continue
    for row, level in enumerate(sigma):
      most = max(3e-6, 1e-4 * level)
      assert golden_io.max_error(step.x0[row], wanted[row]) <= most


@pytest.mark.parametrize('precision', ['f64', 'f32'])
def test_denoiser(precision):
  """dit_diffusion.npz: D/D, at levels of the schedule."""
  golden = golden_io.load(FILE)
  with golden_io.precision(precision) as dtype:
    sigma = golden['D/sigma'].astype(dtype)
    time = MODEL.denoiser.time(jnp.asarray(sigma))
    np.testing.assert_array_equal(time, golden['t'])
    inputs = (rows('D/x', dtype), jnp.asarray(sigma), labels())
    out = with_variance(*inputs)
    plain = KNOWN.denoise({}, *inputs)
  d = np.asarray(out)[..., :4]
  np.testing.assert_allclose(plain, d, rtol=1e-6, atol=1e-6)
  wanted = golden_io.nhwc(golden[f'D/D_{precision}'])
  for row, level in enumerate(sigma):
    scale = max(1.0, np.abs(wanted[row]).max())
    most = 1e-10 * scale if precision == 'f64' else max(3e-6, 1e-4 * level)
    assert golden_io.max_error(d[row], wanted[row]) <= most


def test_denoiser_between_the_levels():
  """dit_diffusion.npz: D/off_*, t interpolated in ln σ, and the nearest."""
  golden = golden_io.load(FILE)
  with golden_io.precision('f64'):
    sigma = jnp.asarray(golden['D/off_sigma'])
    time = MODEL.denoiser.time(sigma)
    np.testing.assert_allclose(time, golden['D/off_t_interp'], atol=1e-10)
    nearest = MODEL.denoiser.nearest(sigma)
    np.testing.assert_array_equal(nearest, golden['D/off_index_nearest'])
    x = golden_io.nhwc(golden['D/off_x'])
    out = with_variance(x, sigma[2:7], labels())
  wanted = golden_io.nhwc(golden['D/off_D_f64'])
  close(np.asarray(out)[..., :4], wanted, 1e-10)


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_time_is_whole_on_every_level(dtype):
  with golden_io.precision('f64'):
    levels = schedules.ddpm_sigmas().astype(dtype)
    time = MODEL.denoiser.time(jnp.asarray(levels))
    assert time.dtype == dtype
    np.testing.assert_array_equal(time, np.arange(1000))
    beyond = MODEL.denoiser.time(jnp.asarray([1e-3, 1e3], dtype))
    np.testing.assert_array_equal(beyond, [0, 999])
  assert MODEL.denoiser.sigma_range == pytest.approx((0.0100005, 157.4073))


def batch_of(dtype):
  t = golden_io.load(FILE)['t']
  z = stats.norm.ppf((t + 0.5) / 1000)
  batch = likelihood.Batch(rows('x0', dtype), labels(), np.arange(len(t)))
  return batch, z


@pytest.mark.parametrize('precision', ['f64', 'f32'])
def test_mle_loss(precision, monkeypatch):
  """dit_diffusion.npz: train/*, the error of ε and the bound's term."""
  golden = golden_io.load(FILE)
  size = math.prod(MODEL.example_shape)
  plain = MODEL.replace(learn_sigma=False)  # ε's error alone
  with golden_io.precision(precision) as dtype:
    batch, z = batch_of(dtype)
    keys = golden_io.fix_draws(monkeypatch, z, rows('noise', dtype), dtype)

    def mean(params):
      loss = MODEL.mle_loss(params, {}, batch, keys) / size
      return jnp.mean(loss), (loss, plain.mle_loss(params, {}, batch, keys))

    if precision == 'f64':
      run = jax.jit(jax.value_and_grad(mean, has_aux=True))
      (_, (loss, mse)), grads = jax.device_get(run(params_of(dtype)))
      mse = mse / size
    else:
      mse = KNOWN.replace(learn_sigma=False).mle_loss({}, {}, batch, keys)
      loss = mse = np.asarray(mse / size)
  assert loss.dtype == dtype
  if precision == 'f32':
    np.testing.assert_allclose(mse, golden['train/mse_f32'], rtol=1e-5)
    return
  np.testing.assert_allclose(mse, golden['train/mse_f64'], rtol=1e-10)
  np.testing.assert_allclose(loss - mse, golden['train/vb_f64'], rtol=1e-8)
  np.testing.assert_allclose(loss, golden['train/loss_f64'], rtol=1e-8)
  state = dit_names.to_official(grads, grid=(4, 4))
  for name in golden:
    if name.startswith('train/grad/') and name.endswith('_f64'):
      key = name.removeprefix('train/grad/').removesuffix('_f64')
      most = 1e-8 * np.abs(golden[name]).max()
      assert golden_io.max_error(state[key], golden[name]) <= most, key


def test_the_log_ratio_leaves_the_variance_alone(monkeypatch):
  """Δ at θ_ref is 0; it is ε's error; its gradient in the variance is 0."""
  golden = golden_io.load(FILE)
  with golden_io.precision('f64') as dtype:
    batch, z = batch_of(dtype)
    keys = golden_io.fix_draws(monkeypatch, z, rows('noise', dtype), dtype)
    params = params_of(dtype)
    other = jax.tree.map(lambda leaf: 0.9 * leaf, params)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params, reference):
      delta, info = MODEL.log_ratio(params, reference, {}, batch, keys)
      log_prob = MODEL.log_prob(params, {}, batch, keys)
      return jnp.mean(delta), (delta, info['mle_loss'], log_prob)

    grads, (delta, ours, log_prob) = gradient(params, params)
    np.testing.assert_allclose(delta, 0, atol=1e-12)
    np.testing.assert_allclose(ours, -log_prob, rtol=1e-12)
    _, (delta, theirs, _) = gradient(other, params)
    np.testing.assert_allclose(delta, ours - theirs, rtol=1e-9)
    assert np.abs(delta).min() > 1e-3
  size = math.prod(MODEL.example_shape)
  mse = np.asarray(ours) / size
  np.testing.assert_allclose(mse, golden['train/mse_f64'], rtol=1e-10)
  kernel = np.asarray(grads['network']['final_layer']['linear']['kernel'])
  kernel = kernel.reshape(48, 2, 2, 8)
  assert np.abs(kernel[..., :4]).min() > 0
  np.testing.assert_array_equal(kernel[..., 4:], 0)


@pytest.mark.parametrize('precision', ['f64', 'f32'])
def test_guidance_of_three_channels(precision, monkeypatch):
  """dit_forward.npz: cfg*_out; the last channels are those of each half."""
  golden = golden_io.load(NET)
  label = golden['cfg_y'].astype(np.int32)

  def bound(params, label, x, t):
    return forward()(params, x, t, label)

  def times_above_0(t):
    return t + 1

  for scale in (1.5, 4.0):
    with golden_io.precision(precision) as dtype:
      x = jnp.asarray(golden_io.nhwc(golden['cfg_x']).astype(dtype)[:3])
      t = jnp.asarray(golden['cfg_t'].astype(dtype)[:3])
      strong, weak = (
        functools.partial(bound, params_of(dtype), label[half])
        for half in (slice(0, 3), slice(3, 6))
      )
      strong(x, t)  # compiles
      got = []
      # In the second half the guide's own channels stay.
      for model, guide, amount in (
        (strong, weak, scale),
        (weak, strong, 1 - scale),
      ):
        with monkeypatch.context() as patch:
          by_hand.loops(patch)
          guided = guidance.guided(
            model, guide, amount, channels=3, level=times_above_0
          )
          got.append(guided(x, t))
      got = np.concatenate(got)
    wanted = golden_io.nhwc(golden[f'cfg{scale}_out_{precision}'])
    atol = 1e-10 if precision == 'f64' else 1e-4 * scale
    assert golden_io.max_error(got, wanted) <= atol


def recorded(kind, dtype, **options):
  """A sampler that starts at z, draws `sample/noise`, returns all states."""
  start, bank = rows('sample/z', dtype), golden_io.load(FILE)['sample/noise']
  bank = np.moveaxis(bank, 2, -1).astype(dtype)

  class Recorded(kind):
    def __call__(self, denoise, shape, keys):
      def noise(step):
        return jnp.asarray(bank)[step]

      return self.integrate(denoise, jnp.asarray(start), noise)[1]

  return Recorded(spacing='10', **options)


SAMPLERS = {
  'ddpm': (ddpm.DDPM, {}),
  'ddpm_cfg1.5': (ddpm.DDPM, {'guidance': 1.5, 'guidance_channels': 3}),
  'ddim_eta0': (ddim.DDIM, {}),
  'ddim_eta1': (ddim.DDIM, {'eta': 1.0}),
}


@pytest.mark.parametrize('precision', ['f64', 'f32'])
@pytest.mark.parametrize('name', SAMPLERS)
def test_samplers(name, precision, monkeypatch):
  """dit_diffusion.npz: sample/*, every state of ten steps."""
  golden = golden_io.load(FILE)
  kind, options = SAMPLERS[name]
  with golden_io.precision(precision) as dtype:
    sampler = recorded(kind, dtype, **options)
    likelihood.check_sampler(MODEL, sampler)
    label = labels('sample/y')[:3]
    keys = jax.random.split(jax.random.key(0), 3)

    start = rows('sample/z', dtype)
    call = KNOWN.driven({}, label, sampler)
    call(jnp.asarray(start), jnp.ones(3, dtype))  # compiles
    with monkeypatch.context() as patch:
      by_hand.loops(patch)
      states = KNOWN.sample({}, {}, label, keys, sampler)
    states = np.moveaxis(np.asarray(states), -1, 2)
  if precision == 'f64':
    close(states, golden[f'sample/{name}_f64'], 1e-10)
  else:
    wanted = golden[f'sample/{name}_f32']
    # The original in float32 is 3e-3 off at values up to 900.
    assert (
      golden_io.max_error(states[-1], wanted) <= 2e-5 * np.abs(wanted).max()
    )


def test_a_sampler_of_the_variance_wants_one():
  small = dit.DitConfig((8, 8, 4), 4, 2, 8, 1, 2, learn_sigma=False).build()
  with pytest.raises(errors.UserError, match='follows noise levels'):
    likelihood.check_sampler(small, ddpm.DDPM())
  likelihood.check_sampler(small, ddim.DDIM())
  likelihood.check_sampler(MODEL, heun.Heun())
