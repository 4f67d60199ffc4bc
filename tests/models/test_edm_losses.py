"""EDM's and EDM2's losses, DDO's on them, and schedules, against originals."""

import golden_io
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax import config
from ddo_jax.method import ddo
from ddo_jax.method import likelihood
from ddo_jax.method import noise
from ddo_jax.method import objective
from ddo_jax.models import edm
from ddo_jax.models import edm2
from ddo_jax.training import state as state_lib
from ddo_jax.training import step as step_lib
from ddo_jax.weights import edm_names


def _model(family, golden, p_mean, p_std, **changes):
  options = golden_io.read_json(golden, 'config') | changes
  if family == 'edm':
    knobs = golden_io.edm_config(options)
  else:
    knobs = golden_io.edm2_config(options)
  return knobs.build(noise.LogNormal(p_mean, p_std))


def _params(family, golden, dtype, prefix):
  taps = (1, 1) if family == 'edm' else ()
  return golden_io.params(golden, dtype, prefix, taps)


@pytest.mark.golden
@pytest.mark.parametrize(('precision', 'rtol'), [('f64', 1e-9), ('f32', 1e-5)])
@pytest.mark.parametrize(
  ('family', 'file'), [('edm', 'edm_ddpmpp.npz'), ('edm2', 'edm2_cond.npz')]
)
def test_mle_loss(family, file, precision, rtol, monkeypatch):
  """train_losses.npz: EDMLoss and EDM2Loss, summed over C, H, W."""
  golden, net = golden_io.load('train_losses.npz'), golden_io.load(file)
  law = golden_io.read_json(golden, f'{family}_opts')
  p_mean, p_std = law['P_mean'], law['P_std']
  model = _model(family, net, p_mean, p_std, dropout=0.0)
  assert model.weight == noise.EdmWeight(law['sigma_data'])
  with golden_io.precision(precision) as dtype:
    sigma = np.exp(p_mean + p_std * golden['rnd_normal'].ravel().astype(float))
    keys = golden_io.fix_noise(
      monkeypatch,
      sigma,
      golden_io.nhwc(golden['noise_unit']),
      p_mean,
      p_std,
      dtype,
    )
    x = np.asarray(golden_io.nhwc(golden['images']), dtype)
    label = golden_io.labels(golden['labels'])
    batch = likelihood.Batch(x, label, np.arange(3))
    params = _params(family, net, dtype, 'sd/')
    loss = jax.jit(model.mle_loss)(params, {}, batch, keys)
    assert loss.dtype == dtype
    loss = np.asarray(loss)
  wanted = golden[f'{family}_loss_per_example_sum_f64']
  np.testing.assert_allclose(loss, wanted, rtol=rtol)
  mean = golden[f'{family}_loss_mean_f64']
  np.testing.assert_allclose(np.mean(loss) / x[0].size, mean, rtol=rtol)


def _pair(golden, dtype):
  """Rows real 0, fake 0, real 1, … as the step feeds them."""
  rows = [
    likelihood.Batch(
      np.asarray(golden_io.nhwc(golden[f'x_{kind}']), dtype),
      golden_io.labels(golden[f'labels_{kind}']),
      np.arange(4),
    )
    for kind in ('real', 'fake')
  ]
  return step_lib.interleave(*rows)


def _ddo_loss(model, golden):
  """(θ, reference, batch, keys) -> (loss, rows), and its gradient in θ."""
  loss_of = ddo.DDO(float(golden['alpha']), float(golden['beta'])).loss

  def loss(params, reference, batch, keys):
    delta, info = model.log_ratio(params, reference, {}, batch, keys)
    terms = loss_of(delta[::2], delta[1::2], objective.Rows.plain(4))
    rows = {'delta': delta, 'logp_theta': -info['mle_loss']}
    return sum(jnp.mean(term) for term in terms), rows

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def _check_ddo(golden, results, precision, mode):
  """Compares a run in `mode`: '' for evaluation, 'train_' for training."""
  (loss, rows), grads = jax.tree.map(np.asarray, results)
  f64 = precision == 'f64'

  def tell(name):
    return golden[f'{mode}{name}_{precision}']

  np.testing.assert_allclose(
    loss, tell('loss'), rtol=0, atol=1e-8 if f64 else 5e-5
  )
  for i, kind in enumerate(('real', 'fake')):
    delta = rows['delta'][i::2]
    wanted = tell(f'delta_{kind}')
    atol = 1e-8 if f64 else 2e-3
    np.testing.assert_allclose(delta, wanted, rtol=0, atol=atol)
    theta = rows['logp_theta'][i::2]
    for name, value in (('theta', theta), ('ref', theta - delta)):
      wanted = golden[f'{mode}logp_{name}_f64'][4 * i : 4 * i + 4]
      np.testing.assert_allclose(value, wanted, rtol=1e-12 if f64 else 1e-6)
  state = edm_names.to_official(grads)
  rtol = (1e-9 if mode == '' else 1e-8) if f64 else 5e-5
  for key in golden_io.read_json(golden, 'grad_params'):
    wanted = tell(f'grad/{key}')
    assert golden_io.relative_error(state[key], wanted) <= rtol, key
  norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(grads)))
  wanted = golden[f'{mode}grad_global_norm_f64']
  np.testing.assert_allclose(norm, wanted, rtol=rtol)
  return grads


@pytest.mark.golden
@pytest.mark.parametrize('precision', ['f64', 'f32'])
def test_ddo_of_edm(precision, monkeypatch):
  """edm_ddo_loss.npz: loss, Δ, log-likelihoods and gradients."""
  golden = golden_io.load('edm_ddo_loss.npz')
  model = _model('edm', golden, -1.2, 1.2)
  with golden_io.precision(precision) as dtype:
    keys = _fixed_keys(monkeypatch, golden, dtype)
    theta, reference = (
      _params('edm', golden, dtype, prefix) for prefix in ('theta/', 'ref/')
    )
    run = _ddo_loss(model, golden)
    results = run(theta, reference, _pair(golden, dtype), keys)
    grads = _check_ddo(golden, results, precision, '')
  # No augmentation labels: their map gets no gradient.
  assert not np.any(grads['network']['map_augment']['kernel'])


@pytest.mark.golden
@pytest.mark.parametrize('precision', ['f64', 'f32'])
def test_ddo_of_edm2(precision, monkeypatch):
  """edm2_ddo_loss.npz: θ as it is, and projected as in training mode."""
  golden = golden_io.load('edm2_ddo_loss.npz')
  model = _model('edm2', golden, -0.8, 1.6)
  with golden_io.precision(precision) as dtype:
    keys = _fixed_keys(monkeypatch, golden, dtype, -0.8, 1.6)
    theta, reference = (
      _params('edm2', golden, dtype, prefix) for prefix in ('theta/', 'ref/')
    )
    run = _ddo_loss(model, golden)
    batch = _pair(golden, dtype)
    grads = _check_ddo(
      golden, run(theta, reference, batch, keys), precision, ''
    )
    theta = jax.jit(model.rules.project)(theta)
    results = run(theta, reference, batch, keys)
    _check_ddo(golden, results, precision, 'train_')
  # The log-variance is no part of the likelihood's surrogate.
  assert not np.any(grads['logvar_linear']['kernel'])


def _fixed_keys(monkeypatch, golden, dtype, p_mean=-1.2, p_std=1.2):
  """The keys of interleaved rows: a real row and its fake share theirs."""
  sigma = golden['sigma'].astype(float)
  noise = golden_io.nhwc(golden['noise'].astype(float))
  noise = noise / sigma[:, None, None, None]
  keys = golden_io.fix_noise(monkeypatch, sigma, noise, p_mean, p_std, dtype)
  return step_lib.interleave(keys, keys)


@pytest.mark.golden
@pytest.mark.parametrize(
  'name', ['edm2_img64_s', 'edm2_img512_l', 'edm2_nodecay', 'edm2_norampup']
)
def test_learning_rate_of_edm2(name):
  """lr_schedule.npz: ramp-up, then the inverse square root."""
  golden = golden_io.load('lr_schedule.npz')
  options = golden_io.read_json(golden, f'{name}_opts')
  optimizer = state_lib.Optimizer(
    warmup_images=int(options.get('rampup_Mimg', 10) * 1e6),
    decay='inverse_sqrt' if options['ref_batches'] else 'none',
    decay_images=options['ref_batches'] * options['batch_size'],
  )
  _check_rates(golden, name, options['ref_lr'], optimizer)


@pytest.mark.golden
def test_learning_rate_of_edm():
  """lr_schedule.npz: a ramp-up of 10 M images."""
  golden = golden_io.load('lr_schedule.npz')
  optimizer = state_lib.Optimizer(warmup_images=10_000_000)
  _check_rates(golden, 'edm_lr_1e-3_rampup10M', 1e-3, optimizer)


def _check_rates(golden, name, peak, optimizer):
  with golden_io.precision('f64'):
    seen = jnp.asarray(golden['cur_nimg'])
    rate = peak * optimizer.factor(seen, images=10**10)
  np.testing.assert_allclose(rate, golden[name], rtol=1e-12)


EDM = edm.EdmConfig(
  image_shape=(8, 8, 3),
  num_classes=2,
  model_channels=8,
  num_blocks=1,
  channel_mult=(1,),
)
EDM2 = edm2.Edm2Config(
  image_shape=(8, 8, 3),
  num_classes=2,
  model_channels=64,
  num_blocks=1,
  channel_mult=(1,),
  dropout=0.1,
)


@pytest.mark.parametrize(
  ('knobs', 'loss'),
  [(EDM, objective.MLE()), (EDM2, objective.MLE()), (EDM2, ddo.DDO(4.0, 0.05))],
)
def test_models_fit_the_step(knobs, loss):
  """Traced only: what the step takes and gives, of a model from its config."""
  phase = config.Phase(
    objective=loss,
    optimizer=config.Optimizer(learning_rate=1e-4),
    averages=config.Averages(width=(0.05,)),
    batch_size=2,
    label_drop=0.1,
  )
  model = knobs.build(noise.LogNormal(-1.2, 1.2))
  assert model == knobs.build(noise.LogNormal(-1.2, 1.2))
  raw = {
    'stored': np.zeros((2, 8, 8, 3), np.uint8),
    'label': np.zeros(2, np.int32),
    'id': np.arange(2, dtype=np.uint32),
  }

  def run(key):
    params = model.init(key)
    transform = phase.optimizer.transform(
      model.rules, phase.batch_size, phase.images
    )
    state = state_lib.create(params, transform, phase.averages)
    fake = raw if loss.contrastive else None
    return state, step_lib.train_step(
      state, params, {}, raw, fake, model, phase, key
    )

  before, (after, metrics) = jax.eval_shape(run, jax.random.key(0))
  assert before == after
  assert metrics['loss'].shape == ()
