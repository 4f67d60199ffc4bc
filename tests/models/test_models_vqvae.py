"""The tokenizer against the original's numbers."""

import dataclasses
import functools

import golden_io
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import var_golden

from ddo_jax import errors
from ddo_jax.data import codec
from ddo_jax.models import vqvae

TINY = var_golden.TOKENIZER
PIXELS = codec.Pixels(nearest=False)


@pytest.mark.golden
def test_matrices():
  """quant10.npz, vq_tiny.npz: area and bicubic weights of every scale."""
  found = 0
  for name, size in (('quant10', 16), ('vq_tiny', 4)):
    golden = golden_io.load(f'{name}.npz')
    for n in golden['patch_nums']:
      wanted = golden[f'area_down_{size}_{n}']
      assert golden_io.max_error(vqvae.area_matrix(size, n), wanted) <= 1e-12
      wanted = golden[f'bicubic_up_{n}_{size}']
      assert golden_io.max_error(vqvae.bicubic_matrix(n, size), wanted) <= 1e-12
      found += 1
  assert found == 14


@pytest.mark.golden
def test_phi():
  """quant10.npz: the two midpoints go where the original rounds them."""
  golden = golden_io.load('quant10.npz')
  assert vqvae.phi_index(10) == tuple(golden['phi_idx'])
  assert vqvae.phi_index(1) == (0,)
  assert vqvae.phi_index(6) == (0, 0, 1, 2, 3, 3)
  # Away from ties the formula gives the table's entries.
  ticks = np.linspace(1 / 12, 11 / 12, 4)
  np.testing.assert_allclose(golden['phi_ticks'], ticks)
  for scales in (4, 14):
    ratio = np.arange(scales) / (scales - 1)
    wanted = np.abs(ratio[:, None] - ticks[None, :]).argmin(1)
    assert vqvae.phi_index(scales) == tuple(wanted)


@jax.jit
def _quantize10(params, f):
  quantizer = vqvae.Quantizer(vqvae.PATCH_NUMS, 64, 8)
  variables = {'params': params}
  ids = quantizer.apply(variables, f)
  return ids, *quantizer.apply(variables, ids, method='accumulate')


@pytest.mark.golden
@pytest.mark.parametrize('precision', ['f64', 'f32'])
def test_ten_scales(precision):
  """quant10.npz: tokens exactly, every partial sum, the input."""
  golden = golden_io.load('quant10.npz')
  shapes = var_golden.shapes(
    vqvae.Quantizer(vqvae.PATCH_NUMS, 64, 8), (2, 16, 16, 8)
  )
  with golden_io.precision(precision) as dtype:
    params = var_golden.params(golden, shapes, 'vq10', dtype)
    f = np.asarray(golden_io.nhwc(golden['f']), dtype)
    ids, sums, inputs = _quantize10(params, f)
    assert inputs.dtype == dtype
  np.testing.assert_array_equal(ids, golden['ids'])
  wanted = np.moveaxis(golden['fhat_scales'], (1, 2), (0, -1))
  assert golden_io.max_error(np.stack(sums), wanted) <= 1e-5
  assert golden_io.max_error(inputs, golden['var_input']) <= 1e-5


@jax.jit
def _tokenize(params, image):
  model, variables = vqvae.build(TINY), {'params': params}
  apply = functools.partial(model.apply, variables)
  watched = functools.partial(apply, capture_intermediates=True)

  def output(seen, name):
    return seen['intermediates'][name]['__call__'][0]

  f, seen = watched(image, method='features')
  got = {'enc_out': output(seen, 'encoder'), 'f': f}
  got['ids'] = ids = apply(image, method='encode')
  sums, _ = apply(ids, method=lambda module, x: module.quantize.accumulate(x))
  got['fhat_scales'] = jnp.stack(sums, axis=1)
  got['fhat'] = f_hat = apply(ids, method='f_hat')
  got['var_input'] = apply(ids, method='teacher_input')
  decoded, seen = watched(f_hat, method='decode')
  return got, {'raw_dec': output(seen, 'decoder'), 'img_dec': decoded}


@pytest.mark.golden
@pytest.mark.parametrize(('precision', 'atol'), [('f64', 1e-9), ('f32', 2e-5)])
def test_tokenizer(precision, atol):
  """vq_tiny.npz: image to features, tokens, sums, input; and back."""
  golden = golden_io.load('vq_tiny.npz')
  with golden_io.precision(precision) as dtype:
    _, params = var_golden.tokenizer(dtype)
    image = golden_io.nhwc(golden['images_u8']).astype(dtype) / 255 * 2 - 1
    got, decoded = _tokenize(params, image.astype(dtype))
    assert got['f'].dtype == decoded['img_dec'].dtype == dtype
    pixels = PIXELS.decode({}, decoded['img_dec'].astype(np.float32))
  np.testing.assert_array_equal(got['ids'], golden['ids'])
  assert got['ids'].dtype == np.int32
  for name in ('enc_out', 'f', 'fhat', 'fhat_scales'):
    wanted = np.moveaxis(golden[name], -3, -1)
    assert golden_io.max_error(got[name], wanted) <= atol, name
  assert golden_io.max_error(got['var_input'], golden['var_input']) <= atol
  for name, image in decoded.items():
    wanted = golden_io.nhwc(golden[name])
    assert golden_io.max_error(image, wanted) <= 2e-5, name
  off = np.asarray(pixels, int) - golden_io.nhwc(golden['img_dec_u8_trunc'])
  assert np.abs(off).max() <= 1
  assert np.mean(off != 0) < 1e-3


def test_parameters_of_the_released_tokenizer():
  """vae_ch160v4096z32, part by part."""
  shapes = var_golden.vqvae_shapes(vqvae.VqvaeConfig())
  assert {name: golden_io.count(part) for name, part in shapes.items()} == {
    'encoder': 44_107_872,
    'decoder': 64_653_923,
    'quantize': 168_064,
    'quant_conv': 9_248,
    'post_quant_conv': 9_248,
  }


def test_one_scale_has_no_input():
  quantizer = vqvae.Quantizer((1,), 5, 3)
  f = np.random.default_rng(0).normal(size=(2, 1, 1, 3)).astype(np.float32)
  ids, variables = quantizer.init_with_output(jax.random.key(0), f)
  _, inputs = quantizer.apply(variables, ids, method='accumulate')
  assert ids.shape == (2, 1)
  assert inputs.shape == (2, 0, 3)


def test_truncation():
  """255·x is cut off, not rounded; beyond the range it is clipped."""
  image = np.array([-2, -1, -0.999, 0, 0.999, 1, 2], np.float32)
  wanted = [0, 0, 0, 127, 254, 255, 255]
  np.testing.assert_array_equal(PIXELS.decode({}, image), wanted)


@pytest.mark.parametrize(
  'options',
  [
    {'patch_nums': (2, 4)},
    {'patch_nums': (1, 3, 2, 4)},
    {'patch_nums': (1, 2, 3)},
    {'patch_nums': ()},
    {'image_shape': (64, 32, 3)},
    {'image_shape': (64, 64)},
    {'base': 40},
    {'base': 0},
    {'vocab': 0},
    {'channels': -1},
  ],
)
def test_misfits_are_refused(options):
  with pytest.raises(errors.UserError, match='must'):
    vqvae.build(dataclasses.replace(TINY, **options))
