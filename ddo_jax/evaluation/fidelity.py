"""Scores under a named protocol: FID and its companions."""

import pathlib
from typing import Any

import jax
import numpy as np

from ddo_jax import config as config_lib
from ddo_jax.data import loader
from ddo_jax.data import sources
from ddo_jax.evaluation import features
from ddo_jax.evaluation.metrics import frechet
from ddo_jax.evaluation.metrics import inception_score
from ddo_jax.evaluation.metrics import kid
from ddo_jax.evaluation.metrics import prdc
from ddo_jax.evaluation.metrics import statistics
from ddo_jax.evaluation.metrics import uncertainty
from ddo_jax.method import generate
from ddo_jax.method import likelihood
from ddo_jax.weights import fid_stats

_FOLDER = pathlib.Path('~/.cache/ddo_jax/references')


class Evaluator:
  """Measures images under a protocol.

  Scores: the Fréchet distance of each kind of features (`fid`, `sfid`,
  `fd_dinov2`), `inception_score`, and, where there are real images to compare
  with, `kid`, `precision` and `recall` in the features of FID.

  Attributes:
    extractor: of the features.
    files: where the reference and the networks' weights come from.
    num_images: of a block.
    num_blocks: of the protocol.
  """

  def __init__(
    self, config: config_lib.Config, real: sources.Source | None = None
  ):
    """Loads the networks' weights and the reference.

    Args:
      config: its evaluation names the protocol and what that needs.
      real: training images; `evaluation.real_images` of them are embedded.

    Raises:
      errors.UserError: the weights or the reference are missing or damaged;
        the line says which file to bring and where to put it.
    """
    self.extractor = features.Extractor(config)
    protocol = self.extractor.protocol
    self.num_images = protocol.num_images
    self.num_blocks = len(protocol.first_seeds)
    path = config.evaluation.reference or _FOLDER / protocol.reference
    self._reference = fid_stats.read(pathlib.Path(path).expanduser())
    self._moments = {k: self._reference.of(k) for k in self.extractor.kinds}
    reference = next(iter(self._moments.values()))
    self.files = self.extractor.provenance | {
      'reference': dict(reference.provenance)
    }
    self._real = self._real_rows(real, config.evaluation.real_images)

  def _real_rows(
    self, real: sources.Source | None, count: int
  ) -> features.Rows | None:
    """Features of real images, for neighbours and kernels; None without."""
    if self._reference.has_images:
      images = self._reference.images()
      real = sources.ArraySource(
        'real', images, np.zeros(len(images), np.int32)
      )
      count = len(images)
    if real is None or not count:
      return None
    index = loader.order(0, np.arange(min(count, len(real))), len(real))
    return self.extractor.read(real, index)

  def scores(self, rows: features.Rows) -> dict[str, float]:
    """All scores of features."""
    scores = {
      kind: frechet.distance(features.sums(rows[kind]), moments)
      for kind, moments in self._moments.items()
    }
    if features.LOGITS in rows:
      score = {
        'openai': inception_score.openai,
        'torch_fidelity': inception_score.torch_fidelity,
      }[self.extractor.protocol.inception_score]
      scores['inception_score'] = score(rows[features.LOGITS]).mean
    if self._real is not None and 'fid' in rows:
      pair = (self._real['fid'], rows['fid'])
      size = min(1_000, *map(len, pair))
      scores['kid'] = kid.kid(*pair, size=size).mean
      scores |= prdc.precision_recall(*pair)._asdict()
    return scores

  def uncertainty(self, rows: features.Rows) -> dict[str, Any]:
    """{kind: {'jackknife', 'limit'}} of the Fréchet distances, where enough."""
    estimates = {
      'jackknife': (uncertainty.jackknife, 10),
      'limit': (uncertainty.extrapolate, 4),
    }
    found = {kind: {} for kind in self._moments}
    for kind, moments in self._moments.items():
      metric = lambda sums, moments=moments: frechet.distance(sums, moments)
      count, width = rows[kind].shape
      for name, (estimate, groups) in estimates.items():
        if count // groups <= width:  # singular covariances say nothing
          continue
        parts = np.split(rows[kind][: count - count % groups], groups)
        result = estimate([features.sums(part) for part in parts], metric)
        found[kind][name] = {
          key: value.tolist() if isinstance(value, np.ndarray) else value
          for key, value in result._asdict().items()
        }
    return found

  def notes(self, count: int) -> list[str]:
    """What keeps a number of so many images from being compared."""
    lines, protocol = [], self.extractor.protocol
    if count != protocol.num_images:
      lines.append(
        f'{count} images, where protocol {protocol.name} has'
        f' {protocol.num_images}: not to be compared with published numbers'
      )
    for kind, moments in self._moments.items():
      sizes = {f'{kind} of these images': count}
      if moments.n:  # some files do not say
        sizes[f'{kind} of the reference'] = moments.n
      notes = [
        statistics.rank_note(name, n, len(moments.mean))
        for name, n in sizes.items()
      ]
      lines += filter(None, notes)
    return lines

  def measure(
    self,
    generator: generate.Generator,
    params: likelihood.Params,
    key: jax.Array,
    block: int,
    count: int,
  ) -> dict[str, float]:
    """Scores of `count` images of a block's ids; see `evaluate.Measures`."""
    return self.scores(self.draw(generator, params, key, block, count))

  def draw(
    self,
    generator: generate.Generator,
    params: likelihood.Params,
    key: jax.Array,
    block: int,
    count: int,
    **options: Any,
  ) -> features.Rows:
    """Features of a block's images; `options` as `Extractor.draw` has them."""
    ids = np.arange(block * count, (block + 1) * count)
    return self.extractor.draw(generator, params, key, ids, **options)
