"""Draws rows from params: for fake pools, sample grids and evaluations."""

from collections.abc import Iterable
from collections.abc import Iterator
import functools
from typing import Any

import jax
import numpy as np

from ddo_jax import rng
from ddo_jax.data import labels as labels_lib
from ddo_jax.method import likelihood
from ddo_jax.method import negatives
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import processes
from ddo_jax.runtime import progress

RENDERED = 8  # rows a call: an activation of 512×512 pixels takes 134 MB a row


def call_size(count: int, batch: int, num_devices: int) -> int:
  """Returns the number of images in a call that draws some of `count`.

  A set that fills a call has calls of `batch`. A smaller one has the smallest
  power of two on each device that holds it, so that four images do not cost a
  call of 1,000, and the shapes to compile are few. How many of the set are
  still missing is of no account: an image is rounded as it was.

  Args:
    count: the size of the whole set.
    batch: the largest number of images in a call.
    num_devices: the number of devices.
  """
  rows = -(-min(count, batch) // num_devices)
  return min(batch, num_devices * 2 ** (rows - 1).bit_length())


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
    batch: the largest number of images in a call; see `call_size`.
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
    set_size: int = 0,
  ) -> Iterator[np.ndarray]:
    """Yields rows [b,...] as the data stores them, in the order of the ids.

    Args:
      params: the weights, on the devices.
      key: the stream's key; an image's own key folds in its id.
      ids: [N] integers.
      labels: [N] int32; num_classes means "no label".
      set_size: the number of images in the set that these belong to, which
        settles the size of a call; 0 where these are all.
    """
    block = (ids, labels)
    yield from self._blocks(params, key, [block], set_size or len(ids))

  def _blocks(
    self,
    params: likelihood.Params,
    key: jax.Array,
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
    set_size: int,
  ) -> Iterator[np.ndarray]:
    """Yields the rows of blocks (ids, labels), see `stream`.

    The devices do not wait where a block ends.
    """
    batch = call_size(set_size, self.batch, self.executor.num_devices)
    weights = (params, self.frozen, self.executor.replicate(key))
    fn = functools.partial(_sample, model=self.model, sampler=self.sampler)
    rows = (
      {'id': ids.astype(np.uint32), 'label': labels.astype(np.int32)}
      for ids, labels in blocks
    )
    return self.executor.map_rows(fn, weights, rows, batch)

  def render(self, stored: np.ndarray) -> np.ndarray:
    """Returns the uint8 images [N,H,W,C] that stored rows [N,...] stand for."""
    if stored.dtype == np.uint8:  # stored rows are images already
      return stored
    fn = functools.partial(_render, model=self.model)
    rows = {'stored': stored}
    batch = min(self.batch, RENDERED)
    parts = self.executor.map_rows(fn, self.frozen, [rows], batch)
    return np.concatenate(list(parts))

  def images(
    self,
    params: likelihood.Params,
    key: jax.Array,
    ids: np.ndarray,
    labels: np.ndarray,
    name: str = 'samples',
    set_size: int = 0,
  ) -> np.ndarray:
    """Returns images uint8 [N,H,W,C]; see `stream` for the arguments.

    Args:
      params: the weights, on the devices.
      key: the stream's key.
      ids: [N].
      labels: [N].
      name: what the line of progress says.
      set_size: as `stream` takes it.
    """
    parts = []
    with progress.follow(name, len(ids)) as bar:
      for part in self.stream(params, key, ids, labels, set_size):
        parts.append(part)
        bar.update(len(part))
    return self.render(np.concatenate(parts))

  def fill(
    self,
    pool: negatives.FakePool,
    params: likelihood.Params,
    key: jax.Array,
    shares: labels_lib.Shares,
  ) -> None:
    """Draws the missing shards of a pool; safe to cut off anywhere.

    Args:
      pool: the pool.
      params: the weights, on the devices.
      key: the stream's key.
      shares: how often each class is drawn.
    """
    missing = processes.decide(f'missing in {pool.folder}', pool.missing)
    done = pool.size - sum(len(pool.ids(shard)) for shard in missing)

    blocks = []
    for shard in missing:
      ids = pool.ids(shard)
      blocks.append((ids, shares.labels(ids)))
    parts = self._blocks(params, key, blocks, pool.size)
    with progress.follow('fake pool', pool.size, done=done) as bar:
      for shard, (ids, labels) in zip(missing, blocks, strict=True):
        drawn = [next(parts)]
        while sum(map(len, drawn)) < len(ids):
          drawn.append(next(parts))
        pool.write(shard, np.concatenate(drawn), labels)
        bar.update(len(ids))
