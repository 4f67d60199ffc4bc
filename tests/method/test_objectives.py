"""The objectives of VAR's DDO and of CCA against the original's numbers."""

import functools
from typing import NamedTuple

import golden_io
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
import var_golden

from ddo_jax import config as config_lib
from ddo_jax.method import ddo
from ddo_jax.method import likelihood
from ddo_jax.method import objective
from ddo_jax.method import siblings
from ddo_jax.models import var
from ddo_jax.training import step as step_lib
from ddo_jax.weights import var_names


def _mean_of(terms):
  return sum(jnp.mean(term) for term in terms)


def _ddo(real, fake, dropped, alpha, beta):
  label = jnp.zeros(dropped.shape, jnp.int32)
  rows = objective.Rows(dropped, label, label, label_drop=0.1)
  loss = ddo.DDO(alpha=alpha, beta=beta, normalize=True)
  return _mean_of(loss.loss(real, fake, rows))


def _cca(positive, negative, rows, weight, beta):
  loss = siblings.CCA(alpha=weight, beta=beta, normalize=True)
  rows = objective.Rows(*rows, label_drop=0.1)
  return _mean_of(loss.loss(positive, negative, rows))


@pytest.mark.golden
def test_ddo_of_given_log_ratios():
  """loss_functions.npz: five α, two β, masked rows; values and slopes."""
  golden = golden_io.load('loss_functions.npz')
  with golden_io.precision('f64'):
    gaps = [jnp.asarray(golden[f'gap_{name}']) for name in ('real', 'fake')]
    run = jax.jit(jax.value_and_grad(_ddo, (0, 1)))
    for i, alpha in enumerate(golden['ddo_alphas']):
      for j, beta in enumerate(golden['ddo_betas']):
        loss, slopes = run(*gaps, golden['uncond_mask'], alpha, beta)
        assert abs(loss - golden['ddo_loss'][i, j]) <= 1e-12
        for name, slope in zip(('real', 'fake'), slopes, strict=True):
          wanted = golden[f'ddo_dgap_{name}'][i, j]
          assert golden_io.max_error(slope, wanted) <= 1e-12


@pytest.mark.golden
def test_cca_of_given_log_ratios():
  """loss_functions.npz: four λ; with no label dropped, DDO's own form."""
  golden = golden_io.load('loss_functions.npz')
  label = np.arange(16)
  rows = (golden['uncond_mask'], label, label + 20 * ~golden['same'])
  with golden_io.precision('f64'):
    gaps = [jnp.asarray(golden[f'gap_{name}']) for name in ('real', 'fake')]
    run = jax.jit(jax.value_and_grad(_cca, (0, 1)))
    for i, weight in enumerate(golden['cca_lambdas']):
      loss, slopes = run(*gaps, rows, weight, golden['cca_beta'])
      assert abs(loss - golden['cca_loss'][i]) <= 1e-12
      for name, slope in zip(('pos', 'neg'), slopes, strict=True):
        wanted = golden[f'cca_dgap_{name}'][i]
        assert golden_io.max_error(slope, wanted) <= 1e-12
      plain = siblings.CCA(alpha=weight, beta=golden['cca_beta'])
      terms = plain.loss(*gaps, objective.Rows.plain(16))
      wanted = golden['cca_loss_uncond0'][i]
      assert abs(_mean_of(terms) - wanted) <= 1e-12


def test_preference_is_the_margins_sigmoid():
  r = np.random.default_rng(0).normal(size=(2, 8)) * 50
  got, nothing = siblings.DPO(beta=0.02).loss(*r, objective.Rows.plain(8))
  np.testing.assert_array_equal(nothing, np.zeros(8))
  np.testing.assert_allclose(
    got, -special.log_expit(0.02 * (r[0] - r[1])), rtol=1e-5
  )


def test_unlearning_is_linear():
  """Positives keep weight 1 and their sign."""
  r = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
  dropped = np.array([True, False, False])
  rows = objective.Rows(
    dropped, np.array([9, 1, 2]), np.array([9, 1, 1]), label_drop=0.1
  )
  first, second = siblings.Unlearning(alpha=50.0).loss(*r, rows)
  np.testing.assert_array_equal(first, [-1, -2, -3])
  np.testing.assert_array_equal(second, [-4, -5, 300])


CONFIG = var_golden.CONFIG


def _weights(dtype):
  """Flax params of θ and of the reference."""
  golden = golden_io.load('var_adaln.npz')
  shapes = var_golden.var_shapes(var.transformer(CONFIG), 8)
  state = var_golden.weights(golden, shapes, 'var_adaln')
  away = {}
  for key, tensor in state.items():
    delta = var_golden.normal(f'var_theta_delta/{key}', tensor.shape)
    away[key] = (tensor.astype(np.float64) + 0.01 * delta).astype(np.float32)

  def cast(leaf):
    return np.asarray(leaf, dtype)

  return [jax.tree.map(cast, var_names.to_flax(s)) for s in (away, state)]


def _inputs(golden, dtype):
  """(label, input, tokens) of DDO's four kinds of rows, by name."""

  def cast(name):
    return golden[name].astype(np.int32)

  masked = np.where(golden['uncond_mask'], 10, cast('labels'))
  masked = masked.astype(np.int32)

  def part(label, kind):
    return (
      label,
      golden[f'var_input_{kind}'].astype(dtype),
      cast('ids_real' if kind == 'real' else 'fake_ids'),
    )

  return {
    'ddo': (part(masked, 'real'), part(masked, 'fake')),
    'cca': (
      part(cast('cca_labels_pos'), 'real'),
      part(cast('cca_labels_neg'), 'real'),
    ),
  }


@functools.lru_cache
def _step():
  """Losses, gradients and log-probabilities of both objectives."""
  model = var.transformer(CONFIG)

  def log_probs(params, pair):
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *pair)
    tokens = model.apply({'params': params}, *both, method='token_log_prob')
    return jnp.split(tokens.sum(1), 2)

  def objective(params, reference, pair, loss):
    ours, theirs = log_probs(params, pair), log_probs(reference, pair)
    gaps = [
      a - jax.lax.stop_gradient(b) for a, b in zip(ours, theirs, strict=True)
    ]
    return loss(*gaps), (ours, theirs)

  @jax.jit
  def step(params, reference, inputs, dropped, hyper):
    labels = [part[0] for part in inputs['cca']]
    losses = {
      'ddo': lambda *gaps: _ddo(*gaps, dropped, *hyper['ddo']),
      'cca': lambda *gaps: _cca(*gaps, (dropped, *labels), *hyper['cca']),
    }
    run = jax.value_and_grad(objective, has_aux=True)
    results = {
      name: run(params, reference, inputs[name], loss)
      for name, loss in losses.items()
    }
    args = ({'params': params}, *inputs['ddo'][0])
    return results, -model.apply(*args, method='token_log_prob').mean(1)

  return step


def _check(golden, precision, results):
  """Log-probabilities, losses and gradients of both objectives."""
  suffix = '' if precision == 'f64' else '_f32'
  rows = 1e-8 if precision == 'f64' else 2e-4
  kinds = {'ddo': ('real', 'fake'), 'cca': ('pos', 'neg')}
  for name, ((loss, sides), grads) in results.items():
    for side, values in zip(('theta', 'ref'), sides, strict=True):
      for kind, got in zip(kinds[name], values, strict=True):
        wanted = golden[f'{name}_logp_{side}_{kind}{suffix}']
        assert golden_io.max_error(got, wanted) <= rows, (name, side, kind)
    wanted = float(golden[f'{name}_loss{suffix}'])
    exact = 1e-10 if precision == 'f64' else 1e-6 * wanted
    assert abs(loss - wanted) <= exact
    found = 0
    for key, wanted in golden.items():
      if key.startswith(f'{name}_grad/'):
        got = grads[key.removeprefix(f'{name}_grad/')]
        exact = 1e-9 if precision == 'f64' else 1e-4 * np.abs(wanted).max()
        assert golden_io.max_error(got, wanted) <= exact + 1e-9, key
        found += 1
    assert found == 6


@pytest.mark.golden
@pytest.mark.parametrize('precision', ['f64', 'f32'])
def test_steps_of_the_network(precision):
  """var_losses.npz: DDO's and CCA's step on four pairs, one masked."""
  golden = golden_io.load('var_losses.npz')
  with golden_io.precision(precision) as dtype:
    params, reference = _weights(dtype)

    def number(name):
      return np.asarray(golden[name], dtype)

    hyper = {
      'ddo': (number('alpha'), number('beta')),
      'cca': (number('cca_lambda'), number('cca_beta')),
    }
    inputs = _inputs(golden, dtype)
    positive = golden['uncond_mask'] | (
      inputs['cca'][0][0] == inputs['cca'][1][0]
    )
    np.testing.assert_array_equal(positive, golden['cca_same'])
    dropped = golden['uncond_mask']
    results, mean = _step()(params, reference, inputs, dropped, hyper)
    results, mean = jax.tree.map(np.asarray, (results, mean))
  results = {
    name: (value, var_names.to_official(grads, CONFIG.tokenizer.patch_nums))
    for name, (value, grads) in results.items()
  }
  _check(golden, precision, results)
  wanted = float(golden['ce_theta_real_mean'])
  assert mean.mean() == pytest.approx(wanted, rel=1e-6)
  grads = results['ddo'][1]
  keys = bytes(golden['per_param_grad_norm_keys']).decode().split('\n')
  norms = np.array([np.linalg.norm(grads[key]) for key in keys])
  if precision == 'f64':
    wanted = golden['ddo_per_param_grad_norm']
    assert golden_io.max_error(norms, wanted) <= 1e-9
  name, rel = {
    'f64': ('ddo_grad_norm', 1e-9),
    'f32': ('ddo_grad_norm_f32', 1e-4),
  }[precision]
  assert np.linalg.norm(norms) == pytest.approx(float(golden[name]), rel=rel)


@pytest.mark.golden
def test_tokens_of_the_step():
  """var_losses.npz: f̂ of the sampled tokens, input of real and fake ones."""
  golden = golden_io.load('var_losses.npz')
  ids = {
    name: golden[name].astype(np.int32)
    for name in ('fake_ids_sampled', 'fake_ids', 'ids_real')
  }
  with golden_io.precision('f64') as dtype:
    model, frozen = var_golden.tokenizer(dtype)

    @jax.jit
    def run(frozen, sampled, fake, real):
      apply = functools.partial(model.apply, {'params': frozen})
      f_hat = apply(sampled, method='f_hat')
      both = apply(jnp.concatenate([fake, real]), method='teacher_input')
      return f_hat, *jnp.split(both, 2)

    f_hat, fake, real = map(np.asarray, run(frozen, *ids.values()))
  wanted = golden_io.nhwc(golden['fake_fhat'])
  assert golden_io.max_error(f_hat, wanted) <= 1e-9
  assert golden_io.max_error(fake, golden['var_input_fake']) <= 1e-9
  assert golden_io.max_error(real, golden['var_input_real']) <= 1e-9


@pytest.mark.golden
def test_fakes_are_encoded_from_pixels():
  """var_losses.npz: sampled tokens, image, and the tokens of the image.

  And var_adaln.npz: the images of guided greedy sampling.
  """
  golden = golden_io.load('var_losses.npz')
  guided = golden_io.load('var_adaln.npz')
  model, frozen = var_golden.tokenizer(np.float32)

  @jax.jit
  def run(frozen, ids, more):
    apply = functools.partial(model.apply, {'params': frozen})
    f_hat = apply(ids, method='f_hat')
    images = apply(jnp.concatenate([f_hat, more]), method='decode')
    image, more = jnp.split(images, [len(f_hat)])
    again = apply(image, method='encode')
    return f_hat, image, again, apply(again, method='teacher_input'), more

  sampled = golden['fake_ids_sampled'].astype(np.int32)
  greedy = golden_io.nhwc(guided['ar_cfg1.5_fhat']).astype(np.float32)
  f_hat, image, ids, inputs, more = run(frozen, sampled, greedy)
  wanted = golden_io.nhwc(guided['ar_cfg1.5_img01'])
  assert golden_io.max_error((more + 1) / 2, wanted) <= 2e-5
  wanted = golden_io.nhwc(golden['fake_fhat'])
  assert golden_io.max_error(f_hat, wanted) <= 2e-5
  wanted = golden_io.nhwc(golden['fake_img01'])
  assert golden_io.max_error((image + 1) / 2, wanted) <= 2e-5
  np.testing.assert_array_equal(ids, golden['fake_ids'])
  assert np.mean(ids == sampled) < 0.1
  assert golden_io.max_error(inputs, golden['var_input_fake']) <= 2e-5


class Given(NamedTuple):
  """A model whose log-ratios are given, of two pairs of rows."""

  log_ratios: np.ndarray

  def log_ratio(self, *_):
    info = {'noise_bin': np.zeros(4, int), 'mle_loss': np.zeros(4)}
    return jnp.asarray(self.log_ratios), info


_SIBLINGS = {
  'dpo': siblings.DPO(beta=1.0),
  'cca': siblings.CCA(alpha=8.0, beta=1.0, normalize=True),
  'unlearning': siblings.Unlearning(alpha=8.0, normalize=True),
}


@pytest.mark.parametrize(
  ('name', 'label_drop', 'wanted'),
  [
    # Images 0 and 1 of classes 0 and 1; the second's neighbour has its class.
    ('dpo', 0.5, lambda s: np.mean(s([-2, 3]))),
    ('cca', 0.5, lambda s: (np.sum(s([-1, -2])) + 8 * s(-1) + s(-5)) / 16),
    ('cca', 0.0, lambda s: (np.sum(s([-1, -2])) + 8 * s(-1) + 8 * s(5)) / 2),
    ('unlearning', 0.5, lambda _: (-1 - 2 - 8 - 5) / 16),
    ('unlearning', 0.0, lambda _: (-1 - 2 - 8 + 40) / 2),
  ],
)
def test_the_other_objectives(name, label_drop, wanted):
  """Without label drop as published: all second rows are negatives.

  And nothing is divided by a weight that is not there.
  """
  model = Given(np.array([1.0, -1.0, 2.0, 5.0]))
  real = likelihood.Batch(None, jnp.array([0, 1]), None)
  other = likelihood.Batch(None, jnp.array([1, 1]), None)
  pairs = step_lib.Pairs(real, other, jnp.zeros(2), jnp.zeros(2, bool))
  phase = config_lib.Phase(objective=_SIBLINGS[name], label_drop=label_drop)
  loss, (metrics, _) = step_lib.contrastive_loss(
    None, None, {}, pairs, model, phase
  )

  def softplus(x):
    return np.log1p(np.exp(np.asarray(x, float)))

  np.testing.assert_allclose(loss, wanted(softplus), rtol=1e-6)
  chance = {'dpo': np.log(2), 'unlearning': 0}
  chance['cca'] = np.log(2) * ((2 + 8 + 1) / 16 if label_drop else 1 + 8)
  np.testing.assert_allclose(metrics['chance_loss'], chance[name], 1e-6)
