"""Files that are read safely and would cost time or memory to believe.

What a file says of its network is checked for types and sizes before anything
is built from it, printed or walked. Each must be refused in one line. Where the
check is missing some of these end in a traceback, others never end.
"""

import json
import struct

import bounds
import numpy as np
import official_files as official
import payloads
import pytest
import safetensors.numpy
import test_released

from configs import digits_var
from ddo_jax import settings
from ddo_jax.weights import edm_configs
from ddo_jax.weights import files
from ddo_jax.weights import pickle_reader
from ddo_jax.weights import released

KIND, ARGUMENTS, EDM = test_released.CASES['ddpmpp']
VAR = digits_var.get_config().model


def laughs():
  """A list of 2 entries, nested 40 deep: 2⁴⁰ to whoever walks it."""
  tree = ['x']
  for _ in range(40):
    tree = [tree, tree]
  return tree


def tables():
  """The same of tables, which take more room when they are printed."""
  tree = {'x': 1}
  for _ in range(40):
    tree = {'a': tree, 'b': tree}
  return tree


def refusal(path, config=None):
  with bounds.kept():
    return payloads.one_line(lambda: released.read(path, config=config))


SIZES = (10**7, -3, 'x', [1], {'a': 1}, None, 2.5, 10**30, laughs())
LISTS = ([10**7], [-1], ['x'], 'xy', {'a': 1}, 5, [1] * 10**6, laughs())
FIELDS = {
  'num_blocks': SIZES,
  'model_channels': SIZES,
  'img_resolution': SIZES,
  'label_dim': SIZES,
  'augment_dim': SIZES,
  'dropout': ('x', [1], 2.5, float('nan'), laughs()),
  'channel_mult': LISTS,
  'attn_resolutions': LISTS,
  'resample_filter': LISTS,
  'model_type': (5, laughs()),
  'of_no_network': (laughs(),),
}


@pytest.mark.parametrize('field', FIELDS)
def test_arguments_of_a_network(field):
  for value in FIELDS[field]:
    arguments = ARGUMENTS | {field: value}
    network = pickle_reader.Network(KIND, {}, arguments, {}, None, 0.0, {})
    line = payloads.one_line(edm_configs.config_of, network)
    assert 'the network inside the file' in line


WORST = {
  'laughs': laughs(),
  'tables': tables(),
  'digits': 10**5_000,
  'digits below 0': -(10**5_000),
  'an array': np.zeros(10**5),
  'complex numbers': np.array([1j, 2]),
  'long text': 'x' * 10**6,
  'a set': {1, 2},
}


@pytest.mark.parametrize('value', WORST.values(), ids=WORST)
def test_the_worst_arguments_of_a_network(tmp_path, value):
  for field in (*FIELDS, 'img_channels', 'sigma_data', 'embedding_type'):
    arguments = ARGUMENTS | {field: value}
    network = pickle_reader.Network(KIND, {}, arguments, {}, None, 0.0, {})

    def read(network=network):
      # As `released.read` does.
      with files.refusing(tmp_path / 'x.pkl', 'a network'):
        edm_configs.config_of(network)

    with bounds.kept():
      line = payloads.one_line(read)
    assert 'integer string conversion' not in line


def test_an_array_for_an_argument_inside_a_pkl(tmp_path):
  path = tmp_path / 'network.pkl'
  test_released.write_pkl(path, 'ddpmpp', embedding_type=np.zeros(9))
  assert 'network.pkl is refused' in refusal(path)


def test_an_argument_inside_a_pkl(tmp_path):
  path = tmp_path / 'network.pkl'
  test_released.write_pkl(path, 'ddpmpp', label_dim=laughs())
  assert 'num_classes' in payloads.one_line(released.read, path)


RECORDS = {
  'no JSON': '{',
  'a list': '[1]',
  'null': 'null',
  'deep': '[' * 100_000 + ']' * 100_000,
  'deep name': {'model.' + 'a.' * 5_000 + 'b': 1},
  'blocks': {'model.num_blocks': 10**7},
  'negative': {'model.num_blocks': -1},
  'text': {'model.model_channels': 'x'},
  'table': {'model.channel_mult': {'a': 1}},
  'nested': {'model.channel_mult': [[1], [2]]},
  'long': {'model.channel_mult': [1] * 100_000},
  'resolution': {'model.image_shape': [10**9, 10**9, 3]},
  'not a number': {'model.sigma_data': float('nan')},
  'type': {'model.type': [1]},
  'other type': {'model.type': 'int'},
  'network': {'model.network': 'unett'},
}
RECORDS_OF_TOKENS = {
  'depth': {'model.depth': 10**7},
  'scales': {'model.tokenizer.patch_nums': [10**6]},
  'scales of text': {'model.tokenizer.patch_nums': 'abc'},
  'width': {'model.width': -8},
}


def write_record(path, record):
  array = {'a.b': np.zeros(3, np.float32)}
  safetensors.numpy.save_file(array, path, metadata={'model': record})
  return path


def recorded(config, changes):
  named = {f'model.{k}': v for k, v in settings.to_json(config).items()}
  return json.dumps({'model.type': type(config).__name__} | named | changes)


@pytest.mark.parametrize('record', RECORDS.values(), ids=RECORDS)
def test_a_record_in_a_safetensors(tmp_path, record):
  if isinstance(record, dict):
    record = recorded(EDM, record)
  path = write_record(tmp_path / 'x.safetensors', record)
  assert 'model' in refusal(path)


@pytest.mark.parametrize(
  'changes', RECORDS_OF_TOKENS.values(), ids=RECORDS_OF_TOKENS
)
def test_a_record_of_a_model_of_tokens(tmp_path, changes):
  record = recorded(VAR, changes)
  path = write_record(tmp_path / 'x.safetensors', record)
  assert 'the recorded model' in refusal(path)


@pytest.mark.parametrize(
  ('dtype', 'shape'),
  [
    ('F8_E4M3', [16]),
    ('F8_E5M2', [16]),
    ('F8_E8M0', [16]),
    ('F4', [32]),
    ('C64', [2]),
    ('F32', [-1]),
    ('F32', [1] * 1000),
  ],
)
def test_a_tensor_of_a_safetensors(tmp_path, dtype, shape):
  entry = {'dtype': dtype, 'shape': shape, 'data_offsets': [0, 16]}
  header = json.dumps({'a': entry}).encode()
  path = tmp_path / 'x.safetensors'
  path.write_bytes(struct.pack('<Q', len(header)) + header + bytes(16))
  assert 'is refused' in refusal(path, EDM)


def test_a_name_of_many_parts(tmp_path):
  path = tmp_path / 'x.safetensors'
  array = np.zeros(3, np.float32)
  safetensors.numpy.save_file({'a.' * 200_000 + 'b': array}, path)
  assert 'under the key' in refusal(path, EDM)


def tensor():
  return official.Tensor(np.zeros(3, np.float32))


STATES = {
  'numbers for keys': {1: tensor(), 2: tensor()},
  'a list': [tensor()],
  'nothing': None,
  'laughs': laughs(),
  'laughs by key': {'a': laughs()},
  'laughs of a trainer': {'trainer': laughs()},
  'a trainer of a list': {'trainer': [tensor()]},
  'a trainer of a number': {'trainer': 5},
  'a trainer of numbers': {'trainer': {'var_wo_ddp': {2: tensor()}}},
  'a long key': {'.'.join('a' * 5_000): tensor()},
  'an empty key': {'': tensor()},
  'dots': {'...': tensor(), 'enc.': tensor(), 'enc': tensor()},
  'wrappers': {'module.' * 100_000 + 'a': tensor()},
  'many blocks': {
    'blocks.99999999.ffn.fc1.weight': tensor(),
    'blocks.0.x': tensor(),
  },
  'a tensor that holds one': {'a': tensor(), 'a.b': tensor()},
  'a tokenizer': {'quantize.embedding.weight': tensor()},
}


@pytest.mark.parametrize('config', [EDM, VAR], ids=['edm', 'var'])
@pytest.mark.parametrize('state', STATES.values(), ids=STATES)
def test_a_state_dict(tmp_path, state, config):
  path = official.zipped(tmp_path / 'x.pth', state)
  line = refusal(path, config)
  assert 'x.pth' in line or 'wanted a state dict' in line


def test_a_file_of_many_operations(tmp_path):
  """Tensors without end: what is read of them is bounded."""
  path = tmp_path / 'x.pkl'
  path.write_bytes(b'\x80\x02]' + b'N0' * 2**20 + b'.')
  with bounds.kept():
    assert 'operations' in payloads.refusal(pickle_reader.read, path)
