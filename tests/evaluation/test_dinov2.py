"""DINOv2: its tables, a NumPy account of the network, and its weights."""

import golden_io
import jax
import jax.numpy as jnp
import numpy as np
import official_files as official
import pytest
from scipy import special

from ddo_jax import errors
from ddo_jax.evaluation.networks import dinov2
from ddo_jax.evaluation.networks import resize
from ddo_jax.weights import dinov2 as convert
from ddo_jax.weights import safetensors_file

TINY = dinov2.DinoV2(width=32, depth=2, heads=2)


def weights(seed=0):
  """An official state dict of the tiny network."""
  random = np.random.default_rng(seed)
  shapes = {
    'cls_token': (1, 1, 32),
    'pos_embed': (1, 1_370, 32),
    'mask_token': (1, 32),
    'patch_embed.proj.weight': (32, 3, 14, 14),
    'patch_embed.proj.bias': (32,),
    'norm.weight': (32,),
    'norm.bias': (32,),
  }
  for i in range(2):
    block = {
      'norm1.weight': (32,),
      'norm1.bias': (32,),
      'attn.qkv.weight': (96, 32),
      'attn.qkv.bias': (96,),
      'attn.proj.weight': (32, 32),
      'attn.proj.bias': (32,),
      'ls1.gamma': (32,),
      'norm2.weight': (32,),
      'norm2.bias': (32,),
      'mlp.fc1.weight': (128, 32),
      'mlp.fc1.bias': (128,),
      'mlp.fc2.weight': (32, 128),
      'mlp.fc2.bias': (32,),
      'ls2.gamma': (32,),
    }
    shapes |= {f'blocks.{i}.{k}': v for k, v in block.items()}
  return {
    k: np.float32(random.normal(size=s) / np.sqrt(np.prod(s[1:]) or 1))
    for k, s in shapes.items()
  }


def account(state, images):
  """The network in NumPy, float64, in the official layout."""
  w = {k: v.astype(np.float64) for k, v in state.items()}

  def norm(x, name):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * w[f'{name}.weight'] + w[f'{name}.bias']

  def linear(x, name):
    return x @ w[f'{name}.weight'].T + w[f'{name}.bias']

  rows = resize.bicubic_matrix(images.shape[1], 224)
  x = np.einsum('oh,pw,bhwc->bopc', rows, rows, images.astype(np.float64))
  x = (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  patches = x.reshape(-1, 16, 14, 16, 14, 3).transpose(0, 1, 3, 5, 2, 4)
  kernel = w['patch_embed.proj.weight'].reshape(32, -1)
  x = patches.reshape(-1, 256, 588) @ kernel.T + w['patch_embed.proj.bias']
  table = golden_io.load('resize_tables.npz')['dinov2_pos_37_to_16']
  place = w['pos_embed'][0, 1:].reshape(37, 37, 32)
  place = np.einsum('ih,jw,hwc->ijc', table, table, place).reshape(256, 32)
  token = np.broadcast_to(w['cls_token'], (len(x), 1, 32))
  x = np.concatenate([token + w['pos_embed'][:, :1], x + place], axis=1)
  for i in range(2):
    at = f'blocks.{i}'
    qkv = linear(norm(x, f'{at}.norm1'), f'{at}.attn.qkv')
    q, k, v = np.split(qkv, 3, axis=-1)
    heads = []
    for c in (slice(0, 16), slice(16, 32)):
      logits = q[..., c] @ k[..., c].swapaxes(1, 2) / 4
      heads.append(special.softmax(logits, axis=-1) @ v[..., c])
    y = linear(np.concatenate(heads, axis=-1), f'{at}.attn.proj')
    x = x + w[f'{at}.ls1.gamma'] * y
    y = linear(norm(x, f'{at}.norm2'), f'{at}.mlp.fc1')
    y = y * special.ndtr(y)
    x = x + w[f'{at}.ls2.gamma'] * linear(y, f'{at}.mlp.fc2')
  return norm(x[:, 0], 'norm')


@pytest.mark.golden
def test_the_position_table():
  wanted = golden_io.load('resize_tables.npz')['dinov2_pos_37_to_16']
  got = dinov2.position_matrix(16)
  np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


def test_the_network():
  random = np.random.default_rng(1)
  images = random.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
  images[1] = images[1] // 4
  images[2, 16:] = 0
  params = convert.to_flax(weights(), TINY)

  @jax.jit
  def run(params, images):
    return TINY.apply({'params': params}, dinov2.preprocess(images))

  wanted = account(weights(), images)
  assert wanted.std(axis=0).mean() > 0.05  # it looks at the images
  assert golden_io.max_error(run(params, images), wanted) < 2e-5


def test_the_large_network_has_its_published_size():
  # 304,368,640 with the mask token, which only training uses.
  leaves = jax.tree.leaves(dinov2.param_shapes())
  assert sum(leaf.size for leaf in leaves) == 304_368_640 - 1_024
  image = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.uint8)
  out = jax.eval_shape(dinov2.apply, dinov2.param_shapes(), image)
  assert out.shape == (2, 1_024)


def test_the_published_file(tmp_path):
  tensors = {k: official.Tensor(v) for k, v in weights().items()}
  path = official.zipped(tmp_path / convert.PUBLISHED, tensors)
  params, origin = convert.load(path, network=TINY)
  expected = convert.to_flax(weights(), TINY)
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  assert origin['file'] == convert.PUBLISHED and 'Meta' in origin['licence']
  path = tmp_path / 'x.safetensors'
  safetensors_file.write(path, weights(), {})
  again, _ = convert.load(path, network=TINY)
  jax.tree.map(np.testing.assert_array_equal, again, expected)


def test_what_is_missing_or_broken(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  with pytest.raises(errors.UserError, match=convert.PUBLISHED) as caught:
    convert.load()
  assert '\n' not in str(caught.value) and str(tmp_path) in str(caught.value)

  def refuses(said, state):
    path = official.zipped(tmp_path / 'x.pth', state)
    with pytest.raises(errors.UserError, match=said):
      convert.load(path, network=TINY)

  good = {k: official.Tensor(v) for k, v in weights().items()}
  bad = official.Tensor(np.full((32,), np.nan, np.float32))
  refuses('holds NaN', good | {'blocks.1.ls2.gamma': bad})
  refuses('norm.bias gives', good | {'norm.bias': good['cls_token']})
  good.pop('blocks.1.mlp.fc2.bias')
  refuses(r'blocks\.1\.mlp\.fc2\.bias is missing', good)
  refuses('no table of tensors', [1])
  with pytest.raises(errors.UserError, match='repeat the channel'):
    dinov2.preprocess(jnp.zeros((1, 8, 8, 1), jnp.uint8))
