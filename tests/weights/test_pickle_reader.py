"""Released networks are read bit for bit, and nothing of them is run."""

import ast
import hashlib
import pathlib
import pickle

import numpy as np
import official_files as official
import pytest

import ddo_jax
from ddo_jax import errors
from ddo_jax.assets import table
from ddo_jax.weights import pickle_reader
from ddo_jax.weights import provenance


def save(path, value, protocol=4):
  path.write_bytes(official.dumps(value, protocol))
  return path


def assert_same(got, expected):
  assert list(got) == list(expected)
  for key, array in expected.items():
    assert got[key].dtype == array.dtype and got[key].shape == array.shape
    assert got[key].tobytes() == array.tobytes(), key


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_an_edm_file(tmp_path, protocol):
  weights = official.arrays()
  path = save(tmp_path / 'edm-x.pkl', official.edm(weights), protocol)
  net = pickle_reader.read_network(path, source='https://a:b@host/edm-x.pkl?t')
  assert_same(net.state_dict, weights)
  assert net.class_name == 'EDMPrecond'
  assert net.init_kwargs['channel_mult'] == [2, 2, 2]
  assert net.init_kwargs['model_type'] == 'SongUNet'
  assert net.attributes == {
    'training': False,
    'sigma_min': 0,
    'sigma_max': float('inf'),
    'sigma_data': 0.5,
    'label_dim': 10,
    'use_fp16': False,
  }
  assert net.encoder is None
  origin = net.provenance
  assert origin['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
  assert origin['file'] == 'edm-x.pkl'
  assert origin['source'] == 'https://host/edm-x.pkl'
  assert 'non-commercial' in origin['licence'] and origin['date'][:2] == '20'
  source = hashlib.sha256(official.SOURCE.encode()).hexdigest()
  assert origin['class_sha256'] == source


@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_an_edm2_file(tmp_path, protocol):
  weights = official.arrays(np.float16)
  path = save(tmp_path / 'x.pkl', official.edm2(weights), protocol)
  net = pickle_reader.read_network(path)
  assert_same(net.state_dict, weights)
  assert net.class_name == 'Precond' and net.attributes['use_fp16'] is True
  assert net.encoder.name == 'StabilityVAEEncoder'
  assert net.encoder.state['vae_name'] == 'a/vae'
  scale = net.encoder.state['scale']
  assert scale.dtype == np.float32 and scale[1] == np.float32(0.11)


def test_the_source_inside_is_never_run(tmp_path):
  canary = tmp_path / 'canary'
  source = official.SOURCE.format(canary=str(canary))
  assert canary.name in source
  path = save(tmp_path / 'x.pkl', official.edm(official.arrays(), source))
  tree = pickle_reader.read(path)
  assert not canary.exists() and tree['ema'].source == source
  exec(source)
  assert canary.exists()  # the text was a live one


def test_views_are_read_at_their_offsets_and_strides(tmp_path):
  flat = np.arange(60, dtype=np.float32)
  storage = official.Storage(flat)
  views = {
    'transposed': (0, (6, 5), (1, 6), flat[:30].reshape(5, 6).T),
    'sliced': (6 + 2, (3, 2), (6, 1), flat[:30].reshape(5, 6)[1:4, 2:4]),
    'channels_last': (
      0,
      (1, 3, 4, 5),
      (60, 1, 15, 3),
      flat.reshape(1, 4, 5, 3).transpose(0, 3, 1, 2),
    ),
    'last': (59, (), (), flat[59]),
    'stride of one row is idle': (0, (1, 4), (999, 1), flat[None, :4]),
    'empty': (60, (0, 3), (3, 1), flat[:0].reshape(0, 3)),
  }
  tensors = {
    name: official.Tensor(None, storage, *place)
    for name, (*place, _) in views.items()
  }
  got = pickle_reader.read(save(tmp_path / 'x.pkl', tensors))
  for name, (*_, expected) in views.items():
    np.testing.assert_array_equal(got[name], expected, name)
    assert got[name].shape == expected.shape
    assert got[name].flags.c_contiguous and got[name].flags.aligned
    assert not got[name].flags.writeable


@pytest.mark.parametrize('dtype', official.KINDS)
@pytest.mark.parametrize('module', ['torch', 'torch.cuda'])
def test_every_type(tmp_path, dtype, module):
  dtype = official.BFLOAT16 if dtype == 'bfloat16' else np.dtype(dtype)
  array = np.array([[0, 1, -1.5], [3, 0.1, 7]]).astype(dtype)
  storage = official.Storage(array, 'cuda:0', module)
  tensor = official.Tensor(array, storage)
  got = pickle_reader.read(save(tmp_path / 'x.pkl', [tensor]))[0]
  assert got.dtype == dtype and got.tobytes() == array.tobytes()


def test_sharing_is_kept(tmp_path):
  tensor = official.Tensor(np.arange(3))
  value = {'a': tensor, 'b': [tensor], 'self': []}
  value['self'].append(value['self'])
  got = pickle_reader.read(save(tmp_path / 'x.pkl', value))
  assert got['a'] is got['b'][0] and got['self'][0] is got['self']


@pytest.mark.parametrize('core', [b'numpy._core', b'numpy.core'])
@pytest.mark.parametrize('protocol', [2, 3, 5])
def test_numpy_values(tmp_path, protocol, core):
  value = {
    'mu': np.arange(4.0),
    'fortran': np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
    'strided': np.arange(10)[::3],
    'scalar': np.float64(0.5),
    'flag': np.array([True, False]),
    'zero': np.float32(2).reshape(()),
    'empty': np.zeros((0, 4)),
    'names': {'a', 'b'},
    'bytes': b'\x00\xff',
  }
  raw = official.dumps(value, protocol)
  if protocol < 4:  # names are lines of text there
    raw = raw.replace(b'cnumpy._core', b'c' + core)
  (tmp_path / 'x.pkl').write_bytes(raw)
  got = pickle_reader.read(tmp_path / 'x.pkl')
  assert list(got) == list(value)
  for name in ('mu', 'fortran', 'strided', 'scalar', 'flag', 'zero', 'empty'):
    np.testing.assert_array_equal(got[name], value[name], name)
    assert got[name].dtype == value[name].dtype
  assert got['names'] == {'a', 'b'} and got['bytes'] == b'\x00\xff'


def test_a_file_of_something_else_is_named(tmp_path):
  path = save(tmp_path / 'x.pkl', {'fid': {'mu': np.zeros(2)}})
  with pytest.raises(errors.UserError, match=r"'ema' \(it holds \['fid'\]\)"):
    pickle_reader.read_network(path)
  path = save(path, {'ema': official.Persistent('Loss', {'P_mean': 0})})
  with pytest.raises(errors.UserError, match="'Loss' is no module"):
    pickle_reader.read_network(path)
  with pytest.raises(errors.UserError, match=r'cannot read .*No such file'):
    pickle_reader.read(tmp_path / 'none.pkl')


def test_modules_in_the_wrong_places_are_refused(tmp_path):
  weight = official.Tensor(np.zeros(2))
  child = official.Persistent('Linear', official.module({'w': weight}))
  kwargs = {'_init_kwargs': {}}

  def refusal(**tables):
    net = official.Persistent('Net', official.module(**tables, **kwargs))
    path = save(tmp_path / 'x.pkl', {'ema': net})
    with pytest.raises(errors.UserError) as caught:
      pickle_reader.read_network(path)
    return str(caught.value)

  assert 'x is no module' in refusal(modules={'x': 3})
  twice = {'parameters': {'a.w': weight}, 'modules': {'a': child}}
  assert "'a.w' is no array, or twice" in refusal(**twice)
  assert "'w' is no array" in refusal(parameters={'w': 1.0})
  bare = official.FAKES['torch.nn.modules.container.ModuleDict']()
  assert "'ModuleDict' is no module" in refusal(modules={'x': bare})
  loop = official.module_dict({})
  loop._modules['x'] = loop
  assert 'hold one another without end' in refusal(modules={'a': loop})


def test_shared_children_cannot_multiply(tmp_path, monkeypatch):
  monkeypatch.setattr(pickle_reader, '_MAX_MODULES', 1000)
  net = official.Persistent('Leaf', official.module())
  for _ in range(12):
    state = official.module(modules={'a': net, 'b': net}, _init_kwargs={})
    net = official.Persistent('Pair', state)
  path = save(tmp_path / 'x.pkl', {'ema': net})
  with pytest.raises(errors.UserError, match='more than 1000 modules'):
    pickle_reader.read_network(path)


def test_licences():
  for name in ('edm2-img64-s-1073741-0.075.pkl', 'var_d16-ddo.pth'):
    assert provenance.licence_of(name) == table.NVIDIA
  assert provenance.licence_of('var_d30.pth') == table.VAR
  assert provenance.licence_of('mine.pth') == provenance.UNKNOWN


def test_the_package_never_unpickles():
  banned = {'pickle', 'cPickle', '_pickle', 'dill', 'cloudpickle', 'joblib'}
  package = pathlib.Path(ddo_jax.__file__).parent
  # It reads what its own parent sent through a file without a name.
  allowed = package / 'data' / 'workers.py'
  for path in set(package.rglob('*.py')) - {allowed}:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import | ast.ImportFrom):
        names = {alias.name.split('.')[0] for alias in node.names}
        names.add((getattr(node, 'module', None) or '').split('.')[0])
        assert not names & banned, path
      if isinstance(node, ast.keyword) and node.arg == 'allow_pickle':
        assert node.value.value is False, path


@pytest.mark.peers
@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_a_real_module_as_released(tmp_path, protocol):
  torch = pytest.importorskip('torch', reason='PyTorch is not installed')
  linear = torch.nn.Linear(3, 5).half()
  conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
  holder = torch.nn.ModuleDict({'a': linear, 'b': conv})
  holder.register_buffer('t', torch.arange(6).reshape(2, 3).T)
  expected = holder.state_dict()

  def persistent(module):
    state = dict(module.__dict__)
    children = {
      name: persistent(child) if len(name) == 1 else child
      for name, child in module.named_children()
    }
    state['_modules'] = children
    return official.Persistent(type(module).__name__, state)

  net = persistent(holder)
  net.meta['state']['_init_kwargs'] = {}
  # Only the persistent class is a stand-in; the rest is PyTorch's own.
  name = 'torch_utils.persistence._reconstruct_persistent_obj'
  with official.importable([name]), (tmp_path / 'x.pkl').open('wb') as file:
    pickle.dump({'ema': net}, file, protocol)
  got = pickle_reader.read_network(tmp_path / 'x.pkl').state_dict
  assert list(got) == list(expected)
  for key, tensor in expected.items():
    np.testing.assert_array_equal(got[key], tensor.numpy(), key)
