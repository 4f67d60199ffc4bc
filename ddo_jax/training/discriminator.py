"""Trains a discriminator of a reference's samples against the real images.

It is a phase like a round, see `method.discriminator`, by the same loop: it is
saved, resumed and evaluated as one. What chooses its checkpoint is the loss on
a tenth of the real images and of the pool, which it is not trained on; its own
rows it learns by heart.
"""

from collections.abc import Callable
import functools
import math
import pathlib
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import rng
from ddo_jax import settings
from ddo_jax.data import selection
from ddo_jax.data import sources
from ddo_jax.data import splits
from ddo_jax.data import workers
from ddo_jax.method import discriminator as discriminator_lib
from ddo_jax.method import likelihood
from ddo_jax.models import discriminator as models_lib
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import manifest as manifest_lib
from ddo_jax.runtime import records
from ddo_jax.runtime import work
from ddo_jax.training import loop as loop_lib
from ddo_jax.training import round as round_lib
from ddo_jax.training import workspace

_HELD_OUT = 0.1  # of the real images, and of the pool
_DRAWS = 16  # of (σ, n) for each held-out image
_MOST = 2_000  # held-out images of a kind that are looked at
_ROWS = 1_000  # in a call
METRIC = 'held_out_loss'


def train(run: workspace.Run, index: int = 0) -> pathlib.Path:
  """Trains the discriminator of a round's reference; see `fit`.

  Args:
    run: a run that has begun the round. What is missing of its pool is drawn.
    index: the number of the round, from 0.

  Returns:
    The folder of the params, for `config.discriminator_from`.

  Raises:
    errors.UserError: the model is no denoiser, the round has no pool or no
      reference, or see `fit`.
  """
  run.config.discriminator_network.beside(run.model)  # it refuses others
  negatives = run.config.ddo.negatives
  if not negatives.needs_pool:
    raise errors.UserError(
      f'config.ddo.negatives is {negatives}, whose rounds have no pool that a'
      ' discriminator could be trained on: play one with'
      ' --config.ddo.negatives=pool in another --workdir'
    )
  stage = run.workdir / f'round_{index:03d}'
  if not (stage / 'reference').exists():
    raise errors.UserError(
      f'{stage} has no reference: a discriminator is trained on the pool of a'
      ' round, which --mode=selfplay begins'
    )
  reference, meta = workspace.load_params(
    stage / 'reference', run.model, run.executor
  )
  pool = functools.partial(round_lib.fake_pool, run, stage, reference, meta)
  return fit(run, stage / 'discriminator', pool)


def fit(
  run: workspace.Run,
  folder: pathlib.Path,
  pool: Callable[[], sources.Source],
  phase: config_lib.Phase | None = None,
  network: models_lib.DiscriminatorConfig | None = None,
) -> pathlib.Path:
  """Trains a discriminator of a pool, or returns the one that was trained.

  The folder's done.json says at which step its loss on held-out images was
  lowest, and what all of its training cost, the choice of that step, and a
  correction while one samples, in forward passes of the generator.

  Args:
    run: the run.
    folder: where it is kept; a call that was cut off goes on there. Noise and
      the order of rows depend on its name and its parent's.
    pool: returns the pool; it is not asked for where training is done.
    phase: how it is trained; None: as `config.discriminator` says.
    network: its size; None: `config.discriminator_network`.

  Returns:
    The folder of the params.

  Raises:
    errors.UserError: the folder has one of other settings, or see `loop.run`.
  """
  phase = config_lib.at_round(phase or run.config.discriminator, 0)
  network = network or run.config.discriminator_network
  about = {
    'phase': settings.to_json(phase),
    'network': settings.to_json(network),
  }
  manifest = manifest_lib.Manifest(folder, ('settings.json', 'params'))
  begun = manifest.read_json('settings.json') or about
  changes = settings.science_changes(phase, begun['phase'])
  changes += settings.science_changes(network, begun['network'])
  if changes:
    raise errors.UserError(
      f'{folder} holds a discriminator of other settings'
      f' ({"; ".join(changes)}): delete it to train another'
    )
  if manifest.lists('done.json') and manifest.holds('params'):
    return folder / 'params'
  manifest.write_json('settings.json', about)

  # It has as much of a model as the loop asks for.
  model: Any = network.beside(run.model, phase.noise)
  real = run.real
  fake = pool()
  seed = run.config.seed
  init = functools.partial(model.init, rng.stream(seed, 'discriminator'))

  def start():
    return run.executor.make_state(init)

  judge = _Judge(run, model, _part(real, True), _part(fake, True))
  job = loop_lib.Job(
    name=f'{folder.parent.name}/{folder.name}',
    folder=folder,
    seed=seed,
    phase=phase,
    model=model,
    start=start,
    reference=start(),
    frozen=run.frozen,
    real=_part(real, False),
    fake=_part(fake, False),
    sampler=None,
    executor=run.executor,
    accumulate=1,
    log=records.MetricsLog(folder),
    evaluate=judge,
    metric=METRIC,
    workers=workers.count(run.config.data.workers),
  )
  promotion = loop_lib.run(job)
  meta = {'stage': job.name, 'about': about, 'step': promotion.step}
  sha256 = checkpoint.save_params(folder / 'params', promotion.params, meta)
  manifest.add_params('params', sha256)
  cost = costs(run, model)
  result = {
    'step': promotion.step,
    METRIC: promotion.selection,
    'forwards': {
      'training': phase.steps() * phase.batch_size * cost.pair,
      'selection': len(promotion.evaluations) * judge.count * cost.row,
      'gradient': cost.gradient,
    },
    'environment': devices_lib.environment(),
  }
  manifest.write_json('done.json', result)
  return folder / 'params'


def _part(source: sources.Source, held_out: bool) -> sources.Source:
  """Returns the tenth of a source that is held out, or the rest of it."""
  held = splits.held_out(source.labels(), _HELD_OUT)
  rows = np.flatnonzero(held == held_out)
  if not len(rows):
    raise errors.UserError(
      f'{source.name} has {len(source)} images; a discriminator wants ten or'
      ' more images of a class, of which one is held out: give more images, or'
      ' a larger --config.ddo.negatives.size'
    )
  word = 'held out' if held_out else 'trained on'
  return selection.of_rows(source, rows, f'{source.name} ({word})')


class _Judge:
  """Scores a discriminator on held-out rows, always under the same noise.

  Attributes:
    count: the number of rows that it looks at.
  """

  def __init__(
    self,
    run: workspace.Run,
    model: discriminator_lib.Discriminator,
    real: sources.Source,
    fake: sources.Source,
  ):
    """Reads the rows, `_MOST` of a kind."""
    self._executor = run.executor
    self._frozen = run.frozen
    self._model = model
    self._key = rng.stream(run.config.seed, 'discriminator', 'held out')
    self._rows = {'real': _read(real), 'fake': _read(fake)}
    self.count = sum(len(rows['id']) for rows in self._rows.values())

  def __call__(self, params: Any, folder: pathlib.Path) -> dict[str, float]:
    """Returns the mean of −log σ(±logit) of a row, ln 2 at chance, and the
    shares of real and of drawn rows that are told for what they are.
    """
    del folder
    weights = self._executor.replicate((self._key, self._model))
    weights = (params, self._frozen, *weights)
    scores = {}
    losses = []
    for name, rows in self._rows.items():
      parts = self._executor.map_rows(_logits, weights, [rows], _ROWS)
      logit = np.concatenate(list(parts)).astype(np.float64)
      signed = logit if name == 'real' else -logit
      losses.append(np.mean(np.logaddexp(0, -signed)))
      scores[f'accuracy_{name}'] = float(np.mean((1 + np.sign(signed)) / 2))
    return {METRIC: float(np.mean(losses))} | scores


def _read(source: sources.Source) -> dict[str, np.ndarray]:
  """Returns up to `_MOST` held-out rows of all parts, each `_DRAWS` times."""
  # Sets may be in the order of their classes.
  rows = np.arange(0, len(source), math.ceil(len(source) / _MOST))
  stored, label = source.read(rows)
  ids = np.arange(len(rows) * _DRAWS, dtype=np.uint32)
  return {
    'stored': np.repeat(stored, _DRAWS, axis=0),
    'label': np.repeat(label, _DRAWS),
    'id': ids,
  }


@jax.jit
def _logits(weights: Any, rows: dict[str, jax.Array]) -> jax.Array:
  """Returns the logits [B] of rows at one draw of (σ, n) each."""
  params, frozen, key, model = weights
  keys = rng.per_example(key, rows['id'])
  encode_keys = rng.split_rows(keys, 'encode')
  x = model.codec.encode(frozen, rows['stored'], encode_keys)
  batch = likelihood.Batch(x, rows['label'], rows['id'])
  logit, _ = model.log_ratio(params, params, frozen, batch, keys)
  return logit


class Costs(NamedTuple):
  """A discriminator's work, in forward passes of the generator for one image.

  Attributes:
    pair: of training on a real row and a drawn one.
    row: of scoring a held-out row.
    gradient: of a correction, beside the call of the denoiser.
  """

  pair: float
  row: float
  gradient: float


def costs(run: workspace.Run, model: discriminator_lib.Discriminator) -> Costs:
  """Counts what a discriminator costs beside a run's model, the generator."""
  x = jnp.zeros((1, *model.example_shape))
  sigma = jnp.ones(1)
  label = jnp.zeros(1, jnp.int32)
  params = jax.eval_shape(model.init, rng.stream(0))
  denoiser: Any = run.model
  generator = jax.eval_shape(denoiser.init, rng.stream(0))

  def logit(params, x):
    return jnp.sum(model.logit(params, x, sigma, label))

  forward = work.of(denoiser.denoise, generator, x, sigma, label).total
  step = work.of(jax.value_and_grad(logit), params, x).total
  gradient = work.of(jax.grad(logit, argnums=1), params, x).total
  return Costs(
    pair=2 * step / forward,
    row=work.of(logit, params, x).total / forward,
    gradient=gradient / forward,
  )
