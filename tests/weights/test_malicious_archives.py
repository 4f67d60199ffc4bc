"""Hostile tensors, storages and zips; files cut off, damaged or renamed."""

import pickle
import struct
import zipfile

import numpy as np
import official_files as official
import payloads
import pytest

from ddo_jax import errors
from ddo_jax.weights import pickle_reader
from ddo_jax.weights import torch_zip

NUMBERS = np.arange(24, dtype=np.float32)
SEVERAL = 'several times the file'


def refusal(path):
  """The one line that refuses a .pth file."""
  return payloads.refusal(torch_zip.read, path)


def tensor(offset, size, stride, storage=None):
  storage = storage or official.Storage(NUMBERS)
  return official.Tensor(None, storage, offset, size, stride)


# name: ((offset, size, stride[, storage]), words)
TENSORS = {
  'offset behind the end': ((24, (1,), (1,)), 'reaches past'),
  'last number outside': ((0, (5, 5), (5, 1)), 'reaches past'),
  'stride outside': ((0, (2,), (24,)), 'reaches past'),
  'huge stride': ((0, (2,), (2**46,)), 'reaches past'),
  'overflowing stride': ((0, (2,), (2**63,)), 'negative, huge'),
  'overflowing size': ((0, (2**32, 2**32), (0, 0)), 'reaches past'),
  'wrapping size': ((0, (2**60, 16), (1, 1)), 'negative, huge'),
  'endless repetition': ((0, (10**9,), (0,)), 'reaches past'),
  'overlapping windows': ((0, (20, 5), (1, 1)), 'reaches past'),
  'negative offset': ((-1, (2,), (1,)), 'negative'),
  'negative size': ((0, (-2, -3), (3, 1)), 'negative'),
  'negative stride': ((20, (2,), (-1,)), 'negative'),
  'fractional size': ((0, (2.0,), (1,)), 'fractional'),
  'not a number': ((0, (float('nan'),), (1,)), 'fractional'),
  'a truth for a size': ((0, (True,), (1,)), 'fractional'),
  'text for a size': ((0, '23', (3, 1)), 'no short tuple'),
  'no size': ((0, None, (1,)), 'no short tuple'),
  'more strides than sizes': ((0, (2,), (3, 1)), 'but 2 strides'),
  'too many dimensions': ((0, (1,) * 40, (1,) * 40), 'no short tuple'),
  'no storage': ((0, (2,), (1,), [1.0, 2.0]), 'without a storage'),
  'huge empty': ((0, (0, 2**46, 2**46), (0, 0, 0)), 'too big'),
}


@pytest.mark.parametrize('kind', ['pickle', 'zip', 'legacy'])
@pytest.mark.parametrize('case', TENSORS)
def test_tensors_stay_inside_their_storage(tmp_path, case, kind):
  place, words = TENSORS[case]
  value = {'a': tensor(*place)}
  path = tmp_path / 'x'
  if kind == 'pickle':
    path.write_bytes(official.dumps(value))
    assert words in payloads.refusal(pickle_reader.read, path)
  elif kind == 'legacy':
    path.write_bytes(official.legacy(value))
    assert words in refusal(path)
  else:
    assert words in refusal(official.zipped(path, value))


def test_many_views_of_one_storage_are_refused(tmp_path):
  storage = official.Storage(np.zeros(2**14, np.float32))
  value = [tensor(0, (64, 256), (1, 64), storage) for _ in range(40)]
  assert SEVERAL in refusal(official.zipped(tmp_path / 'x', value))
  assert len(torch_zip.read(official.zipped(tmp_path / 'x', value[:2]))) == 2


def test_truths_other_than_0_and_1(tmp_path):
  storage = official.Storage(np.array([False, True]))
  storage.array = np.array([1, 2], np.uint8)
  value = tensor(0, (2,), (1,), storage)
  assert 'truth values' in refusal(official.zipped(tmp_path / 'x', value))


class Lying(official.Storage):
  """A storage whose persistent id is the attacker's, in part."""

  def __init__(self, changes):
    super().__init__(NUMBERS)
    self.changes = changes

  def identity(self, key):
    true = dict(enumerate(super().identity(key)))
    return tuple((true | self.changes).values())


# name: (what is changed in ('storage', type, key, location, numel), words)
IDENTITIES = {
  'too long': ({4: 25}, '25'),
  'endless': ({4: 2**46}, str(2**46)),
  'overflowing': ({4: 2**62}, 'huge'),
  'negative': ({4: -24}, 'negative'),
  'not a number': ({4: float('nan')}, 'fractional'),
  'another object': ({0: 'module'}, 'something else'),
  'text for a type': ({1: 'torch.FloatStorage'}, 'something else'),
  'another type': ({1: {}}, 'something else'),
  'a view': ({5: ('0', 0, 1)}, 'something else'),
  'more': ({5: None, 6: 1}, 'something else'),
  'path as a key': ({2: '../data.pkl'}, "no storage '../data.pkl'"),
  'number as a key': ({2: 0}, 'without a name'),
}


@pytest.mark.parametrize('case', IDENTITIES)
def test_lying_storages(tmp_path, case):
  changes, words = IDENTITIES[case]
  value = tensor(0, (2,), (1,), Lying(changes))
  assert words in refusal(official.zipped(tmp_path / 'x', value))
  (tmp_path / 'x').write_bytes(official.legacy(value))
  refusal(tmp_path / 'x')


@pytest.mark.parametrize('change', [{4: 12}, {1: 'torch.LongStorage'}])
def test_two_storages_of_one_name(tmp_path, change):
  kinds = {k: official.FAKES.get(v, v) for k, v in change.items()}
  storages = (Lying({2: '0'}), Lying({2: '0'} | kinds))
  value = [tensor(0, (2,), (1,), storage) for storage in storages]
  (tmp_path / 'x').write_bytes(official.legacy(value))
  assert 'two storages of one name' in refusal(tmp_path / 'x')
  line = refusal(official.zipped(tmp_path / 'x', value))
  assert 'two storages of one name' in line or '24 numbers in 96' in line


def test_legacy_files_that_lie(tmp_path):
  value = {'a': official.Tensor(NUMBERS), 'b': official.Tensor(NUMBERS[:5])}

  def changed(part, content):
    return official.legacy(value, parts={part: pickle.dumps(content)})

  raw = official.legacy(value)
  longer = raw.replace((24).to_bytes(8, 'little'), (23).to_bytes(8, 'little'))
  cases = (
    (raw + b'x', 'behind the end'),
    (raw[:-3], 'cut off after 17 bytes'),
    (longer, 'another length than announced'),
    (changed('keys', ['0', '0', '1']), 'list of storages'),
    (changed('keys', [['0'], '1']), "'<' not supported"),
    (changed('keys', 3), 'list of storages'),
    (changed('system', {'little_endian': False}), 'not little-endian'),
    (changed('system', 3), 'not little-endian'),
    (changed('version', 1002), 'before 1.6'),
    (changed('magic', 1), 'before 1.6'),
  )
  for damaged, words in cases:
    (tmp_path / 'x').write_bytes(damaged)
    assert words in refusal(tmp_path / 'x'), words


def good_zip(path, **options):
  return official.zipped(path, {'a': official.Tensor(NUMBERS)}, **options)


LZMA = {'compression': zipfile.ZIP_LZMA}
NONE = official.dumps(None, 2)
PKL = 'archive/data.pkl'
DATA = 'archive/data/0'
# name: (options of the archive, members changed, words)
ZIPS = {
  'deflated': ({'compression': zipfile.ZIP_DEFLATED}, {}, 'compressed'),
  'bomb': (LZMA, {'archive/data/9': bytes(10**6)}, 'compressed'),
  'no pickle': ({}, {PKL: None}, 'with 0 data.pkl'),
  'two pickles': ({}, {'b/data.pkl': NONE}, 'with 2 data.pkl'),
  'deep pickle': ({}, {PKL: None, 'a/b/data.pkl': NONE}, 'with 0 data.pkl'),
  'pickle after pickle': ({}, {PKL: NONE + NONE}, 'behind the end of data'),
  'zip in a zip': ({}, {PKL: b'PK\5\6' + bytes(18)}, 'no pickle of protocol'),
  'no storage': ({}, {DATA: None}, "no storage '0'"),
  'short storage': ({}, {DATA: bytes(95)}, '24 numbers in 95'),
  'long storage': ({}, {DATA: bytes(97)}, '24 numbers in 97'),
  'big-endian': ({}, {'archive/byteorder': b'big'}, 'endian'),
  'TorchScript': ({}, {'archive/constants.pkl': NONE}, 'TorchScript'),
  'parent folder': ({}, {'../../evil': b''}, 'a member named'),
  'hidden parent': ({}, {'archive/../evil': b''}, 'a member named'),
  'absolute path': ({}, {'/etc/evil': b''}, 'a member named'),
  'windows path': ({}, {'..\\evil': b''}, 'a member named'),
  'folder': ({}, {'archive/data/': b''}, 'a member named'),
}


@pytest.mark.parametrize('case', ZIPS)
def test_hostile_zips(tmp_path, case):
  options, members, words = ZIPS[case]
  good_zip(tmp_path / 'x', members=members, **options)
  assert words in refusal(tmp_path / 'x')
  assert [path.name for path in tmp_path.iterdir()] == ['x']


def test_a_name_twice(tmp_path):
  good_zip(tmp_path / 'x')
  with zipfile.ZipFile(tmp_path / 'x', 'a') as archive:
    with pytest.warns(UserWarning, match='Duplicate'):
      archive.writestr(PKL, NONE)
  assert 'two members named' in refusal(tmp_path / 'x')


def patched(raw, at, value):
  return raw[:at] + value + raw[at + len(value) :]


def entry(raw, member):
  """Where a member stands: (central entry, local header, its bytes)."""
  local = raw.index(member) - 30
  return raw.rindex(member) - 46, local, local + 30 + len(member)


def test_zips_whose_headers_lie(tmp_path):
  raw = good_zip(tmp_path / 'x').read_bytes()
  central, local, start = entry(raw, DATA.encode())
  other = entry(raw, b'archive/version')[0]
  end = raw.rindex(b'PK\5\6')
  cases = (
    ('damaged (CRC)', start + 5, b'\xff'),
    ('has two sizes', central + 20, struct.pack('<2I', 96, 2**20)),
    ('overlaps another', central + 20, struct.pack('<2I', 2**31, 2**31)),
    ('has another header', other + 42, raw[central + 42 : central + 46]),
    ('has another header', local + 30, b'x'),
    ('has another header', local, b'XX'),
    ('compressed or locked', central + 8, b'\1\0'),
    ('unpack_from requires', central + 42, b'\xff\xff\xff\x7f'),
    ('Bad offset for central', end + 12, b'\xff\xff\xff\x7f'),
    ('not a zip file', end, b'XX'),
  )
  for words, at, lie in cases:
    (tmp_path / 'x').write_bytes(patched(raw, at, lie))
    assert words in refusal(tmp_path / 'x'), words
  (tmp_path / 'x').write_bytes(b'MZ' + raw)  # a program that ends in a zip
  assert 'no file that torch.save writes' in refusal(tmp_path / 'x')


def test_members_that_lie_in_one_another(tmp_path):
  """Each is whole by itself, and they share their bytes: the flat bomb."""
  path = tmp_path / 'x'
  members = {'archive/data/1': NUMBERS.tobytes()}
  raw = good_zip(path, members=members).read_bytes()
  _, local, start = entry(raw, b'archive/data/1')
  inner = raw[local : start + NUMBERS.nbytes]
  raw = good_zip(path, members={'archive/data/2': inner} | members).read_bytes()
  assert torch_zip.read(path)  # so far only bytes like any
  at = struct.pack('<I', raw.index(inner))
  path.write_bytes(patched(raw, entry(raw, b'archive/data/1')[0] + 42, at))
  with zipfile.ZipFile(path) as archive:
    assert archive.read('archive/data/1') == NUMBERS.tobytes()
  assert 'overlaps another' in refusal(path)


def write_npz(path):
  with path.open('wb') as file:
    np.savez(file, a=NUMBERS)


def write(raw):
  return lambda path: path.write_bytes(raw)


PKL_READER, PTH_READER = pickle_reader.read, torch_zip.read
# name: (reader, what makes the file, words)
RENAMED = {
  'zip as pkl': (PKL_READER, good_zip, 'a zip archive'),
  'npz as pkl': (PKL_READER, write_npz, 'a zip archive'),
  'npz as pth': (PTH_READER, write_npz, 'with 0 data.pkl'),
  'text as pth': (PTH_READER, write(b'hello'), 'no file that torch'),
  'pickle as pth': (PTH_READER, write(official.dumps([1])), 'before 1.6'),
  'legacy as pkl': (PKL_READER, write(official.legacy({})), 'behind the end'),
  'empty as pth': (PTH_READER, write(b''), 'empty'),
  'safetensors as pth': (PTH_READER, write(b'\2' + bytes(7)), 'no file'),
  'folder as pth': (PTH_READER, lambda path: path.mkdir(), 'a folder'),
  'nothing as pth': (PTH_READER, lambda path: None, 'No such file'),
}


@pytest.mark.parametrize('case', RENAMED)
def test_renamed_files(tmp_path, case):
  read, make, words = RENAMED[case]
  make(tmp_path / 'x')
  assert words in payloads.refusal(read, tmp_path / 'x')


def whole_files(path):
  """(reader, bytes) of a good file of each format."""
  weights = official.arrays()
  state = {key: official.Tensor(array) for key, array in weights.items()}
  yield PKL_READER, official.dumps(official.edm(weights))
  yield PTH_READER, official.legacy(state)
  yield PTH_READER, official.zipped(path, state).read_bytes()


def test_files_cut_off_anywhere(tmp_path):
  path = tmp_path / 'x'
  for read, raw in whole_files(path):
    path.write_bytes(raw)
    read(path)
    for end in np.linspace(0, len(raw) - 1, 60).astype(int):
      path.write_bytes(raw[:end])
      payloads.refusal(read, path)


def test_files_with_bytes_changed_are_read_or_refused(tmp_path):
  rng = np.random.default_rng(0)
  path = tmp_path / 'x'
  refused = 0
  for read, raw in whole_files(path):
    for _ in range(200):
      damaged = np.frombuffer(raw, np.uint8).copy()
      at = rng.integers(0, len(raw), rng.integers(1, 4))
      damaged[at] = rng.integers(0, 256, len(at))
      path.write_bytes(damaged.tobytes())
      try:
        read(path)
      except errors.UserError:
        refused += 1
  assert refused > 200
