"""Sets of the Hugging Face hub, and parquet or Arrow files of encoded images.

`datasets` writes Arrow files (`save_to_disk`), the hub holds parquet. Both are
tables with a column of encoded images, and pyarrow reads them: Arrow files are
mapped into memory and parquet, which has no random access, is read whole or
copied to an Arrow file once. pyarrow comes along with TFDS; `datasets` itself,
which would bring pandas and 30 more packages, is not needed.
"""

import functools
import hashlib
import json
import os
import pathlib
import re
from typing import Any

import numpy as np

from ddo_jax import errors
from ddo_jax.data import classes as classes_lib
from ddo_jax.data import encoded
from ddo_jax.data import splits

_IN_MEMORY = 2**30  # Parquet files of up to this many bytes are not copied.
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


def is_address(source: str) -> bool:
  """Whether a setting names a set of the hub, as 'hf:owner/name' does."""
  return source.startswith('hf:')


def fetch(source: str) -> pathlib.Path:
  """Returns the folder of a set of the hub, which is downloaded once.

  Args:
    source: 'hf:owner/name' or 'hf://datasets/owner/name', perhaps with
      '@revision' behind the name, and with a folder of the set behind that.

  Raises:
    errors.UserError: there is no such set, or it cannot be reached.
  """
  address = _PREFIX.sub('', source, count=1)
  owner, _, rest = address.partition('/')
  name, _, folder = rest.strip('/').partition('/')
  name, _, revision = name.partition('@')
  import huggingface_hub

  # A set that is kept as loose images, or by a script, has been turned into
  # parquet by the hub, on a branch of this name.
  branches = [revision] if revision else ['', 'refs/convert/parquet']
  for branch in branches:
    with encoded.user_error(
      f'{source} cannot be fetched: check the name (hf:owner/name), the network'
      ' and, for a set with conditions, `hf auth login`'
    ):
      root = huggingface_hub.snapshot_download(
        f'{owner}/{name}',
        repo_type='dataset',
        revision=branch or None,
        allow_patterns=f'{folder}/*.parquet' if folder else '*.parquet',
      )
    path = pathlib.Path(root) / folder
    if any(path.rglob('*.parquet')):
      return path
  raise errors.UserError(
    f'{source} holds no parquet files; load it with `datasets` and take the'
    ' folder that save_to_disk writes'
  )


def is_set(path: pathlib.Path) -> bool:
  """Whether a path is a parquet file, or a folder of tables."""
  if path.suffix == '.parquet':
    return path.is_file()
  saved = ('dataset_dict.json', 'state.json')
  if any((path / name).is_file() for name in saved):
    return True
  return path.is_dir() and any(path.rglob('*.parquet'))


def _split_of(file: pathlib.PurePath, known: tuple[str, ...]) -> str:
  """Returns the split that a file's path names between its marks, or ''."""
  words = re.split(r'[^A-Za-z0-9]+', str(file))
  return next((word for word in words if word in known), '')


def _files(path: pathlib.Path, wanted: splits.Wanted) -> list[pathlib.Path]:
  """Returns the tables of a split, in order."""
  if path.suffix == '.parquet':
    wanted.choose(str(path), [])
    return [path]
  if (path / 'dataset_dict.json').is_file():
    folders = sorted(p.parent.name for p in path.glob('*/state.json'))
    return sorted((path / wanted.choose(str(path), folders)).glob('*.arrow'))
  if (path / 'state.json').is_file():
    wanted.choose(str(path), [])
    return sorted(path.glob('*.arrow'))
  found = sorted(path.rglob('*.parquet'))
  named = [_split_of(file.relative_to(path), wanted.known) for file in found]
  split = wanted.choose(str(path), sorted(set(named) - {''}))
  return [f for f, name in zip(found, named, strict=True) if name == split]


def _copied(
  files: list[pathlib.Path], columns: list[str], folder: pathlib.Path
) -> pathlib.Path:
  """Returns an Arrow file of some columns of parquet files, made once."""
  pa = _pyarrow()
  about = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
  digest = hashlib.sha256(json.dumps([about, columns]).encode()).hexdigest()
  path = folder / f'{digest[:16]}.arrow'
  if path.exists():
    return path
  folder.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(f'.{os.getpid()}.partial')
  schema = pa.parquet.read_schema(files[0])
  schema = pa.schema([schema.field(name) for name in columns], schema.metadata)
  with pa.OSFile(str(partial), 'wb') as sink:
    with pa.ipc.new_stream(sink, schema) as writer:
      for file in files:
        for batch in pa.parquet.ParquetFile(file).iter_batches(
          batch_size=1_000, columns=columns
        ):
          writer.write_batch(batch.cast(schema))
  os.replace(partial, path)
  return path


def _read_schema(file: pathlib.Path) -> Any:
  """Returns the schema of a table."""
  pa = _pyarrow()
  if file.suffix == '.parquet':
    return pa.parquet.read_schema(file)
  with pa.memory_map(str(file)) as mapped:
    return pa.ipc.open_stream(mapped).schema


def _read_table(
  files: list[pathlib.Path], columns: list[str], folder: pathlib.Path
) -> Any:
  """Returns some columns of tables; those of large ones stay on disk."""
  pa = _pyarrow()
  if files[0].suffix == '.parquet':
    if sum(file.stat().st_size for file in files) <= _IN_MEMORY:
      parts = [pa.parquet.read_table(file, columns=columns) for file in files]
      return pa.concat_tables(parts)
    files = [_copied(files, columns, folder)]
  parts = [
    pa.ipc.open_stream(pa.memory_map(str(file))).read_all().select(columns)
    for file in files
  ]
  return pa.concat_tables(parts)


def _image_column(where: str, schema: Any, features: dict[str, Any]) -> str:
  """Returns the column of encoded images."""
  pa = _pyarrow()
  found = []
  for field in schema:
    kind = field.type
    is_struct = pa.types.is_struct(kind) and kind.get_field_index('bytes') >= 0
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    if is_struct or is_bytes:
      found.append(field.name)
  declared = [name for name in found if features.get(name) == 'Image']
  named = [name for name in ('image', 'img') if name in found]
  for candidates in (named[:1], declared, found):
    if len(candidates) == 1:
      return candidates[0]
  raise errors.UserError(
    f'{where} has the columns {schema.names}, of which {found} hold encoded'
    ' images; wanted one, or one called image'
  )


def _labels(
  where: str, column: Any, names: tuple[str, ...]
) -> tuple[np.ndarray, int, tuple[str, ...]]:
  """Returns a column as labels [N], the number of classes and their names."""
  pa = _pyarrow()
  if column.null_count:
    raise errors.UserError(
      f'{where}: {column.null_count} of {len(column)} labels are missing'
    )
  if pa.types.is_integer(column.type):
    labels = column.to_numpy()
  else:
    words, labels = np.unique(column.to_pylist(), return_inverse=True)
    names = tuple(words.tolist())
  return labels, len(names) or classes_lib.count_classes(where, labels), names


class _Images:
  """The encoded images of a column, by row; safe in threads."""

  def __init__(self, where: str, column: Any, folder: pathlib.Path):
    pa = _pyarrow()
    self._where = where
    self._folder = folder
    self._chunks = column.chunks
    self._paths = []
    if pa.types.is_struct(column.type):
      self._chunks = [chunk.field('bytes') for chunk in column.chunks]
      if column.type.get_field_index('path') >= 0:
        self._paths = [chunk.field('path') for chunk in column.chunks]
    self._ends = np.cumsum([len(chunk) for chunk in column.chunks])

  def read(self, row: int) -> bytes:
    """Returns the bytes of a row's image, which may stand in a file of its own.

    Raises:
      errors.UserError: the row has no image.
    """
    chunk = int(np.searchsorted(self._ends, row, 'right'))
    place = row - int(self._ends[chunk]) + len(self._chunks[chunk])
    content = self._chunks[chunk][place].as_py()
    if content is not None:
      return content
    file = self._paths[chunk][place].as_py() if self._paths else None
    if not file:
      raise errors.UserError(f'{self._where}, row {row} has no image')
    with encoded.user_error(f'{self._where}, row {row} cannot be read'):
      return (self._folder / file).read_bytes()


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
      are numbered by their order.
    cache: the folder for copies of large parquet files.

  Raises:
    errors.UserError: pyarrow is missing, or nothing there is a set of images.
      A damaged row is refused when it is read.
  """
  pa = _pyarrow()
  files = _files(path, wanted)
  if not files:
    raise errors.UserError(f'{path} holds no tables, write it again')
  with encoded.user_error(f'{files[0]} is damaged or cut off, write it again'):
    schema = _read_schema(files[0])
    written = json.loads((schema.metadata or {}).get(b'huggingface', b'{}'))
    features = written.get('info', {}).get('features', {})
    # A list of fields is declared as a list.
    features = {k: v for k, v in features.items() if isinstance(v, dict)}
    kinds = {name: about.get('_type') for name, about in features.items()}
  image = _image_column(str(path), schema, kinds)
  label = classes_lib.choose_field(
    where=str(path),
    class_fields=[n for n in schema.names if kinds.get(n) == 'ClassLabel'],
    other_fields=[
      field.name
      for field in schema
      if pa.types.is_integer(field.type)
      or (pa.types.is_string(field.type) and field.name in ('label', 'class'))
    ],
    asked=label_field,
  )
  columns = [image, label] if label else [image]
  with encoded.user_error(f'{path} has a damaged table, write it again'):
    table = _read_table(files, columns, cache)
  labels = np.zeros(len(table), np.int32)
  num_classes = 0
  names: tuple[str, ...] = ()
  if label:
    names = tuple(features.get(label, {}).get('names', ()))
    labels, num_classes, names = _labels(str(path), table[label], names)
  images = _Images(str(path), table[image], path)

  def fetch(index: list[int]) -> list[encoded.EncodedRow]:
    return [
      encoded.EncodedRow(f'{path}, row {i}', images.read(i), int(labels[i]))
      for i in index
    ]

  return encoded.EncodedSource(
    name=str(path),
    length=len(table),
    num_classes=num_classes,
    pixel_values=256,
    fetch=fetch,
    fetch_labels=functools.partial(np.asarray, labels),
    class_names=names,
  )
