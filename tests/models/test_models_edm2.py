"""EDM2's network and forced normalisation against the original's numbers."""

import functools

import golden_io
import jax
import numpy as np
import pytest

from ddo_jax import rng
from ddo_jax.method import likelihood
from ddo_jax.method import noise
from ddo_jax.models import edm2
from ddo_jax.models import edm2_layers
from ddo_jax.models import layers
from ddo_jax.training import state as state_lib
from ddo_jax.weights import edm_names


def _model(golden):
  options = golden_io.read_json(golden, 'config')
  return golden_io.edm2_config(options).build()


def _inputs(golden, dtype):
  x = np.asarray(golden_io.nhwc(golden['x']), dtype)
  label = np.zeros(len(x), np.int32)
  if 'class_labels' in golden:
    label = golden_io.labels(golden['class_labels'])
  return x, np.asarray(golden['sigma'], dtype), label


@jax.jit
def _primitives(a, b, c):
  return {
    'mp_silu_a': edm2_layers.mp_silu(a),
    'mp_sum_a_c_t05': edm2_layers.mp_sum(a, c, 0.5),
    'mp_sum_a_c_t03': edm2_layers.mp_sum(a, c, 0.3),
    'mp_cat_a_b_t05': edm2_layers.mp_cat(a, b, 0.5),
    'mp_cat_a_b_t03': edm2_layers.mp_cat(a, b, 0.3),
    'normalize_a_all': edm2_layers.normalize(a, (1, 2, 3)),
    'normalize_a_dim1': edm2_layers.normalize(a, -1),
    'resample_up_11': layers.upsample(a, (1, 1)),
    'resample_down_11': layers.downsample(a, (1, 1)),
    'resample_up_1331': layers.upsample(a, (1, 3, 3, 1)),
    'resample_down_1331': layers.downsample(a, (1, 3, 3, 1)),
  }


@pytest.mark.golden
@pytest.mark.parametrize(('precision', 'atol'), [('f64', 1e-12), ('f32', 2e-6)])
def test_primitives(precision, atol):
  """edm2_primitives.npz: functions."""
  golden = golden_io.load('edm2_primitives.npz')
  with golden_io.precision(precision) as dtype:
    inputs = [np.asarray(golden_io.nhwc(golden[k]), dtype) for k in 'abc']
    for name, got in _primitives(*inputs).items():
      wanted = golden_io.nhwc(golden[name])
      assert golden_io.max_error(got, wanted) <= atol, name


@pytest.mark.golden
@pytest.mark.parametrize(('precision', 'atol'), [('f64', 1e-12), ('f32', 2e-6)])
def test_layers(precision, atol):
  """edm2_primitives.npz: mpconv_conv3, mpconv_lin, fourier."""
  golden = golden_io.load('edm2_primitives.npz')
  with golden_io.precision(precision) as dtype:
    for case, kernel in (('mpconv_conv3', 3), ('mpconv_lin', None)):
      conv = edm2_layers.MPConv(golden[f'{case}/w'].shape[0], kernel)
      weight = {'weight': np.asarray(golden[f'{case}/w'], dtype)}
      params = {'params': edm_names.to_flax(weight)}
      x = np.asarray(golden_io.nhwc(golden[f'{case}/x']), dtype)
      apply = jax.jit(conv.apply)
      for gain in (1, 0.7):
        wanted = golden_io.nhwc(golden[f'{case}/y_gain{gain}'])
        got = apply(params, x, gain)
        assert golden_io.max_error(got, wanted) <= atol, (case, gain)
    fourier = golden_io.params(golden, dtype, 'fourier/')
    fourier = {name: fourier[name] for name in golden_io.CONSTANTS}
    value = np.asarray(golden['fourier/x'], dtype)
    got = edm2_layers.MPFourier(8).apply({'params': fourier}, value)
    assert golden_io.max_error(got, golden['fourier/y']) <= atol


@functools.lru_cache
def _forward(denoiser):
  """Compiled once for what several tests share."""

  @jax.jit
  def forward(params, x, sigma, label):
    variables, options = {'params': params}, {'mutable': ['intermediates']}
    d, captured = denoiser.apply(
      variables, x, sigma, label, capture_intermediates=True, **options
    )
    u = denoiser.apply(variables, sigma, method='log_variance')
    return d, u, captured

  return forward


@pytest.mark.golden
@pytest.mark.parametrize('precision', ['f64', 'f32'])
@pytest.mark.parametrize('case', ['cond', 'uncond'])
def test_network(case, precision):
  """edm2_cond.npz, edm2_uncond.npz: D, log-variance, F and every block."""
  golden = golden_io.load(f'edm2_{case}.npz')
  model = _model(golden)
  with golden_io.precision(precision) as dtype:
    params = golden_io.params(golden, dtype)
    x, sigma, label = _inputs(golden, dtype)
    d, u, captured = _forward(model.denoiser)(
      params,
      np.concatenate([x, x]),
      np.concatenate([sigma, sigma]),
      np.concatenate([label, np.full_like(label, model.num_classes)]),
    )
    assert d.dtype == dtype
    captured = jax.tree.map(lambda v: np.asarray(v)[:3], captured)
  names = ('D', 'D_nolabel' if case == 'cond' else 'D')
  for got, name in zip(np.split(np.asarray(d), 2), names, strict=True):
    wanted = golden_io.nhwc(golden[f'{name}_{precision}'])
    error = golden_io.max_error(got, wanted)
    assert error <= {'f64': 1e-10, 'f32': 3e-6}[precision], name
  wanted = golden[f'logvar_{precision}'].ravel()
  error = golden_io.max_error(np.asarray(u)[:3], wanted)
  assert error <= {'f64': 1e-10, 'f32': 2e-6}[precision]
  if precision == 'f64':
    rows = captured['intermediates']
    f = rows['network']['__call__'][0]
    assert golden_io.max_error(f, golden_io.nhwc(golden['F_f64'])) <= 1e-10
    golden_io.check_trace(golden, rows)


@pytest.mark.golden
@pytest.mark.parametrize('precision', ['f64', 'f32'])
def test_training_mode(precision):
  """edm2_train.npz: training mode is `project`, then the forward pass."""
  golden = golden_io.load('edm2_train.npz')
  model = _model(golden)
  project = jax.jit(model.rules.project)
  atol = {'f64': 1e-10, 'f32': 3e-6}[precision]
  with golden_io.precision(precision) as dtype:
    raw = golden_io.params(golden, dtype)
    once = project(raw)
    twice = project(once)
    rows = [np.concatenate([row, row]) for row in _inputs(golden, dtype)]

    def check(params, name):
      d, u, _ = _forward(model.denoiser)(params, *rows)
      wanted = golden_io.nhwc(golden[name])
      assert golden_io.max_error(d[:3], wanted) <= atol, name
      return np.asarray(u)[:3]

    check(raw, 'D_eval_before_f64')
    u = check(once, f'D_train_{precision}')
    assert golden_io.max_error(u, golden['logvar_train_f64'].ravel()) <= atol
    check(twice, 'D_train_second_call_f64')
    check(twice, 'D_eval_after_f64')
  after = golden_io.state_dict(golden, 'after/')
  state = edm_names.to_official(once)
  assert list(after) == golden_io.read_json(golden, 'after_names')
  for (key, wanted), rms in zip(
    after.items(), golden['after_rms'], strict=True
  ):
    assert golden_io.max_error(state.pop(key), wanted) <= 1e-6, key
    np.testing.assert_allclose(np.sqrt(np.mean(wanted**2)), rms, rtol=1e-6)
  # What is left is free: gains and constants, to the bit.
  before = edm_names.to_official(raw)
  for key, tensor in state.items():
    assert key.endswith(('_gain', *golden_io.CONSTANTS))
    np.testing.assert_array_equal(tensor, before[key])


def _tiny():
  """Of a decoder alone, as each kernel costs its compilation."""
  config = edm2.Edm2Config(
    image_shape=(4, 4, 1),
    num_classes=3,
    model_channels=8,
    channel_mult=(1,),
    num_blocks=0,
    attn_resolutions=(4,),
    channels_per_head=8,
    logvar_channels=8,
    dropout=0.3,
  )
  return config.build(noise.LogNormal(-0.8, 1.6))


def _tiny_params(model):
  """Random, gains too: they start at 0, where D is the same whatever θ is."""
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  draw = np.random.default_rng(0).normal

  def random(leaf):
    return np.asarray(draw(size=leaf.shape), np.float32)

  return jax.jit(model.rules.project)(jax.tree.map(random, shapes))


def _batch(rows):
  ids = np.arange(rows, dtype=np.uint32)
  x = np.random.default_rng(0).uniform(-1, 1, (rows, 4, 4, 1))
  batch = likelihood.Batch(x.astype(np.float32), ids.astype(np.int32) % 4, ids)
  return batch, rng.per_example(rng.stream(0), ids)


def _check_sphere(path, leaf):
  axes = tuple(range(leaf.ndim - 1))
  rms = np.sqrt(np.mean(np.asarray(leaf) ** 2, axes))
  np.testing.assert_allclose(rms, 1, atol=2e-3, err_msg=str(path))


def test_initial_weights():
  """Fresh kernels stand on the sphere, gains at 0."""
  params = jax.jit(_tiny().init)(jax.random.key(0))
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if path[-1].key == 'kernel':
      _check_sphere(path, leaf)
    elif path[-1].key.endswith('_gain'):
      assert leaf == 0
  phases = np.asarray(params['logvar_fourier']['phases'])
  assert 0 <= phases.min() < phases.max() < 2 * np.pi


def test_log_ratio_is_zero_at_the_reference():
  """Law 1: θ and reference are the same projected bytes."""
  model = _tiny()
  params = _tiny_params(model)
  batch, keys = _batch(4)
  log_ratio = jax.jit(model.log_ratio)
  reference = jax.tree.map(np.array, params)
  delta, info = log_ratio(params, reference, {}, batch, keys)
  np.testing.assert_array_equal(delta, 0)
  assert np.all(info['mle_loss'] > 1)
  # This could not fail if D did not depend on θ.
  params['network']['out_gain'] += 0.1
  delta, _ = log_ratio(params, reference, {}, batch, keys)
  assert np.all(np.abs(delta) > 1e-3)


def test_a_step_projects_and_keeps_the_constants():
  """After Adam, and after the average, kernels are on the sphere again."""
  model = _tiny()
  params = _tiny_params(model)
  averages = state_lib.Averages(width=(0.1,))
  transform = state_lib.Optimizer(learning_rate=0.1).transform(
    model.rules, batch_size=4, images=400
  )
  batch, keys = _batch(4)

  @jax.jit
  def step(params):
    def loss(p):
      return model.mle_loss(p, {}, batch, keys).mean()

    grads = jax.grad(loss)(params)
    state = state_lib.create(params, transform, averages)
    state = state_lib.apply_gradients(
      state, grads, transform, averages, model.rules, batch_size=4
    )
    return grads, state.params, state.ema['power_0.100']

  grads, *trees = step(params)
  for tree in trees:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), old in zip(leaves, jax.tree.leaves(params), strict=True):
      if path[-1].key in golden_io.CONSTANTS:
        np.testing.assert_array_equal(leaf, old)
      elif path[-1].key == 'kernel':
        _check_sphere(path, leaf)
        assert np.abs(leaf - old).max() > 1e-3, path
  # The learned variance is trained by this loss.
  assert np.any(grads['logvar_linear']['kernel'])
  # Gradients are tangent to the sphere.
  kernel, grad = (
    np.asarray(tree['network']['out_conv']['kernel'])
    for tree in (params, grads)
  )
  radial = np.abs(np.sum(kernel * grad, (0, 1, 2)))
  assert np.all(radial < 1e-3 * np.sum(np.abs(kernel * grad), (0, 1, 2)))
