"""Image sets prepared by TFDS and read back, without TensorFlow.

The set `digits` is part of scikit-learn. `fashion_mnist` and `cifar10` are made
from the files that their authors publish, which are fetched; their names,
versions, features and keys are TFDS's own, so that stock TFDS reads what is
written here, in the same order. All three are written as array_record, the
format that TFDS reads at random without TensorFlow. scikit-learn, PIL and
tensorflow_datasets are imported only inside the functions that need them.
"""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import gzip
import hashlib
import pathlib
import tarfile
from typing import Any
import zlib

import numpy as np

from ddo_jax import errors
from ddo_jax.assets import store
from ddo_jax.assets import table
from ddo_jax.data import classes as classes_lib
from ddo_jax.data import encoded

_MOST_UNFOLDED = 2**26  # bytes of an IDX file; the largest here has 47 million
_CHUNK = 1_024  # Records that are parsed at once for their labels.

# Split name -> (images uint8 [N,H,W,C], labels [N]).
Splits = dict[str, tuple[np.ndarray, np.ndarray]]

# SHA-256 of the training images and labels, then of the test images and labels.
# They are hashed uncompressed, because the bytes of a .gz depend on the program
# that compressed it.
FASHION_MNIST_SHA256 = (
  'c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888',
  'bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9',
  '5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b',
  '0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34',
)
_FASHION_MNIST_FILES = (
  'train-images-idx3-ubyte.gz',
  'train-labels-idx1-ubyte.gz',
  't10k-images-idx3-ubyte.gz',
  't10k-labels-idx1-ubyte.gz',
)
_CIFAR10_FILE = 'cifar-10-binary.tar.gz'
_SETTING = '--config.data.raw_dir (its folder)'
CIFAR10_SHA256 = table.find(_CIFAR10_FILE).sha256


def digits(raw_dir: str = '') -> Splits:
  """Returns scikit-learn's digits: 8×8 grey images with values 0 .. 16.

  The split is stratified and always the same, 1,437 images for training and
  360 for the test.

  Args:
    raw_dir: not used, because scikit-learn brings the images along.
  """
  del raw_dir
  from sklearn import datasets
  from sklearn import model_selection

  pixels, labels = datasets.load_digits(return_X_y=True)
  images = pixels.astype(np.uint8).reshape(-1, 8, 8, 1)
  train, test = model_selection.train_test_split(
    np.arange(len(labels)), test_size=360, stratify=labels, random_state=0
  )
  return {
    'train': (images[train], labels[train]),
    'test': (images[test], labels[test]),
  }


def _raw_file(raw_dir: str, filename: str, where_to_get: str) -> pathlib.Path:
  """Returns the path of a published file, fetched if no folder is named.

  Raises:
    errors.UserError: it is not in the folder that is named, or it cannot be
      fetched.
  """
  if not raw_dir:
    return store.fetch(table.find(filename), _SETTING)
  path = pathlib.Path(raw_dir).expanduser() / filename
  if not path.is_file():
    raise errors.UserError(
      f'{filename} is not in config.data.raw_dir={raw_dir!r}; {where_to_get};'
      ' or leave config.data.raw_dir empty to fetch it'
    )
  return path


def _require_sha256(path: pathlib.Path, got: str, wanted: str) -> None:
  """Raises UserError unless the hash of a downloaded file is the known one."""
  if got != wanted:
    raise errors.UserError(
      f'{path} has SHA-256 {got}, wanted {wanted}: damaged, or the file of'
      ' another set (MNIST uses the same names); download it again'
    )


def _read_idx(path: pathlib.Path, rank: int, sha256: str) -> np.ndarray:
  """Reads a gzipped IDX file of bytes into an array of the given rank.

  An IDX file is a magic number of 4 bytes, the size of each dimension as a
  big-endian uint32, and the bytes of the array.
  """
  try:
    with gzip.open(path) as file:
      content = file.read(_MOST_UNFOLDED)
  except (OSError, EOFError, zlib.error) as error:
    raise errors.UserError(
      f'{path} cannot be decompressed ({error}): download it again'
    ) from error
  # The hash covers the header, too, so that it need not be checked.
  _require_sha256(path, hashlib.sha256(content).hexdigest(), sha256)
  shape = np.frombuffer(content, '>u4', count=rank, offset=4)
  return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def fashion_mnist(
  raw_dir: str, sha256: tuple[str, ...] = FASHION_MNIST_SHA256
) -> Splits:
  """Reads Fashion-MNIST: 28×28 grey, 60,000 images to train, 10,000 to test.

  Args:
    raw_dir: the folder of the four *-ubyte.gz files; '' fetches them.
    sha256: the hashes of their uncompressed content, in the default's order.

  Raises:
    errors.UserError: a file is missing, damaged or that of another set.
  """
  where_to_get = (
    "Zalando's fashion-mnist repository has it, and Debian's package"
    ' dataset-fashion-mnist (in /usr/share/datasets/fashion-mnist)'
  )
  # All four are looked for before the first is decompressed and hashed.
  paths = [
    _raw_file(raw_dir, filename, where_to_get)
    for filename in _FASHION_MNIST_FILES
  ]
  train_images = _read_idx(paths[0], 3, sha256[0])
  train_labels = _read_idx(paths[1], 1, sha256[1])
  test_images = _read_idx(paths[2], 3, sha256[2])
  test_labels = _read_idx(paths[3], 1, sha256[3])
  return {
    'train': (train_images[..., None], train_labels),
    'test': (test_images[..., None], test_labels),
  }


def _read_cifar10(
  tar: tarfile.TarFile, names: list[str]
) -> tuple[np.ndarray, np.ndarray]:
  """Reads images [N,32,32,3] and labels [N] of some files of CIFAR-10."""
  content = b''
  for name in names:
    member = tar.extractfile(f'cifar-10-batches-bin/{name}')
    assert member is not None, 'the hash vouches for the content'
    content += member.read()
  # A record is one byte of label, then the red, green and blue planes.
  records = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
  planes = records[:, 1:].reshape(-1, 3, 32, 32)
  return planes.transpose(0, 2, 3, 1), records[:, 0]


def cifar10(raw_dir: str, sha256: str = CIFAR10_SHA256) -> Splits:
  """Reads CIFAR-10: 32×32 RGB, 50,000 images to train and 10,000 to test.

  The images are in the order of the file.

  Args:
    raw_dir: the folder of cifar-10-binary.tar.gz; '' fetches it.
    sha256: the hash of that file.

  Raises:
    errors.UserError: the file is missing or damaged.
  """
  where_to_get = (
    "the University of Toronto's CIFAR page has it (binary version)"
  )
  path = _raw_file(raw_dir, _CIFAR10_FILE, where_to_get)
  with path.open('rb') as file:
    got = hashlib.file_digest(file, 'sha256').hexdigest()
  _require_sha256(path, got, sha256)
  with tarfile.open(path) as tar:
    return {
      'train': _read_cifar10(tar, [f'data_batch_{i}.bin' for i in range(1, 6)]),
      'test': _read_cifar10(tar, ['test_batch.bin']),
    }


@dataclasses.dataclass(frozen=True)
class Spec:
  """What TFDS is told about a set, and how the set's raw files are read.

  Attributes:
    name: the set's name in TFDS.
    version: its version in TFDS.
    read: gives the splits, from the folder `raw_dir` of published files.
    files: the names of those files.
    class_names: the names of the classes, by label.
    pixel_values: pixels are 0 .. pixel_values−1.
    has_id: whether records carry '<split>_<index>', as stock cifar10's do.
  """

  name: str
  version: str
  read: Callable[[str], Splits]
  class_names: tuple[str, ...]
  pixel_values: int = 256
  has_id: bool = False
  files: tuple[str, ...] = ()


SPECS = {
  'digits': Spec(
    name='digits',
    version='1.0.0',
    read=digits,
    class_names=tuple('0123456789'),
    pixel_values=17,
  ),
  'fashion_mnist': Spec(
    name='fashion_mnist',
    version='3.0.1',
    read=fashion_mnist,
    files=_FASHION_MNIST_FILES,
    class_names=(
      'T-shirt/top',
      'Trouser',
      'Pullover',
      'Dress',
      'Coat',
      'Sandal',
      'Shirt',
      'Sneaker',
      'Bag',
      'Ankle boot',
    ),
  ),
  'cifar10': Spec(
    name='cifar10',
    version='3.0.2',
    read=cifar10,
    files=(_CIFAR10_FILE,),
    class_names=(
      'airplane',
      'automobile',
      'bird',
      'cat',
      'deer',
      'dog',
      'frog',
      'horse',
      'ship',
      'truck',
    ),
    has_id=True,
  ),
}


def _builder(spec: Spec, splits: Splits, data_dir: str) -> Any:
  """Returns a TFDS builder that writes `splits` under `data_dir`."""
  from PIL import Image
  import tensorflow_datasets as tfds

  # The class stays unregistered, because TFDS may know a builder of this name.
  # To TFDS's types the keyword is unknown.
  class Builder(  # type: ignore[call-arg]
    tfds.core.GeneratorBasedBuilder, skip_registration=True
  ):
    name = spec.name
    VERSION = tfds.core.Version(spec.version)

    def _info(self) -> tfds.core.DatasetInfo:
      train_images, _ = splits['train']
      features = {
        'image': tfds.features.Image(shape=train_images.shape[1:]),  # As PNG.
        'label': tfds.features.ClassLabel(names=list(spec.class_names)),
      }
      if spec.has_id:
        features['id'] = tfds.features.Text()
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(features),
        supervised_keys=('image', 'label'),
      )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
      del dl_manager
      return {name: self._generate_examples(name) for name in splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
      images, labels = splits[split]
      for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        pixels = image[..., 0] if image.shape[-1] == 1 else image
        record = {
          # A PIL image, because TFDS needs TensorFlow to encode an array.
          'image': Image.fromarray(pixels),
          'label': int(label),
        }
        if spec.has_id:
          record['id'] = f'{split}_{i:05d}'
        yield i, record

  return Builder(data_dir=data_dir or None)


def prepare(spec: Spec, data_dir: str = '', raw_dir: str = '') -> None:
  """Writes a set under `data_dir` unless it is there.

  Several processes may prepare a set at once, and any of them may be killed:
  TFDS writes into a folder `incomplete.*` of its own and renames it when all
  is written. The first process wins and the others find its result. The
  `incomplete.*` folder of a killed one is never read, and the user may delete
  it.

  Args:
    spec: the set.
    data_dir: where TFDS keeps prepared data; '' is TFDS's own default.
    raw_dir: the folder of published files, for sets that need them; '' fetches
      them.

  Raises:
    errors.UserError: raw files are missing or damaged, or `data_dir` cannot be
      written.
  """
  builder = _builder(spec, spec.read(raw_dir), data_dir)
  try:
    builder.download_and_prepare(file_format='array_record')
  except OSError as error:
    if not builder.data_path.exists():
      raise errors.UserError(
        f'cannot write {builder.data_path} ({error}): set config.data.data_dir'
        ' to a folder with space that may be written'
      ) from error


def _find(name: str, data_dir: str) -> Any | None:
  """Returns the TFDS builder of a prepared set, or None if there is none."""
  import tensorflow_datasets as tfds

  try:
    return tfds.core.read_only_builder.builder_from_files(
      name, data_dir=data_dir or None
    )
  except ValueError:  # There is no such set, or TFDS cannot parse the name.
    return None
  except Exception as error:  # Any of TFDS's parsers may have failed.
    raise errors.UserError(
      f'the folder of the set {name!r} is damaged ({type(error).__name__}):'
      ' delete it and prepare the set again'
    ) from error


def wanted(name: str, data_dir: str, raw_dir: str) -> list[store.Wanted]:
  """Returns the published files that opening a set will fetch."""
  spec = SPECS.get(name)
  if spec is None or raw_dir or _find(name, data_dir) is not None:
    return []
  return [store.Wanted(table.find(file), _SETTING) for file in spec.files]


def _open_builder(name: str, data_dir: str, raw_dir: str) -> Any:
  """Returns the TFDS builder of a set, which is prepared if SPECS has it."""
  builder = _find(name, data_dir)
  if builder is None and name in SPECS:
    prepare(SPECS[name], data_dir=data_dir, raw_dir=raw_dir)
    builder = _find(name, data_dir)
  if builder is None:
    raise errors.UserError(
      f'{name!r} is neither a file or folder nor a set prepared, whole, in'
      f' {data_dir or "the folder of TFDS"}; known: {", ".join(SPECS)};'
      " prepare others with download_and_prepare(file_format='array_record')"
    )
  formats = {known.value for known in builder.info.available_file_formats()}
  if 'array_record' not in formats:
    raise errors.UserError(
      f'{builder.data_path} is prepared as {formats}; wanted array_record:'
      " prepare it with file_format='array_record' in another"
      ' config.data.data_dir'
    )
  return builder


def _records(builder: Any, split: str) -> tuple[Any, list[Any]]:
  """Opens a split.

  Returns:
    Random access to its records, with images undecoded, and TFDS's
    instructions for the files that hold them.
  """
  import tensorflow_datasets as tfds

  info = builder.info
  try:
    length = info.splits[split].num_examples
  except (KeyError, ValueError) as error:
    raise errors.UserError(
      f'{builder.name} has no split {split!r}; it has {list(info.splits)}'
    ) from error
  features = dict(info.features.items())
  if not length or not isinstance(features.get('image'), tfds.features.Image):
    raise errors.UserError(
      f'{builder.name}/{split} has {length} rows of {list(features)};'
      ' wanted some, with an `image`'
    )
  records = builder.as_data_source(
    split,
    decoders={'image': tfds.decode.SkipDecoding()},
    file_format='array_record',
  )
  return records, info.splits[split].file_instructions


def _label_field(name: str, builder: Any, asked: str) -> str:
  """Returns the field of a set's records that holds the class, or ''."""
  import tensorflow_datasets as tfds

  # TFDS gives them in any order.
  features = dict(sorted(builder.info.features.items()))
  classes = [
    field
    for field, feature in features.items()
    if isinstance(feature, tfds.features.ClassLabel)
  ]
  integers = [
    field
    for field, feature in features.items()
    if isinstance(feature, tfds.features.Tensor)
    and feature.shape == ()
    and np.issubdtype(feature.np_dtype, np.integer)
    and field not in classes
  ]
  return classes_lib.choose_field(name, classes, integers, asked)


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Fetches the rows of a split; may be sent to another process.

  Attributes:
    records: random access to the records.
    files: the files that hold them.
    ends: [F] the number of the row after each file's last.
    label: the field of the class; '' in a set without classes.
  """

  records: Any
  files: list[str]
  ends: np.ndarray
  label: str

  def _file_of(self, row: int) -> str:
    return self.files[np.searchsorted(self.ends, row, 'right')]

  def __call__(self, index: list[int]) -> list[encoded.EncodedRow]:
    """Returns the rows at the given indices."""
    try:
      found = self.records.__getitems__(index)
    except Exception as error:
      if len(index) > 1:
        # The error names no file, so the rows are looked at one by one.
        return [self([row])[0] for row in index]
      raise errors.UserError(
        f'{self._file_of(index[0])} is damaged ({error}): delete its folder,'
        ' prepare again'
      ) from error
    return [
      encoded.EncodedRow(
        where=f'{self._file_of(row)}, row {row}',
        content=record['image'],
        label=record[self.label] if self.label else 0,
      )
      for row, record in zip(index, found, strict=True)
    ]

  def labels(self) -> np.ndarray:
    """Returns the classes of all rows, integers [N]."""
    # Records are parsed a chunk at a time, because they hold their images.
    length = len(self.records)
    labels = [
      row.label
      for start in range(0, length, _CHUNK)
      for row in self(list(range(start, min(start + _CHUNK, length))))
    ]
    return np.array(labels)


def open_split(
  name: str,
  split: str,
  data_dir: str = '',
  raw_dir: str = '',
  label_field: str = '',
) -> encoded.EncodedSource:
  """Opens a split of a TFDS set; prepares a set of SPECS on first use.

  Args:
    name: a key of SPECS, or the TFDS name of a set prepared before.
    split: 'train', or a slice such as 'train[:90%]'.
    data_dir: where TFDS keeps prepared data; '' is TFDS's own default.
    raw_dir: the folder of published files, for sets that need them; '' fetches
      them.
    label_field: the field of the classes; see `classes.choose_field`.

  Raises:
    errors.UserError: the name or the split is unknown; the set is damaged or
      in another format than array_record; or `prepare` failed. A damaged
      record is refused when it is read.
  """
  builder = _open_builder(name, data_dir, raw_dir)
  records, files = _records(builder, split)
  ends = np.cumsum([file.take for file in files])
  label = _label_field(name, builder, label_field)
  rows = _Rows(records, [file.filename for file in files], ends, label)
  num_classes = 0
  class_names = ()
  if label:
    feature = dict(builder.info.features.items())[label]
    # A plain integer does not say how many classes there are.
    num_classes = getattr(feature, 'num_classes', None)
    if num_classes is None:
      num_classes = classes_lib.count_classes(name, rows.labels())
    class_names = tuple(getattr(feature, 'names', None) or ())
  spec = SPECS.get(builder.name)
  return encoded.EncodedSource(
    name=f'{name}/{split}',
    length=len(records),
    num_classes=num_classes,
    pixel_values=spec.pixel_values if spec else 256,
    fetch=rows,
    fetch_labels=rows.labels,
    class_names=class_names,
  )
