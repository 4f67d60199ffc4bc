"""State dicts of PyTorch and of safetensors, in and out, bit for bit."""

import collections
import io
import json
import os
import pickletools
import zipfile

import numpy as np
import official_files as official
import pytest

from ddo_jax import errors
from ddo_jax.weights import pickle_machine
from ddo_jax.weights import safetensors_file
from ddo_jax.weights import torch_zip

WRITERS = {
  'zip': official.zipped,
  'legacy': lambda path, value: path.write_bytes(official.legacy(value)),
}


def make(dtype, seed=0):
  dtype = official.BFLOAT16 if dtype == 'bfloat16' else np.dtype(dtype)
  return np.random.default_rng(seed).normal(0, 3, (4, 3)).astype(dtype)


def states():
  """A state dict with every type and shape that is special."""
  state = {f'type.{name}': make(name) for name in official.KINDS}
  return state | {
    'scalar': np.float32(3).reshape(()),
    'empty': np.zeros((0, 3), np.float32),
    'transposed': make('float32').T,
    'every other': make('float32')[::2, 1:],
    'wörter.weight': np.arange(3),
  }


def assert_same(got, expected):
  assert list(got) == list(expected)
  for key, array in expected.items():
    assert got[key].dtype == array.dtype and got[key].shape == array.shape
    assert got[key].tobytes() == array.tobytes(), key


def tensors(state):
  return {k: official.Tensor(np.array(v, order='C')) for k, v in state.items()}


@pytest.mark.parametrize('kind', WRITERS)
def test_a_plain_state_dict(tmp_path, kind):
  value = collections.OrderedDict(tensors(states()))
  value._metadata = {'': {'version': 1}}  # as PyTorch's own have
  WRITERS[kind](tmp_path / 'x.pth', value)
  got = torch_zip.read(tmp_path / 'x.pth')
  assert_same(got, states())
  for array in got.values():
    assert array.flags.c_contiguous and array.flags.aligned
    assert not array.flags.writeable


@pytest.mark.parametrize('kind', WRITERS)
def test_a_trainer_stays_nested(tmp_path, kind):
  weight = official.Tensor(np.arange(6.0).reshape(2, 3))
  value = {
    'epoch': 3,
    'trainer': {
      'config': {'patch_nums': (1, 2), 'label_smooth': 0.0, 'x': None},
      'var_wo_ddp': {'head.weight': official.Parameter(weight)},
      'var_opt': {'state': {0: {'step': weight}}, 'param_groups': [[True]]},
    },
    'args': {'best': np.float64(2), 'name': 'd16'},
  }
  WRITERS[kind](tmp_path / 'x.pth', value)
  got = torch_zip.read(tmp_path / 'x.pth')
  assert got['epoch'] == 3 and got['args'] == {'best': 2.0, 'name': 'd16'}
  trainer = got['trainer']
  assert trainer['config'] == value['trainer']['config']
  array = trainer['var_wo_ddp']['head.weight']
  np.testing.assert_array_equal(array, [[0, 1, 2], [3, 4, 5]])
  assert trainer['var_opt']['state'][0]['step'] is array
  assert trainer['var_opt']['param_groups'] == [[True]]


@pytest.mark.parametrize('kind', WRITERS)
def test_views_share_a_storage(tmp_path, kind):
  storage = official.Storage(np.arange(12, dtype=np.int32))
  places = {
    'rows': ((4, (2, 4), (4, 1)), [[4, 5, 6, 7], [8, 9, 10, 11]]),
    'columns': ((1, (3, 2), (4, 2)), [[1, 3], [5, 7], [9, 11]]),
    'diagonal': ((0, (3,), (5,)), [0, 5, 10]),
    'one': ((7, (), ()), 7),
  }
  value = {
    k: official.Tensor(None, storage, *place)
    for k, (place, _) in places.items()
  }
  WRITERS[kind](tmp_path / 'x.pth', value)
  got = torch_zip.read(tmp_path / 'x.pth')
  for name, (_, expected) in places.items():
    np.testing.assert_array_equal(got[name], expected, name)
    assert got[name].shape == np.shape(expected)


def test_arrays_of_a_zip_are_mapped_and_outlive_its_replacement(tmp_path):
  path = tmp_path / 'x.pth'
  torch_zip.write(path, {'a': make('float32')})
  got = torch_zip.read(path)['a']
  assert not got.flags.owndata
  torch_zip.write(path, {'a': np.zeros(5)})
  np.testing.assert_array_equal(got, make('float32'))


def test_written_and_read_again(tmp_path):
  path = tmp_path / 'folder' / 'näme.pth'
  torch_zip.write(path, states())
  assert_same(torch_zip.read(path), states())
  assert os.listdir(path.parent) == [path.name]
  first = path.read_bytes()
  torch_zip.write(path, torch_zip.read(path))
  assert path.read_bytes() == first


def test_the_numbers_of_a_zip_start_at_multiples_of_64(tmp_path):
  torch_zip.write(tmp_path / 'x.pth', states())
  raw = (tmp_path / 'x.pth').read_bytes()
  with zipfile.ZipFile(io.BytesIO(raw)) as archive:
    assert archive.testzip() is None
    for index, array in enumerate(states().values()):
      info = archive.getinfo(f'x/data/{index}')
      size = array.nbytes
      start = info.header_offset + 30 + len(info.filename) + len(info.extra)
      assert start % 64 == 0 and raw[start : start + size] == array.tobytes()


def test_what_the_written_pickle_names(tmp_path):
  """All that torch.load(weights_only=True) needs to know, and no more."""
  torch_zip.write(tmp_path / 'x.pth', {'a': make('float16')})
  with zipfile.ZipFile(tmp_path / 'x.pth') as archive:
    operations = list(pickletools.genops(archive.read('x/data.pkl')))
    assert archive.read('x/byteorder') == b'little'
    assert archive.read('x/version') == b'3\n'
  assert {arg for op, arg, _ in operations if op.name == 'GLOBAL'} == {
    'collections OrderedDict',
    'torch HalfStorage',
    'torch._utils _rebuild_tensor_v2',
  }


def test_a_large_count_is_written(tmp_path):
  raw = torch_zip._number(2**31)
  stream = io.BytesIO(b'\x80\x02' + raw + b'.')
  budget = pickle_machine.Budget.of(100)
  assert pickle_machine.Machine(stream, {}, budget).run() == 2**31


@pytest.mark.parametrize(
  'write',
  [torch_zip.write, lambda p, s: safetensors_file.write(p, s, {})],
)
def test_what_cannot_be_written_is_refused(tmp_path, write):
  path = tmp_path / 'x'
  path.write_bytes(b'before')
  with pytest.raises(errors.UserError, match='complex128'):
    write(path, {'a': np.zeros(2), 'b': np.zeros(2, complex)})
  assert path.read_bytes() == b'before' and os.listdir(tmp_path) == ['x']
  (tmp_path / 'folder').mkdir()
  with pytest.raises(errors.UserError, match=r'cannot write .*folder'):
    write(tmp_path / 'folder', {'a': np.zeros(2)})


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'x.pth'
  torch_zip.write(path, {'a': np.zeros(2)})
  before = path.read_bytes()

  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(zipfile.ZipFile, 'writestr', full)
  with pytest.raises(errors.UserError, match='No space left'):
    torch_zip.write(path, {'a': np.ones(2)})
  assert path.read_bytes() == before and os.listdir(tmp_path) == ['x.pth']


def test_safetensors_round_trip(tmp_path):
  path = tmp_path / 'x.safetensors'
  safetensors_file.write(path, states(), {'licence': 'MIT'})
  got, metadata = safetensors_file.read(path)
  assert metadata == {'licence': 'MIT'}
  assert_same({key: got[key] for key in states()}, states())
  assert len(got) == len(states()) and os.listdir(tmp_path) == [path.name]


def safetensors(shape, start, end, data):
  header = {'a': {'dtype': 'F32', 'shape': shape, 'data_offsets': [start, end]}}
  raw = json.dumps(header).encode()
  return len(raw).to_bytes(8, 'little') + raw + data


@pytest.mark.parametrize(
  'raw',
  [
    b'',
    b'PK\3\4' + bytes(60),
    (2**62).to_bytes(8, 'little') + b'{}',
    safetensors([2], 0, 8, b''),
    safetensors([2**40], 0, 8, bytes(8)),
    safetensors([2], -8, 0, bytes(8)),
  ],
)
def test_broken_safetensors_are_refused(tmp_path, raw):
  path = tmp_path / 'x.safetensors'
  path.write_bytes(raw)
  with pytest.raises(errors.UserError, match='refused'):
    safetensors_file.read(path)
  path.write_bytes(safetensors([2], 0, 8, bytes(8)))  # the same, were it well
  assert safetensors_file.read(path)[0]['a'].tolist() == [0, 0]


@pytest.fixture
def torch():
  return pytest.importorskip('torch', reason='PyTorch is not installed')


def as_torch(torch, value):
  """Arrays to tensors of the same bits; a bfloat16 goes through its bits."""
  if value.dtype == official.BFLOAT16:
    bits = np.array(value).view(np.int16)
    return torch.from_numpy(bits).view(torch.bfloat16)
  return torch.from_numpy(np.array(value))


@pytest.mark.peers
@pytest.mark.parametrize('as_zip', [True, False])
def test_what_pytorch_saved(tmp_path, torch, as_zip):
  expected = states()
  state = {key: as_torch(torch, array) for key, array in expected.items()}
  state['transposed'] = as_torch(torch, expected['transposed'].T).T
  layer = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
  optimizer = torch.optim.AdamW(layer.parameters())
  layer(torch.ones(1, 3, 4, 4)).sum().backward()
  optimizer.step()
  value = {'trainer': {'var_wo_ddp': state, 'opt': optimizer.state_dict()}}
  value['net'] = layer.state_dict()
  path = tmp_path / 'x.pth'
  torch.save(value, path, _use_new_zipfile_serialization=as_zip)
  got = torch_zip.read(path)
  assert_same(got['trainer']['var_wo_ddp'], expected)
  for key, tensor in layer.state_dict().items():
    np.testing.assert_array_equal(got['net'][key], tensor.numpy())
  moments = got['trainer']['opt']['state'][0]['exp_avg']
  expected = optimizer.state_dict()['state'][0]['exp_avg']
  np.testing.assert_array_equal(moments, expected.numpy())


@pytest.mark.peers
@pytest.mark.parametrize('mapped', [True, False])
def test_pytorch_loads_what_is_written(tmp_path, torch, mapped):
  path = tmp_path / 'x.pth'
  torch_zip.write(path, states())
  got = torch.load(path, weights_only=True, mmap=mapped)
  assert list(got) == list(states())
  for key, array in states().items():
    tensor = as_torch(torch, array)
    assert got[key].dtype == tensor.dtype and got[key].shape == tensor.shape
    assert torch.equal(got[key], tensor), key


@pytest.mark.peers
def test_pytorch_loads_strictly_what_is_converted(tmp_path, torch):
  def net():
    return torch.nn.Sequential(
      torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.Linear(4, 2)
    )

  source, target = net(), net()
  torch.save(source.state_dict(), tmp_path / 'a.pth')
  torch_zip.write(tmp_path / 'b.pth', torch_zip.read(tmp_path / 'a.pth'))
  state = torch.load(tmp_path / 'b.pth', weights_only=True)
  target.load_state_dict(state, strict=True)
  for key, tensor in target.state_dict().items():
    assert torch.equal(tensor, source.state_dict()[key])
