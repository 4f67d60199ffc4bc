"""Named evaluation protocols: what a published number was measured under.

A FID depends on the number of images, on how their classes are drawn, on how
images are resized and on the file of statistics they are compared with; each
of these moves it by more than good models differ. A score therefore carries
its protocol, and scores of different protocols are not compared.

Images are measured as they are. How a model's output becomes uint8 pixels is
the concern of the model's codec, and it belongs to the model as much as its
weights do: EDM's and EDM2's pixels are those of clip(127.5 x + 128, 0, 255)
cut off to integers, which is rounding; VAR's, and those of EDM2's latents, are
those of 255 (x + 1)/2 cut off, which is half a pixel value darker on average.

A protocol of one's own is made by --mode=fid_stats: statistics of any images,
and beside them a JSON file that says how they are to be compared. The path of
that folder stands wherever a published protocol's name may.

The seeds of a published number are 0, 1, ..., N−1 for its first block of N
images, N, ..., 2N−1 for its second, and so on. Here an image's id is its place
in that sequence, and its noise depends on its id and the run's seed.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
import typing
from typing import Any
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.data import labels as labels_lib
from ddo_jax.evaluation.networks import resize
from ddo_jax.runtime import manifest
from ddo_jax.runtime import records

# 'random': every image's class is drawn (EDM's and EDM2's generators).
# 'balanced': image i has class i mod classes (DDO's EDM2 script, VAR).
# 'shares': as often as `class_shares` says (protocols of one's own).
LabelRule = Literal['random', 'balanced', 'shares']
# 'openai': chunks in the order of the ids. 'torch_fidelity': shuffled splits.
# '': the papers print no Inception Score.
InceptionRule = Literal['', 'openai', 'torch_fidelity']
# What papers print of the blocks' Fréchet distances: EDM the minimum of three,
# others that of their only block; the mean is printed of one's own.
Printed = Literal['minimum', 'single', 'mean']

FILE = 'protocol.json'  # in a folder of statistics


def _are_counts(values: tuple[Any, ...]) -> bool:
  """Whether all values are whole numbers from 0, of no absurd size."""
  return all(type(value) is int and 0 <= value < 2**40 for value in values)


@dataclasses.dataclass(frozen=True)
class Protocol:
  """How a number is measured.

  Attributes:
    name: what the protocol is called.
    image_shape: [H, W, C] of the images that are measured.
    num_images: N, the number of images in a block.
    num_blocks: the number of blocks of fresh seeds that are measured.
    labels: how classes are drawn.
    resize: how images are resized for the Inception network.
    fid_stats: the name of the published file of statistics, or the folder of
      one's own.
    features: the kinds of statistics that the file has.
    inception_score: the convention of the Inception Score.
    printed: which of the blocks' Fréchet distances papers print.
    class_shares: how often each class is drawn; see `labels.Shares`.
    pixel_values: the images' pixels are 0 .. pixel_values−1; they are measured
      at full contrast.
    data: what the statistics are of; '' where the name says it.
  """

  name: str
  image_shape: tuple[int, int, int]
  num_images: int
  num_blocks: int
  labels: LabelRule
  resize: resize.Bilinear
  fid_stats: str
  features: tuple[str, ...]
  inception_score: InceptionRule
  printed: Printed
  class_shares: tuple[int, ...] = ()
  pixel_values: int = 256
  data: str = ''

  @property
  def label_rule(self) -> str:
    """How often each class is drawn, in words."""
    if self.labels == 'random':
      return 'each class at random, all equally likely'
    return str(labels_lib.Shares(self.class_shares))

  def __post_init__(self):
    choices = {
      'labels': LabelRule,
      'resize': resize.Bilinear,
      'inception_score': InceptionRule,
      'printed': Printed,
    }
    for field, rule in choices.items():
      value = getattr(self, field)
      if value not in typing.get_args(rule):
        raise errors.UserError(
          f'{field} is {errors.brief(value)}; wanted one of'
          f' {typing.get_args(rule)}'
        )
    self._check_fields()
    if self.num_images < 1 or self.num_blocks < 1:
      raise errors.UserError(
        f'{self.num_blocks} blocks of {self.num_images} images; wanted 1 or'
        ' more of each'
      )
    if self.printed == 'single' and self.num_blocks != 1:
      raise errors.UserError(
        f"printed is 'single' of {self.num_blocks} blocks; wanted one block, or"
        " 'minimum'"
      )

  def _check_fields(self) -> None:
    """Raises UserError where a file gave a field of another type or size."""
    counts = (self.num_images, self.num_blocks, self.pixel_values)
    wanted = {
      'image_shape': len(self.image_shape) == 3,
      'num_images, num_blocks or pixel_values': _are_counts(counts),
      'class_shares': _are_counts(self.class_shares),
      'features': all(isinstance(kind, str) for kind in self.features),
    }
    wanted['image_shape'] &= _are_counts(self.image_shape)
    for field in ('name', 'fid_stats', 'data'):
      wanted[field] = isinstance(getattr(self, field), str)
    for field, holds in wanted.items():
      if not holds:
        raise errors.UserError(f'{field} is none that a protocol has')

  def check_images(self, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Raises UserError unless the protocol measures such images.

    Args:
      dtype: the images' type.
      shape: the shape [H, W, C] of one of them.
    """
    wanted = self.image_shape
    if dtype == np.uint8 and tuple(shape) == wanted:
      return
    fitting = [
      f'{name}, or '
      for name, protocol in PROTOCOLS.items()
      if dtype == np.uint8 and tuple(shape) == protocol.image_shape
    ]
    raise errors.UserError(
      f'images are {dtype} {list(shape)}; protocol {self.name} measures uint8'
      f' {list(wanted)}: set config.evaluation.protocol to {"".join(fitting)}a'
      ' protocol of images like these, which --mode=fid_stats makes'
    )

  def shares(self, num_classes: int) -> labels_lib.Shares:
    """Returns how often a model's images are of each class.

    Raises:
      errors.UserError: the model has fewer classes than the protocol's data.
    """
    if num_classes < len(self.class_shares):
      raise errors.UserError(
        f'protocol {self.name} is of data with {len(self.class_shares)} classes'
        f' and the model has {num_classes}: make one of data like the model'
        ' with --mode=fid_stats'
      )
    return labels_lib.Shares(self.class_shares)

  def classes(self, ids: np.ndarray, num_classes: int, seed: int) -> np.ndarray:
    """Returns the classes of images.

    Args:
      ids: [B] the images' ids.
      num_classes: the model's; 0 for a model without classes.
      seed: the run's; random classes are a function of it and of the id.

    Returns:
      [B] int32; all 0 without classes.

    Raises:
      errors.UserError: the rule is 'balanced', and the number of classes does
        not divide N.
    """
    if num_classes == 0:
      return np.zeros(len(ids), np.int32)
    if self.labels == 'shares':
      return self.shares(num_classes).labels(ids)
    if self.labels == 'balanced':
      if self.num_images % num_classes:
        raise errors.UserError(
          f'{self.num_images} images cannot be balanced over {num_classes} '
          f'classes; protocol {self.name} needs a multiple'
        )
      return (np.asarray(ids) % num_classes).astype(np.int32)
    keys = rng.per_example(
      rng.stream(seed, 'evaluation', 'label'), jnp.asarray(ids, jnp.uint32)
    )

    def draw(key: jax.Array) -> jax.Array:
      return jax.random.randint(key, (), 0, num_classes)

    return np.asarray(jax.vmap(draw)(keys), np.int32)


_EDM = Protocol(
  name='edm-cifar10',
  image_shape=(32, 32, 3),
  num_images=50_000,
  num_blocks=3,
  labels='random',
  resize='tf1',
  fid_stats='cifar10-32x32.npz',
  features=('fid',),
  inception_score='',
  printed='minimum',
)
# Classes are drawn as DDO's own sampling script draws them. EDM2's baselines
# were drawn at random: `dataclasses.replace(protocol, name=..., labels=...)`.
_EDM2 = dataclasses.replace(
  _EDM,
  name='edm2-img64',
  image_shape=(64, 64, 3),
  labels='balanced',
  fid_stats='img64.pkl',
  features=('fid', 'fd_dinov2'),
)
_EDM2_LARGE = dataclasses.replace(
  _EDM2,
  name='edm2-img512',
  image_shape=(512, 512, 3),
  fid_stats='img512.pkl',
)
_ADM = dataclasses.replace(
  _EDM,
  name='adm-img256',
  image_shape=(256, 256, 3),
  num_blocks=1,
  labels='balanced',
  fid_stats='VIRTUAL_imagenet256_labeled.npz',
  features=('fid', 'sfid'),
  inception_score='openai',
  printed='single',
)

PROTOCOLS = {
  protocol.name: protocol for protocol in (_EDM, _EDM2, _EDM2_LARGE, _ADM)
}


def _file(name: str) -> pathlib.Path:
  """Returns where the protocol lies that a path names."""
  path = pathlib.Path(name).expanduser()
  return path if path.suffix == '.json' else path / FILE


def is_there(name: str) -> bool:
  """Says whether a protocol is published by that name, or lies at that path."""
  return name in PROTOCOLS or (bool(name) and _file(name).is_file())


def get(name: str) -> Protocol:
  """Returns the protocol of a name, or the one that lies at a path.

  The statistics beside it are held to their checksums where they are read.

  Raises:
    errors.UserError: there is none, or the file is damaged.
  """
  if name in PROTOCOLS:
    return PROTOCOLS[name]
  if not is_there(name):
    raise errors.UserError(
      f'no protocol {name!r}; wanted one of {", ".join(PROTOCOLS)}, or a folder'
      ' that --mode=fid_stats wrote'
      f'{errors.near_miss(name, PROTOCOLS)}'
    )
  path = _file(name)
  manifest.check(path.parent, FILE, 'write it anew with --mode=fid_stats')
  recorded = records.read_json(path)
  try:
    protocol = from_json(recorded)
  except (TypeError, ValueError, KeyError, AttributeError) as error:
    raise errors.UserError(
      f'{path} is no protocol ({str(error)[:200]}): write it anew with'
      ' --mode=fid_stats'
    ) from error
  return dataclasses.replace(protocol, fid_stats=str(path.parent.resolve()))


def write(folder: pathlib.Path, protocol: Protocol) -> None:
  """Writes a protocol beside its statistics, which are there."""
  kept = manifest.Manifest(folder, (), top=True)
  kept.write_json(FILE, dataclasses.asdict(protocol))
  kept.add(*sorted(path.name for path in folder.glob('*.npz')))


def from_json(recorded: Mapping[str, Any]) -> Protocol:
  """Returns the protocol that an eval.json records.

  Files written by earlier versions list the first seed of every block, call
  the statistics `reference`, and name a rule of rounding, which is the model's.
  """
  fields = dict(recorded)
  fields.pop('pixels', None)
  if 'first_seeds' in fields:
    fields['num_blocks'] = len(fields.pop('first_seeds'))
  if 'reference' in fields:
    fields['fid_stats'] = fields.pop('reference')
  fields.setdefault('class_shares', ())
  for name in ('image_shape', 'features', 'class_shares'):
    fields[name] = tuple(fields[name])
  return Protocol(**fields)


@dataclasses.dataclass(frozen=True)
class Score:
  """A number, and all that it hangs on.

  Attributes:
    metric: the score's name: 'fid', 'fd_dinov2', 'inception_score', ...
    value: the number.
    protocol: the protocol that it was measured under.
    num_images: the number of images that were really used.
    fid_stats_sha256: the hash of the file of statistics; '' if it is not known,
      as with a printed number.
  """

  metric: str
  value: float
  protocol: Protocol
  num_images: int
  fid_stats_sha256: str = ''


def difference(a: Score, b: Score) -> float:
  """Returns `a` minus `b`, where that means something.

  Raises:
    errors.UserError: they are of different metrics, protocols, numbers of
      images or files of statistics; the line says which.
  """
  reasons = []
  for field in ('metric', 'num_images', 'fid_stats_sha256'):
    ours = getattr(a, field)
    theirs = getattr(b, field)
    unknown = field == 'fid_stats_sha256' and not (ours and theirs)
    if ours != theirs and not unknown:
      reasons.append(f'{field} {ours} and {theirs}')
  # One's own statistics are known by their hash, wherever they were moved to.
  own = a.protocol.data and b.protocol.data and a.fid_stats_sha256
  for name in [field.name for field in dataclasses.fields(Protocol)]:
    if own and name in ('fid_stats', 'data'):
      continue
    ours = getattr(a.protocol, name)
    theirs = getattr(b.protocol, name)
    if ours != theirs:
      reasons.append(f'{name} {ours} and {theirs}')
  if reasons:
    raise errors.UserError(
      f'two scores cannot be compared: {"; ".join(reasons)}; measure both '
      'under one protocol'
    )
  return a.value - b.value
