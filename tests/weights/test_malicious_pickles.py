"""Broken pickles, bombs, and offered names asked for what they do not do."""

import struct
import tracemalloc

import numpy as np
import official_files as official
import payloads
import pytest

from ddo_jax.weights import pickle_machine
from ddo_jax.weights import pickle_reader

call, name = payloads.call, payloads.name
plain, text = payloads.plain, payloads.text
ARGS = text('x') + b'\x85'


def refusal(folder, raw):
  """The one line that refuses a .pkl file."""
  return payloads.refusal(payloads.in_pickle, folder / 'x', raw)


RECONSTRUCT = name('numpy.core.multiarray', '_reconstruct')
EMPTY = RECONSTRUCT + name('numpy', 'ndarray') + b'K\0\x85C\1b\x87R'
DTYPE = name('numpy', 'dtype') + text('f8') + b'\x89\x88\x87R'
PERSISTENT = 'torch_utils.persistence._reconstruct_persistent_obj'
LOAD = 'torch.storage._load_from_bytes'
NO_CLASS = official.dumps(official.Persistent('X', {}), 2).replace(
  text('class'), text('funcs')
)
PLAIN = 'plain numbers'


def dtype(order='<', subtype=b'N'):
  state = b'(K\3' + text(order) + subtype + b'NNK\0K\0K\0t'
  return b'\x80\x03' + DTYPE + state + b'b.'


def ndarray(shape=b'K\1\x85', raw=b'C\x08' + bytes(8)):
  state = b'(K\1' + shape + DTYPE + b'\x89' + raw + b't'
  return b'\x80\x03' + EMPTY + state + b'b.'


# The names that are offered, asked for what they do not do.
MISUSE = {
  'a type is called': (call('numpy.ndarray', b')'), 'it calls'),
  'a storage is called': (call('torch.FloatStorage', b')'), 'it calls'),
  'a text is called': (plain(text('x') + b')R'), 'a str where a Global'),
  'called with a list': (call('collections.OrderedDict', b']'), 'a list'),
  'called with more': (call('collections.OrderedDict', ARGS), 'malformed'),
  'bytes of a number': (call('builtins.bytes', b'K\1\x85'), 'malformed'),
  'set of a text': (call('builtins.set', ARGS), 'a set of'),
  'state of a name': (plain(name('builtins', 'set') + b'}b'), 'a Global'),
  'state of a list': (plain(b']}b'), 'a list where'),
  'append to a dict': (plain(b'}Na'), 'a dict where'),
  'items of a list': (plain(b']NNs'), 'a list where'),
  'members of a list': (plain(b'](N\x90'), 'a list where'),
  'half an item': (plain(b'}(Nu'), 'shorter'),
  'codec': (
    call('_codecs.encode', text('x') * 2 + b'\x86'),
    'latin1',
  ),
  'object dtype': (call('numpy.dtype', text('O8') + b'\x85'), PLAIN),
  'a list for a dtype': (call('numpy.dtype', b']\x85'), 'malformed'),
  'big-endian': (dtype(order='>'), PLAIN),
  'structured dtype': (dtype(subtype=ARGS), PLAIN),
  'array of a call': (
    ndarray(raw=name('os', 'system') + ARGS + b'R'),
    "'os.system'",
  ),
  'array of objects': (ndarray(raw=b']Na'), PLAIN),
  'array too short': (ndarray(shape=b'K\2\x85'), '8 bytes for an array of 2'),
  'negative shape': (ndarray(shape=b'J\xff\xff\xff\xff\x85'), 'negative'),
  'array never filled': (plain(EMPTY), 'without a shape'),
  'persistent nothing': (call(PERSISTENT, b'}\x85'), 'without its type'),
  'persistent function': (NO_CLASS, 'no class'),
  'parameter of a list': (
    call('torch._utils._rebuild_parameter', b']\x88}\x87'),
    'no tensor',
  ),
  'storage of a text': (call(LOAD, ARGS), 'no bytes'),
  'outside reference': (plain(ARGS + b'Q'), 'outside itself'),
  'outside reference by a line': (plain(b'Px\n'), 'PERSID'),
  'buffer from outside': (plain(b'\x97'), 'NEXT_BUFFER'),
  'read-only buffer': (plain(b'N\x98'), 'READONLY_BUFFER'),
}


@pytest.mark.parametrize('case', MISUSE)
def test_offered_names_do_only_what_they_are_for(tmp_path, case):
  raw, words = MISUSE[case]
  assert words in refusal(tmp_path, raw)


def u64(value):
  return struct.pack('<Q', value)


def many(setup, repeated):
  """One value in memory, used a hundred times."""
  return plain(setup + b'q\0' + repeated * 100)


SET = name('builtins', 'set') + b'h\0\x85R0'
ENCODE = name('_codecs', 'encode') + b'h\0' + text('latin1') + b'\x86R0'
SEVERAL = 'several times the file'
KEY = 'a key that is no text'

# Streams that are no whole pickle, or ask for more than there is.
BROKEN = {
  'empty': (b'', 'empty'),
  'text': (b'version https://git-lfs.github.com/spec/v1\n', 'no pickle of'),
  'html': (b'<!doctype html><title>404</title>', 'no pickle of'),
  'protocol 0': (b'(dp0\n.', 'no pickle of protocol'),
  'protocol 1': (b'\x80\1N.', 'no pickle of protocol'),
  'protocol 6': (b'\x80\6N.', 'no pickle of protocol'),
  'protocol 255': (b'\x80\xffN.', 'no pickle of protocol'),
  'protocol twice': (plain(b'\x80\2N'), 'PROTO'),
  'no value': (plain(b''), 'a pickle of 0 values'),
  'two values': (plain(b'NN'), 'a pickle of 2 values'),
  'open mark': (plain(b'(N'), 'unfinished'),
  'no mark': (plain(b'Nt'), 'malformed'),
  'empty stack': (plain(b'0'), 'malformed'),
  'no memo': (plain(b'h\7'), 'malformed'),
  'no end': (plain(b'N')[:-1], 'exhausted'),
  'a second pickle': (plain(b'N') * 2, '4 bytes behind the end'),
  'unknown opcode': (plain(b'\xff'), 'unknown'),
  'bad utf-8': (plain(b'X\1\0\0\0\xff'), 'utf-8'),
  'long text': (plain(b'X\xff\xff\xff\xffabc'), 'expected 4294967295'),
  'endless bytes': (plain(b'\x8e' + u64(2**62)), 'expected'),
  'endless text': (plain(b'\x8d' + u64(2**64 - 1)), 'maxsize'),
  'endless array': (plain(b'\x96' + u64(2**40)), 'expected'),
  'endless number': (plain(b'\x8b\xff\xff\xff\x7f1'), 'not enough'),
  'negative number': (plain(b'\x8b\xff\xff\xff\xff1'), 'negative'),
  'a frame of nothing': (b'\x80\4\x95' + u64(2**63), 'exhausted'),
  'memo at 2**32': (plain(b'NNr\xff\xff\xff\xff'), '2 values'),
  'deep lists': (plain(b']' * 40_000 + b'a' * 39_999), 'deeper'),
  'deep tuples': (plain(b')' + b'\x85' * 40_000), 'deeper'),
  'tuple as a key': (plain(b'})Ns'), KEY),
  'tuples as keys, doubling': (plain(b'})' + b'q\0h\0\x86' * 60 + b'Ns'), KEY),
  'colliding keys': (plain(b'}(\x8a\x08' + u64(2**61 - 1) + b'Nu'), KEY),
  'fraction as a key': (plain(b'}G' + bytes(8) + b'Ns'), KEY),
  'dict as a member': (plain(b'\x8f(}\x90'), KEY),
  'many sets': (many(b'](' + b'K\1' * 9999 + b'e', SET), SEVERAL),
  'many encodings': (many(text('x' * 99_999), ENCODE), SEVERAL),
}


@pytest.mark.parametrize('case', BROKEN)
def test_broken_pickles(tmp_path, case):
  raw, words = BROKEN[case]
  tracemalloc.start()
  line = refusal(tmp_path, raw)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert words in line and peak < 64e6


def test_too_many_operations(tmp_path, monkeypatch):
  budget = pickle_machine.Budget
  monkeypatch.setattr(budget, 'of', lambda size: budget(9**9, 1000))
  long = b'\x80\x02' + b'N0' * 500 + b'N.'
  assert 'operations' in refusal(tmp_path, long)
  raw = payloads.nested_storage(official.legacy(official.Storage(np.zeros(2))))
  raw = raw[:-1] + b'0' + long[2:-60] + b'.'
  assert 'operations' in refusal(tmp_path, raw)


def test_a_bomb_of_references_is_read_in_a_moment(tmp_path):
  raw = plain(b']q\0' + b'0](h\0h\0eq\0' * 60)
  path = tmp_path / 'x'
  path.write_bytes(raw)
  tree = pickle_reader.read(path)
  assert tree[0] is tree[1] and len(tree[1]) == 2


def test_a_storage_of_bytes_holds_a_storage_alone(tmp_path):
  def line(value):
    return refusal(tmp_path, payloads.nested_storage(official.legacy(value)))

  storage = official.Storage(np.zeros(2))
  for value in (3, None, [storage]):
    assert 'something else than a storage' in line(value)
  assert "names 'torch._utils" in line(official.Tensor(np.zeros(2)))
  assert 'without a shape' in line(storage)
