"""What the checksums of a checkpoint cost, for a state of 472 MB.

python -m experiments.bench.checkpoint

The state is that of 40 convolutions of 256 channels under Adam with two
averages. Measured are how long a save keeps the loop from its next step, how
long it takes until it is whole on the disk, and a restore; each with checksums
and without them, in turns. Beside them stand the checksums alone and the sha256
that a folder of params has. Medians are reported.
"""

import contextlib
import json
import pathlib
import statistics
import tempfile
import time
from unittest import mock

from absl import app
from absl import flags
from absl import logging as absl_logging
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.method import likelihood
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import memory
from ddo_jax.runtime import records
from ddo_jax.training import state as state_lib

_BLOCKS = flags.DEFINE_integer('blocks', 5, 'Timed blocks; median reported.')
_OUTPUT = flags.DEFINE_string(
  'output', 'experiments/results/checkpoint.json', 'The file to write.'
)


def make_state() -> state_lib.TrainState:
  """Returns a state of random numbers, which do not compress."""
  numbers = np.random.default_rng(0)

  def draw(leaf):
    if leaf.ndim == 0:
      return leaf
    return jnp.asarray(numbers.standard_normal(leaf.shape, np.float32))

  kernel = jnp.zeros((3, 3, 256, 256))
  params = {f'layer_{i}': {'kernel': kernel} for i in range(40)}
  transform = state_lib.Optimizer().transform(
    likelihood.WeightRules(), batch_size=1, images=1
  )
  averages = state_lib.Averages(halflife=(10.0, 20.0))
  return jax.tree.map(draw, state_lib.create(params, transform, averages))


def measure(state: state_lib.TrainState) -> dict[str, float]:
  """Returns the seconds of a save and of a restore."""
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  target = checkpoint.abstract(state, jax.tree.map(lambda _: here, state))
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'checkpoints'
    with checkpoint.Checkpoints(path) as checkpoints:
      begin = time.perf_counter()
      checkpoints.save(state, 1)
      stall = time.perf_counter() - begin
      checkpoints.wait()
      whole = time.perf_counter() - begin
      begin = time.perf_counter()
      restored, _ = checkpoints.restore(1, target)
      jax.block_until_ready(restored)
      restore = time.perf_counter() - begin
  return {'save_stalls': stall, 'save': whole, 'restore': restore}


def _alone(state: state_lib.TrainState) -> dict[str, float]:
  """Returns the seconds of the checksums alone, and of a sha256."""
  begin = time.perf_counter()
  checkpoint._describe(state)
  checksums = time.perf_counter() - begin
  begin = time.perf_counter()
  checkpoint.tree_hash(state)
  sha256 = time.perf_counter() - begin
  return {'checksums': checksums, 'sha256': sha256}


def main(_) -> None:
  absl_logging.set_verbosity(absl_logging.ERROR)
  state = make_state()
  measure(state)  # compiles
  without = mock.patch.object(checkpoint, '_checksum', lambda array: 0)
  ways = {'with': contextlib.nullcontext(), 'without': without}
  found = {way: [] for way in (*ways, 'alone')}
  for _ in range(_BLOCKS.value):
    for way, context in ways.items():
      with context:
        found[way].append(measure(state))
    found['alone'].append(_alone(state))
  results = {'megabytes': memory.size_of(state) / 1e6}
  for way, blocks in found.items():
    results[way] = {
      name: round(statistics.median(block[name] for block in blocks), 3)
      for name in blocks[0]
    }
  results['blocks'] = _BLOCKS.value
  results['environment'] = devices_lib.environment()
  records.write_json(pathlib.Path(_OUTPUT.value), results)
  print(json.dumps(results, indent=1))


if __name__ == '__main__':
  app.run(main)
