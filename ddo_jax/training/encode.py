"""The encode mode: the images of any source as a set of latents.

A row depends on its image and its number alone: `extract.by_blocks` gives every
row its place in a call of `_ROWS` on one device. So the bytes are the same on
any number of devices of a kind and of processes, and in a set that was cut off
and went on; on a GPU, whose compiler may choose its convolutions by timing
them, to rounding.
"""

from collections.abc import Generator
import contextlib
import functools
import hashlib
import logging
import pathlib
from typing import Any

import jax
import numpy as np

from ddo_jax import errors
from ddo_jax import settings
from ddo_jax.data import codec as codec_lib
from ddo_jax.data import latent_set
from ddo_jax.data import loader
from ddo_jax.data import sources
from ddo_jax.data import workers
from ddo_jax.evaluation.networks import extract
from ddo_jax.method import likelihood
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import disk
from ddo_jax.runtime import lock
from ddo_jax.runtime import processes
from ddo_jax.runtime import progress
from ddo_jax.training import workspace

_LOGGER = logging.getLogger(__name__)
# In a call, which divide a shard: an activation of 512×512 pixels takes 134 MB
# a row.
_ROWS = 8
_LOOKED_AT = 16  # images that tell a source from another


def _latents(run: workspace.Run) -> codec_lib.Latents:
  """Returns the codec of a run's model.

  Raises:
    errors.UserError: the model reads no latents, or no weights of the
      autoencoder are named.
  """
  codec = run.model.codec
  if not isinstance(codec, codec_lib.Latents):
    read = 'pixels'
    if isinstance(codec, codec_lib.Tokens):
      read = 'tokens, which its tokenizer makes of the images in every step'
    raise errors.UserError(
      f'config.model is a {type(run.config.model).__name__}, which reads'
      f' {read}; --mode=encode wants a recipe of a model of latents, such as'
      ' imagenet256_dit_xl2 or imagenet512_edm2_l'
    )
  errors.require(
    bool(run.config.vae_from),
    'vae_from',
    '',
    "the autoencoder's weights, such as sd-vae-ft-mse",
  )
  return codec


def _check_images(
  source: sources.Source,
  model: likelihood.LikelihoodModel,
  codec: codec_lib.Latents,
) -> None:
  """Raises UserError unless a source's images become a model's latents."""
  stored, _ = source.read(np.arange(1))
  got = stored.shape[1:]
  wanted = codec.image_shape(model.example_shape)
  if stored.dtype != np.uint8:
    raise errors.UserError(
      f'{source.name} holds latents already: name images with'
      ' --config.data.source'
    )
  faults = []
  if got != wanted:
    remedy = f'--config.data.resize={wanted[0]} --config.data.resize_by=adm'
    if got[-1] != wanted[-1]:
      remedy += f' --config.data.channels={wanted[-1]}'
    faults.append(
      f'images are {list(got)}; the model reads latents'
      f' {list(model.example_shape)}, whose sides are 1/{codec.factor} of those'
      f' of images {list(wanted)}: {remedy}'
    )
  if source.pixel_values != codec.pixel_values:
    faults.append(
      f'pixels are 0 .. {source.pixel_values - 1}; wanted 0 ..'
      f' {codec.pixel_values - 1}: write them as images of 8 bits'
    )
  if faults:
    raise errors.UserError(f'{source.name} does not fit: {"; ".join(faults)}')
  likelihood.check_source(
    model=model,
    name=source.name,
    stored_shape=codec.stored_shape(model.example_shape),
    num_classes=source.num_classes,
    pixel_values=source.pixel_values,
  )


def _fingerprint(source: sources.Source) -> str:
  """Returns a hash of a source's labels and of some of its images."""
  count = len(source)
  some = np.linspace(0, count - 1, min(count, _LOOKED_AT)).astype(np.int64)
  images, _ = source.read(some)
  content = hashlib.sha256(source.labels().tobytes())
  content.update(np.ascontiguousarray(images).tobytes())
  return content.hexdigest()


def _read(
  source: sources.Source, blocks: list[np.ndarray], setting: settings.OrAuto
) -> Generator[np.ndarray, None, None]:
  """Yields the images [b,H,W,C] of blocks of rows, read ahead.

  Rows from the number of images on are the same images, mirrored.
  """
  count = len(source)
  in_memory = isinstance(source, sources.ArraySource)
  num_workers = 0 if in_memory else workers.count(setting)

  def read_block(read: workers.Read, step: int) -> np.ndarray:
    rows = blocks[step]
    images, _ = read(rows % count)
    mirrored = (rows >= count)[:, None, None, None]
    return np.where(mirrored, images[:, :, ::-1], images)

  return loader.read_ahead(source, num_workers, read_block, range(len(blocks)))


@functools.partial(jax.jit, static_argnames='codec')
def _compress(params: Any, images: jax.Array, codec: Any) -> jax.Array:
  return codec.compress({'vae': params}, images)


def write(
  run: workspace.Run, output: pathlib.Path, mirrored: bool = False
) -> pathlib.Path:
  """Writes the training images as latents; a call that was cut off goes on.

  Of several processes each encodes a shard at a time on its own devices, and
  process 0 writes them.

  Args:
    run: its config names the model, which must read latents, the autoencoder
      and the images.
    output: the folder of the set.
    mirrored: whether each image is there a second time, mirrored left to right;
      these rows follow on all others.

  Returns:
    output.

  Raises:
    errors.UserError: something named is missing or does not fit, or the folder
      holds another set.
  """
  config = run.config
  codec = _latents(run)
  source = sources.open_source(config.data, config.data.train_split)
  _check_images(source, run.model, codec)
  repeats = 2 if mirrored else 1
  identity = {
    'rows': repeats * len(source),
    'shape': list(codec.stored_shape(run.model.example_shape)),
    'image_range': list(codec.image_range),
    'mirrored': mirrored,
    'autoencoder': run.vae_sha256,
    'images': _fingerprint(source),
  }
  labels = None
  if source.num_classes:
    labels = np.tile(source.labels(), repeats)
  with contextlib.ExitStack() as held:
    disk.check_path('--output', output)
    processes.decide(
      f'lock {output}', lambda: held.enter_context(lock.held(output))
    )
    made = latent_set.LatentSet(output, labels, identity)
    _fill(made, run, source, codec)
  return output


def _fill(
  made: latent_set.LatentSet,
  run: workspace.Run,
  source: sources.Source,
  codec: codec_lib.Latents,
) -> None:
  """Encodes the missing shards of a set."""
  together = processes.count()
  missing = made.missing()
  # The shards of a turn are encoded side by side, one by each process.
  turns = [
    missing[start : start + together]
    for start in range(0, len(missing), together)
  ]
  own = missing[processes.index() :: together]
  rows = np.concatenate([np.zeros(0, np.int64), *map(made.rows, own)])
  edges = np.flatnonzero(np.diff(rows // _ROWS)) + 1
  blocks = np.split(rows, edges) if len(rows) else []
  images = _read(source, blocks, run.config.data.workers)
  parts = extract.by_blocks(
    functools.partial(_compress, codec=codec),
    run.vae if len(rows) else {},
    lambda _: next(images),
    rows,
    rows=_ROWS,
  )
  shape = codec.stored_shape(run.model.example_shape)
  done = made.size - sum(len(made.rows(shard)) for shard in missing)
  with (
    contextlib.closing(images),
    progress.follow('encode', made.size, done=done) as bar,
  ):
    for number, turn in enumerate(turns):
      latents = np.zeros((latent_set.SHARD, *shape), np.float32)
      left = len(made.rows(own[number])) if number < len(own) else 0
      others = sum(len(made.rows(shard)) for shard in turn) - left
      while left:
        mine, encoded = next(parts)
        latents[mine % latent_set.SHARD] = encoded
        left -= len(mine)
        bar.update(len(mine))
      if together > 1:
        latents = devices_lib.exchange(latents)
      for place, shard in enumerate(turn):
        start = place * latent_set.SHARD
        count = len(made.rows(shard))
        made.write(shard, latents[start : start + count])
      bar.update(others)
