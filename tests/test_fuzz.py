"""Readers of foreign files, given small whole ones with random damage.

Each of 2,000 damaged files a reader is either read or refused in one line, soon
and without gigabytes. The numbers go to experiments/results/fuzz.json:

    pytest -m faults tests/test_fuzz.py
"""

import collections
import importlib.metadata
import json
import pathlib
import platform
import random
import sys
import time
import warnings
import zlib

import bounds
import numpy as np
from PIL import Image
import pyarrow.parquet
import pytest

from ddo_jax import errors
from ddo_jax.assets import wholeness
from ddo_jax.data import encoded
from ddo_jax.data import files as image_files
from ddo_jax.data import hugging_face
from ddo_jax.data import sources
from ddo_jax.data import splits
from ddo_jax.data import transforms
from ddo_jax.evaluation import protocols
from ddo_jax.weights import edm_configs
from ddo_jax.weights import fid_stats
from ddo_jax.weights import files
from ddo_jax.weights import graph_def
from ddo_jax.weights import pickle_reader
from ddo_jax.weights import safetensors_file
from ddo_jax.weights import torch_zip

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / 'tests' / name) for name in ('data', 'weights')]
import official_files as official  # noqa: E402
import sets  # noqa: E402
import test_convert_inception as graphs  # noqa: E402
import test_hugging_face as tables  # noqa: E402
import test_latent_files as latents  # noqa: E402
import test_released  # noqa: E402

RESULT = ROOT / 'experiments' / 'results' / 'fuzz.json'
CASES = 2_000
FIT = transforms.Fit(channels=3, resize=8, method='adm')


def rows(source):
  """Reads all rows of a set."""
  source.labels()
  return sets.read_all(source)


def image(path):
  encoded.open_image(str(path), path.read_bytes(), FIT).decode()


def latent(path):
  encoded.open_latents(str(path), path.read_bytes()).decode()


def folder(path):
  rows(image_files.open_files(path.parent))


def archive(path):
  rows(image_files.open_files(path))


def array(path):
  rows(sources.open_npz(path))


def table(path):
  rows(hugging_face.open_set(path, splits.Wanted('train'), '', path.parent))


def saved_table(path):
  wanted = splits.Wanted('train')
  rows(hugging_face.open_set(path.parent, wanted, '', path.parent))


def network(path):
  found = pickle_reader.read_network(path)
  with files.refusing(path, 'a network'):
    edm_configs.config_of(found)


def state(path):
  with files.refusing(path, 'a state dict'):
    files.check_state(torch_zip.read(path))


def tensors(path):
  with files.refusing(path, 'a state dict'):
    files.check_state(safetensors_file.read(path)[0])


def protocol(path):
  protocols.get(str(path))


def whole(path):
  wholeness.fault(path, path.name)


def small_state():
  return {f'a.{i}': official.Tensor(np.arange(9.0) + i) for i in range(4)}


def picture(kind):
  pixels = sets.make_images(1, (24, 20, 3))[0][0]
  return sets.save(Image.fromarray(pixels), kind)


def write_set(path):
  sets.write(path, sets.edm_files())
  return path.read_bytes()


def write_table(path):
  pyarrow.parquet.write_table(tables.table_of(), path)
  return path.read_bytes()


def write_saved(path):
  path.parent.rmdir()
  tables.save(path.parent, tables.table_of())
  return path.read_bytes()


def write_folder(path):
  sets.write(path.parent, sets.edm_files())
  return path.read_bytes()


def write_npz(path, **arrays):
  np.savez_compressed(path, **arrays)
  return path.read_bytes()


def write_pkl(path):
  test_released.write_pkl(path, 'ddpmpp')
  return path.read_bytes()


def write_tensors(path):
  state = {f'a.{i}': np.arange(9.0) + i for i in range(4)}
  safetensors_file.write(path, state, {'model': '{}'})
  return path.read_bytes()


MOMENTS = {'mu': np.zeros(8), 'sigma': np.eye(8), 'n': np.array(5)}
STATISTICS = {'num_images': 9, 'fid': {'mu': np.zeros(8), 'sigma': np.eye(8)}}
GRAPH = b''.join(
  graphs.node(name, graphs.tensor(np.ones((3, 4), np.float32)))
  for name in ('conv/conv2d_params', 'softmax/weights')
)
PROTOCOL = {
  'image_shape': [32, 32, 3],
  'features': ['fid'],
  'name': 'x',
  'num_images': 5,
  'num_blocks': 1,
  'labels': 'shares',
  'resize': 'tf1',
  'fid_stats': '',
  'inception_score': '',
  'printed': 'mean',
}

# name: (the file's name, what writes it and returns its bytes, its reader)
READERS = {
  'PNG': ('x.png', lambda _: picture('PNG'), image),
  'JPEG': ('x.jpg', lambda _: picture('JPEG'), image),
  'WebP': ('x.webp', lambda _: picture('WEBP'), image),
  'BMP': ('x.bmp', lambda _: picture('BMP'), image),
  'GIF': ('x.gif', lambda _: picture('GIF'), image),
  'TIFF': ('x.tiff', lambda _: picture('TIFF'), image),
  'latents': ('x.npy', lambda _: latents.encode(latents.PLANES), latent),
  'dataset.json': ('dataset.json', write_folder, folder),
  'zip of images': ('x.zip', write_set, archive),
  'npz of images': (
    'x.npz',
    lambda path: write_npz(path, image=sets.make_images(9)[0]),
    array,
  ),
  'parquet': ('x.parquet', write_table, table),
  'Arrow': ('data-00000-of-00001.arrow', write_saved, saved_table),
  'state.json': ('state.json', write_saved, saved_table),
  'pkl of a network': ('x.pkl', write_pkl, network),
  'pth': (
    'x.pth',
    lambda path: official.zipped(path, small_state()).read_bytes(),
    state,
  ),
  'pth before 1.6': ('x.pth', lambda _: official.legacy(small_state()), state),
  'safetensors': ('x.safetensors', write_tensors, tensors),
  'graph': ('x.pb', lambda _: GRAPH, graph_def.read),
  'npz of statistics': (
    'x.npz',
    lambda path: write_npz(path, **MOMENTS),
    fid_stats.read,
  ),
  'pkl of statistics': (
    'x.pkl',
    lambda _: official.dumps(STATISTICS),
    fid_stats.read,
  ),
  'protocol': (
    'protocol.json',
    lambda _: json.dumps(PROTOCOL).encode(),
    protocol,
  ),
  'wholeness of a .pth': (
    'x.pth',
    lambda path: official.zipped(path, small_state()).read_bytes(),
    whole,
  ),
  'wholeness of a .safetensors': ('x.safetensors', write_tensors, whole),
  'wholeness of a .pb': ('x.pb', lambda _: GRAPH, whole),
}


def damaged(content, dice):
  """Returns a file with one to three random changes."""
  raw = bytearray(content)
  for _ in range(dice.randint(1, 3)):
    at = dice.randrange(max(len(raw), 1))
    kind = dice.randrange(6)
    if kind == 0:
      del raw[at:]
    elif kind == 1:
      del raw[at : at + dice.randint(1, 16)]
    elif kind == 2:
      raw[at:at] = dice.randbytes(dice.randint(1, 16))
    elif kind == 3:
      end = at + dice.choice((1, 2, 4, 8))
      raw[at:end] = dice.choice((b'\0', b'\x7f', b'\xff')) * (end - at)
    elif kind == 4:
      end = at + dice.randint(1, 64)
      raw[at:at] = raw[at:end]
    elif raw:
      raw[at] ^= 1 << dice.randrange(8)
  return bytes(raw)


@pytest.fixture(scope='module')
def results():
  found = {}
  yield found
  packages = ('numpy', 'pillow', 'pyarrow', 'safetensors')
  versions = {name: importlib.metadata.version(name) for name in packages}
  environment = {'python': platform.python_version(), **versions}
  content = {'cases': CASES, 'readers': found, 'environment': environment}
  RESULT.write_text(json.dumps(content, indent=1) + '\n')


@pytest.mark.parametrize('name', READERS)
def test_a_little_random_damage(tmp_path, monkeypatch, name):
  play(tmp_path, monkeypatch, name, cases=20)


@pytest.mark.faults
@pytest.mark.parametrize('name', READERS)
def test_random_damage(tmp_path, monkeypatch, results, name):
  results[name] = play(tmp_path, monkeypatch, name, CASES)


def play(tmp_path, monkeypatch, name, cases):
  """Reads one damaged file after the other; returns how that ended."""
  monkeypatch.setitem(fid_stats.WIDTHS, 'fid', 8)
  warnings.simplefilter('ignore')
  file_name, write, read = READERS[name]
  path = tmp_path / 'folder' / file_name
  path.parent.mkdir()
  content = write(path)
  path.write_bytes(content)
  read(path)
  dice = random.Random(zlib.crc32(name.encode()))
  ends = collections.Counter()
  longest = 0.0
  with bounds.kept(seconds=300):
    for _ in range(cases):
      broken = damaged(content, dice)
      path.write_bytes(broken)
      began = time.process_time()
      try:
        read(path)
        ends['read'] += 1
      except errors.UserError as error:
        assert '\n' not in str(error) and len(str(error)) < 1_500
        ends['refused'] += 1
      longest = max(longest, time.process_time() - began)
  assert longest < 10
  return dict(ends) | {'longest_seconds': round(longest, 2)}
