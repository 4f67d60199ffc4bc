"""A module of Flax NNX where a Linen module is expected."""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx
import jax


@dataclasses.dataclass(frozen=True)
class NnxModule:
  """Offers Linen's `init` and `apply` over an NNX module.

  NNX keeps a module's structure and its arrays in one object. `nnx.split` takes
  them apart, so that params are a plain pytree, as they are here; `nnx.merge`
  puts the object together again inside of each call.

  Attributes:
    make: the NNX module's class, called with `arguments` and rngs=.
    arguments: its other arguments, hashable.
  """

  make: Callable[..., nnx.Module]
  arguments: tuple[Any, ...] = ()

  def _module(self, key: jax.Array) -> nnx.Module:
    return self.make(*self.arguments, rngs=nnx.Rngs(key))

  def init(self, key: jax.Array, *inputs: Any) -> dict[str, Any]:
    """Returns {'params': fresh params}; inputs are not needed for them."""
    del inputs
    _, state = nnx.split(self._module(key))
    return {'params': nnx.to_pure_dict(state)}

  def apply(self, variables: dict[str, Any], *inputs: Any) -> Any:
    """Calls the module with the params of `variables`."""
    key = jax.random.key(0)  # of params that are replaced at once
    graph, state = nnx.split(nnx.eval_shape(lambda: self._module(key)))
    nnx.replace_by_pure_dict(state, variables['params'])
    return nnx.merge(graph, state)(*inputs)
