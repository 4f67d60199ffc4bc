"""Statistics, protocols and the networks of features: files that lie of sizes.

Each is refused in one line, soon, and without gigabytes.
"""

import dataclasses
import json
import os
import struct
import zipfile

import bounds
import numpy as np
import official_files as official
import payloads
import pytest
from test_hostile_sizes import WORST

from ddo_jax.evaluation import protocols
from ddo_jax.evaluation import score
from ddo_jax.runtime import records
from ddo_jax.weights import dinov2
from ddo_jax.weights import fid_stats
from ddo_jax.weights import graph_def
from ddo_jax.weights import inception

MU = np.zeros(2_048, np.float32)
SIGMA = np.eye(2_048, dtype=np.float32)


def refusal(read, *args):
  with bounds.kept():
    return payloads.one_line(read, *args)


@pytest.mark.parametrize('value', WORST.values(), ids=WORST)
@pytest.mark.parametrize('field', ['fid', 'num_images', 'mu', 'sigma'])
def test_a_pkl_of_statistics(tmp_path, field, value):
  moments = {'mu': MU, 'sigma': SIGMA}
  tree = {'num_images': 5, 'fid': moments}
  (tree if field in tree else moments)[field] = value
  path = tmp_path / 'x.pkl'
  path.write_bytes(official.dumps(tree))
  assert 'x.pkl is refused' in refusal(fid_stats.read, path)


NPZS = {
  'a list for a provenance': {'provenance': np.array('[1]')},
  'a nested provenance': {'provenance': np.array('{"a": [1]}')},
  'a deep provenance': {'provenance': np.array('[' * 100_000)},
  'text for a count': {'n': np.array('x')},
  'a count without end': {'n': np.array(np.inf)},
  'counts': {'n': np.zeros(3, int)},
  'a count below 0': {'n': np.array(-5)},
  'text': {'mu': np.array(['a'] * 2_048)},
  'complex numbers': {'mu': np.zeros(2_048, complex)},
  'dates': {'mu': np.zeros(2_048, 'M8[s]')},
  'a number': {'mu': np.zeros(())},
  'large': {'mu': np.zeros(10**7, np.uint8)},
}


@pytest.mark.parametrize('case', NPZS)
def test_an_npz_of_statistics(tmp_path, case):
  path = tmp_path / 'x.npz'
  np.savez(path, **({'mu': MU, 'sigma': SIGMA} | NPZS[case]))
  refusal(fid_stats.read, path)


def test_an_npz_that_unfolds(tmp_path):
  path = tmp_path / 'x.npz'
  header = {'descr': '|u1', 'fortran_order': False, 'shape': (2**28,)}
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    with archive.open('mu.npy', 'w') as file:
      np.lib.format.write_array_header_1_0(file, header)
      for _ in range(2**8):
        file.write(bytes(2**20))
  with bounds.kept(most=10**8):
    line = payloads.one_line(fid_stats.read, path)
  assert 'unfolds to 268,435,584 bytes' in line


def varint(number):
  """A number as protobuf writes it."""
  raw = b''
  while number > 127:
    raw += bytes([number & 127 | 128])
    number >>= 7
  return raw + bytes([number])


def number(field, value):
  return varint(field << 3) + varint(value)


def message(field, raw):
  return varint(field << 3 | 2) + varint(len(raw)) + raw


def constant(tensor):
  """A graph of one constant."""
  value = message(1, b'value') + message(2, message(8, tensor))
  return message(1, message(1, b'a') + message(2, b'Const') + message(5, value))


FLOAT = number(1, 1)
GRAPHS = {
  'nothing': b'',
  'zeros': bytes(10**6),
  'many nodes': message(1, b'') * 10**5,
  'many fields of a tensor': constant(FLOAT + number(9, 1) * 11 * 10**5),
  'many axes': constant(FLOAT + message(2, message(2, number(1, 1)) * 10**5)),
  'a long axis': constant(FLOAT + message(2, message(2, number(1, 2**62)) * 3)),
  'a long axis beside none': constant(
    FLOAT + message(2, message(2, number(1, 0)) + message(2, number(1, 2**60)))
  ),
  'a large number': constant(
    FLOAT + message(2, message(2, number(1, 2**25))) + message(4, bytes(4))
  ),
  'three bytes': constant(FLOAT + message(4, b'abc')),
  'a number for an axis': constant(FLOAT + message(2, number(2, 5))),
  'a number for an attribute': message(1, number(5, 1)),
}


@pytest.mark.parametrize('case', GRAPHS)
def test_a_graph(tmp_path, case):
  path = tmp_path / 'x.pb'
  path.write_bytes(GRAPHS[case])
  assert 'x.pb is refused' in refusal(inception.load, path)
  if not case.startswith(('a large number', 'many')):  # read as it should be
    assert 'x.pb is refused' in refusal(graph_def.read, path)
  if case == 'many fields of a tensor':
    assert 'operations' in refusal(graph_def.read, path)


@pytest.mark.parametrize('value', WORST.values(), ids=WORST)
def test_networks_of_features(tmp_path, value):
  key = next(inception._keys())[1]
  for state in ({key: value}, {'cls_token': value}, value):
    path = tmp_path / 'x.pkl'
    path.write_bytes(official.dumps(state))
    refusal(inception.load, path)
    if not isinstance(value, np.ndarray):
      path = official.zipped(tmp_path / 'x.pth', state)
      refusal(inception.load, path)
      line = refusal(dinov2.load, path)
      if isinstance(state, dict):
        assert 'is no array of plain numbers' in line


@pytest.mark.parametrize('dtype', ['C64', 'U8'])
def test_a_tensor_of_a_network_of_features(tmp_path, dtype):
  """As large as a file may be: its shape is looked at before its numbers."""
  size = {'C64': 8, 'U8': 1}[dtype]
  count = 2 * 10**8 // size
  ends = count * size
  key = next(inception._keys())[1]
  entry = {'dtype': dtype, 'shape': [count], 'data_offsets': [0, ends]}
  for name, load in ((key, inception.load), ('cls_token', dinov2.load)):
    header = json.dumps({name: entry}).encode()
    path = tmp_path / 'x.safetensors'
    path.write_bytes(struct.pack('<Q', len(header)) + header)
    os.truncate(path, 8 + len(header) + ends)  # sparse
    refusal(load, path)


FIELDS = ([1], {'a': 1}, None, -1, 10**300, 2.5, [[1]], True, [1] * 10**6)
FITTING = {'features': ({'a': 1},), 'class_shares': ([1], [1] * 10**6)}
PROTOCOL = dataclasses.asdict(protocols.get('edm-cifar10'))


@pytest.mark.parametrize('field', PROTOCOL)
def test_a_protocol(tmp_path, field):
  for value in FIELDS:
    if value in FITTING.get(field, ()):
      continue
    content = json.dumps(PROTOCOL | {field: value})
    (tmp_path / 'protocol.json').write_text(content)
    assert 'is no protocol' in refusal(protocols.get, str(tmp_path))


@pytest.mark.parametrize(
  'content', ['[1]', 'null', '5', '[' * 10**6, '', '1' * 10**6, '"x"']
)
def test_a_protocol_of_another_form(tmp_path, content):
  (tmp_path / 'protocol.json').write_text(content)
  assert 'protocol' in refusal(protocols.get, str(tmp_path))


def test_what_is_no_file(tmp_path):
  os.mkfifo(tmp_path / 'x.json')
  os.symlink('/dev/zero', tmp_path / 'y.json')
  (tmp_path / 'z.json').touch()
  os.truncate(tmp_path / 'z.json', 3 * 10**9)
  for name in ('x.json', 'y.json', 'z.json', '.'):
    assert 'cannot read' in refusal(records.read_json, tmp_path / name)
  for suffix in ('pkl', 'npz', 'pb', 'pth', 'safetensors'):
    for make in (os.mkfifo, os.mkdir):
      path = tmp_path / f'{make.__name__}.{suffix}'
      make(path)
      if suffix in ('pkl', 'npz'):
        refusal(fid_stats.read, path)
      refusal(inception.load, path)
      refusal(dinov2.load, path)


def test_scores_that_are_none(tmp_path):
  good = {
    'protocol': json.loads(json.dumps(PROTOCOL)),
    'files': {'fid_stats': {'sha256': 'a'}},
    'samples': 5,
    'scores': {'fid': {'mean': 1.0}},
  }
  assert score.compare(good, good) == {'fid': 0}
  for change in (
    {'protocol': [1]},
    {'files': []},
    {'files': {'fid_stats': 5}},
    {'scores': [1]},
    {'scores': {'fid': {'mean': 'x'}}},
  ):
    assert 'no eval.json' in refusal(score.compare, good, good | change)
