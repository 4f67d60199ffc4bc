"""VAR: next-scale prediction (Tian et al. 2024), as a Flax module.

VAR is a class-conditional transformer over the tokens of all scales. The tokens
of one scale are predicted together, from all coarser scales, so that log p(x)
is the sum of log p(token | coarser scales). Submodules have the released names.
The params of all blocks are stacked, [depth, ...], and scanned over.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import errors
from ddo_jax import settings
from ddo_jax.data import codec as codec_lib
from ddo_jax.method import autoregressive
from ddo_jax.method import likelihood
from ddo_jax.models import layers
from ddo_jax.models import var_layers
from ddo_jax.models import vqvae
from ddo_jax.models import vqvae_learner
from ddo_jax.samplers import contract

# Params whose path has one of these names do not decay; nor do biases.
_UNDECAYED = (
  'pos_start',
  'pos_1LC',
  'lvl_embed',
  'ada_gss',
  'scale_mul_1H11',
)


def scale_of_token(patch_nums: Sequence[int]) -> np.ndarray:
  """Returns the number of the scale of each token, [L]."""
  return np.repeat(np.arange(len(patch_nums)), np.square(patch_nums))


def mask(patch_nums: Sequence[int]) -> np.ndarray:
  """Returns which token i sees which token j, [L,L] bool.

  A token sees those of its own scale and of coarser ones.
  """
  scale = scale_of_token(patch_nums)
  return scale[:, None] >= scale[None, :]


def decay_mask(params: Any) -> Any:
  """Returns which leaves decay, a tree of bool like params.

  Biases, positions and attention scales do not decay. They are told by name,
  because stacking gives every leaf of a block one axis more.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: (
      not path[-1].key.endswith('bias')
      and not {entry.key for entry in path} & set(_UNDECAYED)
    ),
    params,
  )


def cast(params: Any) -> Any:
  """Returns which leaves the blocks convert to `Var.dtype`, a tree of bool.

  These are the weights and biases of the matrix products.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: (
      bool({entry.key for entry in path} & {'attn', 'ffn'})
      and path[-1].key != 'scale_mul_1H11'
    ),
    params,
  )


class Var(nn.Module):
  """The transformer.

  Embeddings, norms and logits have the type of the params.

  Attributes:
    patch_nums: the side n of each scale.
    vocab: V, the number of different tokens.
    num_classes: the number of classes; the label of this number means "no
      label".
    width: C, the width of the transformer.
    depth: the number of blocks.
    heads: the number of attention heads.
    mlp_ratio: the hidden width of the feed-forward layers, in units of C.
    l2_norm: see `var_layers.Attention`.
    shared_modulation: see `shared` of `var_layers.Block`.
    gate_init: see `var_layers.Block`.
    dtype: the type of the blocks' matrix products; None for the params' type.
    remat: which activations of each block are recomputed in the backward pass,
      see `layers.remat_policy`; False for none.
    chunk: the number of tokens whose logits `token_log_prob` holds at once.
  """

  patch_nums: tuple[int, ...]
  vocab: int
  num_classes: int
  width: int
  depth: int
  heads: int
  mlp_ratio: float = 4.0
  l2_norm: bool = True
  shared_modulation: bool = False
  gate_init: float = 1e-3
  dtype: Any = None
  remat: bool | str = False
  chunk: int = 68

  def setup(self):
    init = var_layers.normal(self.width)
    length = sum(n * n for n in self.patch_nums)
    scales = len(self.patch_nums)
    self.class_emb = nn.Embed(
      self.num_classes + 1, self.width, embedding_init=init
    )
    self.lvl_embed = nn.Embed(scales, self.width, embedding_init=init)
    self.pos_start = self.param('pos_start', init, (1, 1, self.width))
    self.pos_1LC = self.param('pos_1LC', init, (1, length, self.width))
    self.word_embed = nn.Dense(self.width, kernel_init=init)
    if self.shared_modulation:
      self.shared_ada_lin = nn.Dense(6 * self.width, kernel_init=init)
    self.blocks = self._stack()
    self.head_nm = var_layers.HeadNorm()
    fresh = var_layers.normal(self.width, 0.02)
    self.head = nn.Dense(self.vocab, kernel_init=fresh)

  def _stack(self) -> nn.Module:
    """Returns a module that applies all blocks, one after the other."""
    scanned = layers.stacked(
      var_layers.Block,
      depth=self.depth,
      in_axes=(nn.broadcast, nn.broadcast, 0),
      remat=self.remat,
    )
    return scanned(
      heads=self.heads,
      hidden=round(self.mlp_ratio * self.width),
      depth=self.depth,
      l2_norm=self.l2_norm,
      shared=self.shared_modulation,
      gate_init=self.gate_init,
      dtype=self.dtype,
    )

  def embed(
    self, cond: jax.Array, inputs: jax.Array, begin: int = 0
  ) -> jax.Array:
    """Returns what the first block reads.

    Args:
      cond: the embedding of the class, [B,C].
      inputs: f̂ averaged down to the scale of each token, for K tokens, [B,K,c].
      begin: the number of the first token. Token 0 has no input, and reads the
        class instead.

    Returns:
      The embedded tokens, [B,K,C]; or [B,K+1,C] if `begin` is 0.
    """
    x = self.word_embed(inputs)
    if not begin:
      x = jnp.concatenate([cond[:, None, :] + self.pos_start, x], axis=1)
    span = slice(begin, begin + x.shape[1])
    scale = self.lvl_embed(scale_of_token(self.patch_nums)[span])
    return x + scale[None] + self.pos_1LC[:, span]

  def _trunk(self, label, inputs, begin, mask, past):
    """Applies all but the head.

    Args:
      label: see `predict`.
      inputs: see `embed`.
      begin: see `embed`.
      mask: see `var_layers.Attention`.
      past: see `predict`.

    Returns:
      The input of the head, [B,K,C], and the keys and values of these tokens.
    """
    cond = self.class_emb(label)
    modulation = cond
    if self.shared_modulation:
      modulation = self.shared_ada_lin(nn.silu(cond))
      modulation = modulation.reshape(-1, 6, self.width)
    x = self.embed(cond, inputs, begin)
    x, new = self.blocks(x, modulation, mask, past)
    return self.head_nm(x, cond), new

  def _forced(self, label: jax.Array, inputs: jax.Array) -> jax.Array:
    """Returns the input of the head for all tokens at once, [B,L,C]."""
    length = sum(n * n for n in self.patch_nums)
    chex.assert_shape(inputs, (*label.shape, length - 1, None))
    return self._trunk(label, inputs, 0, mask(self.patch_nums), None)[0]

  def __call__(self, label: jax.Array, inputs: jax.Array) -> jax.Array:
    """Predicts all tokens at once, under teacher forcing.

    Args:
      label: the classes, [B] int; num_classes means "no label".
      inputs: what `vqvae.Vqvae.teacher_input` returns, [B,L−1,c].

    Returns:
      The logits, [B,L,V].
    """
    return self.head(self._forced(label, inputs))

  def token_log_prob(
    self, label: jax.Array, inputs: jax.Array, ids: jax.Array
  ) -> jax.Array:
    """Returns log p(token | coarser scales, label) of each token, in nats.

    No more than [B,chunk,V] logits are held at once.

    Args:
      label: the classes, [B] int; num_classes means "no label".
      inputs: what `vqvae.Vqvae.teacher_input` returns of the tokens, [B,L−1,c].
      ids: the tokens, [B,L] int.

    Returns:
      The log-probabilities, [B,L].
    """
    h = self._forced(label, inputs)
    return var_layers.token_log_prob(self, h, ids, self.chunk)

  def predict(
    self,
    scale: int,
    label: jax.Array,
    inputs: jax.Array,
    past: var_layers.Past | None,
  ) -> tuple[jax.Array, var_layers.Past]:
    """Predicts the tokens of one scale from those of the coarser scales.

    Args:
      scale: the number of the scale, static.
      label: the classes, [B] int; num_classes means "no label".
      inputs: f̂ averaged down to this scale, [B,n²,c]; [B,0,c] at scale 0.
      past: the keys and values of the coarser scales, as returned at the scale
        before; None at scale 0.

    Returns:
      The logits [B,n²,V], and the keys and values of all scales so far.
    """
    begin = sum(n * n for n in self.patch_nums[:scale])
    h, (keys, values) = self._trunk(label, inputs, begin, None, past)
    if past is not None:
      past_keys, past_values = past
      keys = jnp.concatenate([past_keys, keys], axis=2)
      values = jnp.concatenate([past_values, values], axis=2)
    return self.head(h), (keys, values)


def stages(
  transformer: nn.Module,
  tokenizer: nn.Module,
  params: Any,
  tokenizer_params: Any,
) -> contract.Stages:
  """Binds a transformer and its tokenizer for sampling, one scale a stage.

  The model reads f̂, the image so far, averaged down to the next scale. The past
  is the blocks' keys and values, which grow from scale to scale. The canvas is
  f̂ [B,h,w,C], ready for the tokenizer's decoder.

  Args:
    transformer: a `Var`.
    tokenizer: a `vqvae.Vqvae`, or its `vqvae.Quantizer` alone.
    params: the transformer's params.
    tokenizer_params: the tokenizer's params.
  """
  variables = {'params': params}
  tokenizer_variables = {'params': tokenizer_params}
  codebook = jnp.asarray(tokenizer.apply(tokenizer_variables, method='vectors'))
  channels = codebook.shape[1]
  size = transformer.patch_nums[-1]

  def begin(rows):
    inputs = jnp.zeros((rows, 0, channels), codebook.dtype)
    canvas = jnp.zeros((rows, size, size, channels), codebook.dtype)
    return inputs, None, canvas

  def predict(stage, label, inputs, past):
    return transformer.apply(
      variables, stage, label, inputs, past, method='predict'
    )

  def advance(stage, vectors, canvas):
    return tokenizer.apply(
      tokenizer_variables, stage, vectors, canvas, method='advance'
    )

  return contract.Stages(
    sizes=tuple(n * n for n in transformer.patch_nums),
    none=transformer.num_classes,
    codebook=codebook,
    begin=begin,
    predict=predict,
    advance=advance,
  )


@dataclasses.dataclass(frozen=True)
class VarRules(likelihood.WeightRules):
  """AdamW's mask as published, and the types that the blocks compute in.

  Attributes:
    dtype: the type of the blocks' matrix products; None for the params'.
  """

  dtype: Any = None

  def reduce(self, params: likelihood.Params) -> likelihood.Params:
    """Casts the matrices that every use casts anyway."""
    if self.dtype is None:
      return params

    def convert(leaf, is_cast):
      return leaf.astype(self.dtype) if is_cast else leaf

    return jax.tree.map(convert, params, cast(params))

  def decay_mask(self, params: likelihood.Params) -> Any:
    """See `decay_mask`."""
    return decay_mask(params)


@dataclasses.dataclass(frozen=True)
class NextScale:
  """The transformer bound to its tokenizer, an `autoregressive.TokenNetwork`.

  Attributes:
    transformer: predicts the tokens.
    tokenizer: turns coarser scales into what the transformer reads of them; its
      weights are `frozen['tokenizer']`.
    codec: the codec, which knows where those weights are.
    channels: the width of a token's vector.
  """

  transformer: Var
  tokenizer: vqvae.Vqvae
  codec: codec_lib.Tokens
  channels: int

  @property
  def length(self) -> int:
    """The number of tokens in an image."""
    return sum(n * n for n in self.transformer.patch_nums)

  def init(self, key: jax.Array) -> likelihood.Params:
    """Returns fresh parameters of the transformer."""
    inputs = jnp.zeros((1, self.length - 1, self.channels))
    label = jnp.zeros([1], jnp.int32)
    return self.transformer.init(key, label, inputs)['params']

  def token_log_prob(
    self,
    params: likelihood.Params,
    frozen: likelihood.Frozen,
    label: jax.Array,
    tokens: jax.Array,
  ) -> jax.Array:
    """Returns log p(token | coarser scales, label), [B,L] in nats."""
    inputs = self.tokenizer.apply(
      {'params': self.codec.weights(frozen)}, tokens, method='teacher_input'
    )
    return self.transformer.apply(
      {'params': params}, label, inputs, tokens, method='token_log_prob'
    )

  def stages(
    self, params: likelihood.Params, frozen: likelihood.Frozen
  ) -> contract.Stages:
    """Returns the scales, as a sampler drives them."""
    return stages(
      self.transformer, self.tokenizer, params, self.codec.weights(frozen)
    )


@dataclasses.dataclass
class VarConfig(likelihood.ModelConfig):
  """A VAR and its tokenizer; `var_presets` has the released ones.

  Attributes:
    tokenizer: the tokenizer, whose scales and tokens are VAR's.
    num_classes: the number of classes; VAR always has some.
    depth: the number of blocks.
    width: C, the width of the transformer; the released models have 64 times
      the depth.
    heads: the number of attention heads; the released models have as many as
      blocks.
    mlp_ratio: the hidden width of the feed-forward layers, in units of C.
    l2_norm: whether attention goes by cosines; if not, by products.
    shared_modulation: whether all blocks share one adaptive norm.
    gate_init: the factor on the initial weights of the gates.
    dtype: the type of the blocks' matrix products, 'float32' or 'bfloat16'.
    chunk: the number of tokens whose logits are held at once in training.
  """

  tokenizer: vqvae.VqvaeConfig = dataclasses.field(
    default_factory=vqvae.VqvaeConfig
  )
  num_classes: int = 1000
  depth: int = settings.at_most(1024, 16)
  width: int = 1024
  heads: int = 16
  mlp_ratio: float = 4.0
  l2_norm: bool = True
  shared_modulation: bool = False
  gate_init: float = 1e-3
  dtype: str = 'float32'
  chunk: int = 68

  def build(
    self, noise: Any = None, remat: bool | str = False
  ) -> autoregressive.Autoregressive:
    """Returns the transformer and its tokenizer; there is no noise."""
    del noise
    network = transformer(self, remat)
    tokenizer = vqvae.build(self.tokenizer)
    pixels = codec_lib.Pixels(
      self.tokenizer.pixel_values, self.tokenizer.nearest
    )
    codec = codec_lib.Tokens(tokenizer, self.tokenizer.image_shape, pixels)
    return autoregressive.Autoregressive(
      network=NextScale(network, tokenizer, codec, self.tokenizer.channels),
      codec=codec,
      num_classes=self.num_classes,
      rules=VarRules(network.dtype),
    )

  def build_tokenizer(self) -> vqvae_learner.Learner:
    """Returns what trains the tokenizer."""
    return vqvae_learner.build(self.tokenizer)


def transformer(config: VarConfig, remat: bool | str = False) -> Var:
  """Returns the transformer of a config.

  Args:
    config: the settings.
    remat: see `Var`.

  Raises:
    errors.UserError: a number is not positive, the heads do not divide the
      width, or there is no type of that name.
  """
  for name in ('num_classes', 'depth', 'width', 'heads', 'mlp_ratio', 'chunk'):
    value = getattr(config, name)
    errors.require(value > 0, f'model.{name}', value, 'positive')
  if config.width % config.heads:
    raise errors.UserError(
      f'config.model has {config.heads} heads at width {config.width}; they'
      ' must divide it'
    )
  dtype = var_layers.product_type(config.dtype)
  return Var(
    patch_nums=tuple(config.tokenizer.patch_nums),
    vocab=config.tokenizer.vocab,
    num_classes=config.num_classes,
    width=config.width,
    depth=config.depth,
    heads=config.heads,
    mlp_ratio=config.mlp_ratio,
    l2_norm=config.l2_norm,
    shared_modulation=config.shared_modulation,
    gate_init=config.gate_init,
    dtype=dtype,
    remat=remat,
    chunk=config.chunk,
  )
