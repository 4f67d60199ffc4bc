r"""What the precision of products costs DDO, by simulated rounding on a CPU.

python -m experiments.precision --workdir=runs/precision
python -m experiments.precision --workdir=runs/precision_fashion \
  --config=configs/fashion_small.py --nogradients \
  --output=experiments/results/precision_fashion.json

A CPU computes in float32 whatever is asked for, so the operands of every dot
and convolution are rounded by hand: to TF32 or bfloat16, once or as three
products.

First the gradient of a DDO step is compared with that in float32, where θ is
θ_ref and a little later, for a pretrained MLP and a pretrained U-Net of the
digits. Then a round of the recipe is played from one pretraining a seed, with
its training rounded or the fakes of its pool. Scores are drawn in float32.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from typing import Any
from unittest import mock

from absl import app
from absl import flags
from absl import logging as absl_logging
import jax
from ml_collections import config_flags
import numpy as np

from configs import digits
from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.data import loader
from ddo_jax.method import generate
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records
from ddo_jax.training import run as run_lib
from ddo_jax.training import step as step_lib
from ddo_jax.training import workspace
from experiments import rounding

_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/precision', 'The folder of all runs.'
)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'The number of pretraining seeds.')
_CONFIG = config_flags.DEFINE_config_file('config', 'configs/digits.py')
_GRADIENTS = flags.DEFINE_bool(
  'gradients', True, "Whether the digits' gradients are compared."
)
_OUTPUT = flags.DEFINE_string(
  'output', 'experiments/results/precision.json', 'The file to write.'
)

METRICS = ('fd_test', 'fd_train', 'accuracy', 'precision', 'recall')
# (of the training, of the pool)
ROUNDS = {
  'highest': ('', ''),
  'tf32x3': ('tf32x3', ''),
  'bf16x3': ('bf16x3', ''),
  'tf32': ('tf32', ''),
  'bf16': ('bf16', ''),
  'highest, pool in bf16': ('', 'bf16'),
}


def sampling(kind: str) -> Any:
  """Returns `generate._sample` with products of a kind."""

  @functools.partial(jax.jit, static_argnames=('model', 'sampler'))
  def sample(weights, rows, *, model, sampler):
    def draw(params, frozen, keys, label):
      return model.draw(params, frozen, label, keys, sampler)

    params, frozen, key = weights
    keys = rng.per_example(key, rows['id'])
    draw = rounding.rounded(draw, rounding.KINDS[kind])
    return draw(params, frozen, keys, rows['label'])

  return sample


@contextlib.contextmanager
def played_in(training: str, pool: str) -> Any:
  """Inside, rounds are trained and their pools drawn with such products."""
  fill = generate.Generator.fill

  def fill_rounded(*args):
    with mock.patch.object(generate, '_sample', sampling(pool)):
      fill(*args)

  with contextlib.ExitStack() as stack:
    if training:
      stack.enter_context(rounding.trained_in(rounding.KINDS[training]))
    if pool:
      patch = mock.patch.object(generate.Generator, 'fill', fill_rounded)
      stack.enter_context(patch)
    yield


def digits_of(network: str) -> config_lib.Config:
  """Returns the digits' recipe with a network of one kind."""
  config = digits.get_config()
  if network == 'unet':
    config.model.network = 'unet'
    config.model.hidden = 16
    config.model.blocks = 1
    config.pretrain.batch_size = 64
    config.pretrain.images = 1_500 * 64
    config.pretrain.optimizer.decay_images = 500 * 64
  return config


def errors_of_gradients(network: str, folder: pathlib.Path) -> dict[str, Any]:
  """Returns the relative errors of a step's gradient, by kind.

  Returns:
    {'start': {kind: error}, 'later': {kind: error}, 'delta': {kind: the largest
    |Δ| of a forward pass where θ = θ_ref}}.
  """
  run = workspace.Run(digits_of(network), folder)
  origin = run_lib.pretrain(run)
  phase = config_lib.at_round(run.config.ddo, 0)
  model = run.training_model(phase.noise)
  reference, _ = workspace.load_params(origin, run.model, run.executor)
  moved = jax.tree.map(
    lambda leaf, z: leaf + 1e-3 * np.std(leaf) * z,
    reference,
    _normal_like(reference),
  )
  ids = np.arange(256)
  labels = run.shares.labels(ids)
  drawn = run.generator(guided=False).stream(
    reference, rng.stream(0, 'fakes'), ids, labels
  )
  stream = loader.batches(
    run.real, rng.order_seed(0, 'real'), 256, 0, 1, 0, 1, other_label=False
  )
  with contextlib.closing(stream):
    real = next(stream)
  rows = step_lib.Microbatch(
    real=real,
    fake={'stored': np.concatenate(list(drawn)), 'label': labels},
    keys=rng.per_example(rng.stream(1), real['id']),
    dropped=np.zeros(256, bool),
  )
  found: dict[str, Any] = {'start': {}, 'later': {}, 'delta': {}}
  for name, params in (('start', reference), ('later', moved)):
    grads = {}
    for kind in ('highest', *rounding.KINDS):

      def call(params):
        return step_lib.gradient_of(
          params, reference, {}, rows, model, phase, None
        )

      with rounding.trained_in(rounding.KINDS.get(kind)):
        _, results, grads[kind] = jax.jit(call)(params)
      if name == 'start':
        found['delta'][kind] = float(np.abs(results['log_ratio_real']).max())
    exact = _flat(grads.pop('highest'))
    for kind, grad in grads.items():
      error = np.linalg.norm(_flat(grad) - exact) / np.linalg.norm(exact)
      found[name][kind] = float(error)
  return found


def _normal_like(tree: Any) -> Any:
  numbers = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: numbers.standard_normal(leaf.shape, np.float32), tree
  )


def _flat(tree: Any) -> np.ndarray:
  leaves = [
    np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)
  ]
  return np.concatenate(leaves)


def one_seed(
  recipe: config_lib.Config, seed: int, workdir: pathlib.Path
) -> dict[str, Any]:
  """Plays all rounds of a seed; returns their scores, or why one stopped."""
  recipe = dataclasses.replace(recipe, seed=seed, rounds=1)
  start = workspace.Run(recipe, workdir / 'start')
  origin = run_lib.pretrain(start)
  found: dict[str, Any] = {}
  for name, (training, pool) in ROUNDS.items():
    config = dataclasses.replace(recipe, init_from=str(origin))
    # Every step is logged: the first loss tells of law 1.
    folder = workdir / name.replace(', ', '_').replace(' ', '_')
    try:
      with played_in(training, pool):
        (result,) = run_lib.play(config, folder)['rounds']
    except errors.UserError as error:
      found[name] = {'stopped': str(error)}
      continue
    log = records.read_log(folder, 'round_000')
    found['reference'] = _scores(result['before'])
    found[name] = _scores(result['after']) | {
      'promoted': result['promoted']['step'],
      'first_logit': log[1]['max_abs_logit'],
    }
  return found


def _scores(scores: dict[str, Any]) -> dict[str, float]:
  return {name: scores[name]['mean'] for name in METRICS}


def main(_) -> None:
  absl_logging.set_verbosity(absl_logging.WARNING)
  workdir = pathlib.Path(_WORKDIR.value)
  networks = ('mlp', 'unet') if _GRADIENTS.value else ()
  result: dict[str, Any] = {
    'environment': devices_lib.environment(),
    'gradients': {
      network: errors_of_gradients(network, workdir / network)
      for network in networks
    },
    'rounds': [],
  }
  output = pathlib.Path(_OUTPUT.value)
  for seed in range(_SEEDS.value):
    played = one_seed(_CONFIG.value, seed, workdir / f'seed_{seed}')
    result['rounds'].append(played)
    records.write_json(output, result)
  print(json.dumps(result, indent=1))


if __name__ == '__main__':
  app.run(main)
