"""DDPM's ancestral sampler with a learned variance (Nichol & Dhariwal 2021)."""

from collections.abc import Mapping
import dataclasses
from typing import Any
from typing import ClassVar
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.samplers import contract
from ddo_jax.samplers import noise as noise_lib
from ddo_jax.samplers import schedules


def columns(alpha_bar: np.ndarray) -> dict[str, np.ndarray]:
  """Returns what each step of a process needs, columns [N] float64.

  Args:
    alpha_bar: ᾱ of the process's steps, from little noise to much, [N].

  Returns:
    sigma: √((1 − ᾱ)/ᾱ).
    beta: β, the variance that a step of the process adds.
    grow: 1/√ᾱ, from x of variance 1 to x = x₀ + σ n.
    log_beta: ln β, the largest log-variance of a step back.
    log_posterior: ln β̃, the smallest; the first, ln 0, is as the second.
    from_x0: the weight of x₀ in the mean of the step before.
    from_x: the weight of x in it.
  """
  before = np.append(1.0, alpha_bar[:-1])
  beta = 1 - alpha_bar / before
  posterior = beta * (1 - before) / (1 - alpha_bar)
  posterior[0] = posterior[min(1, len(posterior) - 1)]
  return {
    'sigma': np.sqrt((1 - alpha_bar) / alpha_bar),
    'beta': beta,
    'grow': 1 / np.sqrt(alpha_bar),
    'log_beta': np.log(beta),
    'log_posterior': np.log(posterior),
    'from_x0': beta * np.sqrt(before) / (1 - alpha_bar),
    'from_x': (1 - before) * np.sqrt(1 - beta) / (1 - alpha_bar),
  }


class Step(NamedTuple):
  """The distribution of x one step before, a normal one.

  Attributes:
    x0: the clean data that it assumes, [B,...,C].
    mean: its mean, [B,...,C].
    log_variance: the logarithm of its variance, [B,...,C].
  """

  x0: jax.Array
  mean: jax.Array
  log_variance: jax.Array


def back(
  x: jax.Array, x0: jax.Array, share: jax.Array, now: Mapping[str, Any]
) -> Step:
  """Returns the distribution of x one step before.

  Args:
    x: the noisy data in units in which it has variance 1, [B,...,C].
    x0: the clean data expected of it, [B,...,C].
    share: v, the learned place of the log-variance: ln β̃ at −1, ln β at 1; it
      may lie beyond both. [B,...,C].
    now: what `columns` says of the step, numbers or arrays that multiply x.
  """
  share = (share + 1) / 2
  return Step(
    x0=x0,
    mean=now['from_x0'] * x0 + now['from_x'] * x,
    log_variance=share * now['log_beta'] + (1 - share) * now['log_posterior'],
  )


@dataclasses.dataclass(unsafe_hash=True)
class DDPM(contract.DenoiseSampler):
  """Steps back through the levels of DiT's schedule, or through some of them.

  The network is called once a step (nfe). It must predict the variance of a
  step as well.

  Attributes:
    spacing: which of the 1000 levels, see `schedules.respaced`.
    clip: whether the clean data that is expected is cut off at ±1, for pixels.
  """

  drives: ClassVar[str] = 'variance'

  spacing: str = '250'
  clip: bool = False

  def indices(self) -> np.ndarray:
    """Returns the numbers of the levels, rising, [N] int.

    Raises:
      errors.UserError: there is no such spacing.
    """
    return schedules.respaced(self.spacing, len(schedules.ddpm_alpha_bar()))

  def __call__(
    self, denoise: contract.Denoise, shape: tuple[int, ...], keys: jax.Array
  ) -> jax.Array:
    """Draws one sample [B, *shape] for each key [B]."""
    start = noise_lib.normal(keys, shape, 'start')
    noise = noise_lib.of_steps(keys, shape)
    return self.integrate(denoise, start, noise)[0]

  def integrate(
    self,
    denoise: contract.Denoise,
    start: jax.Array,
    noise: noise_lib.Noise,
  ) -> tuple[jax.Array, jax.Array]:
    """Steps back from given random numbers, as a pure function of them.

    Args:
      denoise: (x [B,...], sigma [B]) -> D and v, [B,...,2C].
      start: unit normal numbers [B,...,C], where x starts.
      noise: the unit normal numbers [B,...,C] of a step, counted from 0.

    Returns:
      The samples x [B,...,C], and x after each step, [N,B,...,C].
    """
    indices = self.indices()
    table = columns(schedules.ddpm_alpha_bar()[indices])
    # The last step ends in the mean.
    table['fresh'] = (indices > 0).astype(float)
    steps = noise_lib.table(
      start.dtype, **{name: column[::-1] for name, column in table.items()}
    )
    steps['step'] = jnp.arange(len(indices))

    def step(x, now):
      sigma = jnp.full(x.shape[:1], now['sigma'])
      x0, share = jnp.split(denoise(now['grow'] * x, sigma), 2, axis=-1)
      if self.clip:
        x0 = jnp.clip(x0, -1, 1)
      before = back(x, x0, share, now)
      fresh = now['fresh'] * noise(now['step'])
      x = before.mean + jnp.exp(before.log_variance / 2) * fresh
      return x, x

    return jax.lax.scan(step, start, steps)
