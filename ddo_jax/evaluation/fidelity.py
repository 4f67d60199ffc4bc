"""The evaluator of a named protocol: FID and its companions."""

from collections.abc import Callable
import dataclasses
import functools
import json
import pathlib
from typing import Any

import numpy as np

from ddo_jax import errors
from ddo_jax.assets import store
from ddo_jax.assets import table
from ddo_jax.data import loader
from ddo_jax.data import sources
from ddo_jax.evaluation import evaluator
from ddo_jax.evaluation import features
from ddo_jax.evaluation import protocols
from ddo_jax.evaluation import rows as rows_lib
from ddo_jax.evaluation.metrics import fd_ratio
from ddo_jax.evaluation.metrics import frechet
from ddo_jax.evaluation.metrics import inception_score
from ddo_jax.evaluation.metrics import kid
from ddo_jax.evaluation.metrics import mind
from ddo_jax.evaluation.metrics import prdc
from ddo_jax.evaluation.metrics import statistics
from ddo_jax.evaluation.metrics import uncertainty
from ddo_jax.weights import dinov2 as dinov2_weights
from ddo_jax.weights import fid_stats as fid_stats_lib
from ddo_jax.weights import inception as inception_weights

# Where earlier versions asked for files of statistics.
_FORMERLY = pathlib.Path('~/.cache/ddo_jax/references')
_SETTING = '--config.evaluation.fid_stats'
_KID_SUBSET = 1_000  # images of each set in a subset
_OPENAI = 'openai'
_INCEPTION_SCORES: dict[str, Callable[[np.ndarray], Any]] = {
  _OPENAI: inception_score.openai,
  'torch_fidelity': inception_score.torch_fidelity,
}


def _is_shuffled(logits: np.ndarray) -> bool:
  return inception_score.is_shuffled(logits.argmax(axis=1))


def _lying(name: str) -> pathlib.Path | None:
  """Returns where a protocol's statistics lie, if not where assets do.

  A protocol of one's own may name a file that nobody publishes: it lies where
  published ones do.
  """
  formerly = _FORMERLY.expanduser() / name
  asset = table.find(name)
  if asset is not None:
    return None if store.is_here(asset) or not formerly.is_file() else formerly
  own = store.folder(table.FID_STATS) / name
  return formerly if formerly.is_file() and not own.is_file() else own


def wanted(settings: evaluator.Evaluation) -> list[store.Wanted]:
  """Returns the published files that a protocol's evaluator asks for.

  Args:
    settings: checked ones.
  """
  if not settings.protocol:
    return []
  protocol = protocols.get(settings.protocol)
  kinds = evaluator.kinds(settings)
  named = {}
  if settings.fid_stats or _lying(protocol.fid_stats) is None:
    named[_SETTING] = settings.fid_stats or protocol.fid_stats
  if 'fid' in kinds or 'sfid' in kinds:
    published = inception_weights.published().name
    named[inception_weights.SETTING] = settings.inception or published
  if 'fd_dinov2' in kinds:
    named[dinov2_weights.SETTING] = settings.dinov2 or dinov2_weights.PUBLISHED
  return store.wanted(named)


def _open_statistics(settings: evaluator.Evaluation) -> fid_stats_lib.FidStats:
  """Reads the statistics that settings name, or their protocol's.

  Raises:
    errors.UserError: they are missing and cannot be fetched, or damaged.
  """
  name = settings.fid_stats
  if not name:
    name = protocols.get(settings.protocol).fid_stats
    lying = _lying(name)
    if lying is not None:
      return fid_stats_lib.read(lying)
  return fid_stats_lib.read(store.resolve(name, _SETTING))


class FidelityEvaluator:
  """Measures images under a protocol; implements `evaluator.Evaluator`.

  The scores are the Fréchet distance of each kind of features (`fid`, `sfid`,
  `fd_dinov2`), `inception_score` where the protocol has one, and, where there
  are real images to compare with, `kid`, `precision` and `recall` in the
  features of FID. Where they are asked for, there are also the limits of
  infinitely many images (`fid_inf` and so on), `mind`, `density` and `coverage`
  in FID's features, and `fd_ratio`, the mean over the protocol's networks.

  Attributes:
    extractor: the feature networks.
    num_images: the number of images in the protocol's blocks.
    num_blocks: the number of the protocol's blocks.
    minima: the Fréchet distances, if papers print their minimum.
    label_rule: how often each class is drawn, in words.
  """

  def __init__(
    self,
    settings: evaluator.Evaluation,
    seed: int,
    train: sources.Source | None = None,
    open_test: Callable[[], sources.Source] | None = None,
  ):
    """Loads the networks' weights and the published statistics.

    Args:
      settings: they name the protocol and what it needs.
      seed: the run's; under some protocols an image's class is drawn from it.
      train: the training images, of which `settings.real_images` are embedded.
      open_test: opens the held-out images, which `fd_ratio` compares with.

    Raises:
      errors.UserError: the weights or the statistics are missing or damaged
        (the line says which file to bring and where to put it), or the
        images are not of the protocol's shape.
    """
    self.extractor = features.Extractor(settings)
    self._seed = seed
    protocol = self.extractor.protocol
    self.label_rule = protocol.label_rule
    self.num_images = protocol.num_images
    self.num_blocks = protocol.num_blocks
    self.minima: tuple[str, ...] = ()
    if protocol.printed == 'minimum':
      self.minima = self.extractor.kinds
    self._fid_stats = _open_statistics(settings)
    self._moments = {
      kind: self._fid_stats.of(kind) for kind in self.extractor.kinds
    }
    self._train = train
    self._count = settings.real_images
    self._extra = evaluator.extras(settings)
    has_real = self._count or self._fid_stats.has_images
    for name in (evaluator.MIND, evaluator.DENSITY, evaluator.COVERAGE):
      errors.require(
        name not in self._extra or bool(has_real),
        'evaluation.real_images',
        self._count,
        f'positive: {name} compares with real images',
      )
    self._networks = evaluator.networks(settings)
    self._test: sources.Source | None = None
    if open_test and evaluator.FD_RATIO in self._extra:
      self._test = open_test()
      stored, _ = self._test.read(np.arange(1))
      self.check_images(stored.dtype, stored.shape[1:])
    if train is not None:
      stored, _ = train.read(np.arange(1))
      if stored.dtype == np.uint8:  # what latents decode to is not known here
        self.check_images(stored.dtype, stored.shape[1:])

  def check_images(self, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Raises UserError unless the protocol measures such images."""
    self.extractor.protocol.check_images(dtype, shape)

  @functools.cached_property
  def _real(self) -> rows_lib.Rows | None:
    """The features that kid, precision and recall compare with.

    OpenAI's files of statistics bring images of their own; else they are those
    of `real_images` training images. None if there are neither.
    """
    train = self._train
    count = self._count
    if self._fid_stats.has_images:
      images = self._fid_stats.images()
      labels = np.zeros(len(images), np.int32)
      train = sources.ArraySource('real', images, labels)
      count = len(images)
    if train is None or not count:
      return None
    positions = np.arange(min(count, len(train)))
    index = loader.order(0, positions, len(train))
    chunks = features.of_source(train, index)
    return self.extractor.rows(chunks, len(index), train.name)

  def identity(self) -> dict[str, Any]:
    """Returns the protocol, and the files that the number hangs on."""
    origin = next(iter(self._moments.values())).provenance
    files = self.extractor.provenance | {'fid_stats': dict(origin)}
    protocol = dataclasses.asdict(self.extractor.protocol)
    return json.loads(json.dumps({'protocol': protocol, 'files': files}))

  def ids(self, block: int, count: int) -> np.ndarray:
    """Returns the numbers that follow on those of the blocks before."""
    return np.arange(block * count, (block + 1) * count)

  def labels(self, ids: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns classes drawn by the protocol's rule."""
    return self.extractor.protocol.classes(ids, num_classes, self._seed)

  def embed(
    self,
    images: rows_lib.Images,
    count: int,
    name: str,
    folder: pathlib.Path | None = None,
  ) -> rows_lib.Rows:
    """Returns the features of the protocol's networks."""
    return self.extractor.rows(images, count, name, folder)

  def _inception_score(self, logits: np.ndarray, from_file: bool) -> float:
    """Returns the score of logits [N, classes] by the protocol's convention."""
    rule = self.extractor.protocol.inception_score
    # A shuffled file keeps its order, so that OpenAI's own number results.
    if rule == _OPENAI and not (from_file and _is_shuffled(logits)):
      logits = logits[inception_score.permutation(len(logits))]
    return _INCEPTION_SCORES[rule](logits).mean

  def scores(
    self,
    rows: rows_lib.Rows,
    labels: np.ndarray | None = None,
    from_file: bool = False,
  ) -> evaluator.Scores:
    """Returns all scores of a set of images; the labels take no part."""
    del labels
    scores = {}
    for kind, moments in self._moments.items():
      sums = frechet.Statistics.of(rows[kind])
      scores[kind] = frechet.distance(sums, moments)
      limit = kind + evaluator.LIMIT
      if limit in self._extra:
        found = uncertainty.limit_of_distance(rows[kind], moments)
        scores[limit] = found.value
    if features.LOGITS in rows:
      logits = rows[features.LOGITS]
      scores['inception_score'] = self._inception_score(logits, from_file)
    if self._real is not None and 'fid' in rows:
      real = self._real['fid']
      fake = rows['fid']
      size = min(_KID_SUBSET, len(real), len(fake))
      scores['kid'] = kid.kid(real, fake, size=size).mean
      scores |= prdc.precision_recall(
        real, fake, real_radii=self._real_radii
      )._asdict()
      if evaluator.MIND in self._extra:
        scores[evaluator.MIND] = mind.mind(real, fake)
      asked = {evaluator.DENSITY, evaluator.COVERAGE}.intersection(self._extra)
      if asked:
        shares = prdc.density_coverage(
          real, fake, real_radii=self._wide_radii
        )._asdict()
        scores |= {name: shares[name] for name in sorted(asked)}
    if self._test is not None:
      ratios = [ratio(rows[kind]) for kind, ratio in self._fd_ratios.items()]
      scores[evaluator.FD_RATIO] = float(np.mean(ratios))
    return scores

  @functools.cached_property
  def _real_radii(self) -> np.ndarray:
    """See `prdc.radii`, of the real images' features."""
    return prdc.radii(self._real['fid'])

  @functools.cached_property
  def _wide_radii(self) -> np.ndarray:
    """The radii of density and coverage, of the real images' features."""
    return prdc.radii(self._real['fid'], prdc.COVERED_BY)

  @functools.cached_property
  def _fd_ratios(self) -> dict[str, fd_ratio.FdRatio]:
    """By network, what divides a distance by that of the held-out images."""
    chunks = features.of_source(self._test)
    rows = self.extractor.rows(chunks, len(self._test), self._test.name)
    return {
      kind: fd_ratio.FdRatio(rows[kind], self._moments[kind])
      for kind in self._networks
    }

  def uncertainty(self, rows: rows_lib.Rows) -> dict[str, Any]:
    """Returns the sampling errors of the Fréchet distances, where known."""
    return {
      kind: uncertainty.of_distance(rows[kind], moments)
      for kind, moments in self._moments.items()
    }

  def notes(
    self, count: int, num_blocks: int, file_rows: rows_lib.Rows | None = None
  ) -> list[str]:
    """Returns how images were taken, and what departs from the protocol."""
    protocol = self.extractor.protocol
    lines = []
    scored = 'inception' in self.extractor.provenance
    by_chunks = scored and protocol.inception_score == _OPENAI
    if by_chunks and count > inception_score.CHUNK:
      if file_rows is None:
        order = 'a fixed permutation of the images, as a shuffled file has them'
      elif _is_shuffled(file_rows[features.LOGITS]):
        order = "the images in the file's order, as OpenAI's evaluator"
      else:
        order = (
          "a fixed permutation, as the file's order goes by class; OpenAI's"
          ' evaluator would take that order'
        )
      lines.append(f'inception_score: {order}')
    if count != protocol.num_images:
      lines.append(
        f'{count} images, where protocol {protocol.name} has'
        f' {protocol.num_images}: not to be compared with published numbers'
      )
    if protocol.image_shape[2] == 1:
      lines.append('grey images are measured as RGB of three equal channels')
    if protocol.pixel_values != 256:
      top = protocol.pixel_values - 1
      lines.append(f'pixels 0 .. {top} are measured as 0 .. 255')
    for kind, moments in self._moments.items():
      sizes = {f'{kind} of these images': count}
      if moments.n:  # some files do not say
        sizes[f'{kind} of the fid_stats'] = moments.n
      for name, n in sizes.items():
        note = statistics.rank_note(name, n, len(moments.mean))
        if note:
          lines.append(note)
    if self._test is not None:
      lines.append(
        f'{evaluator.FD_RATIO}: of {" and ".join(self._networks)}, of'
        f' {min(count, len(self._test))} images a set'
      )
    if protocol.printed == 'minimum' and num_blocks != protocol.num_blocks:
      lines.append(
        f'{num_blocks} set(s) of images, where protocol {protocol.name} prints'
        f' the minimum of {protocol.num_blocks}'
      )
    if protocol.printed == 'single' and num_blocks != 1:
      lines.append(
        f'the mean of {num_blocks} sets of images, where protocol'
        f' {protocol.name} prints the score of a single one'
      )
    return lines
