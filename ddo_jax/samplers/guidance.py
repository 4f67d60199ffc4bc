"""Guidance by a second, weaker network, or by a discriminator."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddo_jax import errors
from ddo_jax.samplers import contract

# (x [B,...], sigma [B]) -> [B], the logit of a discriminator at noise levels.
Logit = Callable[[jax.Array, jax.Array], jax.Array]


def _check_interval(setting: str, low: float, high: float, off: str) -> None:
  """Raises UserError where an interval of noise levels is empty.

  Args:
    setting: the sampler's setting that holds inside.
    low: noise levels up to this one are outside.
    high: the largest noise level inside.
    off: what the setting is set to for it to hold nowhere, and what that is.
  """
  if not low < high:
    raise errors.UserError(
      f'{setting}_min is {low}, {setting}_max {high}: no noise level lies above'
      f' the one and up to the other; set {setting} to {off}'
    )


def _with_rest(moved: jax.Array, output: jax.Array) -> jax.Array:
  """Returns moved [...,c] and the channels after them of output [...,C]."""
  rest = output[..., moved.shape[-1] :]
  return jnp.concatenate([moved, rest], axis=-1) if rest.shape[-1] else moved


def _column(values: jax.Array, x: jax.Array) -> jax.Array:
  """Returns values [B] as [B,1,...], of as many axes as x [B,...] has."""
  return values.reshape(-1, *[1] * (x.ndim - 1))


def guided(
  denoise: contract.Denoise,
  guide: contract.Denoise,
  scale: float,
  low: float = 0.0,
  high: float = 1e9,
  *,
  channels: int = 0,
  level: Callable[[jax.Array], jax.Array] | None = None,
) -> contract.Denoise:
  """Extrapolates from the guide through the model, for σ in (low, high].

  D = D_guide + scale (D_model − D_guide). This is classifier-free guidance (Ho
  & Salimans 2022) if the guide ignores the label, and autoguidance (Karras et
  al. 2024) if it is a smaller or less trained model. A scale of 1 gives the
  model itself; callers then do without the guide. Outside the interval
  (Kynkäänniemi et al. 2024) D is the model's, and the guide is not evaluated.

  Args:
    denoise: the model's denoiser.
    guide: the weaker model's denoiser.
    scale: the weight of guidance, usually 1 to 3.
    low: noise levels up to this one are not guided.
    high: the largest noise level that is guided.
    channels: only so many channels are guided, and the others are the model's;
      0 for all that both have.
    level: returns the noise levels [B] of what the denoisers are told in their
      place, such as a time; None where they are told the noise levels.

  Returns:
    A denoiser. It evaluates the model at every call, and the guide at calls
    where the noise level of some row is in the interval.

  Raises:
    errors.UserError: the interval is empty.
  """
  _check_interval('guidance', low, high, '1 for no guidance')

  def weaker(x, told, part):
    return guide(x, told)[..., : part.shape[-1]]

  def not_asked(x, told, part):
    return part

  def call(x, told):
    strong = denoise(x, told)
    part = strong[..., : channels or x.shape[-1]]
    sigma = level(told) if level else told
    inside = (low < sigma) & (sigma <= high)
    weak = jax.lax.cond(
      jnp.any(inside),
      weaker,
      not_asked,
      x,
      told,
      part,
    )
    moved = weak + scale * (part - weak)
    return _with_rest(jnp.where(_column(inside, x), moved, part), strong)

  return call


def _correction(
  logit: Logit, weight: float, low: float, high: float
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """Returns (x [B,...], σ [B]) -> w σ² ∇ₓ logit(x, σ), and 0 outside."""
  _check_interval('discriminator', low, high, '0 for no correction')

  def total(x, sigma):
    return jnp.sum(logit(x, sigma))

  def zero(x, sigma):
    del sigma
    return jnp.zeros_like(x)

  def call(x, sigma):
    inside = (low < sigma) & (sigma <= high)
    slope = jax.lax.cond(jnp.any(inside), jax.grad(total), zero, x, sigma)
    inside = _column(inside, x)
    return _column(weight * sigma**2, x) * jnp.where(inside, slope, 0)

  return call


def corrected(
  denoise: contract.Denoise,
  logit: Logit,
  weight: float,
  low: float,
  high: float,
) -> contract.Denoise:
  """Corrects a model by what a discriminator saw, for σ in (low, high].

  D = D_model + weight σ² ∇ₓ logit(x, σ): discriminator guidance (Kim et al.
  2023). The best discriminator of real rows against the model's, both with
  noise of level σ, has the logit log p_data(x; σ) − log p_model(x; σ). By
  Tweedie's formula, D = x + σ² ∇ₓ log p(x; σ), a weight of 1 then gives the
  denoiser of the data. Kim et al. correct the first half of each step of
  Heun's method alone; here every call is corrected, so that it is one denoiser
  for every sampler.

  Args:
    denoise: the model's denoiser; of what it returns, the first channels, as
      many as x has, are corrected.
    logit: the discriminator's logit, high for real rows.
    weight: w; 1 corrects in full, 0 not at all.
    low: noise levels up to this one are not corrected, and there the gradient
      is not computed.
    high: the largest noise level that is corrected.

  Returns:
    A denoiser.

  Raises:
    errors.UserError: the interval is empty.
  """
  correction = _correction(logit, weight, low, high)

  def call(x, sigma):
    output = denoise(x, sigma)
    moved = output[..., : x.shape[-1]] + correction(x, sigma)
    return _with_rest(moved, output)

  return call


def corrected_velocity(
  velocity: contract.Velocity,
  logit: Logit,
  weight: float,
  low: float,
  high: float,
) -> contract.Velocity:
  """Corrects a velocity as `corrected` does the denoiser that it stands for.

  x = t x₀ + (1 − t) n is t times u = x₀ + σ n, with σ = (1 − t)/t, and
  v = (D(u; σ) − x)/(1 − t). So v = v_model + weight (1 − t)/t² ∇ᵤ logit(u, σ).

  Args:
    velocity: the model's.
    logit: the discriminator's logit of u at σ, high for real rows.
    weight: w; 1 corrects in full, 0 not at all.
    low: noise levels up to this one are not corrected, and there the gradient
      is not computed.
    high: the largest noise level that is corrected.

  Returns:
    A velocity.

  Raises:
    errors.UserError: the interval is empty.
  """
  correction = _correction(logit, weight, low, high)

  def call(x, t):
    sigma = contract.VelocitySampler.level(t)
    # In σ nothing is divided by 0: 1/t is 1 + σ, and 1 − t is σ/(1 + σ).
    s = _column(sigma, x)
    return velocity(x, t) + (1 + s) / s * correction((1 + s) * x, sigma)

  return call


def with_guide(
  stages: contract.Stages, guide: contract.Stages
) -> contract.Stages:
  """Gives a model of tokens a second network as its guide.

  A sampler that guides asks for every row twice, with its label and without,
  and takes logits of (1 + t) times the one less t times the other. Here the
  second half of the rows is the guide's, under the same labels as the first:
  autoguidance, or SIMS where the guide was trained on samples of the model.

  Args:
    stages: the model.
    guide: the guide, whose tokens are the model's.

  Returns:
    Stages for a sampler that guides. Their canvas is that of both.
  """
  channels = stages.codebook.shape[1]

  def halves(tree):
    first = jax.tree.map(lambda leaf: leaf[: len(leaf) // 2], tree)
    second = jax.tree.map(lambda leaf: leaf[len(leaf) // 2 :], tree)
    return first, second

  def begin(rows):
    inputs, _, canvas = stages.begin(rows)
    guide_inputs, _, guide_canvas = guide.begin(rows)
    _, past, _ = stages.begin(rows // 2)
    _, guide_past, _ = guide.begin(rows // 2)
    return (inputs, guide_inputs), (past, guide_past), (canvas, guide_canvas)

  def predict(stage, label, inputs, past):
    label, _ = halves(label)
    strong, _ = halves(inputs[0])
    _, weak = halves(inputs[1])
    logits, own_past = stages.predict(stage, label, strong, past[0])
    guide_logits, guide_past = guide.predict(stage, label, weak, past[1])
    return jnp.concatenate([logits, guide_logits]), (own_past, guide_past)

  def advance(stage, vectors, canvas):
    own = vectors[..., :channels]
    others = vectors[..., channels:]
    own_canvas, inputs = stages.advance(stage, own, canvas[0])
    guide_canvas, guide_inputs = guide.advance(stage, others, canvas[1])
    return (own_canvas, guide_canvas), (inputs, guide_inputs)

  return stages._replace(
    codebook=jnp.concatenate([stages.codebook, guide.codebook], axis=1),
    begin=begin,
    predict=predict,
    advance=advance,
  )
