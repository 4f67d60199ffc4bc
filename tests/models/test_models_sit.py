"""SiT's network, paths, losses and samplers against the original's numbers."""

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
from ddo_jax.models import interpolants
from ddo_jax.models import sit
from ddo_jax.samplers import flow_ode
from ddo_jax.samplers import flow_sde
from ddo_jax.samplers import heun
from ddo_jax.weights import dit_names

pytestmark = pytest.mark.golden

NET = golden_io.load('sit_forward.npz')
RUNS = golden_io.load('sit_samplers.npz')
OPTIONS = {
  'image_shape': (8, 8, 4),
  'num_classes': 4,
  'patch': 2,
  'width': 48,
  'depth': 2,
  'heads': 4,
}


class Known(nn.Module):
  """The golden network, compiled once whatever is built around it."""

  def __call__(self, x, c_noise, label):
    return forward()(params_of(x.dtype.type), x, c_noise, label)


def model_of(path='linear', predicts='velocity', weighting='none'):
  config = sit.SitConfig(
    path=path, predicts=predicts, weighting=weighting, **OPTIONS
  )
  return config.build(noise.UniformTime())


def known(model):
  """The model around the compiled network; it has no params."""
  return model.replace(denoiser=model.denoiser.copy(network=Known()))


MODEL = model_of()


@functools.lru_cache
def params_of(dtype):
  tree = dit_names.to_flax(golden_io.state_dict(NET), grid=(4, 4))
  return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), tree)


def rows(golden, name, dtype):
  return golden_io.nhwc(golden[name]).astype(dtype)


@functools.lru_cache
def forward():
  """The network's velocity, as its sampler drives it."""

  @jax.jit
  def run(params, x, t, label):
    return MODEL.driven(params, label, flow_ode.FlowODE())(x, t)

  return run


def close(got, wanted, rtol):
  """To a share of the largest value, or of 1."""
  scale = max(1.0, float(np.abs(wanted).max()))
  assert golden_io.max_error(got, wanted) <= rtol * scale


def check_gradients(grads, prefix, precision):
  state = dit_names.to_official(grads, grid=(4, 4))
  for key in golden_io.read_json(NET, 'grad_params'):
    wanted = NET[f'{prefix}{key}_{precision}']
    if precision == 'f64':
      most = 1e-10 * np.abs(wanted).max()
      assert golden_io.max_error(state[key], wanted) <= most, key
    else:
      assert golden_io.relative_error(state[key], wanted) <= 5e-6, key


@pytest.mark.parametrize('precision', ['f64', 'f32'])
def test_network(precision):
  """sit_forward.npz: out, cfg1.5_out, and gradients of sum(out · probe)."""
  with golden_io.precision(precision) as dtype:
    label = NET['y'].astype(np.int32)
    probe = rows(NET, 'probe', dtype)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradient(params, x, t):
      out = forward()(params, x, t, label)
      return (out * probe).sum(), out

    arguments = (
      params_of(dtype),
      rows(NET, 'x', dtype),
      NET['t'].astype(dtype),
    )
    (grads, grad_x), out = jax.device_get(gradient(*arguments))
  atol = 1e-10 if precision == 'f64' else 5e-6
  wanted = golden_io.nhwc(NET[f'out_{precision}'])
  assert golden_io.max_error(out, wanted) <= atol
  wanted = golden_io.nhwc(NET[f'grad_x_{precision}'])
  rtol = 1e-10 if precision == 'f64' else 5e-6
  assert golden_io.relative_error(grad_x, wanted) <= rtol
  check_gradients(grads, 'grad/', precision)


@pytest.mark.parametrize('precision', ['f64', 'f32'])
def test_guidance_of_three_channels(precision):
  """sit_forward.npz: cfg1.5_out; the last channel is that of each half."""
  label = NET['cfg_y'].astype(np.int32)
  with golden_io.precision(precision) as dtype:
    x = rows(NET, 'cfg_x', dtype)[:3]
    t = NET['cfg_t'].astype(dtype)[:3]
    strong, weak = (
      np.asarray(forward()(params_of(dtype), x, t, label[half]))
      for half in (slice(0, 3), slice(3, 6))
    )
  guided = weak + dtype(1.5) * (strong - weak)
  got = np.concatenate([guided, guided])
  got[..., 3:] = np.concatenate([strong, weak])[..., 3:]
  wanted = golden_io.nhwc(NET[f'cfg1.5_out_{precision}'])
  assert golden_io.max_error(got, wanted) <= (
    1e-10 if dtype == np.float64 else 1e-5
  )


@pytest.mark.parametrize('precision', ['f64', 'f32'])
def test_plan(precision):
  """sit_forward.npz: plan/*, D/*: score, noise, data and the straight path."""
  path = interpolants.Linear()
  f64 = precision == 'f64'
  with golden_io.precision(precision) as dtype:
    x1, x0 = rows(NET, 'x1', dtype), rows(NET, 'x0_noise', dtype)
    t = jnp.asarray(NET['t_loss'].astype(dtype))
    s = t[:, None, None, None]
    xt = path.a(s) * x1 + path.b(s) * x0
    sigma = (1 - t) / t
    v = forward()(params_of(dtype), xt, t, NET['y'].astype(np.int32))
    d = known(MODEL).denoise({}, xt / s, sigma, NET['y'].astype(np.int32))
    times = np.asarray(t, np.float64)
    got = {
      'plan/xt': xt,
      'plan/ut': MODEL.denoiser.target(x1, x0, sigma),
      'plan/v': v,
      'plan/score': flow_sde.score(xt, s, v),
      'plan/noise': xt - s * v,
      'plan/drift': -path.slope_a(s) / path.a(s) * xt,
      'D/x': xt / s,
      'D/D': d,
    }
    got = {name: np.moveaxis(np.asarray(x), -1, 1) for name, x in got.items()}
    got['plan/drift_var'] = np.asarray(path.diffusion(t))
    got['plan/diffusion_SBDM'] = np.asarray(path.diffusion(t))
    got['D/sigma'] = np.asarray(sigma)
  for form in flow_sde.DIFFUSIONS:
    name = form.replace('_', '-')
    got[f'plan/diffusion_{name}'] = flow_sde.diffusion(times, form, 1.0)
  got['plan/diffusion_linear'] = got['plan/diffusion_sigma']
  names = {n.removesuffix('_f64') for n in NET if n.endswith('_f64')}
  assert got.keys() == {n for n in names if n.startswith(('plan/', 'D/'))}
  for name, value in got.items():
    loose = name in ('plan/score', 'D/D')
    rtol = (1e-9 if loose else 1e-10) if f64 else 1e-4 if loose else 5e-6
    close(value, NET[f'{name}_{precision}'], rtol)


def batch_of(path, dtype):
  """The golden rows, and the law's numbers that give their times."""
  t = NET['t_loss'].astype(np.float64)
  sigma = path.b(t) / path.a(t)
  z = stats.norm.ppf(np.asarray(sigma / (1 + sigma), np.float64))
  label = NET['y'].astype(np.int32)
  return likelihood.Batch(rows(NET, 'x1', dtype), label, np.arange(len(t))), z


LOSSES = sorted(
  name.removeprefix('loss/').removesuffix('_f64')
  for name in NET
  if name.startswith('loss/') and name.count('-') == 2 and '_f64' in name
)
# Those that are tried in float32.
FLOAT32 = ('Linear-velocity-None', 'Linear-noise-None', 'Linear-score-None')


def loss_inputs(name, dtype, monkeypatch):
  """A model, the rows of its loss, and the keys that draw the golden noise."""
  path, predicts, weighting = name.lower().split('-')
  model = model_of(path, predicts, weighting)
  batch, z = batch_of(interpolants.PATHS[path], dtype)
  noises = rows(NET, 'x0_noise', dtype)
  keys = golden_io.fix_draws(monkeypatch, z, noises, dtype)
  return model, batch, keys


def test_all_paths_and_predictions_are_there():
  assert len(LOSSES) == 3 * (1 + 2 * 3)


@pytest.mark.parametrize('precision', ['f64', 'f32'])
def test_losses(precision, monkeypatch):
  """sit_forward.npz: loss/*; in float32 the unweighted on the straight path."""
  for name in LOSSES if precision == 'f64' else FLOAT32:
    with golden_io.precision(precision) as dtype:
      model, batch, keys = loss_inputs(name, dtype, monkeypatch)
      loss = np.asarray(known(model).mle_loss({}, {}, batch, keys))
    assert loss.dtype == dtype
    rtol = 1e-10 if name.startswith('Linear') else 1e-9
    rtol = rtol if precision == 'f64' else 3e-6
    wanted = NET[f'loss/{name}_{precision}']
    loss = loss / math.prod(model.example_shape)
    np.testing.assert_allclose(loss, wanted, rtol=rtol, err_msg=name)


@pytest.mark.parametrize('precision', ['f64', 'f32'])
def test_gradients_of_the_loss(precision, monkeypatch):
  """sit_forward.npz: loss/grad/* and loss/pred; Δ and its gradient at θ_ref."""
  with golden_io.precision(precision) as dtype:
    model, batch, keys = loss_inputs(FLOAT32[0], dtype, monkeypatch)
    size = math.prod(model.example_shape)

    @jax.jit
    @jax.value_and_grad
    def ratio(params, reference):
      delta, _ = model.log_ratio(params, reference, {}, batch, keys)
      return jnp.mean(delta) / size

    params = params_of(dtype)
    delta, grads = jax.device_get(ratio(params, params))
    assert abs(delta) <= 1e-6
    # Of log p, which is minus the loss.
    grads = jax.tree.map(np.negative, grads)
    s = NET['t_loss'].astype(dtype)
    xt = s[:, None, None, None] * (batch.x - rows(NET, 'x0_noise', dtype))
    xt = xt + rows(NET, 'x0_noise', dtype)
    v = forward()(params, xt, s, batch.label)
  check_gradients(grads, 'loss/grad/', precision)
  wanted = golden_io.nhwc(NET[f'loss/pred_{precision}'])
  rtol = 1e-10 if precision == 'f64' else 5e-6
  assert golden_io.max_error(v, wanted) <= rtol


def test_guidance_is_that_of_the_velocity(monkeypatch):
  """The three-channel rule through `sample`, at all times, t = 0 and 1 too."""
  label = NET['cfg_y'].astype(np.int32)[:3]
  x = jnp.ones((3, 8, 8, 4))
  t = jnp.asarray([0.0, 0.5, 1.0])

  class Asking(flow_ode.FlowODE):
    def __call__(self, velocity, shape, keys):
      return velocity(x, t)

  keys = jax.random.split(jax.random.key(0), 3)
  model = known(MODEL)
  sampler = Asking(guidance=1.5, guidance_channels=3)
  strong, weak = (
    np.asarray(model.driven({}, y, sampler)(x, t))
    for y in (label, np.full_like(label, 4))
  )
  by_hand.loops(monkeypatch)
  got = np.asarray(model.sample({}, {}, label, keys, sampler))
  wanted = weak + 1.5 * (strong - weak)
  np.testing.assert_allclose(got[..., :3], wanted[..., :3], atol=1e-5)
  np.testing.assert_array_equal(got[..., 3], strong[..., 3])
  assert np.abs(wanted - strong).max(axis=(1, 2, 3)).min() > 1e-2
  sampler.guidance_max = 1.0  # the noise level at t = ½
  got = np.asarray(model.sample({}, {}, label, keys, sampler))
  np.testing.assert_array_equal(got[0], strong[0])
  np.testing.assert_allclose(got[1:, ..., :3], wanted[1:, ..., :3], atol=1e-5)


def recorded(kind, dtype, backwards=False, **options):
  """A sampler that starts at z, draws `noise`, and returns all states."""
  start = rows(RUNS, 'z', dtype)
  if backwards:
    start = rows(NET, 'x1', dtype)[:3]
  bank = np.moveaxis(RUNS['noise'], 2, -1).astype(dtype)
  asked = []

  class Recorded(kind):
    def __call__(self, velocity, shape, keys):
      def call(x, t):
        asked.append(float(t[0]))
        return velocity(x, t)

      if kind is flow_ode.FlowODE:
        return self.integrate(call, jnp.asarray(start), backwards)

      def noise(step):
        return jnp.asarray(bank)[step]

      return self.integrate(call, jnp.asarray(start), noise)

  return Recorded(**options), asked


def run(sampler, dtype, monkeypatch):
  """The end and the states of a sampler that starts as the original did."""
  likelihood.check_sampler(MODEL, sampler)
  label = RUNS['y'].astype(np.int32)
  keys = jax.random.split(jax.random.key(0), 3)
  model = known(MODEL)
  start = jnp.asarray(rows(RUNS, 'z', dtype))
  model.driven({}, label, sampler)(start, jnp.ones(3, dtype))  # compiles
  with monkeypatch.context() as patch:
    by_hand.loops(patch)
    end, states = model.sample({}, {}, label, keys, sampler)
  assert end.dtype == dtype
  return np.moveaxis(np.asarray(end), -1, 1), np.moveaxis(states, -1, 2)


GUIDED = {'guidance': 1.5, 'guidance_channels': 3}
ODES = {
  'euler': {'method': 'euler'},
  'midpoint': {'method': 'midpoint'},
  'heun2': {'method': 'heun'},
  'rk4': {'method': 'rk4'},
  'euler_reverse': {'method': 'euler', 'backwards': True},
  'euler_cfg1.5': {'method': 'euler', **GUIDED},
}


@pytest.mark.parametrize('precision', ['f64', 'f32'])
@pytest.mark.parametrize('name', ODES)
def test_ode(name, precision, monkeypatch):
  """sit_samplers.npz: ode/*, every state and every time asked for."""
  with golden_io.precision(precision) as dtype:
    sampler, asked = recorded(
      flow_ode.FlowODE, dtype, num_steps=5, **ODES[name]
    )
    end, states = run(sampler, dtype, monkeypatch)
  if precision == 'f32':
    close(end, RUNS[f'ode/{name}_f32'], 1e-5)
    return
  close(np.asarray(states), RUNS[f'ode/{name}_f64'][1:], 1e-9)
  if f'ode/{name}_t_f64' in RUNS:
    times = RUNS[f'ode/{name}_t_f64']
    np.testing.assert_allclose(asked, times, rtol=0, atol=1e-12)


def test_the_adaptive_solver_of_the_original_is_near(monkeypatch):
  """sit_samplers.npz: ode/dopri5, to its own accuracy of 5e-3."""
  with golden_io.precision('f32') as dtype:
    sampler, _ = recorded(flow_ode.FlowODE, dtype, num_steps=50, method='rk4')
    end, _ = run(sampler, dtype, monkeypatch)
  for precision in ('f32', 'f64'):
    wanted = RUNS[f'ode/dopri5_{precision}']
    wanted = wanted if precision == 'f32' else wanted[-1]
    close(end, wanted, 5e-3)
  assert RUNS['ode/dopri5_t_f64'].max() > 1.3  # which is why it is not here


SDES = sorted(
  name.removeprefix('sde/').removesuffix('_f64')
  for name in RUNS
  if name.startswith('sde/') and name.endswith('_f64')
)


def sde_options(name):
  plain = name.removesuffix('_cfg1.5')
  method, form, last = plain.lower().split('-')
  options = {'method': method, 'last': last, 'num_steps': 10}
  if form == 'sigma2':
    options['diffusion_norm'] = 2.0
  options['diffusion'] = 'decreasing' if form == 'decreasing' else 'sigma'
  return options | (GUIDED if plain != name else {})


@pytest.mark.parametrize('precision', ['f64', 'f32'])
@pytest.mark.parametrize('name', SDES)
def test_sde(name, precision, monkeypatch):
  """sit_samplers.npz: sde/*, every state that is stored."""
  with golden_io.precision(precision) as dtype:
    sampler, _ = recorded(flow_sde.FlowSDE, dtype, **sde_options(name))
    end, states = run(sampler, dtype, monkeypatch)
  if precision == 'f32':
    close(end, RUNS[f'sde/{name}_f32'], 1e-5)
    return
  wanted = RUNS[f'sde/{name}_f64']
  close(end, wanted[-1], 1e-9)
  if len(wanted) > 1:
    close(np.asarray(states), wanted[:-1], 1e-9)


def test_what_drives_a_velocity():
  likelihood.check_sampler(MODEL, heun.Heun())
  ode = flow_ode.FlowODE()
  for other in (
    model_of('gvp'),
    model_of('linear', 'noise'),
    dit.DitConfig(**OPTIONS).build(),
  ):
    likelihood.check_sampler(other, heun.Heun())
    with pytest.raises(errors.UserError, match='this model wants one that'):
      likelihood.check_sampler(other, ode)


@pytest.mark.parametrize(
  ('sampler', 'field'),
  [
    (flow_ode.FlowODE(num_steps=0), 'num_steps'),
    (flow_ode.FlowODE(method='dopri5'), 'method'),
    (flow_sde.FlowSDE(diffusion='SBDM'), 'diffusion'),
    (flow_sde.FlowSDE(last='none'), 'last'),
    (flow_sde.FlowSDE(last_step=0.0), 'last_step'),
    (flow_sde.FlowSDE(diffusion_norm=-1.0), 'diffusion_norm'),
  ],
)
def test_settings_that_make_no_sense(sampler, field):
  keys = jax.random.split(jax.random.key(0), 1)
  with pytest.raises(errors.UserError, match=f'sampler.{field} is'):
    sampler(lambda x, t: x, (2,), keys)
