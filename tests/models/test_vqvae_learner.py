"""What training a tokenizer minimises, and what of it decays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tiny_var
import var_golden

from ddo_jax.models import vqvae_learner

LEARNER = dataclasses.replace(
  vqvae_learner.build(tiny_var.TOKENIZER), module=tiny_var.TINY_TOKENIZER
)


def _apply(params, *args, method):
  return LEARNER.module.apply({'params': params}, *args, method=method)


def _by_hand(params, image):
  """([B] error, [B] distance), and the gradient of the mean of their sum.

  By the chain rule: the codebook and φ follow the features in full, the
  features them in a quarter; and the decoder's slope passes from f̂ to f.
  """

  def back(method, x):
    return jax.vjp(
      lambda params, x: _apply(params, x, method=method), params, x
    )

  ids = _apply(params, image, method='encode')
  f, from_f = back('features', image)
  sums, from_sums = back(lambda vq, x: vq.quantize.accumulate(x)[0], ids)
  decoded, from_decoded = back(
    lambda vq, x: vq.decoder(vq.post_quant_conv(x)), sums[-1]
  )
  error, gaps = decoded - image, [f - f_hat for f_hat in sums]

  def mean(x):
    return jnp.mean(x**2, axis=(1, 2, 3))

  def slope(x):
    return 2 * x / x.size  # of a batch's mean square

  distance = sum(1.25 * mean(gap) for gap in gaps) / len(gaps)
  first, through = from_decoded(slope(error))
  quarter = sum(0.25 * slope(gap) for gap in gaps) / len(gaps)
  second, _ = from_f(through + quarter)
  third, _ = from_sums([-slope(gap) / len(gaps) for gap in gaps])
  grads = jax.tree.map(lambda *parts: sum(parts), first, second, third)
  return (mean(error), distance), grads


def test_losses_and_their_gradient():
  """Error of the rounded features' image, and distance over the scales."""
  params = tiny_var.weights()[1]['tokenizer']
  stored = jnp.asarray(tiny_var.make_rows(0)['stored'])
  image = LEARNER.codec.encode({}, stored, None)

  @jax.jit
  def run(params, image):
    def loss(params):
      losses = _apply(params, image, method='losses')
      return jnp.mean(sum(losses)), losses

    (_, losses), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return (losses, grads), _by_hand(params, image)

  got, wanted = run(params, image)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    got,
    wanted,
  )
  sizes = [np.abs(leaf).max() for leaf in jax.tree.leaves(got)]
  assert min(sizes) > 1e-3


def test_what_decays():
  """Kernels; neither biases, nor norms, nor the codebook."""
  shapes = var_golden.vqvae_shapes(tiny_var.TOKENIZER)
  decays = jax.tree_util.tree_leaves_with_path(LEARNER.rules.decay_mask(shapes))
  names = [path[-1].key for path, _ in decays]
  assert set(names) == {'kernel', 'bias', 'scale', 'embedding'}
  assert [on for _, on in decays] == [name == 'kernel' for name in names]
