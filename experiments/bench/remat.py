"""Time and memory of a gradient, by which activations are recomputed.

python -m experiments.bench.remat  # some minutes on two CPU cores

For a small U-Net and a small VAR, a DDO gradient is computed with
`executor.remat` False, 'dots' and True, in turns; medians are reported. The
time of the processor is less moved by a machine's other work than the clock.
'difference' is the largest difference of a gradient from that without, in units
of its leaf's largest element. The first call encodes VAR's images, too.
"""

import pathlib
import time
from typing import Any

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import config as config_lib
from ddo_jax import rng
from ddo_jax.models import toy
from ddo_jax.models import var
from ddo_jax.models import vqvae
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import memory
from ddo_jax.runtime import records
from ddo_jax.training import fit as fit_lib
from ddo_jax.training import step as step_lib

_UNET = toy.ToyConfig('unet', 16, 2, (16, 16, 3), pixel_values=256)
_TOKENIZER = vqvae.VqvaeConfig((8, 8, 1), (1, 2, 4), 32, 8, 32, (1, 1))
_VAR = var.VarConfig(_TOKENIZER, 10, depth=8, width=64, heads=4, chunk=21)
MODELS = {'unet': _UNET, 'var': _VAR}
REMATS = (False, 'dots', True)
ROWS = 16


def _stage(config: Any) -> fit_lib.Stage:
  """Returns a phase of DDO."""
  phase = config_lib.at_round(config_lib.Phase(batch_size=ROWS), 0)
  learner = config.build_tokenizer()
  frozen = {}
  if learner:
    frozen['tokenizer'] = jax.eval_shape(learner.init, rng.stream(0))

  def build(remat):
    return config.build(phase.noise, remat)

  return fit_lib.Stage('ddo', phase, build, frozen, None)


def _filled(shapes: Any, scale: float) -> Any:
  """Returns random arrays of some shapes, none of them zero."""
  random = np.random.default_rng(0)

  def fill(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return rng.per_example(rng.stream(0), jnp.arange(leaf.shape[0]))
    if leaf.dtype != jnp.float32:
      return jnp.zeros(leaf.shape, leaf.dtype)
    return jnp.asarray(scale * random.standard_normal(leaf.shape, np.float32))

  return jax.tree.map(fill, shapes)


def _calls(stage: fit_lib.Stage) -> tuple[dict[Any, Any], tuple[Any, ...]]:
  """Returns the compiled gradient by remat, and what it takes."""
  shapes = fit_lib.state_shapes(stage).params
  rows = fit_lib.make_rows(stage, stage.build(False), ROWS)
  args = (
    _filled(shapes, 0.05),
    _filled(shapes, 0.051),
    _filled(stage.frozen, 0.05),
    _filled(rows, 1.0),
  )

  def compiled(remat):
    model = stage.build(remat)

    def gradient(params, reference, frozen, rows):
      return step_lib.gradient_of(
        params, reference, frozen, rows, model, stage.phase, None
      )[2]

    return jax.jit(gradient)

  return {remat: compiled(remat) for remat in REMATS}, args


def measure(config: Any, blocks: int) -> dict[str, dict[str, float]]:
  """Returns what is measured of a model, by remat."""
  stage = _stage(config)
  calls, args = _calls(stage)
  grads = {remat: call(*args) for remat, call in calls.items()}
  times: dict[Any, list[tuple[float, float]]] = {remat: [] for remat in REMATS}
  for _ in range(blocks):
    for remat, call in calls.items():
      start = (time.process_time(), time.perf_counter())
      jax.block_until_ready(call(*args))
      times[remat].append(
        (time.process_time() - start[0], time.perf_counter() - start[1])
      )

  def difference(ours, theirs):
    return float(jnp.max(jnp.abs(ours - theirs)) / jnp.max(jnp.abs(theirs)))

  made = {}
  for remat, call in calls.items():
    processor, clock = np.median(times[remat], axis=0)
    differences = jax.tree.map(difference, grads[remat], grads[False])
    made[str(remat)] = {
      'processor seconds': processor,
      'seconds': clock,
      'counted MiB': memory.peak(call, *args) / 2**20,
      'difference': max(jax.tree.leaves(differences)),
    }
  return made


def main(_) -> None:
  made = {
    name: measure(config, flags.FLAGS.blocks) for name, config in MODELS.items()
  }
  environment = devices_lib.environment()
  path = pathlib.Path(flags.FLAGS.output)
  records.write_json(path, {'models': made, 'environment': environment})
  print(made)


if __name__ == '__main__':
  flags.DEFINE_integer('blocks', 15, 'Timed calls of each.')
  flags.DEFINE_string(
    'output', 'experiments/results/remat.json', 'The file to write.'
  )
  app.run(main)
