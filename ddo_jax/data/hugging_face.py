"""Sets of the Hugging Face hub, and parquet or Arrow files of encoded images.

`datasets` writes Arrow files (`save_to_disk`), the hub holds parquet. Both are
tables with a column of encoded images, and pyarrow reads them: Arrow files are
mapped into memory; parquet, which has no random access, is read whole, or
copied to an Arrow file once. pyarrow comes along with TFDS. `datasets` itself,
which brings pandas and twenty packages more, is not needed.
"""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from typing import Any

import numpy as np

from ddo_jax import errors
from ddo_jax.data import classes
from ddo_jax.data import encoded
from ddo_jax.data import files
from ddo_jax.data import splits
from ddo_jax.runtime import reading

_IN_MEMORY = 2**30  # Parquet files of up to this many bytes are not copied.
_BATCH = 256  # rows
_MOST_JSON = 2**26  # bytes
_PARQUET = '.parquet'
# Beside the tables that `datasets` saved, and above those of several splits.
_STATE = 'state.json'
_SPLITS = 'dataset_dict.json'
_PREFIX = re.compile(r'hf:(//datasets/|//)?')


def _pyarrow() -> Any:
  """Imports pyarrow with what is used of it."""
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise errors.UserError(
      f'parquet and Arrow files are read with pyarrow ({error}): pip install'
      " 'ddo_jax[hf]', or pyarrow"
    ) from error
  return pyarrow


def is_address(place: str) -> bool:
  """Whether a setting names a set of the hub, as 'hf:owner/name' does."""
  return place.startswith('hf:')


def fetch(place: str) -> pathlib.Path:
  """Returns the folder of a set of the hub, which is downloaded once.

  Args:
    place: 'hf:owner/name' or 'hf://datasets/owner/name', perhaps with
      '@revision' behind the name, and behind that with a folder of the set.

  Raises:
    errors.UserError: there is no such set, or it cannot be reached.
  """
  import huggingface_hub

  owner, _, rest = _PREFIX.sub('', place, count=1).partition('/')
  name, _, folder = rest.strip('/').partition('/')
  name, _, revision = name.partition('@')
  # The hub turns a set of loose images, or of a script, into parquet on a
  # branch of this name.
  for branch in [revision] if revision else [None, 'refs/convert/parquet']:
    with encoded.user_error(
      f'{place} cannot be fetched: check the name (hf:owner/name), the network'
      ' and, where the set has conditions, `hf auth login`'
    ):
      root = huggingface_hub.snapshot_download(
        f'{owner}/{name}',
        repo_type='dataset',
        revision=branch,
        allow_patterns=f'{folder}/*{_PARQUET}' if folder else f'*{_PARQUET}',
      )
    path = pathlib.Path(root) / folder
    if is_set(path):
      return path
  raise errors.UserError(
    f'{place} holds no parquet files: load it with `datasets`, and name the'
    ' folder that its save_to_disk writes'
  )


def is_set(path: pathlib.Path) -> bool:
  """Whether a path is a parquet file, or a folder of tables."""
  if path.suffix == _PARQUET:
    return path.is_file()
  if not path.is_dir():
    return False
  if any((path / name).is_file() for name in (_SPLITS, _STATE)):
    return True
  # The first file decides, because a folder of images may hold a million.
  kinds = (_PARQUET, files.LATENTS, *files.IMAGES)
  with encoded.user_error(f'{path} cannot be read'):
    found = (n for n in files.walk(str(path)) if n.lower().endswith(kinds))
    return next(found, '').endswith(_PARQUET)


def _saved(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the tables of a folder that `datasets` saved.

  It may have left others there, which are its caches.
  """
  state = path / _STATE
  with encoded.user_error(f'{state} is damaged, save the set again'):
    listed = json.loads(reading.read(state, _MOST_JSON))['_data_files']
    return [path / pathlib.PurePath(file['filename']).name for file in listed]


def _split_of(file: str, known: tuple[str, ...]) -> str:
  """Returns the split that a file's path names between its marks, or ''."""
  words = re.split(r'[^A-Za-z0-9]+', file)
  return next((word for word in words if word in known), '')


def _tables(path: pathlib.Path, wanted: splits.Wanted) -> list[pathlib.Path]:
  """Returns the files of a split's tables, in order."""
  where = str(path)
  if path.suffix == _PARQUET:
    wanted.choose(where, [])
    return [path]
  if (path / _SPLITS).is_file():
    known = sorted(state.parent.name for state in path.glob(f'*/{_STATE}'))
    return _saved(path / wanted.choose(where, known))
  if (path / _STATE).is_file():
    wanted.choose(where, [])
    return _saved(path)
  names = [n for n in files.walk(where) if n.endswith(_PARQUET)]
  split_of = {name: _split_of(name, wanted.known) for name in names}
  split = wanted.choose(where, sorted(set(split_of.values()) - {''}))
  return [path / name for name in names if split_of[name] == split]


def _batches(table: pathlib.Path, columns: list[str]) -> Iterator[Any]:
  """Yields some columns of a parquet file, a few rows at a time.

  Raises:
    ValueError: they unfold to many times the file.
  """
  pa = _pyarrow()
  most = max(_IN_MEMORY // 4, 64 * table.stat().st_size)
  size = 0
  file = pa.parquet.ParquetFile(table)
  for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
    size += batch.nbytes
    if size > most:
      raise ValueError(f'{table.name} unfolds to more than {most:,} bytes')
    yield pa.Table.from_batches([batch]).select(columns)


def _schema(table: pathlib.Path) -> Any:
  """Returns the schema of a table."""
  pa = _pyarrow()
  if table.suffix == _PARQUET:
    return pa.parquet.read_schema(table)
  with pa.memory_map(str(table)) as mapped:
    return pa.ipc.open_stream(mapped).schema


def _copied(
  tables: list[pathlib.Path], columns: list[str], cache: pathlib.Path
) -> pathlib.Path:
  """Returns an Arrow file of some columns of parquet files, made once."""
  pa = _pyarrow()
  stats = [(str(table), table.stat()) for table in tables]
  about = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
  digest = hashlib.sha256(json.dumps([about, columns]).encode()).hexdigest()
  path = cache / f'{digest[:16]}.arrow'
  if path.exists():
    return path
  cache.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(f'.{os.getpid()}.partial')
  whole = pa.parquet.read_schema(tables[0])
  schema = pa.schema([whole.field(name) for name in columns])
  with (
    pa.OSFile(str(partial), 'wb') as sink,
    pa.ipc.new_stream(sink, schema) as writer,
  ):
    for table in tables:
      for batch in _batches(table, columns):
        writer.write_table(batch)
  os.replace(partial, path)
  return path


def _read(
  tables: list[pathlib.Path], columns: list[str], cache: pathlib.Path
) -> Any:
  """Returns some columns of tables; those of large ones stay on disk."""
  pa = _pyarrow()
  if tables[0].suffix == _PARQUET:
    if sum(table.stat().st_size for table in tables) <= _IN_MEMORY:
      return pa.concat_tables(
        [batch for table in tables for batch in _batches(table, columns)]
      )
    tables = [_copied(tables, columns, cache)]
  mapped = [pa.ipc.open_stream(pa.memory_map(str(table))) for table in tables]
  return pa.concat_tables([m.read_all().select(columns) for m in mapped])


def _image_column(where: str, schema: Any, kinds: dict[str, str]) -> str:
  """Returns the column of encoded images.

  Args:
    where: the set, for errors.
    schema: the columns.
    kinds: what `datasets` declares them to be, as far as it wrote them.
  """
  pa = _pyarrow()
  found = []
  for field in schema:
    kind = field.type
    is_struct = pa.types.is_struct(kind) and kind.get_field_index('bytes') >= 0
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    if is_struct or is_bytes:
      found.append(field.name)
  named = [name for name in ('image', 'img') if name in found]
  declared = [name for name in found if kinds.get(name) == 'Image']
  for candidates in (named[:1], declared, found):
    if len(candidates) == 1:
      return candidates[0]
  raise errors.UserError(
    f'{where} has the columns {schema.names}, of which {found} may hold encoded'
    ' images; wanted one, or one called image'
  )


def _label_column(
  where: str, schema: Any, kinds: dict[str, str], asked: str
) -> str:
  """Returns the column of the classes, '' if there is none."""
  pa = _pyarrow()
  others = [
    field.name
    for field in schema
    if pa.types.is_integer(field.type)
    or (pa.types.is_string(field.type) and field.name in ('label', 'class'))
  ]
  declared = [name for name in schema.names if kinds.get(name) == 'ClassLabel']
  others = [name for name in others if name not in declared]
  return classes.choose_field(where, declared, others, asked)


def _labels(
  where: str, column: Any, names: tuple[str, ...]
) -> tuple[np.ndarray, int, tuple[str, ...]]:
  """Returns a column as labels [N], the number of classes and their names."""
  if column.null_count:
    raise errors.UserError(
      f'{where}: {column.null_count} of {len(column)} labels are missing'
    )
  if _pyarrow().types.is_integer(column.type):
    labels = column.to_numpy()
    return labels, len(names) or classes.count_classes(where, labels), names
  words, labels = np.unique(column.to_pylist(), return_inverse=True)
  return labels, len(words), tuple(words.tolist())


class _Images:
  """The encoded images of a column, by row; safe in threads.

  Another process reads the tables anew, which maps those that stay on disk.
  """

  def __init__(self, where: str, column: Any, again: Callable[[], '_Images']):
    self._where = where
    self._again = again
    self._chunks = column.chunks
    self._paths = []
    self._ends = np.cumsum([len(chunk) for chunk in column.chunks])
    if _pyarrow().types.is_struct(column.type):
      self._chunks = [chunk.field('bytes') for chunk in column.chunks]
      if column.type.get_field_index('path') >= 0:
        self._paths = [chunk.field('path') for chunk in column.chunks]

  def __reduce__(self) -> Any:
    return self._again, ()

  def read(self, row: int) -> bytes:
    """Returns the bytes of a row's image, which may stand in a file of its own.

    Raises:
      errors.UserError: the row has no image.
    """
    i = int(np.searchsorted(self._ends, row, 'right'))
    chunk = self._chunks[i]
    place = row - int(self._ends[i]) + len(chunk)
    content = chunk[place].as_py()
    path = self._paths[i][place].as_py() if self._paths else None
    if content is None:
      where = f'{self._where}, row {row}'
      with encoded.user_error(f'the image of {where} cannot be read'):
        content = reading.read(pathlib.Path(path or ''), files.MOST_BYTES)
    return content


def _images(
  where: str,
  tables: list[pathlib.Path],
  columns: list[str],
  cache: pathlib.Path,
  name: str,
) -> _Images:
  """Returns the images of the column `name`; see `_read`."""
  again = functools.partial(_images, where, tables, columns, cache, name)
  return _Images(where, _read(tables, columns, cache)[name], again)


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Fetches rows of a table; may be sent to another process."""

  where: str
  images: _Images
  labels: np.ndarray

  def __call__(self, index: list[int]) -> list[encoded.EncodedRow]:
    return [self._row(i) for i in index]

  def _row(self, i: int) -> encoded.EncodedRow:
    content = self.images.read(i)
    where = f'{self.where}, row {i}'
    return encoded.EncodedRow(where, content, int(self.labels[i]))


def open_set(
  path: pathlib.Path,
  wanted: splits.Wanted,
  label_field: str,
  cache: pathlib.Path,
) -> encoded.EncodedSource:
  """Opens a split of a parquet file, or of a folder of tables.

  Args:
    path: the file; or a folder that `datasets` saved, or of parquet files, each
      of which may name its split in its path.
    wanted: the split, of a set that has several.
    label_field: the column of the classes; see `classes.choose_field`. Words
      are numbered in their order.
    cache: the folder for copies of large parquet files.

  Raises:
    errors.UserError: pyarrow is missing, or nothing there is a set of images.
      A damaged row is refused when it is read.
  """
  where = str(path)
  tables = _tables(path, wanted)
  _pyarrow()
  with encoded.user_error(f'{where} holds no whole table, write it again'):
    for table in tables:
      reading.check_regular(table)
    schema = _schema(tables[0])
    written = json.loads((schema.metadata or {}).get(b'huggingface', b'{}'))
    features = written.get('info', {}).get('features', {})
    # A list of fields is declared as a list.
    features = {k: v for k, v in features.items() if isinstance(v, dict)}
    names_of = {k: v['names'] for k, v in features.items() if v.get('names')}
    for words in names_of.values():
      if not all(isinstance(word, str) for word in words):
        raise ValueError('classes whose names are no text')
  kinds = {name: about.get('_type') for name, about in features.items()}
  image = _image_column(where, schema, kinds)
  label = _label_column(where, schema, kinds, label_field)
  columns = [image, label] if label else [image]
  with encoded.user_error(f'{where} holds a damaged table, write it again'):
    table = _read(tables, columns, cache)
    # Offsets that lead out of a column would end the program when followed.
    table.validate(full=True)
  if not len(table):
    raise errors.UserError(f'{where} has no rows')
  labels = np.zeros(len(table), np.int32)
  num_classes = 0
  names: tuple[str, ...] = ()
  if label:
    names = tuple(names_of.get(label, ()))
    labels, num_classes, names = _labels(where, table[label], names)
  again = functools.partial(_images, where, tables, columns, cache, image)
  images = _Images(where, table[image], again)
  return encoded.EncodedSource(
    name=where,
    length=len(table),
    num_classes=num_classes,
    pixel_values=256,
    fetch=_Rows(where, images, labels),
    fetch_labels=functools.partial(np.asarray, labels),
    class_names=names,
  )
