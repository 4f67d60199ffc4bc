"""A stranger's model of tokens: a tiny GPT over a fixed codebook.

python -m ddo_jax.main --config=tests/strangers/raster_tokens.py \
  --workdir=runs/raster

A token is the rounded mean of a patch of pixels; they are read row by row.
"""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from ddo_jax import config as config_lib
from ddo_jax.method import autoregressive
from ddo_jax.method import likelihood
from ddo_jax.method import negatives
from ddo_jax.samplers import ancestral
from ddo_jax.samplers import contract
from tests.strangers import tiny


class Gpt(nn.Module):
  """One block of causal attention; position 0 reads the class."""

  vocab: int
  num_classes: int
  length: int
  width: int

  def setup(self):
    self.tokens = nn.Embed(self.vocab, self.width)
    self.classes = nn.Embed(self.num_classes + 1, self.width)
    self.positions = nn.Embed(self.length, self.width)
    self.qkv = nn.Dense(3 * self.width)
    self.mlp = nn.Sequential(
      [nn.Dense(2 * self.width), nn.gelu, nn.Dense(self.width)]
    )
    self.head = nn.Dense(self.vocab)

  def codebook(self):
    """[V,C], what the model reads of each token."""
    return self.tokens.embedding

  def step(self, vectors, begin, cache):
    """vectors [B,n,C] at positions begin … -> logits [B,n,V], the new cache.

    The cache holds keys and values [B,L,C] of all positions; those at or
    after a query's own are hidden from it.
    """
    count = vectors.shape[1]
    position = begin + jnp.arange(count)
    x = vectors + self.positions(position)[None]
    q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
    keys = jax.lax.dynamic_update_slice_in_dim(cache[0], k, begin, axis=1)
    values = jax.lax.dynamic_update_slice_in_dim(cache[1], v, begin, axis=1)
    seen = jnp.arange(self.length)[None, :] <= position[:, None]
    logits = jnp.einsum('bqc,bkc->bqk', q, keys) / jnp.sqrt(self.width)
    weights = nn.softmax(jnp.where(seen[None], logits, -jnp.inf))
    x = x + jnp.einsum('bqk,bkc->bqc', weights, values)
    return self.head(x + self.mlp(x)), (keys, values)

  def __call__(self, label, tokens):
    """Logits [B,L,V] of all tokens, each from those before it."""
    shape = (len(label), self.length, self.width)
    cache = (jnp.zeros(shape), jnp.zeros(shape))
    vectors = jnp.concatenate(
      [self.classes(label)[:, None], self.tokens(tokens[:, :-1])], axis=1
    )
    logits, _ = self.step(vectors, 0, cache)
    return logits


# --- From here on, what the house asks for -----------------------------------


@dataclasses.dataclass(frozen=True)
class Patches:
  """Pixels [B,H,W,1] as the rounded means of 2×2 patches, [B,L]."""

  image_shape: tuple[int, int, int]
  pixel_values: int

  def stored_shape(self, example_shape):
    return self.image_shape

  def encode(self, frozen, stored, keys):
    height, width, _ = self.image_shape
    patches = stored.reshape(len(stored), height // 2, 2, width // 2, 2)
    means = jnp.mean(patches.astype(jnp.float32), axis=(2, 4))
    return jnp.round(means).astype(jnp.int32).reshape(len(stored), -1)

  def decode(self, frozen, x):
    height, width, _ = self.image_shape
    image = x.reshape(len(x), height // 2, width // 2, 1)
    return image.repeat(2, axis=1).repeat(2, axis=2).astype(jnp.uint8)

  def round_trip(self, frozen, x, keys):
    return self.encode(frozen, self.decode(frozen, x), keys)

  def render(self, frozen, stored):
    return stored


@dataclasses.dataclass(frozen=True)
class NextToken:
  """The GPT as the house reads it."""

  module: Gpt

  @property
  def length(self):
    return self.module.length

  def init(self, key):
    label = jnp.zeros([1], jnp.int32)
    tokens = jnp.zeros([1, self.length], jnp.int32)
    return self.module.init(key, label, tokens)['params']

  def token_log_prob(self, params, frozen, label, tokens):
    logits = self.module.apply({'params': params}, label, tokens)
    log_probs = nn.log_softmax(logits)
    return jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]

  def stages(self, params, frozen):
    variables = {'params': params}

    def begin(rows):
      shape = (rows, self.length, self.module.width)
      cache = (jnp.zeros(shape), jnp.zeros(shape))
      return jnp.zeros((rows, 1, self.module.width)), cache, None

    def predict(stage, label, inputs, past):
      first = self.module.apply(
        variables, label, method=lambda m, y: m.classes(y)
      )
      vectors = jnp.where(stage == 0, first[:, None], inputs)
      return self.module.apply(variables, vectors, stage, past, method='step')

    def advance(stage, vectors, canvas):
      return canvas, vectors

    return contract.Stages(
      sizes=(1,) * self.length,
      none=self.module.num_classes,
      codebook=self.module.apply(variables, method='codebook'),
      begin=begin,
      predict=predict,
      advance=advance,
      scanned=True,
    )


@dataclasses.dataclass
class GptConfig(likelihood.ModelConfig):
  """A tiny GPT for the digits."""

  width: int = 8

  def build(self, noise=None, remat=False) -> autoregressive.Autoregressive:
    module = Gpt(vocab=17, num_classes=10, length=16, width=self.width)
    return autoregressive.Autoregressive(
      network=NextToken(module), codec=Patches((8, 8, 1), 17), num_classes=10
    )


def get_config() -> config_lib.Config:
  """Returns the recipe."""
  config = tiny.get_config()
  config.name = 'raster'
  config.model = GptConfig()
  config.sampler = ancestral.Ancestral()
  config.ddo.negatives = negatives.Online()
  return config
