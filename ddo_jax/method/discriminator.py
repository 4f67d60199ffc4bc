"""A network that tells real rows from drawn ones at every noise level.

Discriminator guidance (Kim et al. 2023) trains it and adds its gradient to the
denoiser when one samples (`samplers.guidance.corrected`). DDO does without: its
discriminator is the likelihood ratio. The two have one loss. With the logit of
this network in the place of the log-ratio and α = β = 1, DDO's loss is that of
a classifier, so that the step and the loop of a round train it as they are.
"""

from typing import Any

import chex
from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from ddo_jax import precision as precision_lib
from ddo_jax.data import codec as codec_lib
from ddo_jax.method import likelihood
from ddo_jax.method import noise as noise_lib


def _static(**options: Any) -> Any:
  """A field that is part of what the discriminator is, not traced."""
  return struct.field(pytree_node=False, **options)


@struct.dataclass
class Discriminator:
  """As much of a `LikelihoodModel` as training by a log-ratio needs.

  Its logit estimates log p_data(x; σ) − log p_ref(x; σ), of rows with noise of
  level σ. Fresh, it is 0 everywhere.

  Attributes:
    network: a Linen module, (x [B,H,W,C], sigma [B], label [B]) -> logit [B],
      whose last layer is zero at first.
    example_shape: (H, W, C).
    num_classes: the number of classes; 0 for an unconditional one.
    codec: between stored rows and model units: the generator's.
    noise: the law of σ in training; None where it only guides.
    rules: what may be done to the weights.
    num_bins: the number of noise bins in the diagnostics.
  """

  network: nn.Module = _static()
  example_shape: tuple[int, int, int] = _static()
  num_classes: int = _static()
  codec: codec_lib.Codec = _static()
  noise: noise_lib.NoiseLaw | None = None
  rules: likelihood.WeightRules = _static(default=likelihood.WeightRules())
  num_bins: int = _static(default=8)

  def init(self, key: jax.Array) -> likelihood.Params:
    """Returns fresh parameters."""
    x = jnp.zeros((1, *self.example_shape))
    label = jnp.zeros([1], jnp.int32)
    return self.network.init(key, x, jnp.ones([1]), label)['params']

  def logit(
    self,
    params: likelihood.Params,
    x: jax.Array,
    sigma: jax.Array,
    label: jax.Array,
  ) -> jax.Array:
    """Returns [B], high for rows x [B,H,W,C] that look real at sigma [B]."""
    with precision_lib.of('highest'):
      return self.network.apply({'params': params}, x, sigma, label)

  def log_ratio(
    self,
    params: likelihood.Params,
    reference: likelihood.Params,
    frozen: likelihood.Frozen,
    batch: likelihood.Batch,
    keys: jax.Array,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the logit [B] at one draw of (σ, n) a row, and per-row info.

    The reference is the fresh network, whose logit is 0.
    """
    del reference, frozen
    chex.assert_shape(batch.x, (None, *self.example_shape))
    drawn = noise_lib.draw(self.noise, batch.x, keys)
    logit = self.logit(params, drawn.x, drawn.sigma, batch.label)
    info = {
      'noise_bin': noise_lib.bins(drawn.z, self.num_bins),
      'mle_loss': jnp.zeros_like(logit),  # it has none
    }
    return logit, info
