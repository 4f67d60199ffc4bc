"""Image sets prepared by TFDS, without TensorFlow.

`digits` is part of scikit-learn; `fashion_mnist` and `cifar10` are read from
the files that their authors publish and the user downloads. Names, versions,
features and keys of these two are TFDS's own, so that stock TFDS reads what is
written here, in the same order. All are written as array_record, the format
that TFDS reads at random without TensorFlow. scikit-learn, PIL and
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

# Split name -> (images uint8 [N,H,W,C], labels [N]).
Splits = dict[str, tuple[np.ndarray, np.ndarray]]
Row = tuple[str, bytes, int]  # where it stands, image file, label

# Train images and labels, test images and labels; of the uncompressed content,
# because the .gz differ with who compressed them.
FASHION_MNIST_SHA256 = (
  'c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888',
  'bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9',
  '5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b',
  '0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34',
)
CIFAR10_SHA256 = (
  'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'
)


def digits(raw_dir: str = '') -> Splits:
  """Returns scikit-learn's digits, 8x8 grey, values 0..16 unscaled.

  The split is stratified and always the same: 1,437 train, 360 test. `raw_dir`
  is not used.
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


def _raw_file(raw_dir: str, filename: str, source: str) -> pathlib.Path:
  path = pathlib.Path(raw_dir).expanduser() / filename
  if not raw_dir or not path.is_file():
    raise errors.UserError(
      f'{filename} is not in config.data.raw_dir={raw_dir!r}; {source}'
    )
  return path


def _require_sha256(path: pathlib.Path, got: str, wanted: str) -> None:
  if got != wanted:
    raise errors.UserError(
      f'{path} has SHA-256 {got}, wanted {wanted}: damaged, or the file of'
      ' another set (MNIST uses the same names); download it again'
    )


def _idx(path: pathlib.Path, dims: int, sha256: str) -> np.ndarray:
  """Reads a gzipped IDX file of bytes with `dims` dimensions."""
  try:
    content = gzip.decompress(path.read_bytes())
  except (OSError, EOFError, zlib.error) as error:
    raise errors.UserError(
      f'{path} cannot be decompressed ({error}): download it again'
    ) from error
  # The hash vouches for the header, too: 4 bytes of magic number, the sizes.
  _require_sha256(path, hashlib.sha256(content).hexdigest(), sha256)
  shape = np.frombuffer(content, '>u4', count=dims, offset=4)
  return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)


def fashion_mnist(
  raw_dir: str, sha256: tuple[str, ...] = FASHION_MNIST_SHA256
) -> Splits:
  """Reads Fashion-MNIST (28x28 grey, 60,000 train and 10,000 test).

  Args:
    raw_dir: folder of the four *-ubyte.gz files.
    sha256: of their uncompressed content, in the order of the default.

  Raises:
    UserError: a file is missing, damaged or another set's.
  """
  source = (
    "Zalando's fashion-mnist repository has it, and Debian's package"
    ' dataset-fashion-mnist (in /usr/share/datasets/fashion-mnist)'
  )
  names = [
    f'{part}-{kind}-ubyte.gz'
    for part in ('train', 't10k')
    for kind in ('images-idx3', 'labels-idx1')
  ]
  paths = [_raw_file(raw_dir, name, source) for name in names]
  x, y, test_x, test_y = map(_idx, paths, (3, 1, 3, 1), sha256)
  return {'train': (x[..., None], y), 'test': (test_x[..., None], test_y)}


def cifar10(raw_dir: str, sha256: str = CIFAR10_SHA256) -> Splits:
  """Reads CIFAR-10 (32x32 RGB, 50,000 train and 10,000 test), in file order.

  Args:
    raw_dir: folder of cifar-10-binary.tar.gz.
    sha256: of that file.

  Raises:
    UserError: the file is missing or damaged.
  """
  source = "the University of Toronto's CIFAR page has it (binary version)"
  path = _raw_file(raw_dir, 'cifar-10-binary.tar.gz', source)
  with path.open('rb') as file:
    got = hashlib.file_digest(file, 'sha256').hexdigest()
  _require_sha256(path, got, sha256)

  def read(tar: tarfile.TarFile, *names: str) -> tuple[np.ndarray, np.ndarray]:
    members = [tar.extractfile(f'cifar-10-batches-bin/{n}') for n in names]
    content = b''.join(member.read() for member in members)
    # A record: one byte of label, then the red, green and blue planes.
    rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    planes = rows[:, 1:].reshape(-1, 3, 32, 32)
    return planes.transpose(0, 2, 3, 1), rows[:, 0]

  with tarfile.open(path) as tar:
    train = read(tar, *(f'data_batch_{i}.bin' for i in range(1, 6)))
    return {'train': train, 'test': read(tar, 'test_batch.bin')}


@dataclasses.dataclass(frozen=True)
class Spec:
  """What TFDS is told of a set, and how its raw files are read."""

  name: str
  version: str
  read: Callable[[str], Splits]  # raw_dir -> splits
  class_names: str  # 'name of class 0,name of class 1,...'
  pixel_values: int = 256  # pixel values are 0 .. pixel_values-1
  has_id: bool = False  # records carry '<split>_<index>', as stock cifar10's


_DIGITS = '0,1,2,3,4,5,6,7,8,9'
_FASHION = (
  'T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot'
)
_CIFAR10 = 'airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck'
SPECS = {
  'digits': Spec('digits', '1.0.0', digits, _DIGITS, pixel_values=17),
  'fashion_mnist': Spec('fashion_mnist', '3.0.1', fashion_mnist, _FASHION),
  'cifar10': Spec('cifar10', '3.0.2', cifar10, _CIFAR10, has_id=True),
}


def _builder(spec: Spec, splits: Splits, data_dir: str) -> Any:
  """Returns a TFDS builder that writes `splits` under `data_dir`."""
  from PIL import Image
  import tensorflow_datasets as tfds

  # Unregistered: TFDS's registry may hold its own builder of this name.
  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name = spec.name
    VERSION = tfds.core.Version(spec.version)

    def _info(self) -> tfds.core.DatasetInfo:
      shape = splits['train'][0].shape[1:]
      names = spec.class_names.split(',')
      features = {
        'image': tfds.features.Image(shape=shape),  # stored as PNG
        'label': tfds.features.ClassLabel(names=names),
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
      for i, (image, label) in enumerate(zip(*splits[split], strict=True)):
        # As PIL images: TFDS needs TensorFlow to encode arrays.
        pixels = image[..., 0] if image.shape[-1] == 1 else image
        record = {'image': Image.fromarray(pixels), 'label': int(label)}
        yield i, record | ({'id': f'{split}_{i:05d}'} if spec.has_id else {})

  return Builder(data_dir=data_dir or None)


def prepare(spec: Spec, data_dir: str = '', raw_dir: str = '') -> None:
  """Writes a set under `data_dir` unless it is there; may race or be killed.

  TFDS writes into a folder `incomplete.*` of its own and renames it when all
  is written. Of several processes that prepare at once the first wins and the
  others find its result; a killed one leaves its `incomplete.*` folder, which
  nobody reads and the user may delete.

  Args:
    spec: the set.
    data_dir: where TFDS keeps prepared data; '' is TFDS's own default.
    raw_dir: folder of the downloaded files, for sets that need them.

  Raises:
    UserError: raw files are missing or damaged, or `data_dir` is not writable.
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
  """Returns the TFDS builder of a prepared set, None if there is none."""
  import tensorflow_datasets as tfds

  try:
    return tfds.core.read_only_builder.builder_from_files(
      name, data_dir=data_dir or None
    )
  except ValueError:  # no such set, or no name that TFDS can parse
    return None
  except Exception as error:  # any of TFDS's parsers
    raise errors.UserError(
      f'the folder of the set {name!r} is damaged ({type(error).__name__}):'
      ' delete it and prepare the set again'
    ) from error


def _open_builder(name: str, data_dir: str, raw_dir: str) -> Any:
  """Returns the TFDS builder of a prepared set; prepares those of SPECS."""
  builder = _find(name, data_dir)
  if builder is None and name in SPECS:
    prepare(SPECS[name], data_dir, raw_dir)
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


def _rows(builder: Any, split: str) -> tuple[Any, list[Any]]:
  """Returns the records of a split, images undecoded, and its files."""
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
  rows = builder.as_data_source(
    split,
    decoders={'image': tfds.decode.SkipDecoding()},
    file_format='array_record',
  )
  return rows, info.splits[split].file_instructions


@dataclasses.dataclass(frozen=True)
class Split:
  """A split of a prepared set, read at random."""

  length: int
  num_classes: int  # 0: no labels
  pixel_values: int  # pixel values are 0 .. pixel_values-1
  fetch: Callable[[list[int]], list[Row]]


def open_split(
  name: str, split: str, data_dir: str = '', raw_dir: str = ''
) -> Split:
  """Opens a split of a TFDS set; prepares those of SPECS on first use.

  Args:
    name: a key of SPECS, or the TFDS name of a set prepared before.
    split: 'train', or a slice such as 'train[:90%]'.
    data_dir: see `prepare`.
    raw_dir: see `prepare`.

  Raises:
    UserError: unknown name or split; a set not prepared, damaged (by `fetch`,
      too) or in another format; what `prepare` raises.
  """
  builder = _open_builder(name, data_dir, raw_dir)
  rows, files = _rows(builder, split)
  ends = np.cumsum([file.take for file in files])
  label = dict(builder.info.features.items()).get('label')
  num_classes = getattr(label, 'num_classes', 0)  # a ClassLabel has it

  def fetch(index: list[int]) -> list[Row]:
    where = [files[i].filename for i in np.searchsorted(ends, index, 'right')]
    try:
      found = rows.__getitems__(index)
    except Exception as error:
      if len(index) > 1:  # the error names no file: look at the rows singly
        return [row for i in index for row in fetch([i])]
      raise errors.UserError(
        f'{where[0]} is damaged ({error}): delete its folder, prepare again'
      ) from error
    return [
      (f'{file}, row {i}', row['image'], row['label'] if num_classes else 0)
      for file, i, row in zip(where, index, found, strict=True)
    ]

  spec = SPECS.get(builder.name)
  return Split(
    len(rows), num_classes, spec.pixel_values if spec else 256, fetch
  )
