"""Images from params: fake pools, sample grids, evaluation sets."""

from collections.abc import Iterator
import functools
import pathlib
from typing import Any

import jax
import numpy as np
from PIL import Image
import tqdm

from ddo_jax import rng
from ddo_jax.data import pool as pool_lib
from ddo_jax.method import likelihood
from ddo_jax.runtime import devices as devices_lib

_RENDERED = 8  # rows a call: an activation of 512×512 pixels takes 134 MB a row


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
    sampler: its settings.
    executor: the devices.
    batch: images a call.
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
    name: str = 'samples',
  ) -> Iterator[np.ndarray]:
    """Yields rows [b,...] as the data stores them, of ids [N], in order.

    Args:
      params: on the devices.
      key: the stream's key; an image's own key folds in its id.
      ids: [N] integers.
      labels: [N] int32; num_classes means "no label".
      name: on the progress bar (off where there is no terminal).
    """
    weights = (params, self.frozen, self.executor.replicate(key))
    fn = functools.partial(_sample, model=self.model, sampler=self.sampler)
    rows = {'id': ids.astype(np.uint32), 'label': labels.astype(np.int32)}
    with tqdm.tqdm(
      total=len(ids), desc=name, unit='img', disable=None, leave=False
    ) as bar:
      for stored in self.executor.map_rows(fn, weights, rows, self.batch):
        bar.update(len(stored))
        yield stored

  def render(self, stored: np.ndarray) -> np.ndarray:
    """The uint8 images [N,H,W,C] of stored rows [N,...]."""
    if stored.dtype == np.uint8:  # they are
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
    """Class-balanced images uint8 [count,H,W,C] and their labels [count]."""
    ids = np.arange(count)
    labels = pool_lib.balanced_labels(ids, self.model.num_classes)
    parts = self.stream(params, key, ids, labels, name)
    return self.render(np.concatenate(list(parts))), labels

  def fill(
    self, pool: pool_lib.FakePool, params: likelihood.Params, key: jax.Array
  ) -> None:
    """Draws the missing shards of a pool; safe to cut off anywhere."""
    for shard in tqdm.tqdm(
      pool.missing(), desc='fake pool', unit='shard', disable=None, leave=False
    ):
      ids = pool.ids(shard)
      labels = pool_lib.balanced_labels(ids, self.model.num_classes)
      parts = self.stream(params, key, ids, labels, f'shard {shard}')
      pool.write(shard, np.concatenate(list(parts)), labels)


def grid(
  images: np.ndarray, columns: int, pixel_values: int = 256
) -> np.ndarray:
  """Lays images [N,H,W,C] out in rows, one pixel apart, at full contrast.

  Returns:
    uint8 [rows·(H+1)+1, columns·(W+1)+1, C], white between the images.
  """
  _, height, width, channels = images.shape
  rows = -(-len(images) // columns)
  size = (rows * (height + 1) + 1, columns * (width + 1) + 1, channels)
  sheet = np.full(size, 255, np.uint8)
  bright = (images.astype(np.uint32) * 255 // (pixel_values - 1)).astype(
    np.uint8
  )
  for i, image in enumerate(bright):
    top = (i // columns) * (height + 1) + 1
    left = (i % columns) * (width + 1) + 1
    sheet[top : top + height, left : left + width] = image
  return sheet


def save_grid(
  path: pathlib.Path, images: np.ndarray, pixel_values: int
) -> None:
  """Writes a PNG of images uint8 [N,H,W,C], ten a row, small ones enlarged."""
  sheet = grid(images, 10, pixel_values)
  zoom = max(1, 32 // images.shape[1])
  sheet = sheet.repeat(zoom, 0).repeat(zoom, 1)
  Image.fromarray(sheet.squeeze()).save(path)
