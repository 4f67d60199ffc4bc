"""Guidance by a second, weaker denoiser."""

from collections.abc import Callable

import jax

Denoise = Callable[[jax.Array, jax.Array], jax.Array]


def guided(denoise: Denoise, guide: Denoise, scale: float) -> Denoise:
  """Extrapolates from the guide through the model.

  D = D_guide + scale (D_model − D_guide): classifier-free guidance where the
  guide ignores the label, autoguidance where it is a smaller model. Scale 1
  is the model itself; callers skip the guide then.

  Args:
    denoise: (x [B,...], sigma [B]) -> D.
    guide: the same, of the weaker model.
    scale: guidance weight, usually 1 to 3.

  Returns:
    A denoiser that evaluates both at every call.
  """

  def call(x, sigma):
    weak = guide(x, sigma)
    return weak + scale * (denoise(x, sigma) - weak)

  return call
