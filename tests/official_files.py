"""Files in the official layouts, written without PyTorch.

Python's own pickler writes them from stand-ins that reduce to the names that
the original programs' objects reduce to.
"""

import collections
import contextlib
import io
import pickle
import sys
import types
from unittest import mock
import zipfile

import jax
import ml_dtypes
import numpy as np

from ddo_jax.weights import released as released_lib

MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {
  'protocol_version': 1001,
  'little_endian': True,
  'type_sizes': {'short': 2, 'int': 4, 'long': 4},
}
KINDS = {
  'float64': 'DoubleStorage',
  'float32': 'FloatStorage',
  'float16': 'HalfStorage',
  'bfloat16': 'BFloat16Storage',
  'int64': 'LongStorage',
  'int32': 'IntStorage',
  'int16': 'ShortStorage',
  'int8': 'CharStorage',
  'uint8': 'ByteStorage',
  'bool': 'BoolStorage',
}
SOURCE = 'open({canary!r}, "w")  # what the official loader would run'


NAMES = (
  *(f'{m}.{kind}' for m in ('torch', 'torch.cuda') for kind in KINDS.values()),
  'torch._utils._rebuild_tensor_v2',
  'torch._utils._rebuild_parameter',
  'torch.storage._load_from_bytes',
  'torch.nn.modules.container.ModuleDict',
  'torch_utils.persistence._reconstruct_persistent_obj',
  'dnnlib.util.EasyDict',
)


def _fake(name):
  """A class that pickles as the global of that full name."""
  module, _, attribute = name.rpartition('.')
  base = dict if attribute == 'EasyDict' else object
  return type(attribute, (base,), {'__module__': module})


FAKES = {name: _fake(name) for name in NAMES}


@contextlib.contextmanager
def importable(names=NAMES):
  """The fakes can be imported, as the pickler demands of what it names."""
  modules = {}
  for name in names:
    module, _, attribute = name.rpartition('.')
    parts = module.split('.')
    for end in range(1, len(parts) + 1):
      path = '.'.join(parts[:end])
      modules.setdefault(path, types.ModuleType(path))
    setattr(modules[module], attribute, FAKES[name])
  with mock.patch.dict(sys.modules, modules):
    yield


class Storage:
  """A flat run of numbers."""

  def __init__(self, array, location='cpu', module='torch'):
    self.array = np.ravel(array)
    self.kind = FAKES[f'{module}.{KINDS[self.array.dtype.name]}']
    self.location = location

  def identity(self, key):
    size = self.array.size
    return ('storage', self.kind, key, self.location, size)

  def __reduce__(self):
    raw = legacy(self)
    return FAKES['torch.storage._load_from_bytes'], (raw,)


class Tensor:
  """A view of a storage; by default of a contiguous copy of `array`."""

  def __init__(self, array=None, storage=None, offset=0, size=(), stride=()):
    self.storage = storage
    self.place = (offset, size, stride)
    if array is not None:
      strides = np.empty(array.shape, np.int8).strides
      self.storage = storage or Storage(array)
      self.place = (0, array.shape, strides)

  def __reduce__(self):
    made = FAKES['torch._utils._rebuild_tensor_v2']
    return made, (self.storage, *self.place, False, collections.OrderedDict())


class Parameter:
  """A tensor that is trained."""

  def __init__(self, tensor):
    self.tensor = tensor

  def __reduce__(self):
    made = FAKES['torch._utils._rebuild_parameter']
    return made, (self.tensor, True, collections.OrderedDict())


class Persistent:
  """An object of a class of NVIDIA's."""

  def __init__(self, class_name, state, source=SOURCE):
    self.meta = {
      'type': 'class',
      'version': 6,
      'module_src': source,
      'class_name': class_name,
      'state': state,
    }

  def __reduce__(self):
    name = 'torch_utils.persistence._reconstruct_persistent_obj'
    return FAKES[name], (self.meta,)


def dumps(value, protocol=4, identify=None):
  """Pickles a value; `identify` gives storages their persistent ids."""

  class Pickler(pickle.Pickler):
    def persistent_id(self, value):
      if identify and isinstance(value, Storage):
        return identify(value)
      return None

  stream = io.BytesIO()
  with importable():
    Pickler(stream, protocol).dump(value)
  return stream.getvalue()


def legacy(value, protocol=2, parts=None):
  """The format before 1.6, whole; `parts` replaces some of its pickles."""
  storages = {}

  def identify(storage):
    key = storages.setdefault(id(storage), (str(len(storages)), storage))[0]
    return (*storage.identity(key), None)

  pickles = {
    'magic': pickle.dumps(MAGIC, protocol),
    'version': pickle.dumps(1001, protocol),
    'system': pickle.dumps(SYSTEM, protocol),
    'object': dumps(value, protocol, identify),
  }
  keys = [key for key, _ in storages.values()]
  pickles['keys'] = pickle.dumps(keys, protocol)
  pickles |= parts or {}
  raw = [
    storage.array.size.to_bytes(8, 'little') + storage.array.tobytes()
    for _, storage in storages.values()
  ]
  return b''.join([*pickles.values(), *raw])


def zipped(path, value=None, root='archive', members=None, **options):
  """The format since 1.6; `members` replaces, adds or (None) drops some."""
  storages = {}

  def identify(storage):
    key = storages.setdefault(id(storage), (str(len(storages)), storage))[0]
    return storage.identity(key)

  contents = {
    'data.pkl': dumps(value, 2, identify),
    'byteorder': b'little',
    **{f'data/{k}': s.array.tobytes() for k, s in storages.values()},
    'version': b'3\n',
  }
  contents = {f'{root}/{name}': raw for name, raw in contents.items()}
  contents |= members or {}
  with zipfile.ZipFile(path, 'w', **options) as archive:
    for name, raw in contents.items():
      if raw is not None:
        archive.writestr(name, raw)
  return path


def module(parameters=None, buffers=None, modules=None, transient=(), **more):
  """The attributes of a module, as a table."""
  hooks = ('_backward_hooks', '_forward_hooks', '_forward_pre_hooks')
  return {
    'training': False,
    '_parameters': collections.OrderedDict(parameters or {}),
    '_buffers': collections.OrderedDict(buffers or {}),
    '_non_persistent_buffers_set': set(transient),
    **{hook: collections.OrderedDict() for hook in hooks},
    '_modules': collections.OrderedDict(modules or {}),
    **more,
  }


def module_dict(modules):
  made = FAKES['torch.nn.modules.container.ModuleDict']()
  made.__dict__.update(module(modules=modules))
  return made


def arrays(dtype=np.float32, seed=0):
  """Arrays for a small network, in the order of its official keys."""
  rng = np.random.default_rng(seed)
  shapes = {
    'model.map_label.weight': (8, 10),
    'model.enc.4x4_conv.weight': (8, 3, 3, 3),
    'model.enc.4x4_conv.bias': (8,),
    'model.enc.4x4_down.gain': (),
    'model.enc.4x4_down.resample_filter': (1, 1, 2, 2),
    'logvar.freqs': (16,),
  }
  return {k: rng.normal(size=s).astype(dtype) for k, s in shapes.items()}


def network(class_name, weights, **attributes):
  """A persistent network around `arrays`, in the official layout."""
  at = {key: Tensor(array) for key, array in weights.items()}
  convolution = Persistent(
    'Conv2d',
    module(
      {
        'weight': Parameter(at['model.enc.4x4_conv.weight']),
        'bias': Parameter(at['model.enc.4x4_conv.bias']),
      },
      {'resample_filter': None},
      skip_scale=np.float64(0.5),
    ),
  )
  down = Persistent(
    'UNetBlock',
    module(
      {'gain': Parameter(at['model.enc.4x4_down.gain']), 'bias': None},
      {
        'transient': Tensor(np.ones(3, np.float32)),
        'resample_filter': at['model.enc.4x4_down.resample_filter'],
      },
      transient=['transient'],
    ),
  )
  label = {'weight': Parameter(at['model.map_label.weight'])}
  encoder = module_dict({'4x4_conv': convolution, '4x4_down': down})
  unet = module(
    modules={
      'map_label': Persistent('Linear', module(label)),
      'map_augment': None,
      'enc': encoder,
    },
    _init_args=(),
    _init_kwargs={'img_resolution': 4},
  )
  logvar = Persistent(
    'MPFourier', module(buffers={'freqs': at['logvar.freqs']})
  )
  kwargs = {
    'img_resolution': 4,
    'img_channels': 3,
    'label_dim': 10,
    'model_type': 'SongUNet',
    'channel_mult': [2, 2, 2],
  }
  modules = {'model': Persistent('SongUNet', unet), 'logvar': logvar}
  state = module(
    modules=modules, _init_args=(), _init_kwargs=kwargs, **attributes
  )
  return Persistent(class_name, state)


def released(class_name, state, kwargs, **entries):
  """The table of a file with a whole network of that official state dict."""

  def build(items, **more):
    own = {k[0]: Parameter(Tensor(v)) for k, v in items if len(k) == 1}
    names = dict.fromkeys(k[0] for k, _ in items if len(k) > 1)
    children = {
      name: Persistent(
        'Module', build([(k[1:], v) for k, v in items if k[0] == name])
      )
      for name in names
    }
    return module(own, modules=children, **more)

  items = [(key.split('.'), array) for key, array in state.items()]
  net = build(items, _init_args=(), _init_kwargs=kwargs)
  return {'ema': Persistent(class_name, net), **entries}


def edm(weights, source=SOURCE):
  """The table of an EDM file."""
  net = network(
    'EDMPrecond',
    weights,
    sigma_min=0,
    sigma_max=float('inf'),
    sigma_data=0.5,
    label_dim=10,
    use_fp16=False,
  )
  net.meta['module_src'] = source
  return {
    'ema': net,
    'loss_fn': Persistent('EDMLoss', {'P_mean': -1.2}),
    'augment_pipe': Persistent('AugmentPipe', {'wavelet': np.arange(6.0)}),
    'dataset_kwargs': {'path': 'cifar10-32x32.zip', 'use_labels': True},
  }


def edm2(weights):
  """The table of an EDM2 file."""
  scale = np.float32([0.12, 0.11, 0.13, 0.15])
  table = FAKES['dnnlib.util.EasyDict']()
  table['encoder'] = Persistent(
    'StabilityVAEEncoder',
    {'scale': scale, 'bias': -scale, '_vae': None, 'vae_name': 'a/vae'},
  )
  table['dataset_kwargs'] = FAKES['dnnlib.util.EasyDict'](path='x')
  table['loss_fn'] = Persistent('EDM2Loss', {'P_mean': -0.8})
  table['ema'] = network('Precond', weights, label_dim=10, use_fp16=True)
  return table


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def random_state(config):
  """Random params without two alike, and their official state dict."""
  draw = np.random.default_rng(0).normal
  params = jax.tree.map(
    lambda leaf: np.asarray(draw(size=leaf.shape), np.float32),
    released_lib._shapes(config),
  )
  return params, released_lib._to_official(config, params)
