"""LlamaGen: one token after the other, row by row (Sun et al. 2024).

The transformer is a class-conditional GPT. Position 0 reads the class, and
position i the token before it; the output there predicts token i. The only
positions are rotations of queries and keys by row and column. Submodules have
the released names; the params of all blocks are stacked and scanned over.

The tokens are those of `llamagen_vq.VqTokenizer`, or the pixels themselves.
Dropout, by which LlamaGen was trained, is left out: a log-ratio is exact.
"""

import dataclasses
from typing import Any

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp

from ddo_jax import errors
from ddo_jax import settings
from ddo_jax.data import codec as codec_lib
from ddo_jax.method import autoregressive
from ddo_jax.method import likelihood
from ddo_jax.models import layers
from ddo_jax.models import llamagen_layers
from ddo_jax.models import llamagen_vq
from ddo_jax.models import var_layers
from ddo_jax.models import vqvae_learner
from ddo_jax.samplers import contract

_EMBED_INIT = nn.initializers.normal(0.02)
_PRODUCTS = ('attention', 'feed_forward')  # the parts of a block with matrices


class Gpt(nn.Module):
  """The transformer.

  Embeddings, norms and logits have the type of the params.

  Attributes:
    grid: the number of rows and of columns of tokens.
    vocab: V, the number of different tokens.
    num_classes: the number of classes; the label of this number means "no
      label".
    width: C, the width of the transformer.
    depth: the number of blocks.
    heads: the number of attention heads.
    shared_heads: see `llamagen_layers.Attention`.
    hidden: see `llamagen_layers.FeedForward`.
    dtype: the type of the blocks' matrix products; None for the params' type.
    remat: which activations of each block are recomputed in the backward pass,
      see `layers.remat_policy`; False for none.
    chunk: the number of tokens whose logits `token_log_prob` holds at once.
  """

  grid: tuple[int, int]
  vocab: int
  num_classes: int
  width: int
  depth: int
  heads: int
  shared_heads: int
  hidden: int
  dtype: Any = None
  remat: bool | str = False
  chunk: int = 64

  @property
  def length(self) -> int:
    """L, the number of tokens in an image."""
    return self.grid[0] * self.grid[1]

  def setup(self):
    self.cls_embedding = nn.Embed(
      self.num_classes + 1, self.width, embedding_init=_EMBED_INIT
    )
    self.tok_embeddings = nn.Embed(
      self.vocab, self.width, embedding_init=_EMBED_INIT
    )
    self.blocks = self._stack()
    self.norm = llamagen_layers.RmsNorm()
    self.head = nn.Dense(
      self.vocab, use_bias=False, kernel_init=nn.initializers.zeros
    )

  def _stack(self) -> nn.Module:
    """Returns a module that applies all blocks, one after the other."""
    scanned = layers.stacked(
      llamagen_layers.Block,
      depth=self.depth,
      in_axes=(nn.broadcast, nn.broadcast, 0),
      remat=self.remat,
    )
    return scanned(self.heads, self.shared_heads, self.hidden, self.dtype)

  def _trunk(self, x, begin, past):
    """Applies all but the embeddings and the head; see `predict`."""
    rotations = llamagen_layers.rotations(self.grid, self.width // self.heads)
    rotation = jax.lax.dynamic_slice_in_dim(
      jnp.asarray(rotations, x.dtype), begin, x.shape[1]
    )
    x, past = self.blocks(x, begin, rotation, past)
    return self.norm(x), past

  def _forced(self, label: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns the input of the head for all tokens at once, [B,L,C]."""
    chex.assert_shape(ids, (*label.shape, self.length))
    first = self.cls_embedding(label)[:, None]
    x = jnp.concatenate([first, self.tok_embeddings(ids[:, :-1])], axis=1)
    return self._trunk(x, 0, None)[0]

  def __call__(self, label: jax.Array, ids: jax.Array) -> jax.Array:
    """Predicts each token from those before it, under teacher forcing.

    Args:
      label: the classes, [B] int; num_classes means "no label".
      ids: the tokens, [B,L] int.

    Returns:
      The logits, [B,L,V].
    """
    return self.head(self._forced(label, ids))

  def token_log_prob(self, label: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns log p(token | the tokens before it, label), [B,L] in nats.

    No more than [B,chunk,V] logits are held at once.

    Args:
      label: the classes, [B] int; num_classes means "no label".
      ids: the tokens, [B,L] int.
    """
    h = self._forced(label, ids)
    return var_layers.token_log_prob(self, h, ids, self.chunk)

  def codebook(self) -> jax.Array:
    """Returns what the transformer reads of each token, [V,C]."""
    return self.tok_embeddings.embedding

  def blank(self, rows: int) -> llamagen_layers.Past:
    """Returns the past before the first token, of `rows` rows."""
    shape = (
      self.depth,
      rows,
      self.length,
      self.shared_heads,
      self.width // self.heads,
    )
    zeros = jnp.zeros(shape, self.dtype or self.codebook().dtype)
    return zeros, zeros

  def predict(
    self,
    position: int | jax.Array,
    label: jax.Array,
    vectors: jax.Array,
    past: llamagen_layers.Past,
  ) -> tuple[jax.Array, llamagen_layers.Past]:
    """Predicts one token from those before it.

    Args:
      position: the number of the token.
      label: the classes, [B] int; num_classes means "no label".
      vectors: the codebook's vector of the token before it, [B,1,C]; of no
        account at position 0.
      past: the keys and the values so far.

    Returns:
      The logits [B,1,V], and the keys and the values with those of this token.
    """
    first = self.cls_embedding(label)[:, None]
    x = jnp.where(position == 0, first, vectors)
    h, past = self._trunk(x, position, past)
    return self.head(h), past


@dataclasses.dataclass(frozen=True)
class GptRules(likelihood.WeightRules):
  """Matrices decay, and are converted to the type of the blocks' products.

  Attributes:
    dtype: the type of the blocks' matrix products; None for the params'.
  """

  dtype: Any = None

  def reduce(self, params: likelihood.Params) -> likelihood.Params:
    """Casts the matrices that every use casts anyway."""
    if self.dtype is None:
      return params
    blocks = dict(params['blocks'])
    for name in _PRODUCTS:
      blocks[name] = jax.tree.map(
        lambda leaf: leaf.astype(self.dtype), blocks[name]
      )
    return {**params, 'blocks': blocks}

  def decay_mask(self, params: likelihood.Params) -> Any:
    """Returns a tree of bool like params: all but the norms' weights."""
    return jax.tree_util.tree_map_with_path(
      lambda path, _: path[-1].key != 'scale', params
    )


@dataclasses.dataclass(frozen=True)
class NextToken:
  """The transformer as an `autoregressive.TokenNetwork`.

  Attributes:
    transformer: predicts the tokens.
  """

  transformer: Gpt

  @property
  def length(self) -> int:
    """The number of tokens in an image."""
    return self.transformer.length

  def init(self, key: jax.Array) -> likelihood.Params:
    """Returns fresh parameters of the transformer."""
    label = jnp.zeros([1], jnp.int32)
    ids = jnp.zeros([1, self.length], jnp.int32)
    return self.transformer.init(key, label, ids)['params']

  def token_log_prob(
    self,
    params: likelihood.Params,
    frozen: likelihood.Frozen,
    label: jax.Array,
    tokens: jax.Array,
  ) -> jax.Array:
    """Returns log p(token | the tokens before it, label), [B,L] in nats."""
    del frozen
    return self.transformer.apply(
      {'params': params}, label, tokens, method='token_log_prob'
    )

  def stages(
    self, params: likelihood.Params, frozen: likelihood.Frozen
  ) -> contract.Stages:
    """Returns the tokens as stages, one a token."""
    del frozen
    variables = {'params': params}
    codebook = self.transformer.apply(variables, method='codebook')

    def begin(rows):
      inputs = jnp.zeros((rows, 1, codebook.shape[1]), codebook.dtype)
      past = self.transformer.apply(variables, rows, method='blank')
      return inputs, past, None

    def predict(stage, label, inputs, past):
      return self.transformer.apply(
        variables, stage, label, inputs, past, method='predict'
      )

    def advance(stage, vectors, canvas):
      del stage
      return canvas, vectors

    return contract.Stages(
      sizes=(1,) * self.length,
      none=self.transformer.num_classes,
      codebook=codebook,
      begin=begin,
      predict=predict,
      advance=advance,
      scanned=True,
    )


@dataclasses.dataclass(kw_only=True)
class GptConfig(likelihood.ModelConfig):
  """What the models of this file have in common.

  Attributes:
    num_classes: the number of classes; there are always some.
    depth: the number of blocks.
    width: C, the width of the transformer.
    heads: the number of attention heads; a head's channels are a multiple of 4.
    shared_heads: the number of heads of keys and values; 0 for as many as
      there are. No released model has fewer.
    hidden: the width of the feed-forward layers; 0 for 8/3 of the width,
      rounded up to a multiple of 256.
    dtype: the type of the blocks' matrix products, 'float32' or 'bfloat16'.
    chunk: the number of tokens whose logits are held at once in training.
  """

  num_classes: int = 1000
  depth: int = settings.at_most(1024, 12)
  width: int = 768
  heads: int = 12
  shared_heads: int = 0
  hidden: int = 0
  dtype: str = 'float32'
  chunk: int = 64

  def transformer(
    self, grid: tuple[int, int], vocab: int, remat: bool | str
  ) -> Gpt:
    """Returns the transformer.

    Args:
      grid: the number of rows and of columns of tokens.
      vocab: the number of different tokens.
      remat: see `Gpt`.

    Raises:
      errors.UserError: a number is not positive, the heads do not fit the
        width, or there is no type of that name.
    """
    for name in ('num_classes', 'depth', 'width', 'heads', 'chunk'):
      value = getattr(self, name)
      errors.require(value > 0, f'model.{name}', value, 'positive')
    for name in ('shared_heads', 'hidden'):
      value = getattr(self, name)
      errors.require(value >= 0, f'model.{name}', value, 'positive, or 0')
    if self.width % (4 * self.heads):
      raise errors.UserError(
        f'config.model has {self.heads} heads at width {self.width}; a head'
        ' must have a multiple of 4 channels'
      )
    shared_heads = self.shared_heads or self.heads
    if self.heads % shared_heads:
      raise errors.UserError(
        f'config.model has {self.heads} heads and {shared_heads} of keys and'
        ' values; the second number must divide the first'
      )
    dtype = var_layers.product_type(self.dtype)
    return Gpt(
      grid=grid,
      vocab=vocab,
      num_classes=self.num_classes,
      width=self.width,
      depth=self.depth,
      heads=self.heads,
      shared_heads=shared_heads,
      hidden=self.hidden or -(-(8 * self.width // 3) // 256) * 256,
      dtype=dtype,
      remat=remat,
      chunk=self.chunk,
    )


@dataclasses.dataclass(kw_only=True)
class LlamagenConfig(GptConfig):
  """LlamaGen's transformer and its tokenizer; see `llamagen_presets`.

  Attributes:
    tokenizer: the tokenizer.
  """

  tokenizer: llamagen_vq.VqConfig = dataclasses.field(
    default_factory=llamagen_vq.VqConfig
  )

  def build(
    self, noise: Any = None, remat: bool | str = False
  ) -> autoregressive.Autoregressive:
    """Returns the transformer and its tokenizer; there is no noise."""
    del noise
    network = self.transformer(self.tokenizer.grid, self.tokenizer.vocab, remat)
    pixels = codec_lib.Pixels(
      self.tokenizer.pixel_values, self.tokenizer.nearest
    )
    codec = codec_lib.Tokens(
      self.tokenizer.module(), self.tokenizer.image_shape, pixels
    )
    return autoregressive.Autoregressive(
      network=NextToken(network),
      codec=codec,
      num_classes=self.num_classes,
      rules=GptRules(network.dtype),
    )

  def build_tokenizer(self) -> vqvae_learner.Learner:
    """Returns what trains the tokenizer."""
    return vqvae_learner.build(self.tokenizer)


@dataclasses.dataclass(kw_only=True)
class PixelGptConfig(GptConfig):
  """The same transformer over the pixels themselves, for small grey images.

  Attributes:
    image_shape: the shape (H, W, 1) of an image.
    pixel_values: the number of values of a pixel, which are the tokens.
  """

  image_shape: tuple[int, int, int] = settings.at_most(64, (8, 8, 1))
  pixel_values: int = 17

  def build(
    self, noise: Any = None, remat: bool | str = False
  ) -> autoregressive.Autoregressive:
    """Returns the transformer; there is no noise.

    Raises:
      errors.UserError: an image has more than one channel.
    """
    del noise
    shape = tuple(self.image_shape)
    if len(shape) != 3 or shape[2] != 1:
      raise errors.UserError(
        f'config.model.image_shape is {shape}; wanted (H, W, 1), since a pixel'
        ' is a token'
      )
    network = self.transformer(shape[:2], self.pixel_values, remat)
    return autoregressive.Autoregressive(
      network=NextToken(network),
      codec=codec_lib.PixelTokens(shape, self.pixel_values),
      num_classes=self.num_classes,
      rules=GptRules(network.dtype),
    )
