"""Weights of the golden vectors of VAR and its tokenizer, by their recipe."""

import dataclasses
import functools
import zlib

import golden_io
import jax
import numpy as np

from ddo_jax.models import var
from ddo_jax.models import vqvae
from ddo_jax.weights import var_names

TOKENIZER = vqvae.VqvaeConfig((64, 64, 3), (1, 2, 3, 4), 64, 8, base=32)
CONFIG = var.VarConfig(
  TOKENIZER,
  num_classes=10,
  depth=2,
  width=64,
  heads=2,
  chunk=7,  # does not divide the 30 tokens
)
CASES = {  # by the golden file
  'var_adaln': CONFIG,
  'var_shared': dataclasses.replace(CONFIG, shared_modulation=True),
  'var_nol2': dataclasses.replace(CONFIG, l2_norm=False),
}


@functools.lru_cache
def shapes(model, *rows):
  """Of a module's params; `rows` are the shapes of its inputs.

  Labels, of one axis, are integers; all else is float32.
  """

  def make(s):
    return jax.ShapeDtypeStruct(s, [np.float32, int][len(s) == 1])

  init = jax.eval_shape(model.init, jax.random.key(0), *map(make, rows))
  return init['params']


def var_shapes(model, channels):
  """Of a transformer's params, for latents of `channels`."""
  length = sum(n * n for n in model.patch_nums)
  return shapes(model, (1,), (1, length - 1, channels))


def vqvae_shapes(config):
  """Of a tokenizer's params."""
  return shapes(vqvae.build(config), (1, *config.image_shape))


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """The numbers that a name stands for, float64."""
  state = np.random.RandomState(zlib.crc32(name.encode()))
  return state.standard_normal(shape)


def _tokenizer_rule(key, x):
  if key.endswith('embedding.weight'):
    return 0.6 * x
  if key.endswith('.bias'):
    return 0.1 * x
  return 1 + 0.1 * x if x.ndim == 1 else x / np.sqrt(x[0].size)


def _transformer_rule(key, x):
  if key in ('class_emb.weight', 'lvl_embed.weight', 'pos_start', 'pos_1LC'):
    return 0.5 * x
  if key.endswith('scale_mul_1H11'):
    x = np.log(4) + 0.5 * x
    if key.startswith('blocks.1.'):
      x[0, 1, 0, 0] = 5.0
    return x
  if key.endswith('ada_gss'):
    return 0.3 * x
  if key.endswith(('bias', 'q_bias', 'v_bias')):
    return 0.1 * x
  gain = 2 if key == 'head.weight' or 'ada_lin' in key else 1
  return gain * x / np.sqrt(x[0].size)


def weights(golden, expected, tag):
  """Official state dict of a model's shapes, checked against the golden.

  Args:
    golden: the file, with keys_utf8, w_sum, w_abs and w_first.
    expected: shapes of the Flax params.
    tag: of the model in the recipe.
  """
  empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), expected)
  state = var_names.to_official(empty, TOKENIZER.patch_nums)
  rule = _tokenizer_rule if tag.startswith('vq') else _transformer_rule
  keys = bytes(golden['keys_utf8']).decode().split('\n')
  unread = {'lvl_1L', 'attn_bias_for_masking', 'quantize.ema_vocab_hit_SV'}
  assert state.keys() - unread == set(keys)
  for i, key in enumerate(keys):
    if not key.endswith('zero_k_bias'):
      x = rule(key, normal(f'{tag}/{key}', state[key].shape))
      state[key] = x.astype(np.float32)
    wide = state[key].astype(np.float64)
    assert wide.ravel()[0] == golden['w_first'][i], key
    np.testing.assert_allclose(wide.sum(), golden['w_sum'][i], rtol=1e-6)
    np.testing.assert_allclose(np.abs(wide).sum(), golden['w_abs'][i], 1e-6)
  return state


def params(golden, expected, tag, dtype):
  """Flax params of the recipe, as NumPy arrays of a dtype."""
  tree = var_names.to_flax(weights(golden, expected, tag))
  assert jax.tree.map(np.shape, tree) == jax.tree.map(np.shape, expected)
  return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), tree)


def tokenizer(dtype):
  """The golden tokenizer and its params."""
  golden = golden_io.load('vq_tiny.npz')
  weights = params(golden, vqvae_shapes(TOKENIZER), 'vq', dtype)
  return vqvae.build(TOKENIZER), weights


def transformer(case, dtype):
  """The golden transformer of a case, and its params."""
  model = var.transformer(CASES[case])
  golden = golden_io.load(f'{case}.npz')
  return model, params(golden, var_shapes(model, 8), case, dtype)
