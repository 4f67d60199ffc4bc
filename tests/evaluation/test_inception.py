"""The Inception network against the original programs' taps."""

import functools
import zlib

import golden_io
import inception_state
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax import errors
from ddo_jax.evaluation.networks import inception
from ddo_jax.evaluation.networks import resize
from ddo_jax.weights import inception as convert


def seeded_weight(key, shape):
  """A weight by the golden file's recipe."""
  seed = zlib.crc32(f'inc/{key}'.encode())
  x = np.random.RandomState(seed).standard_normal(shape)
  if key.endswith('conv.weight'):
    x = x * np.sqrt(2 / np.prod(shape[1:]))
  elif key == 'fc.weight':
    x = x / np.sqrt(shape[1])
  elif key.endswith('bn.weight'):
    x = 1 + 0.1 * x
  elif key.endswith('running_var'):
    x = np.exp(0.2 * x)
  else:
    x = 0.1 * x
  return x.astype(np.float32)


@functools.cache
def seeded_state():
  """The state dict of the golden network, whose keys the file lists."""
  golden = golden_io.load('inception.npz')
  keys = bytes(golden['keys_utf8']).decode().split('\n')
  shapes = {k: v.shape for k, v in inception_state.to_state(_zeros()).items()}
  assert sorted(keys) == sorted(shapes)
  state = {key: seeded_weight(key, shapes[key]) for key in keys}
  first = np.float32([x.flat[0] for x in state.values()])
  np.testing.assert_array_equal(first, golden['w_first'].astype(np.float32))
  total = [np.abs(x.astype(np.float64)).sum() for x in state.values()]
  np.testing.assert_allclose(total, golden['w_abs'], rtol=1e-6)
  return state


def _zeros():
  shapes = inception.param_shapes()
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)


@functools.cache
def network():
  """One compilation for both resizes."""
  module = inception.Inception()
  return jax.jit(lambda params, x: module.apply({'params': params}, x))


NAMES = {
  'tap64': 'pool_1',
  'tap192': 'pool_2',
  'tap768': 'mixed_6e',
  'tap2048': 'features',
  'logits_unbiased': 'logits_unbiased',
  'logits': 'logits',
}


@pytest.mark.golden
@pytest.mark.parametrize(
  ('rule', 'prefix'), [('tf1', 'tf1'), ('half_pixel', 'pf')]
)
def test_every_tap(rule, prefix):
  golden = golden_io.load('inception.npz')
  images = golden_io.nhwc(golden['images_u8'])
  params = convert.to_flax(seeded_state())
  x = inception.preprocess(jnp.asarray(images), rule)
  taps = network()(params, x)
  for name, field in NAMES.items():
    error = golden_io.max_error(
      getattr(taps, field), golden[f'{prefix}_{name}']
    )
    assert error < 2e-5, name
  if rule == 'tf1':
    wanted = golden['tf1_spatial2023']
    assert golden_io.max_error(taps.spatial, wanted) < 5e-5
    got = np.asarray(taps.features)
    assert golden_io.max_error(got, golden['nv_tap2048_f32']) < 2e-5


@pytest.mark.golden
def test_the_resized_input():
  golden = golden_io.load('inception.npz')
  images = golden_io.nhwc(golden['images_u8'])
  x = np.asarray(inception.preprocess(jnp.asarray(images)))
  row = golden['tf1_input_row150_ch1']
  np.testing.assert_allclose(x[:, 150, :, 1], row, rtol=0, atol=1e-6)
  moments = np.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], axis=1)
  wanted = golden['tf1_input_stats'][:, :2]
  np.testing.assert_allclose(moments, wanted, rtol=0, atol=2e-6)
  whole = jax.eval_shape(inception.apply, inception.param_shapes(), images)
  assert whole.features.shape == (8, 2_048) and whole.spatial.shape == (
    8,
    2_023,
  )


@pytest.mark.golden
@pytest.mark.parametrize('size', [32, 64, 256, 512])
def test_resize_tables(size):
  golden = golden_io.load('inception.npz')
  for rule, prefix in (('tf1', 'tf1'), ('half_pixel', 'hp')):
    table = resize.bilinear_table(size, 299, rule)
    for got, name in zip(table, ('lo', 'hi', 'frac'), strict=True):
      wanted = golden[f'{prefix}_{name}_{size}']
      np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6, err_msg=name)
  matrix = golden_io.load('resize_tables.npz')[f'bicubic_aa_{size}_to_224']
  got = resize.bicubic_matrix(size, 224)
  np.testing.assert_allclose(got, matrix, rtol=0, atol=1e-6)


def test_images_of_another_kind_are_refused():
  with pytest.raises(errors.UserError, match='repeat the channel'):
    inception.preprocess(jnp.zeros((1, 8, 8, 1), jnp.uint8))
  with pytest.raises(errors.UserError, match='int32'):
    inception.preprocess(jnp.zeros((1, 8, 8, 3), jnp.int32))
  with pytest.raises(errors.UserError, match="'lanczos' is unknown"):
    resize.bilinear_table(8, 299, 'lanczos')
