"""A VAR small enough to compile in seconds, its weights and its rows."""

import dataclasses
import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import rng
from ddo_jax.models import var
from ddo_jax.models import vqvae

BATCH = 16
CLASSES = 3
SHAPE = (2, 2, 1)
TOKENIZER = vqvae.VqvaeConfig(
  SHAPE, (1, 2), vocab=6, channels=3, base=32, mult=(1,), pixel_values=17
)
CONFIG = var.VarConfig(
  TOKENIZER, num_classes=CLASSES, depth=1, width=8, heads=2, chunk=3
)


class Tokenizer(vqvae.Vqvae):
  """With one convolution each way: its many layers would compile for long."""

  def setup(self):
    self.quantize = vqvae.Quantizer(self.patch_nums, self.vocab, self.channels)
    self.quant_conv = nn.Conv(self.channels, (3, 3))
    self.post_quant_conv = nn.Conv(self.channels, (3, 3))
    self.encoder = nn.Conv(self.channels, (3, 3))
    self.decoder = nn.Conv(self.image_channels, (3, 3))


def with_tokenizer(model, tokenizer):
  """The model, reading the tokens of another tokenizer."""
  codec = dataclasses.replace(model.codec, tokenizer=tokenizer)
  network = dataclasses.replace(
    model.network,
    tokenizer=tokenizer,
    codec=codec,
    channels=tokenizer.channels,
  )
  return dataclasses.replace(model, network=network, codec=codec)


def with_dtype(dtype):
  """The model, its blocks' products in another type."""
  config = dataclasses.replace(CONFIG, dtype=dtype)
  return with_tokenizer(config.build(), TINY_TOKENIZER)


TINY_TOKENIZER = Tokenizer((1, 2), 6, 3, 32, (1,), 1)
BUILT = CONFIG.build()
MODEL = with_tokenizer(BUILT, TINY_TOKENIZER)


def filled(shapes, seed):
  """Weights without a zero, of unit fan-in gain."""
  draw = np.random.default_rng(seed).standard_normal

  def fill(leaf):
    fan = math.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 9
    return (draw(leaf.shape) / np.sqrt(fan)).astype(np.float32)

  return jax.tree.map(fill, shapes)


@functools.cache
def weights():
  """Params of the transformer, and the frozen ones."""
  params = filled(jax.eval_shape(MODEL.init, rng.stream(0)), 0)
  image = jnp.zeros((1, *SHAPE))
  shapes = jax.eval_shape(TINY_TOKENIZER.init, rng.stream(0), image)['params']
  return params, {'tokenizer': filled(shapes, 1)}


def make_rows(seed):
  numbers = np.random.default_rng(seed)
  image = numbers.integers(0, 17, (BATCH, *SHAPE), np.uint8)
  label = numbers.integers(0, CLASSES, BATCH).astype(np.int32)
  return {'stored': image, 'label': label}
