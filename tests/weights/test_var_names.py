"""Official state dicts of VAR and its tokenizer, to Flax and back."""

import golden_io
import jax
import numpy as np
import official_files
import pytest
import var_golden

from ddo_jax import errors
from ddo_jax.models import var
from ddo_jax.models import var_presets
from ddo_jax.models import vqvae
from ddo_jax.weights import torch_zip
from ddo_jax.weights import var_names

TINY = var_golden.TOKENIZER


def check_round_trip(state, patch_nums, shapes):
  """All keys and bits come back; what lies between fits the model."""
  params = var_names.to_flax(state)
  assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
  back = var_names.to_official(params, patch_nums)
  assert back.keys() == state.keys()
  for key, tensor in state.items():
    assert back[key].dtype == tensor.dtype, key
    assert back[key].flags.c_contiguous
    np.testing.assert_array_equal(back[key], tensor, err_msg=key)


@pytest.mark.golden
def test_round_trip_of_the_tokenizer():
  """vq_tiny.npz: keys, and weights by their sums."""
  golden = golden_io.load('vq_tiny.npz')
  state = var_golden.weights(golden, var_golden.vqvae_shapes(TINY), 'vq')
  check_round_trip(state, TINY.patch_nums, var_golden.vqvae_shapes(TINY))
  # A statistic of training is not carried over.
  statistic = np.ones((4, 64), np.float32)
  params = var_names.to_flax(state | {'quantize.ema_vocab_hit_SV': statistic})
  assert jax.tree.map(np.shape, params) == jax.tree.map(
    np.shape, var_golden.vqvae_shapes(TINY)
  )


def test_released_tokenizer():
  """324 tensors, some of whose shapes are known."""
  config = vqvae.VqvaeConfig()
  state = official(var_golden.vqvae_shapes(config), config.patch_nums)
  assert len(state) == 324
  shapes = {
    'quantize.embedding.weight': (4096, 32),
    'quantize.quant_resi.qresi_ls.3.weight': (32, 32, 3, 3),
    'quantize.ema_vocab_hit_SV': (10, 4096),
    'encoder.down.4.attn.1.qkv.weight': (1920, 640, 1, 1),
    'encoder.down.3.downsample.conv.bias': (320,),
    'encoder.down.2.block.0.nin_shortcut.weight': (320, 160, 1, 1),
    'decoder.up.4.attn.2.proj_out.weight': (640, 640, 1, 1),
    'decoder.up.1.block.0.nin_shortcut.weight': (160, 320, 1, 1),
    'decoder.up.1.upsample.conv.weight': (160, 160, 3, 3),
    'decoder.mid.attn_1.norm.weight': (640,),
    'post_quant_conv.weight': (32, 32, 3, 3),
  }
  assert {key: state[key].shape for key in shapes} == shapes


def _var_shapes(config):
  model = var.transformer(config)
  return var_golden.var_shapes(model, config.tokenizer.channels)


@pytest.mark.golden
@pytest.mark.parametrize('dtype', [np.float32, np.float16])
@pytest.mark.parametrize('case', var_golden.CASES)
def test_round_trip_of_the_transformer(case, dtype):
  """var_*.npz: keys, and weights by their sums; constants made anew."""
  golden = golden_io.load(f'{case}.npz')
  shapes = _var_shapes(var_golden.CASES[case])
  state = var_golden.weights(golden, shapes, case)
  for key in state:
    if not key.startswith(('lvl_1L', 'attn_bias')):
      state[key] = state[key].astype(dtype)
  check_round_trip(state, TINY.patch_nums, shapes)
  level = state['lvl_1L'][0]
  assert level.tolist() == [0] + [1] * 4 + [2] * 9 + [3] * 16
  assert level.dtype == np.int64
  bias = state['attn_bias_for_masking']
  assert (bias.shape, bias.dtype) == ((1, 1, 30, 30), np.float32)
  assert np.array_equal(bias[0, 0] == 0, var.mask(TINY.patch_nums))
  assert set(np.unique(bias)) == {0, -np.inf}
  # Blocks stand in their own order.
  stacked = var_names.to_flax(state)['blocks']['ffn']['fc1']['bias']
  np.testing.assert_array_equal(stacked[1], state['blocks.1.ffn.fc1.bias'])


def test_eleven_blocks_are_in_numerical_order():
  state = {f'blocks.{i}.ffn.fc1.bias': np.full(2, i) for i in range(11)}
  stacked = var_names.to_flax(state)['blocks']['ffn']['fc1']['bias']
  np.testing.assert_array_equal(stacked[:, 0], range(11))


def test_released_transformer():
  """220 tensors of d16, some of whose shapes are known."""
  config = var_presets.get('var_d16')
  state = official(_var_shapes(config), config.tokenizer.patch_nums)
  assert len(state) == 12 + 13 * 16
  shapes = {
    'pos_start': (1, 1, 1024),
    'pos_1LC': (1, 680, 1024),
    'lvl_1L': (1, 680),
    'attn_bias_for_masking': (1, 1, 680, 680),
    'word_embed.weight': (1024, 32),
    'class_emb.weight': (1001, 1024),
    'lvl_embed.weight': (10, 1024),
    'blocks.15.attn.scale_mul_1H11': (1, 16, 1, 1),
    'blocks.15.attn.zero_k_bias': (1024,),
    'blocks.15.attn.mat_qkv.weight': (3072, 1024),
    'blocks.0.ffn.fc1.weight': (4096, 1024),
    'blocks.0.ffn.fc2.weight': (1024, 4096),
    'blocks.0.ada_lin.1.weight': (6144, 1024),
    'head_nm.ada_lin.1.weight': (2048, 1024),
    'head.weight': (4096, 1024),
  }
  assert {key: state[key].shape for key in shapes} == shapes


def official(shapes, patch_nums):
  """The state dict of a model of these shapes, without numbers."""
  empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.int8), shapes)
  return var_names.to_official(empty, patch_nums)


STATE = {'head.bias': np.arange(3)}


@pytest.mark.parametrize(
  'tree',
  [
    STATE,
    {'config': {'resos': 256}, 'var_wo_ddp': STATE},
    {'epoch': 3, 'trainer': {'var_wo_ddp': STATE, 'vae_local': {}}, 'args': {}},
    {'epoch': 3, 'trainer': STATE, 'args': {}},
    {'module.head.bias': STATE['head.bias']},
    {'_orig_mod.head.bias': STATE['head.bias']},
    {'module._orig_mod.head.bias': STATE['head.bias']},
  ],
)
def test_every_layout_is_unwrapped(tree):
  assert var_names.unwrap(tree).keys() == STATE.keys()


@pytest.mark.parametrize('layout', ['plain', 'var', 'cca', 'ddo'])
def test_files(tmp_path, layout):
  """Every program's file is read, and what is written is read alike."""
  model = var.Var((1, 2), 3, 2, width=4, depth=2, heads=2)
  shapes = var_golden.var_shapes(model, 3)
  draw = np.random.default_rng(0).normal
  state = {
    key: np.asarray(draw(size=leaf.shape), np.float32)
    for key, leaf in official(shapes, (1, 2)).items()
    if not key.startswith(('lvl_1L', 'attn_bias')) and 'zero_k' not in key
  }
  tensors = {key: official_files.Tensor(leaf) for key, leaf in state.items()}
  config = {'patch_nums': (1, 2), 'resos': (16, 32), 'label_smooth': 0.0}
  nested = {'config': config, 'var_wo_ddp': tensors}
  tree = {
    'plain': tensors,
    'var': {'epoch': 1, 'trainer': nested | {'var_opt': {}}, 'args': {}},
    'cca': {'epoch': 1, 'iter': 2, 'trainer': tensors, 'args': {}},
    'ddo': nested,
  }[layout]
  official_files.zipped(tmp_path / 'theirs.pth', tree)
  got = var_names.unwrap(torch_zip.read(tmp_path / 'theirs.pth'))
  params = var_names.to_flax(got)
  assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
  written = var_names.to_official(params, (1, 2))
  torch_zip.write(tmp_path / 'ours.pth', written)
  again = torch_zip.read(tmp_path / 'ours.pth')
  assert again.keys() == official(shapes, (1, 2)).keys()
  for key, tensor in state.items():
    assert again[key].tobytes() == tensor.tobytes(), key


@pytest.mark.parametrize('tree', [{}, [1], {'epoch': 3}, {'trainer': {'a': 1}}])
def test_what_is_no_state_dict_is_refused(tree):
  with pytest.raises(errors.UserError, match='wanted a state dict'):
    var_names.unwrap(tree)


@pytest.mark.parametrize(
  'blocks',
  [{0: (3,), 2: (3,)}, {1: (3,)}, {0: (3,), 1: (4,)}],
)
def test_missing_blocks_are_refused(blocks):
  state = {f'blocks.{i}.ffn.fc1.bias': np.zeros(s) for i, s in blocks.items()}
  with pytest.raises(errors.UserError, match=r'ffn.fc1.bias is there for'):
    var_names.to_flax(state)


def test_a_block_without_one_tensor_is_refused():
  state = {f'blocks.{i}.ffn.fc1.bias': np.zeros(3) for i in (0, 1)}
  state['blocks.0.ffn.fc2.bias'] = np.zeros(3)
  with pytest.raises(errors.UserError, match='fc2'):
    var_names.to_flax(state)
