"""Speed and memory of the evaluation: features, Fréchet distance, neighbours.

python -m experiments.bench.evaluation

Features a second of the Inception network from uint8 images, and its share of
the rate of convolutions measured beside it: of the network's own 94, each run
alone, and of one large one. The Fréchet distance against the same by
scipy.linalg.sqrtm. Peak memory of precision and recall, in a process of its
own that is ended after a while: memory is steady from the first tiles on.
"""

from collections.abc import Callable
import json
import math
import multiprocessing
import os
import pathlib
import time
from typing import Any

from absl import app
from absl import flags
import jax
from jax.extend import core as jax_core
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from ddo_jax.evaluation.metrics import frechet
from ddo_jax.evaluation.metrics import prdc
from ddo_jax.evaluation.networks import inception
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import records

_BATCH = flags.DEFINE_integer('batch', 16, 'Images a call.')
_SIDE = flags.DEFINE_integer('side', 32, 'Pixels of an image.')
_REPEATS = flags.DEFINE_integer('repeats', 3, 'Timed calls; median reported.')
_WIDTH = flags.DEFINE_integer('width', 2_048, 'Features.')
_ROWS = flags.DEFINE_integer('rows', 50_000, 'Images in precision and recall.')
_SECONDS = flags.DEFINE_float('seconds', 60.0, 'For precision and recall.')
_OUTPUT = flags.DEFINE_string(
  'output', 'experiments/results/evaluation.json', 'Result.'
)

_LARGE = ((35, 35, 256), (3, 3, 256, 256))  # input without batch, kernel


def seconds(call: Callable[[], Any], repeats: int) -> float:
  """Median time of a call, after one that compiles."""
  times = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
  return float(np.median(times[1:]))


def convolutions(jaxpr: Any) -> list[Any]:
  """All convolutions of a program, those inside its calls included."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'conv_general_dilated':
      found.append(equation)
    for inner in jax_core.jaxprs_in_params(equation.params):
      found += convolutions(inner)
  return found


def flops(equation: Any) -> int:
  """Multiplications and additions of a convolution (NHWC, HWIO)."""
  kernel = equation.invars[1].aval.shape
  return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel[:3])


def alone(equation: Any) -> Callable[[], Any]:
  """A convolution by itself, on random arrays."""
  random = np.random.default_rng(0)
  arrays = [
    jnp.asarray(random.normal(size=v.aval.shape), jnp.float32)
    for v in equation.invars
  ]
  run = jax.jit(lambda x, k: equation.primitive.bind(x, k, **equation.params))
  return lambda: run(*arrays)


def features() -> dict[str, float]:
  """Features a second and the shares of the rates of convolutions."""
  random = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(
      np.abs(random.normal(size=leaf.shape)) * 0.02, jnp.float32
    ),
    inception.param_shapes(),
  )
  shape = (_BATCH.value, _SIDE.value, _SIDE.value, 3)
  images = random.integers(0, 256, shape, dtype=np.uint8)
  network = jax.jit(lambda p, x: inception.apply(p, x).features)
  program = jax.make_jaxpr(network)(params, images)
  own = convolutions(program.jaxpr)
  work = sum(map(flops, own))
  whole = seconds(lambda: network(params, images), _REPEATS.value)
  times = {}
  for equation in own:
    key = tuple(v.aval.shape for v in equation.invars), str(equation.params)
    if key not in times:
      times[key] = [0, seconds(alone(equation), 1)]
    times[key][0] += 1
  bare = sum(count * taken for count, taken in times.values())
  inputs = jnp.ones((_BATCH.value, *_LARGE[0]))
  kernel = jnp.ones(_LARGE[1])
  large = jax.jit(
    lambda x, k: jax.lax.conv_general_dilated(
      x,
      k,
      (1, 1),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      precision=jax.lax.Precision.HIGHEST,
    )
  )
  taken = seconds(lambda: large(inputs, kernel), _REPEATS.value)
  large_work = 2 * inputs.size * math.prod(_LARGE[1][:3])
  return {
    'convolutions': len(own),
    'gflop_an_image': work / _BATCH.value / 1e9,
    'features_per_second': _BATCH.value / whole,
    'gflop_per_second': work / whole / 1e9,
    'share_of_own_convolutions': bare / whole,
    'share_of_large_convolution': (work / whole) / (large_work / taken),
  }


def distance() -> dict[str, float]:
  """The Fréchet distance here and by scipy's matrix square root."""
  random = np.random.default_rng(0)
  width = _WIDTH.value
  mix = random.normal(size=(width, width)) / math.sqrt(width)
  sums = [
    frechet.Statistics.of(random.normal(size=(2 * width, width)) @ mix)
    for _ in range(2)
  ]
  a, b = sums
  moments = (a.mean, a.covariance, b.mean, b.covariance)
  start = time.perf_counter()
  ours = frechet.distance_of_moments(*moments)
  middle = time.perf_counter()
  cross = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
  theirs = np.square(a.mean - b.mean).sum()
  theirs += np.trace(a.covariance + b.covariance - 2 * cross)
  end = time.perf_counter()
  return {
    'width': width,
    'seconds': middle - start,
    'sqrtm_seconds': end - middle,
    'share_of_sqrtm': (middle - start) / (end - middle),
    'relative_difference': abs(ours - theirs) / theirs,
  }


def _peak_gigabytes(process: int) -> float:
  status = pathlib.Path(f'/proc/{process}/status').read_text()
  line = next(x for x in status.splitlines() if x.startswith('VmHWM'))
  return int(line.split()[1]) / 2**20


def _neighbours(rows: int, width: int, out: Any) -> None:
  random = np.random.default_rng(0)
  draw = lambda: random.standard_normal((rows, width), dtype=np.float32)
  real, fake = draw(), draw()
  out.put(_peak_gigabytes(os.getpid()))
  out.put(tuple(prdc.precision_recall(real, fake)))


def neighbours() -> dict[str, float]:
  """Peak memory of precision and recall of two full sets."""
  context = multiprocessing.get_context('spawn')
  out = context.Queue()
  process = context.Process(
    target=_neighbours, args=(_ROWS.value, _WIDTH.value, out)
  )
  process.start()
  features_alone = out.get()
  start = time.perf_counter()
  peak, finished = 0.0, False
  while not finished and time.perf_counter() - start < _SECONDS.value:
    peak = max(peak, _peak_gigabytes(process.pid))
    process.join(0.2)
    finished = not out.empty()
  took = time.perf_counter() - start
  process.terminate()
  process.join()
  return {
    'rows': _ROWS.value,
    'width': _WIDTH.value,
    'features_gigabytes': features_alone,
    'peak_gigabytes': peak,
    'seconds': took,
    'finished': finished,
  }


def main(_) -> None:
  results = {
    'features': features(),
    'frechet': distance(),
    'precision_recall': neighbours(),
    'environment': devices_lib.environment(),
  }
  records.write_json(pathlib.Path(_OUTPUT.value), results)
  print(json.dumps(results, indent=1))


if __name__ == '__main__':
  app.run(main)
