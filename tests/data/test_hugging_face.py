"""Tables of images: parquet, what `datasets` saves, sets of the hub."""

import json
import pickle
import struct
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sets

from ddo_jax.data import hugging_face
from ddo_jax.data import sources

NAMES = ('ant', 'bee', 'cow', 'doe', 'eel')
IMAGES, LABELS = sets.make_images(7)


def table_of(rows=slice(None), **columns):
  """A table as `datasets` writes it, which declares its features."""
  images = [
    {'bytes': sets.encode(image), 'path': None} for image in IMAGES[rows]
  ]
  features = {
    'image': {'_type': 'Image'},
    'label': {'names': list(NAMES), '_type': 'ClassLabel'},
    'boxes': [{'x': {'dtype': 'int32', '_type': 'Value'}}],
  }
  kind = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
  table = pa.table(
    {
      'label': LABELS[rows],
      'image': pa.array(images, kind),
      'boxes': [[{'x': 1}]] * len(images),
    }
    | columns
  )
  about = json.dumps({'info': {'features': features}})
  return table.replace_schema_metadata({'huggingface': about})


def save(folder, *tables):
  """Writes a folder as save_to_disk does, with a cache beside the tables."""
  folder.mkdir(parents=True)
  names = [
    f'data-{i:05d}-of-{len(tables):05d}.arrow' for i in range(len(tables))
  ]
  for name, table in zip(
    (*names, 'cache-1.arrow'), (*tables, tables[0]), strict=True
  ):
    with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
      writer.write_table(table, max_chunksize=2)
  state = {'_data_files': [{'filename': name} for name in names]}
  (folder / 'state.json').write_text(json.dumps(state))


def assert_holds(source, rows=slice(None)):
  assert (source.num_classes, source.class_names) == (5, NAMES)
  got, labels = sets.read_all(source)
  np.testing.assert_array_equal(got, IMAGES[rows])
  np.testing.assert_array_equal(labels, LABELS[rows])
  np.testing.assert_array_equal(source.labels(), LABELS[rows])


def test_what_datasets_saved(tmp_path, monkeypatch):
  save(tmp_path / 'one', table_of(slice(3)), table_of(slice(3, 7)))
  assert_holds(sets.open_set(tmp_path / 'one'))
  assert "is the split 'train'" in sets.refusal(tmp_path / 'one', 'test')
  save(tmp_path / 'two/train', table_of(slice(5)))
  save(tmp_path / 'two/validation', table_of(slice(5, 7)))
  (tmp_path / 'two/dataset_dict.json').write_text('{}')
  assert_holds(sets.open_set(tmp_path / 'two'), slice(5))
  test = sets.open_set(tmp_path / 'two', 'validation', test_split='validation')
  assert_holds(test, slice(5, 7))
  assert "['train', 'validation']" in sets.refusal(tmp_path / 'two', 'test')
  monkeypatch.setattr(sources, '_IN_MEMORY', 0)
  source = sets.open_set(tmp_path / 'one')
  index = np.array([6, 0, 3, 3])
  np.testing.assert_array_equal(source.read(index)[0], IMAGES[index])
  assert_holds(sets.sent(source))
  # The images themselves stay where they are.
  assert sets.encode(IMAGES[0]) not in pickle.dumps(source)


@pytest.mark.parametrize('copied', [False, True])
def test_parquet(tmp_path, monkeypatch, copied):
  if copied:
    monkeypatch.setattr(hugging_face, '_IN_MEMORY', 0)
  fields = {'data_dir': str(tmp_path / 'cache')}
  pq.write_table(table_of(), tmp_path / 'a.parquet')
  assert_holds(sets.open_set(tmp_path / 'a.parquet', **fields))
  made = [path.stat().st_mtime_ns for path in tmp_path.glob('cache/*')]
  assert_holds(sets.open_set(tmp_path / 'a.parquet', **fields))
  assert made == [path.stat().st_mtime_ns for path in tmp_path.glob('cache/*')]
  assert len(made) == copied
  with monkeypatch.context() as context:
    context.setattr(sources, '_IN_MEMORY', 0)
    source = sets.open_set(tmp_path / 'a.parquet', **fields)
  assert_holds(sets.sent(source))
  data = tmp_path / 'set/data'
  data.mkdir(parents=True)
  pq.write_table(table_of(slice(2)), data / 'train-00000-of-00002.parquet')
  pq.write_table(table_of(slice(2, 5)), data / 'train-00001-of-00002.parquet')
  pq.write_table(table_of(slice(5, 7)), data / 'test-00000-of-00001.parquet')
  (tmp_path / 'set/README.md').write_text('')
  assert_holds(sets.open_set(tmp_path / 'set', **fields), slice(5))
  assert_holds(sets.open_set(tmp_path / 'set', 'test', **fields), slice(5, 7))
  assert "has no split 'val'; it has ['test', 'train']" in sets.refusal(
    tmp_path / 'set', 'val'
  )
  assert len(list((tmp_path).glob('cache/*.arrow'))) == 3 * copied
  pq.write_table(table_of(), tmp_path / 'set/data/a.parquet')
  assert_holds(sets.open_set(tmp_path / 'set', **fields), slice(5))


def test_columns_that_pandas_would_write(tmp_path):
  content = [sets.encode(image) for image in IMAGES]
  words = ['eel', 'ant', 'eel', 'ant', 'ant', 'eel', 'ant']
  path = tmp_path / 'a.parquet'
  pq.write_table(pa.table({'jpg': content, 'class': words}), path)
  source = sets.open_set(path)
  assert source.class_names == ('ant', 'eel')
  assert source.labels().tolist() == [1, 0, 1, 0, 0, 1, 0]
  pq.write_table(pa.table({'jpg': content, 'target': LABELS}), path)
  source = sets.open_set(path)
  assert (source.num_classes, source.class_names) == (LABELS.max() + 1, ())
  pq.write_table(pa.table({'jpg': content, 'a': LABELS, 'b': LABELS}), path)
  assert 'may be its classes, a, b: choose' in sets.refusal(path)
  assert sets.open_set(path, label_field='none').num_classes == 0
  file = tmp_path / 'b.png'
  file.write_bytes(content[3])
  kind = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
  row = pa.array([{'bytes': None, 'path': str(file)}], kind)
  pq.write_table(pa.table({'img': row}), path)
  np.testing.assert_array_equal(sets.open_set(path).stored[0], IMAGES[3])


@pytest.mark.parametrize(
  ('columns', 'words'),
  [
    ({'image': [1] * 7}, 'of which [] may hold encoded images'),
    ({'image': [1] * 7, 'a': [b''] * 7, 'b': [b''] * 7}, "['a', 'b'] may hold"),
    ({'image': [b'', *[None] * 6]}, 'row 0: the image is damaged'),
    ({'image': [None, *[b''] * 6]}, 'row 0 cannot be read'),
    ({'label': [None, *[1] * 6]}, '1 of 7 labels are missing'),
    ({'label': [-1, *[1] * 6]}, 'label -1'),
  ],
)
def test_wrong_columns_are_refused(tmp_path, columns, words):
  path = tmp_path / 'a.parquet'
  pq.write_table(table_of(**columns), path)
  assert words in (line := sets.refusal(path)) and str(path) in line


def test_damage_is_refused(tmp_path):
  path = tmp_path / 'a.parquet'
  pq.write_table(table_of(), path)
  path.write_bytes(path.read_bytes()[:-9])
  assert f'{path} holds no whole table' in sets.refusal(path)
  save(tmp_path / 'set', table_of())
  arrow = tmp_path / 'set/data-00000-of-00001.arrow'
  arrow.write_bytes(arrow.read_bytes()[:-900])
  assert 'holds a damaged table' in sets.refusal(tmp_path / 'set')
  (tmp_path / 'set/state.json').write_text('{')
  assert 'state.json is damaged' in sets.refusal(tmp_path / 'set')


def test_without_pyarrow_one_line_says_so(tmp_path, monkeypatch):
  pq.write_table(table_of(), tmp_path / 'a.parquet')
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  assert "pip install 'ddo_jax[hf]'" in sets.refusal(tmp_path / 'a.parquet')


@pytest.mark.parametrize(
  ('place', 'wanted'),
  [
    ('hf:me/animals', ('me/animals', None, '*.parquet')),
    ('hf://datasets/me/animals@v2', ('me/animals', 'v2', '*.parquet')),
    ('hf://me/animals/big', ('me/animals', None, 'big/*.parquet')),
  ],
)
def test_a_set_of_the_hub(tmp_path, monkeypatch, place, wanted):
  asked = []

  def snapshot_download(name, repo_type, revision, allow_patterns):
    assert repo_type == 'dataset'
    asked.append((name, revision, allow_patterns))
    return str(tmp_path)

  monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot_download)
  folder = tmp_path / wanted[-1].rpartition('/')[0]
  folder.mkdir(exist_ok=True)
  pq.write_table(table_of(), folder / 'train.parquet')
  assert_holds(sets.open_set(place))
  assert asked == [wanted]


def test_a_set_of_the_hub_that_is_not_there(tmp_path, monkeypatch):
  asked = []

  def empty(name, revision, **_):
    asked.append(revision)
    return str(tmp_path)

  monkeypatch.setattr('huggingface_hub.snapshot_download', empty)
  assert 'holds no parquet files' in sets.refusal('hf:me/animals')
  assert asked == [None, 'refs/convert/parquet']

  def offline(*_, **__):
    raise OSError('no route')

  monkeypatch.setattr('huggingface_hub.snapshot_download', offline)
  line = sets.refusal('hf:me/animals')
  assert 'hf:me/animals cannot be fetched' in line and 'no route' in line


def test_a_table_that_would_end_the_program(tmp_path):
  """Arrow follows an offset that leads out of a column, unless it looks."""
  save(tmp_path / 'set', table_of())
  path = tmp_path / 'set/data-00000-of-00001.arrow'
  content = path.read_bytes()
  first, second = (len(sets.encode(image)) for image in IMAGES[:2])
  offsets = struct.pack('<3i', 0, first, first + second)
  assert offsets in content
  wrong = struct.pack('<3i', 0, first, 2**30)
  path.write_bytes(content.replace(offsets, wrong))
  assert 'holds a damaged table' in sets.refusal(tmp_path / 'set')


def test_what_a_library_says_becomes_one_line(tmp_path):
  path = tmp_path / 'x.parquet'
  path.write_bytes(b'PAR1' + bytes(99) + b'\x09\0\0\0PAR1')
  assert 'holds no whole table' in sets.refusal(path)
