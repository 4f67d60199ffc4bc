"""The rivals, a function each: what it trains, and what it looks at.

Each takes a `bench.Bench` and returns a `bench.Played`, or raises `bench.Unfit`
with the reason. All have the same budget of forward-equivalents and the same
number of looks on the selection seed.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.method import ddo
from ddo_jax.method import likelihood
from ddo_jax.method import negatives
from ddo_jax.method import noise
from ddo_jax.method import objective
from ddo_jax.method import siblings
from ddo_jax.models import discriminator as discriminator_lib
from ddo_jax.runtime import checkpoint
from ddo_jax.training import discriminator as training
from ddo_jax.training import workspace
from ddo_jax.tuning import candidates as candidates_lib
from experiments import controls
from experiments.rivals import bench as bench_lib

Bench = bench_lib.Bench
Candidate = bench_lib.Candidate
Played = bench_lib.Played
Unfit = bench_lib.Unfit

RATES = (1e-3, 3e-4, 1e-4)  # learning rates of maximum likelihood
SELF_RATE = 3e-4  # that of θ_s, the model that was trained on the pool
WEIGHTS = (0.5, 1.0, 2.0, 3.0)  # Neon's w and SIMS' ω
# Of logits as much is too much.
TOKEN_WEIGHTS = (0.1, 0.25, 0.5, 1.0)
MERGES = (0.75, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 3.5)  # of DDO with θ_ref
_LEFT = len(MERGES)  # looks, where a search follows the round of DDO
STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0)
_SNAPSHOTS = 3  # of a training, of which merges and guides are made
# Under which discriminators are trained: nearly the published one, and one of
# the noise levels where a small image is made.
LAWS = {
  'wide': noise.LogUniform((0.05,), (80.0,)),
  'middle': noise.LogUniform((0.1,), (10.0,)),
}
_SMALL = 0.25  # of a forward pass of the model: what a discriminator may cost
_WIDTH = 0.1  # σ_rel of the average that a snapshot is
_GUIDE_PART = 8  # an autoguide sees this part of the images of pretraining
_DISCRIMINATOR_LOOKS = 12  # at the loss on held-out images


# The reference.


def reference(bench: Bench) -> Played:
  """θ_ref as it is."""
  generator = bench.run.generator()
  return Played(Candidate({}, lambda: bench.reference, generator, 0.0), [], 0.0)


def retuned(bench: Bench) -> Played:
  """θ_ref under other settings of its own sampler."""
  sampler = bench.run.generator().sampler
  if hasattr(sampler, 'churn'):
    most = (math.sqrt(2) - 1) * sampler.num_steps  # more changes nothing
    grid = [
      {'churn': round(share * most, 3), 'churn_noise': factor}
      for share in (0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
      for factor in (1.0, 1.01)
    ]
  elif hasattr(sampler, 'temperature'):
    grid = [
      {'temperature': temperature, 'top_p': top_p}
      for temperature in (0.85, 0.9, 0.95, 1.05)
      for top_p in (0.0, 0.98, 0.95)
    ]
  else:
    raise Unfit('its sampler has nothing to tune but its steps')

  def candidates() -> Iterator[Candidate]:
    for settings in grid:
      generator = bench.run.generator()
      generator.sampler = dataclasses.replace(sampler, **settings)
      yield Candidate(settings, lambda: bench.reference, generator, 0.0)

  return bench.search('retuned', candidates())


# Maximum likelihood.


def continued_mle(bench: Bench) -> Played:
  """Pretraining goes on, on real images, at the best of some rates."""
  looks = bench_lib.LOOKS // len(RATES)
  phases = {
    f'{rate:g}': bench.sized(
      config_lib.at_round(controls.continued(bench.run.config, rate), 0), looks
    )
    for rate in RATES
  }
  return bench.trained('mle', phases)


def _self_phase(bench: Bench, rate: float) -> config_lib.Phase:
  """Returns MLE on the pool by pretraining's road, at a constant rate."""
  phase = config_lib.at_round(controls.continued(bench.run.config, rate), 0)
  second = bench.phase.negatives
  if not second.needs_pool:
    second = negatives.Pool(size=bench.pool_size)
  phase = dataclasses.replace(
    phase,
    trains_on=config_lib.POOL,
    negatives=second,
    averages=config_lib.Averages(width=(_WIDTH,)),
  )
  return bench.sized(phase, bench_lib.LOOKS // len(RATES))


def mle_on_pool(bench: Bench) -> Played:
  """MLE on samples of the reference: θ_s, which is Neon at w = −1."""
  phases = {f'{rate:g}': _self_phase(bench, rate) for rate in RATES}
  return bench.trained('mle_pool', phases, start=False)


def self_trained(bench: Bench) -> list[bench_lib.Snapshot]:
  """Returns θ_s at a quarter, a half and the end of its training."""
  phase = _self_phase(bench, SELF_RATE)
  name = f'mle_pool/{SELF_RATE:g}'
  bench.train(name, phase)
  found = bench.snapshots(name, phase)
  return [*found[:2], found[-1]]


# DDO and what shares its step.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(unsafe_hash=True)
class RealOnly(ddo.DDO):
  """DDO at α = 0: its real half alone."""

  def loss(
    self, log_ratio_real: Any, log_ratio_other: Any, rows: objective.Rows
  ) -> tuple[jax.Array, jax.Array]:
    """Returns −log σ(β r_real), and zeros."""
    real, other = super().loss(log_ratio_real, log_ratio_other, rows)
    return real, jnp.zeros_like(other)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(unsafe_hash=True)
class FakeOnly(ddo.DDO):
  """DDO's fake half alone, α → ∞."""

  def loss(
    self, log_ratio_real: Any, log_ratio_other: Any, rows: objective.Rows
  ) -> tuple[jax.Array, jax.Array]:
    """Returns zeros, and −α log σ(−β r_fake)."""
    real, other = super().loss(log_ratio_real, log_ratio_other, rows)
    return jnp.zeros_like(real), other


def _contrast(
  name: str, make: Callable[[Any], objective.Objective], **changes: Any
) -> Callable[[Bench], Played]:
  """Returns the method that plays the recipe's round by another objective.

  Args:
    name: the method's.
    make: the recipe's objective -> its own, with the same α and β.
    **changes: other fields of the phase.
  """

  def play(bench: Bench) -> Played:
    if not hasattr(bench.phase.objective, 'beta'):
      raise Unfit('the recipe has no beta')
    phase = dataclasses.replace(
      bench.phase, objective=make(bench.phase.objective), **changes
    )
    if phase.used_negatives.needs_other_label and not bench.model.num_classes:
      raise Unfit('the data has no labels')
    return bench.trained(name, {'round': bench.sized(phase, bench_lib.LOOKS)})

  return play


def ddo_merged(bench: Bench) -> Played:
  """DDO, and then θ_ref + w (θ − θ_ref), a line search as Neon has one.

  A quarter of the looks goes to the steps of the round, the rest to w.
  """
  played = _short_of_looks(bench)
  start = played.best
  if not start.settings['step']:
    return played

  def candidates() -> Iterator[Candidate]:
    for weight in MERGES:
      yield start._replace(
        settings=start.settings | {'merge': weight},
        params=functools.partial(extrapolated, bench, start.params, -weight),
      )

  return _gone_on(bench, 'ddo_merged', played, candidates())


def ddo_guided(bench: Bench) -> Played:
  """DDO, and then guidance of what it came to, by itself without labels.

  A quarter of the looks goes to the steps of the round, the rest to strengths.
  """
  bench.guided(0.0)  # which says whether it can be
  played = _short_of_looks(bench)
  start = played.best

  def candidates() -> Iterator[Candidate]:
    for strength in STRENGTHS[:_LEFT]:
      yield start._replace(
        settings=start.settings | {'strength': strength},
        generator=bench.guided(strength),
      )

  return _gone_on(bench, 'ddo_guided', played, candidates())


def _short_of_looks(bench: Bench) -> Played:
  """Plays the recipe's round, once for all, and leaves `_LEFT` looks."""
  phase = bench.sized(bench.phase, bench_lib.LOOKS - _LEFT)
  return bench.trained('ddo_short', {'round': phase})


def _gone_on(
  bench: Bench, name: str, played: Played, candidates: Iterator[Candidate]
) -> Played:
  """Looks at what is made of a round, and takes the best of it and the round.

  Args:
    bench: the seed's.
    name: the method's.
    played: the round.
    candidates: as many as there are looks left.
  """

  def lowest(one: Played) -> float:
    return min(look['selection'] for look in one.looks)

  searched = bench.search(name, candidates, played.trained)
  best = min(played, searched, key=lowest).best
  return searched._replace(best=best, looks=[*played.looks, *searched.looks])


def _divergence(kind: str) -> Callable[[Bench], Played]:
  """Returns the method of an f-divergence."""

  def make(given):
    return siblings.FDivergence(
      alpha=given.alpha, beta=given.beta, kind=kind, normalize=given.normalize
    )

  return _contrast(kind, make)


def _fields(given: Any, *names: str) -> dict[str, Any]:
  return {name: getattr(given, name) for name in names}


# Neon, and its control.


def neon_candidates(
  bench: Bench,
  toward: bench_lib.Snapshot,
  about: dict[str, Any],
  weights: tuple[float, ...] = WEIGHTS,
) -> Iterator[Candidate]:
  """Yields (1 + w) θ_ref − w θ_s, for each w of the grid.

  Args:
    bench: the seed's.
    toward: θ_s.
    about: its settings.
    weights: the w.
  """
  for weight in weights:
    yield Candidate(
      settings=about | {'w': weight},
      params=functools.partial(extrapolated, bench, toward.params, weight),
      generator=bench.run.generator(),
      training=toward.training,
    )


def extrapolated(
  bench: Bench, toward: Callable[[], likelihood.Params], weight: float
) -> likelihood.Params:
  """Returns (1 + w) θ_ref − w θ_s, which is a merge of weight −w."""
  [(_, merged)] = candidates_lib.merges(
    reference=bench.reference,
    params=toward(),
    weights=[-weight],
    rules=bench.model.rules,
    executor=bench.run.executor,
  )
  return merged


def neon(bench: Bench) -> Played:
  """The reference, extrapolated away from what its own samples make of it.

  A model of tokens is sampled under guidance as strong as w is searched with.
  """
  found = self_trained(bench)
  trained = found[-1].training

  def candidates() -> Iterator[Candidate]:
    if not bench.tokens:
      for snapshot in found:
        about = {'images': snapshot.images}
        yield from neon_candidates(bench, snapshot, about)
      return
    for strength in (0.0, 0.5, 0.75, 1.0):
      about = {'images': found[1].images, 'guidance': strength}
      weights = TOKEN_WEIGHTS[1:]
      for candidate in neon_candidates(bench, found[1], about, weights):
        yield candidate._replace(generator=bench.guided(strength))

  return bench.search('neon', candidates(), trained)


def _random_like(
  bench: Bench, toward: bench_lib.Snapshot, draw: int
) -> likelihood.Params:
  """Returns θ_ref + d, each leaf of d as long as that of θ_s − θ_ref."""
  key = rng.stream(bench.run.config.seed, 'random direction', str(draw))
  leaves, tree = jax.tree.flatten(jax.device_get(bench.reference))
  others = jax.tree.leaves(jax.device_get(toward.params()))
  found = []
  keys = jax.random.split(key, len(leaves))
  for key, leaf, other in zip(keys, leaves, others, strict=True):
    noise = np.asarray(jax.random.normal(key, leaf.shape), leaf.dtype)
    length = np.linalg.norm(noise) or 1.0
    found.append(leaf + noise * (np.linalg.norm(other - leaf) / length))
  return bench.run.executor.make_state(
    lambda params: params, jax.tree.unflatten(tree, found)
  )


def random_direction(bench: Bench) -> Played:
  """Neon's control: directions as long as θ_s − θ_ref that know nothing."""
  toward = self_trained(bench)[-1]

  def candidates() -> Iterator[Candidate]:
    for draw in range(_SNAPSHOTS):
      params = functools.partial(_random_like, bench, toward, draw)
      snapshot = toward._replace(params=params)
      yield from neon_candidates(bench, snapshot, {'direction': draw})

  return bench.search('random_direction', candidates(), toward.training)


# Guidance.


def sims(bench: Bench) -> Played:
  """θ_s as a guide: D + ω (D − D_s), two networks at every evaluation."""
  bench.guided(0.0, bench.reference)  # which says whether it can be
  found = self_trained(bench)
  weights = TOKEN_WEIGHTS if bench.tokens else WEIGHTS

  def candidates() -> Iterator[Candidate]:
    for snapshot in found:
      for weight in weights:
        yield Candidate(
          settings={'images': snapshot.images, 'omega': weight},
          params=lambda: bench.reference,
          generator=bench.guided(weight, snapshot.params()),
          training=snapshot.training,
        )

  return bench.search('sims', candidates(), found[-1].training)


def _halved(config: likelihood.ModelConfig) -> likelihood.ModelConfig:
  """Returns a model's settings at half its width, if it can be so narrow."""
  for field in ('width', 'hidden', 'model_channels'):
    if hasattr(config, field):
      half = getattr(config, field) // 2
      narrow = dataclasses.replace(config, **{field: half})
      with contextlib.suppress(errors.UserError):
        narrow.build()
        return narrow
  return config


def autoguidance(bench: Bench) -> Played:
  """A guide of half the width and an eighth of the pretraining, on real data.

  One that cannot be narrower is less trained alone.
  Its snapshots at a third, two thirds and the end of that are tried.
  """
  bench.guided(0.0, bench.reference)
  run = bench.run
  pretrain = config_lib.at_round(run.config.pretrain, 0)
  small = _halved(run.config.model)
  model = small.build(noise=pretrain.noise)
  start = functools.partial(
    run.executor.make_state, model.init, rng.stream(run.config.seed, 'guide')
  )
  ratio = bench.share(start())
  phase = dataclasses.replace(
    pretrain,
    optimizer=dataclasses.replace(
      pretrain.optimizer, decay='none', decay_images=0
    ),
    averages=config_lib.Averages(width=(_WIDTH,)),
  )
  affordable = controls.MLE_STEP * pretrain.images / _GUIDE_PART
  budget = min(bench.budget / ratio, affordable)
  phase = bench.sized(phase, _SNAPSHOTS, budget)
  bench.train('autoguidance/guide', phase, model, start)
  found = bench.snapshots('autoguidance/guide', phase, model)
  strengths = TOKEN_WEIGHTS if bench.tokens else (0.3, 0.7, 1.1, 1.5)

  def candidates() -> Iterator[Candidate]:
    for snapshot in found:
      for strength in strengths:
        yield Candidate(
          settings={'images': snapshot.images, 'strength': strength},
          params=lambda: bench.reference,
          generator=bench.guided(strength, snapshot.params(), model),
          training=ratio * snapshot.training,
        )

  trained = ratio * found[-1].training
  return bench.search('autoguidance', candidates(), trained)


def cfg(bench: Bench) -> Played:
  """Classifier-free guidance: the guide is the reference without labels."""

  def candidates() -> Iterator[Candidate]:
    for strength in STRENGTHS:
      generator = bench.guided(strength)
      settings = {'strength': strength}
      yield Candidate(settings, lambda: bench.reference, generator, 0.0)

  return bench.search('cfg', candidates())


def cfg_interval(bench: Bench) -> Played:
  """Guidance without labels at some of the noise levels alone.

  They are the lower three quarters, the middle half, and the upper three
  quarters of those that the sampler evaluates.
  """
  if bench.tokens:
    raise Unfit('a model of tokens has no noise levels')
  bench.guided(0.0)
  sigma = np.unique(bench_lib.levels(bench.run.config.sampler))[::-1]
  high = float(sigma[len(sigma) // 4])
  low = float(sigma[3 * len(sigma) // 4])
  intervals = ((0.0, high), (low, high), (low, 1e9))

  def candidates() -> Iterator[Candidate]:
    for least, most in intervals:
      for strength in (0.2, 0.4, 0.8, 1.5):
        yield Candidate(
          settings={'strength': strength, 'low': least, 'high': most},
          params=lambda: bench.reference,
          generator=bench.guided(
            strength, guidance_min=least, guidance_max=most
          ),
          training=0.0,
        )

  return bench.search('cfg_interval', candidates())


def smaller(bench: Bench) -> discriminator_lib.DiscriminatorConfig:
  """Returns the recipe's discriminator, halved until it is small beside θ_ref.

  Small is a quarter of a forward pass.
  """
  run = bench.run
  settings = run.config.discriminator_network
  with contextlib.suppress(errors.UserError):  # it cannot be so narrow
    while settings.hidden:
      if training.costs(run, settings.beside(run.model)).row <= _SMALL:
        return settings
      settings = dataclasses.replace(settings, hidden=settings.hidden // 2)
  raise Unfit('however narrow, its discriminator is not small beside the model')


def discriminator_phases(
  bench: Bench, pair: float
) -> dict[str, config_lib.Phase]:
  """Returns how discriminators are trained that share the budget equally.

  Args:
    bench: the seed's.
    pair: the forward-equivalents of a real row and a drawn one.
  """
  given = bench.run.config.discriminator
  each = (bench.budget - bench.pool_cost) / len(LAWS)
  steps = max(1, int(each / pair) // given.batch_size)
  rhythm = dataclasses.replace(
    given.rhythm,
    eval_images=math.ceil(steps / _DISCRIMINATOR_LOOKS) * given.batch_size,
  )
  return {
    name: dataclasses.replace(
      given, noise=law, images=steps * given.batch_size, rhythm=rhythm
    )
    for name, law in LAWS.items()
  }


def discriminator_guidance(bench: Bench) -> Played:
  """A network that tells real rows from the pool's corrects the sampler.

  Two are trained, under two laws of σ; of each the step with the lowest loss on
  held-out images is taken.
  """
  if bench.tokens:
    raise Unfit('a model of tokens has no denoiser that could be corrected')
  run = bench.run
  sampler = run.generator().sampler
  settings = smaller(bench)
  model = settings.beside(run.model)
  pair = training.costs(run, model).pair
  found = {}
  trained = bench.pool_cost
  for name, phase in discriminator_phases(bench, pair).items():
    folder = training.fit(
      run, bench.folder / 'dg' / name, lambda: bench.pool, phase, settings
    )
    target = workspace.params_target(model, run.executor)
    params, _ = checkpoint.load_params(folder, target)
    cost = phase.images * pair
    found[name] = (params, bench.pool_cost + cost)
    trained += cost

  def candidates() -> Iterator[Candidate]:
    for name, (params, cost) in found.items():
      for weight in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0):
        generator = run.generator()
        generator.model = run.model.with_discriminator(model.network)
        generator.frozen = run.frozen | {'discriminator': params}
        generator.sampler = dataclasses.replace(
          sampler,
          discriminator=weight,
          discriminator_min=LAWS[name].lowest[0],
          discriminator_max=LAWS[name].highest[0],
        )
        yield Candidate(
          settings={'law': name, 'w': weight},
          params=lambda: bench.reference,
          generator=generator,
          training=cost,
        )

  return bench.search('dg', candidates(), trained)


METHODS: dict[str, tuple[str, Callable[[Bench], Played]]] = {
  'reference': ('reference', reference),
  'retuned': ('reference, its sampler tuned', retuned),
  'mle': ('continued MLE', continued_mle),
  'mle_pool': ('MLE on the pool (w = −1)', mle_on_pool),
  'ddo': ('DDO (js)', _contrast('ddo', lambda given: given)),
  'ddo_merged': ('DDO (js), merged with θ_ref', ddo_merged),
  'ddo_guided': ('DDO (js), guided', ddo_guided),
  'real_only': (
    'DDO, real half alone (α = 0)',
    _contrast(
      'real_only',
      lambda given: RealOnly(**_fields(given, 'alpha', 'beta', 'normalize')),
    ),
  ),
  'fake_only': (
    'DDO, fake half alone',
    _contrast(
      'fake_only',
      lambda given: FakeOnly(**_fields(given, 'alpha', 'beta', 'normalize')),
    ),
  ),
  'hellinger': ('f-divergence, Hellinger', _divergence('hellinger')),
  'brier': ('f-divergence, Brier', _divergence('brier')),
  'kl': ('f-divergence, KL', _divergence('kl')),
  'reverse_kl': ('f-divergence, reverse KL', _divergence('reverse_kl')),
  'pairwise': (
    'pairwise (SPIN)',
    _contrast('pairwise', lambda given: siblings.DPO(**_fields(given, 'beta'))),
  ),
  'cca': (
    'CCA',
    _contrast(
      'cca',
      lambda given: siblings.CCA(**_fields(given, 'alpha', 'beta')),
      negatives=negatives.OtherLabels(),
    ),
  ),
  'dpo': (
    'DPO, other labels',
    _contrast(
      'dpo',
      lambda given: siblings.DPO(**_fields(given, 'beta')),
      negatives=negatives.OtherLabels(),
    ),
  ),
  'unlearning': (
    'unlearning',
    _contrast(
      'unlearning',
      lambda given: siblings.Unlearning(**_fields(given, 'alpha')),
      negatives=negatives.OtherLabels(),
    ),
  ),
  'neon': ('Neon', neon),
  'random_direction': ('a random direction as long', random_direction),
  'sims': ('SIMS', sims),
  'autoguidance': ('autoguidance', autoguidance),
  'cfg': ('CFG', cfg),
  'cfg_interval': ('CFG in an interval', cfg_interval),
  'dg': ('discriminator guidance', discriminator_guidance),
}
