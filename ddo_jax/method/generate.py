"""Draws rows from params: for fake pools, sample grids and evaluations."""

from collections.abc import Iterator
import functools
from typing import Any

import jax
import numpy as np

from ddo_jax import rng
from ddo_jax.method import likelihood
from ddo_jax.method import negatives
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import progress

_RENDERED = 8  # rows a call: an activation of 512×512 pixels takes 134 MB a row


def balanced_labels(ids: np.ndarray, num_classes: int) -> np.ndarray:
  """Returns int32 labels [B] for ids [B], such that classes occur equally."""
  return (ids % max(num_classes, 1)).astype(np.int32)


@functools.partial(jax.jit, static_argnames=('model', 'sampler'))
def _sample(weights, rows, *, model, sampler):
  params, frozen, key = weights
  keys = rng.per_example(key, rows['id'])
  return model.draw(params, frozen, rows['label'], keys, sampler)


@functools.partial(jax.jit, static_argnames='model')
def _render(frozen, rows, *, model):
  return model.codec.render(frozen, rows['stored'])


class Generator:
  """Draws images of a model; an image depends on its key and id only.

  Attributes:
    model: the family.
    frozen: weights beside the params (tokenizer, VAE, guide), on the devices.
    sampler: the sampler's settings.
    executor: the devices.
    batch: the number of images in a call.
  """

  def __init__(
    self,
    model: likelihood.LikelihoodModel,
    frozen: likelihood.Frozen,
    sampler: Any,
    executor: devices_lib.Executor,
    batch: int,
  ):
    """See the attributes."""
    self.model = model
    self.frozen = frozen
    self.sampler = sampler
    self.executor = executor
    self.batch = batch

  def stream(
    self,
    params: likelihood.Params,
    key: jax.Array,
    ids: np.ndarray,
    labels: np.ndarray,
  ) -> Iterator[np.ndarray]:
    """Yields rows [b,...] as the data stores them, in the order of the ids.

    Args:
      params: the weights, on the devices.
      key: the stream's key; an image's own key folds in its id.
      ids: [N] integers.
      labels: [N] int32; num_classes means "no label".
    """
    weights = (params, self.frozen, self.executor.replicate(key))
    fn = functools.partial(_sample, model=self.model, sampler=self.sampler)
    rows = {'id': ids.astype(np.uint32), 'label': labels.astype(np.int32)}
    yield from self.executor.map_rows(fn, weights, rows, self.batch)

  def render(self, stored: np.ndarray) -> np.ndarray:
    """Returns the uint8 images [N,H,W,C] that stored rows [N,...] stand for."""
    if stored.dtype == np.uint8:  # stored rows are images already
      return stored
    fn = functools.partial(_render, model=self.model)
    rows = {'stored': stored}
    batch = min(self.batch, _RENDERED)
    parts = self.executor.map_rows(fn, self.frozen, rows, batch)
    return np.concatenate(list(parts))

  def images(
    self,
    params: likelihood.Params,
    key: jax.Array,
    count: int,
    name: str = 'samples',
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns class-balanced images uint8 [count,H,W,C], and labels [count]."""
    ids = np.arange(count)
    labels = balanced_labels(ids, self.model.num_classes)
    parts = []
    with progress.follow(name, count) as bar:
      for part in self.stream(params, key, ids, labels):
        parts.append(part)
        bar.update(len(part))
    return self.render(np.concatenate(parts)), labels

  def fill(
    self, pool: negatives.FakePool, params: likelihood.Params, key: jax.Array
  ) -> None:
    """Draws the missing shards of a pool; safe to cut off anywhere."""
    missing = pool.missing()
    done = pool.size - sum(len(pool.ids(shard)) for shard in missing)
    with progress.follow('fake pool', pool.size, done=done) as bar:
      for shard in missing:
        ids = pool.ids(shard)
        labels = balanced_labels(ids, self.model.num_classes)
        parts = self.stream(params, key, ids, labels)
        pool.write(shard, np.concatenate(list(parts)), labels)
        bar.update(len(ids))
