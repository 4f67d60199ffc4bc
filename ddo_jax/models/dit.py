"""DiT, a transformer over the patches of an image (Peebles & Xie 2023).

The network is also SiT's; see `sit`. Submodules have the released names. The
params of all blocks are stacked, [depth, ...], and scanned over, so that
compiling takes as long as for one block.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.models import dit_layers


class Transformer(nn.Module):
  """The network.

  Attributes:
    out_channels: the number of channels of the output.
    num_classes: the number of classes; the label of this number means "no
      label". 0 for an unconditional network.
    patch: the side of a patch.
    width: D, the width of the transformer.
    depth: the number of blocks.
    heads: the number of attention heads.
    mlp_ratio: the hidden width of the feed-forward layers, in units of D.
    remat: whether each block's activations are recomputed in the backward pass.
  """

  out_channels: int
  num_classes: int
  patch: int
  width: int
  depth: int
  heads: int
  mlp_ratio: float = 4.0
  remat: bool = False

  @nn.compact
  def __call__(
    self, x: jax.Array, c_noise: jax.Array, label: jax.Array
  ) -> jax.Array:
    """Applies the network.

    Args:
      x: the noisy image or latent, [B,H,W,C].
      c_noise: the time that the preconditioning tells, [B].
      label: the classes, [B] int.

    Returns:
      F, [B,H,W,out_channels].
    """
    batch = x.shape[0]
    rows = x.shape[1] // self.patch
    columns = x.shape[2] // self.patch
    tokens = dit_layers.PatchEmbedding(
      self.patch, self.width, name='x_embedder'
    )(x)
    # As it is stored in the released files.
    table = dit_layers.positions(rows, columns, self.width).astype(np.float32)
    tokens = tokens + jnp.asarray(table, tokens.dtype)[None]
    condition = dit_layers.TimeEmbedding(self.width, name='t_embedder')(c_noise)
    if self.num_classes:
      condition = condition + dit_layers.LabelEmbedding(
        self.num_classes, self.width, name='y_embedder'
      )(label)
    condition = nn.silu(condition)
    tokens, _ = self._stack()(tokens, condition)
    out = dit_layers.FinalLayer(
      self.patch**2 * self.out_channels, name='final_layer'
    )(tokens, condition)
    out = out.reshape(
      batch, rows, columns, self.patch, self.patch, self.out_channels
    )
    return jnp.swapaxes(out, 2, 3).reshape(*x.shape[:3], self.out_channels)

  def _stack(self) -> nn.Module:
    """Returns a module that applies all blocks, one after the other."""
    block = dit_layers.Block
    if self.remat:
      block = nn.remat(block, prevent_cse=False)
    scanned = nn.scan(
      block,
      variable_axes={'params': 0, 'intermediates': 0},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      length=self.depth,
    )
    hidden = round(self.mlp_ratio * self.width)
    return scanned(self.heads, hidden, name='blocks')
