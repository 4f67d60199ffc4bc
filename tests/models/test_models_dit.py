"""DiT's network against the original's numbers."""

import functools
import math

import golden_io
import jax
import numpy as np
import pytest

from ddo_jax.models import dit
from ddo_jax.models import dit_layers
from ddo_jax.models import edm_layers
from ddo_jax.weights import dit_names

GOLDEN = 'dit_forward.npz'
# What a row may be off in float32: t · frequency is rounded.
ROUNDING = ((20, 1e-5), (300, 3e-5), (1000, 1e-4))


def params_of(golden, dtype, prefix='sd/'):
  """The params of a golden state dict, with a row for "no label"."""
  state = golden_io.state_dict(golden, prefix)
  table = 'y_embedder.embedding_table.weight'
  if len(state[table]) == 4:  # trained without one
    state[table] = np.pad(state[table], ((0, 1), (0, 0)))
  side = math.isqrt(state['pos_embed'].shape[1])
  tree = dit_names.to_flax(state, grid=(side, side))
  return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), tree)


def network_of(options):
  channels = options['in_channels']
  return dit.Transformer(
    out_channels=channels * (1 + options['learn_sigma']),
    num_classes=options['num_classes'],
    patch=options['patch_size'],
    width=options['hidden_size'],
    depth=options['depth'],
    heads=options['num_heads'],
    mlp_ratio=options['mlp_ratio'],
  )


def inputs(golden, dtype, prefix=''):
  x, t, y = (golden[f'{prefix}{name}'] for name in 'xty')
  return golden_io.nhwc(x).astype(dtype), t.astype(dtype), y.astype(np.int32)


@functools.lru_cache
def compiled(network):
  """The output with all intermediates, and S = sum(out · probe)."""

  @jax.jit
  def forward(params, x, t, y):
    return network.apply(
      params, x, t, y, capture_intermediates=True, mutable=['intermediates']
    )

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def gradient(params, x, t, y, probe):
    return (network.apply(params, x, t, y) * probe).sum()

  return forward, gradient


def run(golden, precision, prefix=''):
  """The output, and what lies on the way."""
  network = network_of(golden_io.read_json(golden, f'{prefix}config'))
  with golden_io.precision(precision) as dtype:
    params = params_of(golden, dtype, f'{prefix}sd/')
    variables = {'params': params['network']}
    x, t, y = inputs(golden, dtype, prefix)
    out, captured = compiled(network)[0](variables, x, t, y)
    assert out.dtype == dtype
    return jax.tree.map(np.asarray, (out, captured['intermediates'])), t


def check_rows(got, wanted, t, precision):
  for row, time in enumerate(t):
    atol = 1e-10
    if precision == 'f32':
      atol = next(atol for most, atol in ROUNDING if time < most)
    assert golden_io.max_error(got[row], wanted[row]) <= atol, (row, time)


@pytest.mark.golden
@pytest.mark.parametrize('precision', ['f64', 'f32'])
@pytest.mark.parametrize('prefix', ['', 'p4/'])
def test_forward(prefix, precision):
  """dit_forward.npz: out, with a variance or without, by patches of 2 and 4."""
  golden = golden_io.load(GOLDEN)
  (out, _), t = run(golden, precision, prefix)
  wanted = golden_io.nhwc(golden[f'{prefix}out_{precision}'])
  check_rows(out, wanted, t, precision)


@pytest.mark.golden
def test_what_lies_on_the_way():
  """dit_forward.npz: embeddings, tokens after each block, the last tokens."""
  golden = golden_io.load(GOLDEN)
  (_, rows), t = run(golden, 'f64')

  def output(*names):
    node = rows
    for name in names:
      node = node[name]
    return node['__call__'][0]

  with golden_io.precision('f64'):
    frequencies = edm_layers.positional(t, 256, endpoint=False)
  blocks = output('blocks')[0]
  got = {
    'patches': output('x_embedder'),
    't_freq': frequencies,
    't_emb': output('t_embedder'),
    'y_emb': output('y_embedder'),
    'block0': blocks[0],
    'block1': blocks[1],
    'final_tokens': output('final_layer'),
  }
  for name, value in got.items():
    error = golden_io.max_error(value, golden[f'{name}_f64'])
    assert error <= 1e-10, name


@pytest.mark.golden
@pytest.mark.parametrize('precision', ['f64', 'f32'])
def test_gradients(precision):
  """dit_forward.npz: of S = sum(out · probe), in x and in nine params."""
  golden = golden_io.load(GOLDEN)
  network = network_of(golden_io.read_json(golden, 'config'))
  with golden_io.precision(precision) as dtype:
    variables = {'params': params_of(golden, dtype)['network']}
    probe = golden_io.nhwc(golden['probe']).astype(dtype)
    arguments = (variables, *inputs(golden, dtype), probe)
    grads, grad_x = jax.tree.map(np.asarray, compiled(network)[1](*arguments))
  state = dit_names.to_official({'network': grads['params']}, grid=(4, 4))
  state['x'] = np.moveaxis(grad_x, -1, 1)
  names = golden_io.read_json(golden, 'grad_params')
  assert len(names) == 9
  for key in ('x', *names):
    name = 'grad_x' if key == 'x' else f'grad/{key}'
    wanted = golden[f'{name}_{precision}']
    if precision == 'f64':
      most = 1e-10 * np.abs(wanted).max()
      assert golden_io.max_error(state[key], wanted) <= most, key
    else:
      assert golden_io.relative_error(state[key], wanted) <= 5e-5, key


@pytest.mark.golden
@pytest.mark.parametrize('side', [16, 32])
def test_positions(side):
  """dit_forward.npz: rows of the tables of 256 and 512 pixels."""
  golden = golden_io.load(GOLDEN)
  table = dit_layers.positions(side, side, 1152)
  assert table.shape == (side**2, 1152)
  rows = golden[f'pos_rows_{side}']
  wanted = golden[f'pos_{side}_1152']
  assert golden_io.max_error(table[rows], wanted) <= 1e-12


@pytest.mark.golden
def test_the_stored_positions_are_those_that_are_added():
  golden = golden_io.load(GOLDEN)
  table = dit_layers.positions(4, 4, 48)
  assert golden_io.max_error(table, golden['sd/pos_embed'][0]) <= 3e-8
  count = sum(v.size for v in golden_io.state_dict(golden).values())
  assert count == golden['n_params']
