"""Hostile and broken files: nothing of them runs, each is one clear line.

Wherever a payload claims to run code, a test first shows that Python's own
unpickler does run it; what it would run is a harmless recorder.
"""

import contextlib
import copyreg
import pickle
import sys
import types

import numpy as np
import official_files as official
import payloads
import pytest

from ddo_jax.weights import files
from ddo_jax.weights import torch_zip

MARK = b'('
# Codes of copyreg's table of extensions, and the opcodes that look them up.
EXTENSIONS = {200: b'\x82\xc8', 300: b'\x83\x2c\1', 70000: b'\x84p\x11\1\0'}
RUN = payloads.name('canary', 'run')
BOOM = payloads.name('canary', 'Boom')
ARGS = payloads.text('x') + b'\x85'


@pytest.fixture
def canary(monkeypatch):
  """What was run; importable as `canary`, for payloads to find."""
  calls = []
  module = types.ModuleType('canary')

  def run(*args, **kwargs):
    calls.append(args)
    return module.Boom

  class Boom(dict):
    def __new__(cls, *args, **kwargs):
      calls.append(('new', args))
      return super().__new__(cls)

    def __setstate__(self, state):
      calls.append(('setstate', state))

    def __setitem__(self, key, value):
      calls.append(('setitem', key))

    def append(self, item):
      calls.append(('append', item))

    def add(self, item):
      calls.append(('add', item))

    extend = append

  module.run, module.Boom = run, Boom
  for made in (run, Boom):
    made.__module__, made.__qualname__ = 'canary', made.__name__
  monkeypatch.setitem(sys.modules, 'canary', module)
  for code in EXTENSIONS:
    setattr(module, f'run{code}', run)
    copyreg.add_extension('canary', f'run{code}', code)
  yield calls
  for code in EXTENSIONS:
    copyreg.remove_extension('canary', f'run{code}', code)
  copyreg.clear_extension_cache()


# Every road by which a stream of opcodes makes Python run code.
ROADS = {
  'GLOBAL REDUCE': RUN + ARGS + b'R',
  'STACK_GLOBAL REDUCE': payloads.text('canary')
  + payloads.text('run')
  + b'\x93'
  + ARGS
  + b'R',
  'INST': MARK + payloads.text('x') + b'icanary\nrun\n',
  'OBJ': MARK + RUN + payloads.text('x') + b'o',
  'NEWOBJ': BOOM + ARGS + b'\x81',
  'NEWOBJ_EX': BOOM + ARGS + b'}\x92',
  'BUILD': BOOM + b')\x81}b',
  'APPEND': BOOM + b')\x81' + b'Na',
  'APPENDS': BOOM + b')\x81' + MARK + b'NNe',
  'SETITEM': BOOM + b')\x81' + b'NNs',
  'SETITEMS': BOOM + b')\x81' + MARK + b'NNu',
  'ADDITEMS': BOOM + b')\x81' + MARK + b'N\x90',
  'EXT1': EXTENSIONS[200] + ARGS + b'R',
  'EXT2': EXTENSIONS[300] + ARGS + b'R',
  'EXT4': EXTENSIONS[70000] + ARGS + b'R',
  'memo put, popped, recalled': RUN + b'q\x050h\x05' + ARGS + b'R',
  'memo overwritten': b'Nq\x05' + RUN + b'q\x050h\x05' + ARGS + b'R',
  'memoize': RUN + b'\x940h\x00' + ARGS + b'R',
  'long memo': RUN + b'r\0\0\1\x000j\0\0\1\0' + ARGS + b'R',
  'text memo': RUN + b'p7\n0g7\n' + ARGS + b'R',
  'as a key': b'}' + RUN + ARGS + b'RNs',
  'in a set': b'\x8f' + MARK + RUN + ARGS + b'R\x90',
  'thrown away': RUN + ARGS + b'R0N',
  'thrown away with its mark': MARK + RUN + ARGS + b'R1N',
  'twice': RUN + b'2' + ARGS + b'R0' + ARGS + b'R',
}
PROTOCOL = {'STACK_GLOBAL REDUCE': 4, 'memoize': 4, 'NEWOBJ_EX': 4}


def stream(road):
  return bytes([0x80, PROTOCOL.get(road, 2)]) + ROADS[road] + b'.'


def in_zip(path, raw):
  members = {'archive/data.pkl': raw}
  torch_zip.read(official.zipped(path, {}, members=members))


def in_legacy(part):
  def read(path, raw):
    path.write_bytes(official.legacy({}, parts={part: raw}))
    torch_zip.read(path)

  return read


def in_storage(part):
  def read(path, raw):
    storage = official.Storage(np.zeros(2))
    raw = official.legacy(storage, parts={part: raw})
    payloads.in_pickle(path, payloads.nested_storage(raw))

  return read


PARTS = ('magic', 'version', 'system', 'object', 'keys')
PLACES = {
  'pickle': payloads.in_pickle,
  'zip': in_zip,
  **{f'legacy {part}': in_legacy(part) for part in PARTS},
  **{f'storage {part}': in_storage(part) for part in PARTS},
}


@pytest.mark.parametrize('road', ROADS)
def test_the_roads_are_live(canary, road):
  # What follows the call may fail: the recorder is no real class.
  with contextlib.suppress(AttributeError, TypeError, pickle.UnpicklingError):
    pickle.loads(stream(road))
  assert canary


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('road', ROADS)
def test_no_road_runs_anything(tmp_path, canary, road, place):
  line = payloads.refusal(PLACES[place], tmp_path / 'x', stream(road))
  assert canary == [] and 'nothing in it was run' in line


@pytest.mark.parametrize(
  'full',
  [
    'os.system',
    'posix.system',
    'builtins.eval',
    'builtins.getattr',
    '__builtin__.exec',
    'builtins.__import__',
    'subprocess.Popen',
    'functools.partial',
    'operator.attrgetter',
    'importlib.import_module',
    'pickle.loads',
    'numpy.load',
    'numpy.core.multiarray.fromfile',
    'torch.load',
    'torch.hub.load',
    'torch.jit._script.unpackage_script_module',
    'torch._utils._rebuild_tensor_v2.__globals__',
    'torch_utils.persistence._src_to_module',
    'collections.OrderedDict.fromkeys',
    'ddo_jax.weights.arrays.np.load',
    'canary\u2028.run',
    'x' * 5000,
  ],
)
def test_names_that_weights_do_not_need(tmp_path, full):
  module, _, attribute = full.rpartition('.')
  raw = (
    b'\x80\x04'
    + payloads.text(module)
    + payloads.text(attribute)
    + b'\x93'
    + b'.'
  )
  for read in (payloads.in_pickle, in_zip, in_storage('object')):
    assert 'it names' in payloads.refusal(read, tmp_path / 'x', raw)


def test_a_refusal_is_one_short_line(tmp_path):
  def read():
    with files.refusing(tmp_path / 'x', 'weights'):
      raise ValueError('many\nwords ' * 1000)

  assert payloads.refusal(read).count('many words') < 30
