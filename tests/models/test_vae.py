"""The autoencoder against PyTorch, and the files of its weights.

golden/vae.npz holds what PyTorch's own layers, put together as diffusers
publishes its AutoencoderKL, made of the weights that `weights` draws.
"""

import zlib

import golden_io
import jax
import jax.numpy as jnp
import numpy as np
import official_files
import pytest

from ddo_jax import errors
from ddo_jax.models import vae
from ddo_jax.weights import safetensors_file
from ddo_jax.weights import torch_zip
from ddo_jax.weights import vae_names

SMALL = vae.AutoencoderKL((8, 8, 16), 1, 4, 4)
ATTENTION = {
  'query': 'to_q',
  'key': 'to_k',
  'value': 'to_v',
  'proj_attn': 'to_out.0',
}


def weights():
  """A state dict of SMALL: names and shapes from PyTorch, float64 draws."""
  state = {}
  shapes = golden_io.read_json(golden_io.load('vae.npz'), 'shapes')
  for key, shape in shapes.items():
    random = np.random.RandomState(zlib.crc32(key.encode()))
    offset = float(key.endswith('weight') and len(shape) == 1)  # of a norm
    state[key] = offset + 0.3 * random.standard_normal(shape)
  return state


def older(state):
  """The state dict under the older names of the attention's layers."""
  for name, newer in ATTENTION.items():
    state = {
      key.replace(f'.attentions.0.{newer}.', f'.attentions.0.{name}.'): tensor
      for key, tensor in state.items()
    }
  return state


def pointwise(state):
  """The state dict with 1×1 convolutions for linear layers."""
  return {
    key: tensor[:, :, None, None] if tensor.ndim == 2 else tensor
    for key, tensor in state.items()
  }


def linear(state):
  """The state dict with linear layers for 1×1 convolutions."""
  return {
    key: tensor[:, :, 0, 0] if tensor.shape[2:] == (1, 1) else tensor
    for key, tensor in state.items()
  }


@jax.jit
def run(params, images, latents):
  moments = SMALL.apply({'params': params}, images, method='encode_moments')
  decoded = SMALL.apply({'params': params}, latents, method='decode')
  return dict(zip(('mean', 'std'), moments, strict=True), decoded=decoded)


@pytest.mark.golden
@pytest.mark.parametrize(('precision', 'atol'), [('f64', 1e-12), ('f32', 2e-5)])
def test_both_ways_agree_with_pytorch(precision, atol):
  golden = golden_io.load('vae.npz')
  with golden_io.precision(precision) as dtype:
    params = vae_names.to_flax(weights(), SMALL)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), params)
    images = np.asarray(golden_io.nhwc(golden['images']), dtype)
    latents = np.asarray(golden_io.nhwc(golden['mean']), dtype)
    got = run(params, images, latents)
    for name, value in got.items():
      wanted = golden_io.nhwc(golden[name])
      assert golden_io.max_error(value, wanted) <= atol, name


def test_extreme_deviations_are_bounded():
  golden = golden_io.load('vae.npz')
  params = vae_names.to_flax(weights(), SMALL)
  params = jax.tree.map(np.float32, params)
  images, latents = (
    np.float32(golden_io.nhwc(golden[name])) for name in ('images', 'mean')
  )
  for bias, wanted in ((1e4, np.exp(10.0)), (-1e4, np.exp(-15.0))):
    params['quant_conv']['bias'] = np.full(8, bias, np.float32)
    std = run(params, images, latents)['std']
    np.testing.assert_allclose(std, wanted, rtol=1e-5)


def test_the_released_size():
  images = jax.ShapeDtypeStruct((1, 512, 512, 3), jnp.float32)

  def init(x):
    return vae.AutoencoderKL().init(jax.random.key(0), x)['params']

  params = jax.eval_shape(init, images)
  assert golden_io.count(params) == 83_653_863
  assert len(jax.tree.leaves(params)) == 248

  def apply(p, x):
    return vae.AutoencoderKL().apply({'params': p}, x, method='encode_moments')

  mean, std = jax.eval_shape(apply, params, images)
  assert mean.shape == std.shape == (1, 64, 64, 4)


@pytest.mark.parametrize('change', [dict, older, pointwise, linear])
def test_every_public_form_gives_the_same_params(change):
  state = weights()
  changed = change(state)
  params = vae_names.to_flax(changed, SMALL)
  back = vae_names.to_official(params)
  assert back.keys() == state.keys()
  for key, tensor in state.items():
    np.testing.assert_array_equal(back[key], tensor, err_msg=key)
    assert back[key].flags.c_contiguous
  attention = [key for key in changed if 'attentions' in key]
  assert len(attention) == 20  # two, of a norm and four layers
  assert any('query' in key for key in attention) == (change is older)


@pytest.mark.parametrize('name', ['vae.safetensors', 'vae.bin'])
def test_files_are_read(tmp_path, name):
  state = {key: w.astype(np.float16) for key, w in older(weights()).items()}
  if name.endswith('.bin'):
    torch_zip.write(tmp_path / name, state)
  else:
    safetensors_file.write(tmp_path / name, state, {})
  params = vae_names.read(tmp_path / name, SMALL)
  wanted = vae_names.to_flax(state, SMALL)
  assert jax.tree.structure(params) == jax.tree.structure(wanted)
  jax.tree.map(np.testing.assert_array_equal, params, wanted)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype('f2')}


CONV = 'decoder.up_blocks.1.resnets.0.conv1.weight'
QUERY = 'encoder.mid_block.attentions.0.to_q.weight'


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (lambda s: s.pop(CONV), f'lack 1 tensors ({CONV}, …) of'),
    (lambda s: s.pop('quant_conv.bias'), 'lack 1 tensors (quant_conv.bias'),
    (lambda s: s.update(loss=s[CONV]), 'have 1 tensors (loss, …) too many'),
    (
      # Both names of one layer.
      lambda s: s.update({QUERY.replace('to_q', 'query'): s[QUERY]}),
      'query.weight, …) too many',
    ),
    (lambda s: s.update({CONV: s[CONV][:, :4]}), f'{CONV} is float64 [8, 4, 3'),
    (lambda s: s.update({CONV: s[CONV][:, :, 1, 1]}), f'{CONV} is float64 [8'),
    (lambda s: s.update({CONV: s[CONV].astype('i4')}), f'{CONV} is int32'),
    (lambda s: s.update({QUERY: s[QUERY][0]}), f'{QUERY} is float64 [16]'),
    (lambda s: s.update({QUERY: np.ones((16, 16, 3, 3))}), f'{QUERY} is'),
  ],
)
def test_wrong_weights_are_refused_in_one_line(tmp_path, change, words):
  state = weights()
  change(state)
  path = tmp_path / 'vae.safetensors'
  safetensors_file.write(path, state, {})
  with pytest.raises(errors.UserError) as caught:
    vae_names.read(path, SMALL)
  line = str(caught.value)
  assert words in line and '\n' not in line and line.startswith(str(path))


def test_weights_of_another_size_are_refused(tmp_path):
  path = tmp_path / 'vae.bin'
  torch_zip.write(path, weights())
  with pytest.raises(errors.UserError, match=r'lack .* of this AutoencoderKL'):
    vae_names.read(path)


def test_a_file_of_something_else_is_refused(tmp_path):
  path = tmp_path / 'vae.bin'
  path.write_bytes(b'<html>')
  with pytest.raises(errors.UserError, match=r'vae\.bin is refused'):
    vae_names.read(path, SMALL)
  official_files.zipped(path, {'state_dict': {}, 'epoch': 3})
  with pytest.raises(errors.UserError, match='something else than tensors'):
    vae_names.read(path, SMALL)
