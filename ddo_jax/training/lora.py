"""Low-rank adapters: a round that trains few numbers (LoRA).

Of each matrix of weights W [m,n] not W itself is trained, but two factors of a
difference, W + A·B with A [m,r] and B [r,n] (Hu et al. 2021, arXiv 2106.09685,
section 4). W is the reference, which a round holds in any case, so that one
copy of the weights stands, and moments and averages are those of the factors.
Inside a step the sum is made for as long as the gradient takes.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.method import likelihood

Params = likelihood.Params

# The weights of Flax's Dense and Conv, in Linen and in NNX. Biases, gains and
# norms hold too few numbers to be worth it; a table of embeddings is read by
# rows, which share no directions.
_MATRIX = 'kernel'


def _name(path: Any) -> str:
  """Returns the name of a leaf, such as 'blocks.attn.proj.kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator='.')


def _as_matrices(shape: Sequence[int]) -> tuple[tuple[int, ...], int, int]:
  """Returns a kernel's shape as that of matrices: (stack, m, n).

  A convolution's [h,w,m,n] is the matrix [h·w·m, n]. Where the number of axes
  is odd, as many matrices are stacked along the first one (`layers.stacked`).
  """
  stack = tuple(shape[: len(shape) % 2])
  matrix = shape[len(stack) :]
  return stack, math.prod(matrix[:-1]), matrix[-1]


@dataclasses.dataclass(unsafe_hash=True)
class Lora:
  """What a phase trains: the weights themselves, or factors of a difference.

  "What is trained" below is either of the two.

  Attributes:
    rank: the rank r of the differences; 0 trains the weights themselves. A
      matrix with a shorter side has a difference of that side's rank.
  """

  rank: int = 0

  def start(self, params: Params, key: jax.Array) -> Params:
    """Returns what is trained, where θ = params.

    B is 0. The columns of A are orthogonal, of a length that makes A·Aᵀ the
    identity in expectation. So the first step of plain gradient descent is in
    expectation that of training W, whatever the rank, and it is that very step
    where r = m; and a first step of Adam changes the numbers of W about as
    much as one that trains W. No factor in front of A·B is needed.

    Args:
      params: θ; of low rank, only its shapes are read.
      key: draws A.

    Raises:
      errors.UserError: there is nothing to adapt.
    """
    if not self.rank:
      return params
    factors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
      name = _name(path)
      if name.split('.')[-1] != _MATRIX or leaf.ndim < 2:
        continue
      stack, rows, columns = _as_matrices(leaf.shape)
      rank = min(self.rank, rows, columns)
      own = rng.named(key, name)
      down = jax.random.orthogonal(own, rows, stack, m=rank)
      up = jnp.zeros((*stack, rank, columns), down.dtype)
      factors[name] = {'down': math.sqrt(rows / rank) * down, 'up': up}
    if not factors:
      raise errors.UserError(
        f'config.ddo.lora.rank is {self.rank}, and no leaf of the params is'
        f' called {_MATRIX!r}, which would be adapted: train the weights'
        ' themselves, --config.ddo.lora.rank=0'
      )
    return factors

  def merge(self, reference: Params, trained: Params) -> Params:
    """Returns θ.

    Args:
      reference: θ_ref, perhaps reduced (`WeightRules.reduce`). Then θ is of
        the same types, rounded as the forward pass would.
      trained: what is trained; with B = 0, θ is θ_ref bit for bit.
    """
    if not self.rank:
      return trained

    def of_leaf(path, leaf):
      factors = trained.get(_name(path))
      if factors is None:
        return leaf
      product = jnp.matmul(factors['down'], factors['up'], precision='highest')
      moved = leaf + product.reshape(leaf.shape)
      if moved.dtype == leaf.dtype:
        return moved
      # Said so, or XLA might drop a conversion there and back.
      kept = jnp.finfo(leaf.dtype)
      moved = jax.lax.reduce_precision(moved, kept.nexp, kept.nmant)
      return moved.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(of_leaf, reference)

  def rules(self, rules: likelihood.WeightRules) -> likelihood.WeightRules:
    """Returns the rules of what is trained, of those of the weights.

    Factors are free, and all of them decay: that shrinks the difference.
    """
    return likelihood.WeightRules() if self.rank else rules

  def check(self, name: str) -> None:
    """Raises UserError, naming the field, where a value makes no sense."""
    errors.require_integer(f'{name}.rank', self.rank, 0)


@functools.cache
def plain(
  lora: Lora, rules: likelihood.WeightRules, dtypes: tuple[Any, ...]
) -> Callable[[Params, Params], Params]:
  """Returns (θ_ref, factors) -> θ as weights that know nothing of adapters.

  It is one function for equal arguments, and so compiled once.

  Args:
    lora: of a rank above 0.
    rules: those of the model, which put θ back on its manifold: of the factors
      nothing does, and a forward pass that normalises weights (EDM2's) does not
      see the difference.
    dtypes: the types of the leaves of θ; a reference may be reduced.
  """

  def merged(reference, factors):
    leaves, tree = jax.tree.flatten(reference)
    leaves = [
      leaf.astype(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)
    ]
    whole = jax.tree.unflatten(tree, leaves)
    return rules.project(lora.merge(whole, factors))

  return merged
