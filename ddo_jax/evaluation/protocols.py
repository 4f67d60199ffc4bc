"""Named evaluation protocols: what a published number was measured under.

A FID depends on the number of images, on how labels are drawn, on how pixels
are rounded and resized, and on the reference file, each by more than good
models differ. A score therefore carries its protocol, and scores of different
protocols are not compared.
"""

import dataclasses
import typing
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.evaluation.networks import resize

# 'random': drawn anew for every image (EDM's and EDM2's generators).
# 'balanced': image i has class i mod classes (DDO's EDM2 script, VAR).
LabelRule = Literal['random', 'balanced']
# Both truncate. 'edm': clip(127.5 x + 128); 'var': clip(255 (x + 1)/2), which
# is half a level darker.
PixelRule = Literal['edm', 'var']


@dataclasses.dataclass(frozen=True)
class Protocol:
  """How a number is measured.

  Attributes:
    name: of the protocol.
    image_shape: of the images that the reference is of.
    num_images: N of a block.
    first_seeds: of the blocks; block b has seeds first, first + 1, ...
    labels: how classes are drawn.
    pixels: how model units in [-1, 1] become uint8.
    resize: into the Inception network.
    reference: published file of the reference statistics.
    features: kinds of statistics that the reference file has.
    inception_score: the convention, '' where the papers print none.
    printed: of the blocks' scores: 'minimum' or 'single'.
  """

  name: str
  image_shape: tuple[int, int, int]
  num_images: int
  first_seeds: tuple[int, ...]
  labels: LabelRule
  pixels: PixelRule
  resize: resize.Bilinear
  reference: str
  features: tuple[str, ...]
  inception_score: str
  printed: str

  def __post_init__(self):
    for field, rules in (
      ('labels', LabelRule),
      ('pixels', PixelRule),
      ('resize', resize.Bilinear),
    ):
      if getattr(self, field) not in typing.get_args(rules):
        raise errors.UserError(
          f'{field} is {getattr(self, field)!r}; wanted one of '
          f'{typing.get_args(rules)}'
        )
    gaps = np.diff(sorted(self.first_seeds))
    if not self.first_seeds or (gaps < self.num_images).any():
      raise errors.UserError(
        f'blocks of {self.num_images} images from seeds {self.first_seeds} '
        'overlap; start them at least that far apart'
      )

  def ids(self, block: int) -> np.ndarray:
    """The images' numbers [N] of a block, which are also their seeds."""
    first = self.first_seeds[block]
    return np.arange(first, first + self.num_images)

  def classes(self, ids: np.ndarray, num_classes: int, seed: int) -> np.ndarray:
    """The images' classes.

    Args:
      ids: [B] of one block or of a part of it.
      num_classes: 0 for a model without classes.
      seed: of the run; random classes are a function of it and of the id.

    Returns:
      [B] int32; `num_classes` itself, "no label", is 0 without classes.

    Raises:
      UserError: the rule is 'balanced', and the classes do not divide N.
    """
    if num_classes == 0:
      return np.zeros(len(ids), np.int32)
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
    draw = lambda key: jax.random.randint(key, (), 0, num_classes)
    return np.asarray(jax.vmap(draw)(keys), np.int32)


def _three(n: int) -> tuple[int, int, int]:
  return (0, n, 2 * n)


_EDM = Protocol(
  name='edm-cifar10',
  image_shape=(32, 32, 3),
  num_images=50_000,
  first_seeds=_three(50_000),
  labels='random',
  pixels='edm',
  resize='tf1',
  reference='cifar10-32x32.npz',
  features=('fid',),
  inception_score='',
  printed='minimum',
)
# Labels as DDO's own sampling script draws them; EDM2's baselines were drawn
# at random: `dataclasses.replace(protocol, name=..., labels='random')`.
_EDM2 = dataclasses.replace(
  _EDM,
  name='edm2-img64',
  image_shape=(64, 64, 3),
  labels='balanced',
  reference='img64.pkl',
  features=('fid', 'fd_dinov2'),
)

PROTOCOLS = {
  protocol.name: protocol
  for protocol in (
    _EDM,
    _EDM2,
    dataclasses.replace(
      _EDM2,
      name='edm2-img512',
      image_shape=(512, 512, 3),
      reference='img512.pkl',
    ),
    dataclasses.replace(
      _EDM,
      name='adm-img256',
      image_shape=(256, 256, 3),
      first_seeds=(0,),
      labels='balanced',
      pixels='var',
      reference='VIRTUAL_imagenet256_labeled.npz',
      features=('fid', 'sfid'),
      inception_score='openai',
      printed='single',
    ),
  )
}


def get(name: str) -> Protocol:
  """The protocol of a name.

  Raises:
    UserError: there is none.
  """
  if name not in PROTOCOLS:
    raise errors.UserError(
      f'no protocol {name!r}; wanted one of {", ".join(PROTOCOLS)}'
    )
  return PROTOCOLS[name]


@dataclasses.dataclass(frozen=True)
class Score:
  """A number and all that it hangs on.

  Attributes:
    metric: 'fid', 'fd_dinov2', 'inception_score', ...
    value: the number.
    protocol: that it was measured under.
    num_images: that were really used.
    reference_sha256: of the reference file; '' if unknown (a printed number).
  """

  metric: str
  value: float
  protocol: Protocol
  num_images: int
  reference_sha256: str = ''


def difference(a: Score, b: Score) -> float:
  """`a` minus `b`, where that means something.

  Raises:
    UserError: they are of different metrics, protocols, numbers of images or
      reference files; the line says which.
  """
  reasons = []
  for field in ('metric', 'num_images', 'reference_sha256'):
    ours, theirs = getattr(a, field), getattr(b, field)
    known = field != 'reference_sha256' or (ours and theirs)
    if known and ours != theirs:
      reasons.append(f'{field} {ours} and {theirs}')
  for field in dataclasses.fields(Protocol):
    ours, theirs = (getattr(x.protocol, field.name) for x in (a, b))
    if ours != theirs:
      reasons.append(f'{field.name} {ours} and {theirs}')
  if reasons:
    raise errors.UserError(
      f'two scores cannot be compared: {"; ".join(reasons)}; measure both '
      'under one protocol'
    )
  return a.value - b.value
