"""VAR: next-scale prediction (Tian et al. 2024), as a Flax module.

A class-conditional transformer over the tokens of all scales. Tokens of one
scale are predicted together, from all coarser scales: log p(x) is the sum of
log p(token | coarser scales). Submodules bear the released names; the
parameters of all blocks are stacked, [depth, ...], and scanned over.
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
from ddo_jax.data import codec as codec_lib
from ddo_jax.method import autoregressive
from ddo_jax.method import likelihood
from ddo_jax.models import var_layers
from ddo_jax.models import vqvae
from ddo_jax.models import vqvae_learner
from ddo_jax.samplers import scalewise

_FREE = (  # parts of names without weight decay, beside biases
  'pos_start',
  'pos_1LC',
  'lvl_embed',
  'ada_gss',
  'scale_mul_1H11',
)


def scale_of_token(patch_nums: Sequence[int]) -> np.ndarray:
  """[L] the scale of each token."""
  return np.repeat(np.arange(len(patch_nums)), np.square(patch_nums))


def mask(patch_nums: Sequence[int]) -> np.ndarray:
  """[L,L] bool: token i sees token j of its own or of a coarser scale."""
  scale = scale_of_token(patch_nums)
  return scale[:, None] >= scale[None, :]


def decay_mask(params: Any) -> Any:
  """Which leaves VAR decays: all but biases, positions, scales of attention.

  By name, since stacking gives every leaf of a block one axis more.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: (
      not path[-1].key.endswith('bias')
      and not {entry.key for entry in path} & set(_FREE)
    ),
    params,
  )


def cast(params: Any) -> Any:
  """Which leaves the blocks convert to `Var.dtype`: those of the products."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: (
      bool({entry.key for entry in path} & {'attn', 'ffn'})
      and path[-1].key != 'scale_mul_1H11'
    ),
    params,
  )


class Var(nn.Module):
  """The transformer. Embeddings, norms and logits are in the params' type.

  Attributes:
    patch_nums: side n of each scale.
    vocab: V, number of tokens.
    num_classes: the label of this number means "no label".
    width: C.
    depth: number of blocks.
    heads: of the attention.
    mlp_ratio: hidden width of the feed-forward layers, in C.
    l2_norm: see `var_layers.Attention`.
    shared_modulation: see `var_layers.Block`.
    gate_init: see `var_layers.Block`.
    dtype: of the blocks' matrix products; None for the params'.
    remat: recompute each block's activations in the backward pass.
    chunk: tokens whose logits are held at once by `token_log_prob`.
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
  remat: bool = False
  chunk: int = 68

  def setup(self):
    init = var_layers.normal(self.width)
    embed = lambda size: nn.Embed(size, self.width, embedding_init=init)
    length = sum(n * n for n in self.patch_nums)
    self.class_emb = embed(self.num_classes + 1)
    self.lvl_embed = embed(len(self.patch_nums))
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
    """The blocks, one after the other."""
    block = var_layers.Block
    if self.remat:
      block = nn.remat(block, prevent_cse=False)
    return nn.scan(
      block,
      variable_axes={'params': 0, 'intermediates': 0},
      split_rngs={'params': True},
      in_axes=(nn.broadcast, nn.broadcast, 0),
      length=self.depth,
    )(
      self.heads,
      round(self.mlp_ratio * self.width),
      self.depth,
      self.l2_norm,
      self.shared_modulation,
      self.gate_init,
      self.dtype,
    )

  def embed(
    self, cond: jax.Array, inputs: jax.Array, begin: int = 0
  ) -> jax.Array:
    """What the first block reads.

    Args:
      cond: [B,C] embedding of the class.
      inputs: [B,K,c] interpolated f̂, for K tokens.
      begin: number of the first token; the very first has no input of its
        own but the class.

    Returns:
      [B,K,C]; [B,K+1,C] where `begin` is 0.
    """
    x = self.word_embed(inputs)
    if not begin:
      x = jnp.concatenate([cond[:, None, :] + self.pos_start, x], axis=1)
    span = slice(begin, begin + x.shape[1])
    scale = self.lvl_embed(scale_of_token(self.patch_nums)[span])
    return x + scale[None] + self.pos_1LC[:, span]

  def _trunk(self, label, inputs, begin, mask, past):
    """The normalised input of the head, and keys and values."""
    cond = self.class_emb(label)
    modulation = cond
    if self.shared_modulation:
      modulation = self.shared_ada_lin(nn.silu(cond))
      modulation = modulation.reshape(-1, 6, self.width)
    x = self.embed(cond, inputs, begin)
    x, new = self.blocks(x, modulation, mask, past)
    return self.head_nm(x, cond), new

  def _forced(self, label: jax.Array, inputs: jax.Array) -> jax.Array:
    """[B,L,C] before the head, under teacher forcing."""
    length = sum(n * n for n in self.patch_nums)
    chex.assert_shape(inputs, (*label.shape, length - 1, None))
    return self._trunk(label, inputs, 0, mask(self.patch_nums), None)[0]

  def __call__(self, label: jax.Array, inputs: jax.Array) -> jax.Array:
    """Logits of all tokens at once, under teacher forcing.

    Args:
      label: [B] int; num_classes means "no label".
      inputs: [B,L−1,c] of `vqvae.Vqvae.teacher_input`.

    Returns:
      [B,L,V].
    """
    return self.head(self._forced(label, inputs))

  def token_log_prob(
    self, label: jax.Array, inputs: jax.Array, ids: jax.Array
  ) -> jax.Array:
    """Each log p(token | coarser scales, label), [B,L] nats.

    A scan over runs of `chunk` tokens, logits recomputed in the backward
    pass: never are there more of them than [B,chunk,V].

    Args:
      label: [B] int; num_classes means "no label".
      inputs: [B,L−1,c], of the same tokens.
      ids: [B,L] int tokens.
    """
    h = self._forced(label, inputs)
    rows, length = ids.shape
    count = -(-length // self.chunk)

    def runs(x):
      spare = [(0, 0), (0, count * self.chunk - length)]
      x = jnp.pad(x, spare + [(0, 0)] * (x.ndim - 2))
      x = x.reshape(rows, count, self.chunk, *x.shape[2:])
      return jnp.moveaxis(x, 1, 0)

    def run(module, carry, part):
      logits = module.head(part[0])
      chosen = jnp.take_along_axis(logits, part[1][:, :, None], axis=-1)
      return carry, chosen[:, :, 0] - jax.nn.logsumexp(logits, axis=-1)

    scan = nn.scan(
      nn.remat(run, prevent_cse=False),
      variable_broadcast='params',
      split_rngs={'params': False},
    )
    _, parts = scan(self, None, (runs(h), runs(ids)))
    return jnp.moveaxis(parts, 0, 1).reshape(rows, -1)[:, :length]

  def log_prob(
    self, label: jax.Array, inputs: jax.Array, ids: jax.Array
  ) -> jax.Array:
    """Row sums of `token_log_prob`: log p(image | label), [B] nats."""
    return jnp.sum(self.token_log_prob(label, inputs, ids), axis=1)

  def cross_entropy(
    self, label: jax.Array, inputs: jax.Array, ids: jax.Array
  ) -> jax.Array:
    """[B] nats a token: VAR's pretraining loss."""
    return -jnp.mean(self.token_log_prob(label, inputs, ids), axis=1)

  def predict(
    self,
    scale: int,
    label: jax.Array,
    inputs: jax.Array,
    past: var_layers.Past | None,
  ) -> tuple[jax.Array, var_layers.Past]:
    """Logits of one scale, given keys and values of the coarser ones.

    Args:
      scale: static number of the scale.
      label: [B] int; num_classes means "no label".
      inputs: [B,n²,c] interpolated f̂; [B,0,c] at scale 0.
      past: as returned at the scale before; None at scale 0.

    Returns:
      [B,n²,V], and keys and values of all scales so far.
    """
    begin = sum(n * n for n in self.patch_nums[:scale])
    h, new = self._trunk(label, inputs, begin, None, past)
    if past is not None:
      new = jax.tree.map(lambda *p: jnp.concatenate(p, axis=2), past, new)
    return self.head(h), new


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
  ) -> scalewise.Stages:
    """Returns the scales, as a sampler drives them."""
    return scalewise.bind(
      self.transformer, self.tokenizer, params, self.codec.weights(frozen)
    )


@dataclasses.dataclass
class VarConfig(likelihood.ModelConfig):
  """A VAR and its tokenizer; `var_presets` has the released ones.

  Attributes:
    tokenizer: see `vqvae.VqvaeConfig`; its scales and tokens are VAR's.
    num_classes: number of classes; VAR always has some.
    depth: number of blocks.
    width: C; 64 times the depth as published.
    heads: of the attention; as many as blocks as published.
    mlp_ratio: hidden width of the feed-forward layers, in C.
    l2_norm: attend by cosines; without, by products.
    shared_modulation: one adaptive norm for all blocks.
    gate_init: factor of the fresh gates.
    dtype: 'float32' or 'bfloat16', of the blocks' matrix products.
    chunk: tokens whose logits are held at once in training.
  """

  tokenizer: vqvae.VqvaeConfig = dataclasses.field(
    default_factory=vqvae.VqvaeConfig
  )
  num_classes: int = 1000
  depth: int = 16
  width: int = 1024
  heads: int = 16
  mlp_ratio: float = 4.0
  l2_norm: bool = True
  shared_modulation: bool = False
  gate_init: float = 1e-3
  dtype: str = 'float32'
  chunk: int = 68

  def build(
    self, noise: Any = None, remat: bool = False
  ) -> autoregressive.Autoregressive:
    """Returns the transformer and its tokenizer; there is no noise."""
    del noise
    network = transformer(self, remat)
    tokenizer = vqvae.build(self.tokenizer)
    pixels = codec_lib.Pixels(
      self.tokenizer.pixel_values, self.tokenizer.nearest
    )
    codec = codec_lib.Tokens(
      tokenizer, tuple(self.tokenizer.image_shape), pixels
    )
    return autoregressive.Autoregressive(
      network=NextScale(network, tokenizer, codec, self.tokenizer.channels),
      codec=codec,
      num_classes=self.num_classes,
      rules=VarRules(network.dtype),
    )

  def build_tokenizer(self) -> vqvae_learner.Learner:
    """Returns what trains the tokenizer."""
    return vqvae_learner.build(self.tokenizer)


def transformer(config: VarConfig, remat: bool = False) -> Var:
  """The transformer of a config.

  Raises:
    errors.UserError: a number is not positive, the heads do not divide the
      width, or the type is another.
  """
  for name in ('num_classes', 'depth', 'width', 'heads', 'mlp_ratio', 'chunk'):
    value = getattr(config, name)
    errors.require(value > 0, f'model.{name}', value, 'positive')
  if config.width % config.heads:
    raise errors.UserError(
      f'config.model has {config.heads} heads at width {config.width}; they'
      ' must divide it'
    )
  dtypes = {'float32': None, 'bfloat16': jnp.bfloat16}
  if config.dtype not in dtypes:
    raise errors.UserError(
      f'config.model.dtype is {config.dtype!r}; it must be one of'
      f' {sorted(dtypes)}'
    )
  names = {field.name for field in dataclasses.fields(config)}
  options = {name: getattr(config, name) for name in names - {'tokenizer'}}
  return Var(
    patch_nums=tuple(config.tokenizer.patch_nums),
    vocab=config.tokenizer.vocab,
    remat=remat,
    **options | {'dtype': dtypes[config.dtype]},
  )
