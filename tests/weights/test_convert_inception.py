"""The Inception weights from every published layout, and from broken files."""

import dataclasses
import functools
import re

import inception_state
import jax
import numpy as np
import official_files as official
import pytest

from ddo_jax import errors
from ddo_jax.assets import download
from ddo_jax.assets import store
from ddo_jax.assets import table
from ddo_jax.evaluation.networks import inception as network
from ddo_jax.weights import graph_def
from ddo_jax.weights import inception
from ddo_jax.weights import safetensors_file
from ddo_jax.weights import torch_zip


@functools.cache
def weights():
  """A state dict whose normalisations have a scale of one, as the graph's."""
  random = np.random.default_rng(0)

  def draw(leaf):
    return random.standard_normal(leaf.shape, dtype=np.float32)

  state = inception_state.to_state(jax.tree.map(draw, network.param_shapes()))
  ones = {k: np.ones_like(v) for k, v in state.items() if 'bn.weight' in k}
  return state | ones


def stand_in(monkeypatch, file, path):
  """Makes a file of ours the published one, in size and hash."""
  asset = table.find(file)
  changed = dataclasses.replace(
    asset, size=path.stat().st_size, sha256=download.sha256_of(path)
  )
  monkeypatch.setitem(table.ASSETS, asset.name, changed)


def assert_same(params, state):
  got = inception_state.to_state(params)
  assert sorted(got) == sorted(state)
  for key, array in state.items():
    np.testing.assert_array_equal(got[key], array, err_msg=key)


# --- TensorFlow's graph, as protobuf ------------------------------------------


def varint(value):
  out = b''
  while value > 127:
    out += bytes([value & 127 | 128])
    value >>= 7
  return out + bytes([value])


def field(number, value):
  if isinstance(value, int):
    return varint(number << 3) + varint(value)
  raw = value.encode() if isinstance(value, str) else value
  return varint(number << 3 | 2) + varint(len(raw)) + raw


def tensor(array, dtype=1, content=True):
  dims = b''.join(field(2, field(1, size)) for size in array.shape)
  raw = array.astype('<f4').tobytes()
  if content:
    return field(1, dtype) + field(2, dims) + field(4, raw)
  values = [raw[i : i + 4] for i in range(0, len(raw), 4)]
  parts = b''.join(varint(5 << 3 | 5) + value for value in values)
  return field(1, dtype) + field(2, dims) + parts


def node(name, value, operation='Const'):
  kind = field(5, field(1, 'dtype') + field(2, field(6, 1)))
  entry = field(5, field(1, 'value') + field(2, field(8, value)))
  return field(1, field(1, name) + field(2, operation) + kind + entry)


SUFFIXES = {
  'conv.weight': 'conv2d_params',
  'bn.weight': 'batchnorm/gamma',
  'bn.bias': 'batchnorm/beta',
  'bn.running_mean': 'batchnorm/moving_mean',
  'bn.running_var': 'batchnorm/moving_variance',
}


def graph(state, gammas=True):
  parts = [
    node('ignored', tensor(np.ones(3)), 'Placeholder'),
    node('shape', tensor(np.ones(3), dtype=3)),
    field(4, field(1, 21)),  # versions
    node('softmax/weights', tensor(state['fc.weight'].T)),
    node('softmax/biases', tensor(state['fc.bias'], content=False)),
  ]
  for module in inception.modules():
    scope = inception.scope_of(module)
    for leaf, suffix in SUFFIXES.items():
      array = state[f'{module}.{leaf}']
      if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
      if leaf == 'bn.weight':  # one value fills the tensor
        short = field(1, 1) + field(2, field(2, field(1, array.size)))
        value = short + varint(5 << 3 | 5) + np.float32(1).tobytes()
        parts += [node(f'{scope}/{suffix}', value)] if gammas else []
      else:
        parts.append(node(f'{scope}/{suffix}', tensor(array)))
  return b''.join(parts)


@pytest.mark.parametrize('gammas', [True, False])
def test_tensorflows_graph(tmp_path, gammas):
  path = tmp_path / 'classify_image_graph_def.pb'
  path.write_bytes(graph(weights(), gammas))
  params, origin = inception.load(path)
  assert_same(params, weights())
  assert origin['file'] == path.name and 'Google' in origin['licence']


def test_the_scopes_are_those_of_the_published_graph():
  expected = {
    'Conv2d_1a_3x3': 'conv',
    'Conv2d_4a_3x3': 'conv_4',
    'Mixed_5b.branch1x1': 'mixed/conv',
    'Mixed_5b.branch5x5_2': 'mixed/tower/conv_1',
    'Mixed_5d.branch3x3dbl_3': 'mixed_2/tower_1/conv_2',
    'Mixed_5c.branch_pool': 'mixed_1/tower_2/conv',
    'Mixed_6a.branch3x3': 'mixed_3/conv',
    'Mixed_6a.branch3x3dbl_1': 'mixed_3/tower/conv',
    'Mixed_6d.branch1x1': 'mixed_6/conv',
    'Mixed_6b.branch7x7_3': 'mixed_4/tower/conv_2',
    'Mixed_6e.branch7x7dbl_5': 'mixed_7/tower_1/conv_4',
    'Mixed_6e.branch_pool': 'mixed_7/tower_2/conv',
    'Mixed_7a.branch3x3_2': 'mixed_8/tower/conv_1',
    'Mixed_7a.branch7x7x3_1': 'mixed_8/tower_1/conv',
    'Mixed_7b.branch3x3_1': 'mixed_9/tower/conv',
    'Mixed_7b.branch3x3_2a': 'mixed_9/tower/mixed/conv',
    'Mixed_7c.branch3x3_2b': 'mixed_10/tower/mixed/conv_1',
    'Mixed_7c.branch3x3dbl_2': 'mixed_10/tower_1/conv_1',
    'Mixed_7c.branch3x3dbl_3b': 'mixed_10/tower_1/mixed/conv_1',
    'Mixed_7b.branch_pool': 'mixed_9/tower_2/conv',
  }
  assert {m: inception.scope_of(m) for m in expected} == expected
  modules = inception.modules()
  flat = {inception.scope_of(m).replace('/', '_') for m in modules}
  assert len(modules) == len(flat) == 94


# --- PyTorch's and NVIDIA's ---------------------------------------------------


@pytest.mark.parametrize('name', inception.PUBLISHED[:2])
def test_a_state_dict(tmp_path, name):
  counts = {'Conv2d_1a_3x3.bn.num_batches_tracked': np.zeros((), np.int64)}
  tensors = {k: official.Tensor(v) for k, v in (weights() | counts).items()}
  official.zipped(tmp_path / name, tensors)
  params, origin = inception.load(tmp_path / name)
  assert_same(params, weights())
  assert origin['file'] == name


def test_nvidias_pickle(tmp_path):
  leaves = {
    'conv.weight': 'weight',
    'bn.bias': 'beta',
    'bn.running_mean': 'mean',
    'bn.running_var': 'var',
  }
  layers = {}
  for module in inception.modules():
    name = inception.scope_of(module).replace('/', '_')
    tensors = {
      leaf: official.Tensor(weights()[f'{module}.{key}'])
      for key, leaf in leaves.items()
    }
    layers[name] = official.Persistent(
      'Conv2dLayer', official.module(buffers=tensors)
    )
  fc = {k: official.Tensor(weights()[f'fc.{k}']) for k in ('weight', 'bias')}
  modules = {
    'layers': official.module_dict(layers),
    'output': official.Persistent('Output', official.module(fc)),
  }
  net = official.Persistent('Inception', official.module(modules=modules))
  path = tmp_path / 'inception-2015-12-05.pkl'
  path.write_bytes(official.dumps(net))
  assert_same(inception.load(path)[0], weights())


# --- What is missing or broken ------------------------------------------------


def test_a_published_file_is_found_where_it_lies(tmp_path, monkeypatch):
  """In the folder that is named, or in the cache."""
  name = inception.PUBLISHED[0]
  path = tmp_path / name
  torch_zip.write(path, weights())
  stand_in(monkeypatch, name, path)
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.setenv(store.VARIABLE, str(tmp_path))
  assert_same(inception.load()[0], weights())
  monkeypatch.setenv(store.VARIABLE, 'http://127.0.0.1:9')
  with pytest.raises(errors.UserError, match='no network') as caught:
    inception.load()
  line = str(caught.value)
  assert '\n' not in line and inception.SETTING in line
  place = tmp_path / 'home' / '.cache' / 'ddo_jax' / 'networks' / name
  assert f'http://127.0.0.1:9/{name}' in line and str(place) in line
  path.rename(place)
  assert_same(inception.load()[0], weights())


def test_a_file_given_by_its_path_is_never_kept(tmp_path, monkeypatch):
  """Random weights, given once, scored later runs that named none."""
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  # Even under a published name.
  for name in ('mine.safetensors', *inception.PUBLISHED[:1]):
    path = tmp_path / name
    if path.suffix == '.pth':
      torch_zip.write(path, weights())
    else:
      safetensors_file.write(path, weights(), {})
    assert_same(inception.load(path)[0], weights())
    with pytest.raises(errors.UserError, match='no network'):
      inception.load()
  assert not [p for p in (tmp_path / 'home').rglob('inception*') if p.is_file()]


def test_what_earlier_versions_kept_is_not_read(tmp_path, monkeypatch):
  """It was converted from whatever file had been named last."""
  monkeypatch.setenv('HOME', str(tmp_path))
  folder = tmp_path / '.cache' / 'ddo_jax' / 'networks'
  kept = folder / 'inception-2015-12-05.safetensors'
  safetensors_file.write(kept, weights(), {})
  with pytest.raises(errors.UserError, match='no network'):
    inception.load()
  assert_same(inception.load(kept)[0], weights())  # still, where it is named


def broken(change):
  state = dict(weights())
  change(state)
  return state


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (
      lambda s: s.pop('Mixed_7c.branch_pool.bn.bias'),
      r'1 of 472 tensors are missing \(first: Mixed_7c.branch_pool.bn.bias',
    ),
    (
      lambda s: s.update({'fc.weight': np.zeros((1_000, 2_048), np.float32)}),
      r'fc.weight gives \(2048, 1000\), not \(2048, 1008\)',
    ),
    (
      lambda s: s.update({'fc.bias': np.full(1_008, np.nan, np.float32)}),
      'fc.bias holds NaN',
    ),
  ],
)
def test_another_network_is_refused(tmp_path, change, said):
  path = tmp_path / 'x.pth'
  torch_zip.write(path, broken(change))
  with pytest.raises(errors.UserError, match=said):
    inception.load(path)


@pytest.mark.parametrize('suffix', ['.pth', '.pkl', '.pb', '.safetensors', ''])
def test_damaged_files_are_refused_in_one_line(tmp_path, suffix):
  path = tmp_path / f'x{suffix}'
  for raw in (b'', b'PK\3\4', b'\x80\x04N.', b'\n\xff\xff\xff\xff\xff', b'<!'):
    path.write_bytes(raw)
    with pytest.raises(errors.UserError) as caught:
      inception.load(path)
    assert '\n' not in str(caught.value)


def test_damaged_graphs_are_refused(tmp_path):
  path = tmp_path / 'x.pb'
  good = node('a', tensor(np.arange(6.0).reshape(2, 3)))
  path.write_bytes(good)
  np.testing.assert_array_equal(
    graph_def.read(path)['a'], [[0, 1, 2], [3, 4, 5]]
  )
  huge = field(1, 1) + field(2, field(2, field(1, 2**40)))
  two = field(1, 1) + field(2, field(2, field(1, 2))) + field(4, b'\0' * 12)
  cases = {
    'cut off': good[:-5],
    'two constants': good + good,
    'absurd shape': node('a', huge),
    '3 numbers for a tensor of 2': node('a', two),
    'wire type 3': varint(1 << 3 | 3),
    'no GraphDef': field(4, 3),
    'a number where': field(1, 3),
    'more than ten bytes': b'\n' + b'\xff' * 11,
  }
  for said, raw in cases.items():
    path.write_bytes(raw)
    with pytest.raises(errors.UserError, match=re.escape(said)):
      graph_def.read(path)


def test_random_damage_to_a_graph_never_escapes(tmp_path):
  random = np.random.default_rng(0)
  path = tmp_path / 'x.pb'
  good = node('a', tensor(np.ones((2, 3)))) + node('b', tensor(np.ones(4)))
  refused = 0
  for _ in range(400):
    raw = bytearray(good[: random.integers(1, len(good) + 1)])
    for _ in range(random.integers(0, 4)):
      raw[random.integers(len(raw))] = random.integers(256)
    path.write_bytes(raw)
    try:
      arrays = graph_def.read(path)
    except errors.UserError as error:
      assert '\n' not in str(error)
      refused += 1
    else:
      assert all(x.dtype == np.float32 for x in arrays.values())
  assert 200 < refused < 400
