"""Guidance by a second, weaker denoiser."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddo_jax import errors

Denoise = Callable[[jax.Array, jax.Array], jax.Array]


def guided(
  denoise: Denoise,
  guide: Denoise,
  scale: float,
  low: float = 0.0,
  high: float = 1e9,
) -> Denoise:
  """Extrapolates from the guide through the model, for σ in (low, high].

  D = D_guide + scale (D_model − D_guide): classifier-free guidance (Ho &
  Salimans 2022) where the guide ignores the label, autoguidance (Karras et
  al. 2024) where it is a smaller or less trained model. Scale 1 is the model
  itself; callers skip the guide then. Outside of the interval (Kynkäänniemi
  et al. 2024) D is the model's, and the guide is not evaluated.

  Args:
    denoise: (x [B,...], sigma [B]) -> D.
    guide: the same, of the weaker model.
    scale: guidance weight, usually 1 to 3.
    low: noise levels up to this one are not guided.
    high: the largest guided noise level.

  Returns:
    A denoiser that evaluates both at every call where a row is guided.

  Raises:
    errors.UserError: the interval is empty.
  """
  if not low < high:
    raise errors.UserError(
      f'guidance_min is {low}, guidance_max {high}: no noise level lies above'
      ' the one and up to the other; set guidance to 1 for no guidance'
    )

  def call(x, sigma):
    strong = denoise(x, sigma)
    inside = (low < sigma) & (sigma <= high)
    weak = jax.lax.cond(
      jnp.any(inside), guide, lambda x, sigma: strong, x, sigma
    )
    inside = inside.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(inside, weak + scale * (strong - weak), strong)

  return call
