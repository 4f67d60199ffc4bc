"""Layers that more than one model uses."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class EdmPrecond(nn.Module):
  """EDM's preconditioning (Karras et al. 2022, Table 1), D of a network F.

  D(x; σ) = c_skip x + c_out F(c_in x, ln σ / 4, label).

  Attributes:
    network: F, a module (x [B,...], c_noise [B], label [B]) -> [B,...].
    sigma_data: σ_d, the data's standard deviation.
  """

  network: nn.Module
  sigma_data: float

  @nn.compact
  def __call__(
    self, x: jax.Array, sigma: jax.Array, label: jax.Array
  ) -> jax.Array:
    """X [B,...] noisy, sigma [B], label [B] int -> D [B,...]."""
    c_noise = jnp.log(sigma) / 4
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    total = sigma**2 + self.sigma_data**2
    c_skip = self.sigma_data**2 / total
    c_out = sigma * self.sigma_data / jnp.sqrt(total)
    residual = self.network(x / jnp.sqrt(total), c_noise, label)
    return c_skip * x + c_out * residual


class FourierEmbedding(nn.Module):
  """Sine and cosine of a scalar at fixed, geometrically spaced frequencies.

  Attributes:
    features: width of the output, even.
    lowest: smallest frequency [rad per unit].
    highest: largest frequency [rad per unit].
  """

  features: int
  lowest: float = 1.0
  highest: float = 16.0

  @nn.compact
  def __call__(self, value: jax.Array) -> jax.Array:
    """Value [B] -> [B, features]."""
    frequency = np.geomspace(self.lowest, self.highest, self.features // 2)
    angle = value[:, None] * jnp.asarray(frequency, value.dtype)[None, :]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
