"""Speed and memory of the evaluation: features, Fréchet distance, neighbours.

python -m experiments.bench.evaluation

Three things are measured. The first is how many images a second the Inception
network turns from uint8 pixels into features, and what share that is of the
rate of convolutions measured beside it: of the network's own 94, each run
alone, and of one large one. The second is the Fréchet distance, against the
same by scipy.linalg.sqrtm. The third is the peak memory of precision and
recall, in a process of its own that is ended after a while: memory is steady
from the first tiles on.
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
_SECONDS = flags.DEFINE_float(
  'seconds', 60.0, 'When precision and recall are ended.'
)
_OUTPUT = flags.DEFINE_string(
  'output', 'experiments/results/evaluation.json', 'The file to write.'
)

_LARGE = ((35, 35, 256), (3, 3, 256, 256))  # input without batch, kernel


def seconds(call: Callable[[], Any], repeats: int) -> float:
  """Returns the median time of a call, after one that compiles."""
  times = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
  return float(np.median(times[1:]))


def convolutions(jaxpr: Any) -> list[Any]:
  """Returns all convolutions of a program, those inside its calls included."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'conv_general_dilated':
      found.append(equation)
    for inner in jax_core.jaxprs_in_params(equation.params):
      found += convolutions(inner)
  return found


def flops(equation: Any) -> int:
  """Counts the multiplications and additions of a convolution (NHWC, HWIO)."""
  output = equation.outvars[0].aval.shape
  kernel = equation.invars[1].aval.shape
  return 2 * math.prod(output) * math.prod(kernel[:3])


def alone(equation: Any) -> Callable[[], Any]:
  """Returns a call of one convolution by itself, on random arrays."""
  random = np.random.default_rng(0)
  inputs, kernel = (
    jnp.asarray(random.normal(size=variable.aval.shape), jnp.float32)
    for variable in equation.invars
  )

  @jax.jit
  def run(x, k):
    return equation.primitive.bind(x, k, **equation.params)

  return lambda: run(inputs, kernel)


def large_rate() -> float:
  """Returns the FLOP/s of one large convolution."""
  inputs = jnp.ones((_BATCH.value, *_LARGE[0]))
  kernel = jnp.ones(_LARGE[1])

  @jax.jit
  def run(x, k):
    return jax.lax.conv_general_dilated(
      x,
      k,
      window_strides=(1, 1),
      padding='SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      precision=jax.lax.Precision.HIGHEST,
    )

  work = 2 * inputs.size * math.prod(_LARGE[1][:3])
  return work / seconds(lambda: run(inputs, kernel), _REPEATS.value)


def alone_seconds(equations: list[Any]) -> float:
  """Returns the seconds of convolutions, each run alone; equal ones once."""
  times = {}
  total = 0.0
  for equation in equations:
    shapes = tuple(variable.aval.shape for variable in equation.invars)
    key = (shapes, str(equation.params))
    if key not in times:
      times[key] = seconds(alone(equation), 1)
    total += times[key]
  return total


def features() -> dict[str, float]:
  """Measures features a second, and the shares of the convolutions' rates."""
  random = np.random.default_rng(0)

  def weights(leaf):
    values = np.abs(random.normal(size=leaf.shape)) * 0.02
    return jnp.asarray(values, jnp.float32)

  params = jax.tree.map(weights, inception.param_shapes())
  shape = (_BATCH.value, _SIDE.value, _SIDE.value, 3)
  images = random.integers(0, 256, shape, dtype=np.uint8)

  @jax.jit
  def network(params, images):
    return inception.apply(params, images).features

  program = jax.make_jaxpr(network)(params, images)
  own = convolutions(program.jaxpr)
  work = sum(flops(equation) for equation in own)
  whole = seconds(lambda: network(params, images), _REPEATS.value)
  return {
    'convolutions': len(own),
    'gflop_an_image': work / _BATCH.value / 1e9,
    'features_per_second': _BATCH.value / whole,
    'gflop_per_second': work / whole / 1e9,
    'share_of_own_convolutions': alone_seconds(own) / whole,
    'share_of_large_convolution': work / whole / large_rate(),
  }


def distance() -> dict[str, float]:
  """Times the Fréchet distance here, and by scipy's matrix square root."""
  random = np.random.default_rng(0)
  width = _WIDTH.value
  mix = random.normal(size=(width, width)) / math.sqrt(width)

  def random_set():
    rows = random.normal(size=(2 * width, width)) @ mix
    return frechet.Statistics.of(rows)

  a = random_set()
  b = random_set()
  start = time.perf_counter()
  ours = frechet.distance_of_moments(a.mean, a.covariance, b.mean, b.covariance)
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
  """Returns the largest memory that a process has had so far."""
  status = pathlib.Path(f'/proc/{process}/status').read_text()
  for line in status.splitlines():
    if line.startswith('VmHWM'):
      return int(line.split()[1]) / 2**20
  raise RuntimeError(f'process {process} has no peak memory')


def _neighbours(rows: int, width: int, out: Any) -> None:
  """Puts the peak memory before precision and recall, and then the two."""
  random = np.random.default_rng(0)
  real = random.standard_normal((rows, width), dtype=np.float32)
  fake = random.standard_normal((rows, width), dtype=np.float32)
  out.put(_peak_gigabytes(os.getpid()))
  out.put(tuple(prdc.precision_recall(real, fake)))


def neighbours() -> dict[str, float]:
  """Measures the peak memory of precision and recall of two full sets."""
  context = multiprocessing.get_context('spawn')
  out = context.Queue()
  process = context.Process(
    target=_neighbours, args=(_ROWS.value, _WIDTH.value, out)
  )
  process.start()
  features_alone = out.get()
  start = time.perf_counter()
  peak = 0.0
  finished = False
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
