"""Images a second that the loader reads, beside Grain's `MapDataset`.

python -m experiments.bench.loader

Five sets are written first: zips of 5,000 random PNGs of 32×32 and of 64×64
pixels, zips of latents as EDM2's are, of 32×32×8 and 64×64×8 numbers, and the
digits as TFDS prepares them, in array_record. Each is read in batches of 256 in
several ways, whose timed blocks alternate; the median of the blocks is
reported, and the fastest one, which other programs disturbed least. A block
opens a new iterator and lets it deliver a few batches before the clock starts,
so that neither the start of threads and processes nor what was read ahead
meanwhile is counted.

Beside each rate stand two times, which hang less on what else the machine does.
`own_cpu_us` is the time of a CPU that this process takes for a row: in a run it
is taken from the loop that dispatches the steps. `cpu_us` counts the processes
that read, too: 1e6 / cpu_us rows a second is what a core reads.

Grain is no dependency: it is measured where `pip install grain` has been run,
and left out elsewhere.
"""

from collections.abc import Callable
from collections.abc import Iterator
import functools
from importlib import metadata
import importlib.util
import io
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any
import zipfile

from absl import app
from absl import flags
import numpy as np
from PIL import Image

from ddo_jax.data import builders
from ddo_jax.data import files
from ddo_jax.data import loader
from ddo_jax.data import sources
from ddo_jax.runtime import records

_BLOCKS = flags.DEFINE_integer('blocks', 9, 'Timed blocks; median reported.')
_BATCHES = flags.DEFINE_integer('batches', 24, 'Batches in a timed block.')
_OUTPUT = flags.DEFINE_string(
  'output', 'experiments/results/loader.json', 'Result.'
)
_WORKERS = flags.DEFINE_integer(
  'workers', os.cpu_count(), 'Up to so many processes read.'
)

IMAGES = 5_000
BATCH = 256
WARM_UP = 10  # batches; more than any way but 'grain_rows' reads ahead
WORKERS = 2  # of Grain's processes
HAS_GRAIN = importlib.util.find_spec('grain') is not None


class Indexed:
  """A source by single indices, as Grain reads it.

  It is sent to worker processes as a path, because neither an open zip nor
  open records can be: each process opens the set for itself.
  """

  def __init__(self, open_set: Callable[[], sources.Source]):
    self._open_set = open_set
    self._opened: sources.Source | None = None

  def __reduce__(self) -> Any:
    return Indexed, (self._open_set,)

  @property
  def _source(self) -> sources.Source:
    if self._opened is None:
      self._opened = self._open_set()
    return self._opened

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    stored, label = self._source.read(np.array([index]))
    return {'stored': stored[0], 'label': label[0]}


def write_zip(path: pathlib.Path, side: int) -> None:
  """Writes a zip of smooth images with a little noise, like photographs."""
  draw = np.random.default_rng(0)
  with zipfile.ZipFile(path, 'w') as archive:
    for i in range(IMAGES):
      coarse = draw.integers(0, 256, (4, 4, 3), np.uint8)
      large = Image.fromarray(coarse).resize((side, side), Image.BICUBIC)
      noise = draw.integers(-4, 5, (side, side, 3))
      pixels = np.clip(np.asarray(large) + noise, 0, 255).astype(np.uint8)
      file = io.BytesIO()
      Image.fromarray(pixels).save(file, 'PNG')
      archive.writestr(f'{i // 1000:05d}/img{i:08d}.png', file.getvalue())


def write_latents(path: pathlib.Path, side: int, count: int) -> None:
  """Writes a zip of latents, float32 [8,side,side], stored uncompressed."""
  draw = np.random.default_rng(0)
  with zipfile.ZipFile(path, 'w') as archive:
    for i in range(count):
      file = io.BytesIO()
      np.save(file, abs(draw.standard_normal((8, side, side), np.float32)))
      name = f'{i // 1000:05d}/img-mean-std-{i:08d}.npy'
      archive.writestr(name, file.getvalue())


def open_digits(folder: str) -> sources.Source:
  """The digits, decoded at every read as a set too large for memory is."""
  return builders.open_split('digits', 'train', data_dir=folder)


def serial(open_set: Callable[[], sources.Source]) -> Iterator[Any]:
  """Reads in the calling thread, by the loader's order."""
  source = open_set()
  for step in range(10**6):
    positions = step * BATCH + np.arange(BATCH)
    yield source.read(loader.order(0, positions, len(source)))


def ahead(
  open_set: Callable[[], sources.Source], workers: int
) -> Iterator[Any]:
  """Reads as training does: the loader, ahead in threads or processes."""
  return loader.batches(
    open_set(),
    seed=0,
    batch_size=BATCH,
    start_step=0,
    stop_step=10**6,
    workers=workers,
  )


def grain_shuffled(open_set: Callable[[], sources.Source]) -> Any:
  """Grain's endless stream of shuffled rows."""
  import grain

  return grain.MapDataset.source(Indexed(open_set)).shuffle(seed=0).repeat()


def grain_rows(open_set: Callable[[], sources.Source]) -> Iterator[Any]:
  """Grain with its defaults: rows read in 16 threads, batched afterwards."""
  rows = grain_shuffled(open_set).to_iter_dataset()
  return iter(rows.batch(BATCH, drop_remainder=True))


def grain_batches(open_set: Callable[[], sources.Source]) -> Iterator[Any]:
  """Grain with whole batches read in as many threads as the loader's."""
  import grain

  options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
  batched = grain_shuffled(open_set).batch(BATCH, drop_remainder=True)
  return iter(batched.to_iter_dataset(options))


def grain_processes(open_set: Callable[[], sources.Source]) -> Iterator[Any]:
  """Grain with whole batches read in two processes."""
  import grain

  options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
  batched = grain_shuffled(open_set).batch(BATCH, drop_remainder=True)
  workers = grain.MultiprocessingOptions(num_workers=WORKERS)
  return iter(batched.to_iter_dataset(options).mp_prefetch(workers))


def children_seconds() -> float:
  """The time of a CPU that this process's children have taken so far."""
  ticks = 0
  for listed in pathlib.Path('/proc/self/task').glob('*/children'):
    for child in listed.read_text().split():
      stat = pathlib.Path(f'/proc/{child}/stat').read_text()
      user, system = stat.rpartition(')')[2].split()[11:13]
      ticks += int(user) + int(system)
  return ticks / os.sysconf('SC_CLK_TCK')


def block(stream: Iterator[Any]) -> tuple[float, float, float]:
  """Rows a second; microseconds a row of this process, and with children."""
  for _ in range(WARM_UP):
    next(stream)
  start = time.perf_counter()
  own = time.process_time()
  others = children_seconds()
  for _ in range(_BATCHES.value):
    next(stream)
  own = time.process_time() - own
  others = children_seconds() - others
  seconds = time.perf_counter() - start
  if hasattr(stream, 'close'):
    stream.close()
  rows = BATCH * _BATCHES.value
  return rows / seconds, own / rows * 1e6, (own + others) / rows * 1e6


def start_seconds(open_set: Callable[[], sources.Source]) -> float:
  """The seconds from the start of a worker process to its first batch."""
  source = open_set()
  source.read(np.arange(1))
  start = time.perf_counter()
  stream = ahead(lambda: source, 1)
  next(stream)
  seconds = time.perf_counter() - start
  stream.close()
  return seconds


def measure(open_set: Callable[[], sources.Source]) -> dict[str, Any]:
  """The rates of each way."""
  ways = {'serial': serial}
  for workers in (0, 1, *range(2, 1 + max(_WORKERS.value, 1))):
    name = f'workers_{workers}' if workers else 'threads'
    ways[name] = functools.partial(ahead, workers=workers)
  if HAS_GRAIN:
    ways |= {
      'grain_rows': grain_rows,
      'grain_batches': grain_batches,
      'grain_processes': grain_processes,
    }
  blocks: dict[str, list[tuple[float, float, float]]] = {
    way: [] for way in ways
  }
  for _ in range(_BLOCKS.value):
    for name, way in ways.items():
      blocks[name].append(block(way(open_set)))
  result: dict[str, Any] = {
    'first_batch_of_a_worker_seconds': round(start_seconds(open_set), 2),
  }
  for name, measured in blocks.items():
    rates, own, cpu = zip(*measured, strict=True)
    result[name] = {
      'images_per_second': round(statistics.median(rates)),
      'fastest_block': round(max(rates)),
      'own_cpu_us': round(statistics.median(own), 1),
      'cpu_us': round(statistics.median(cpu), 1),
    }
  return result


def import_seconds(module: str) -> float:
  """The median time to import a module in a fresh interpreter with numpy."""
  code = (
    'import time, numpy; start = time.perf_counter();'
    f' import {module}; print(time.perf_counter() - start)'
  )
  times = []
  for _ in range(5):
    done = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    times.append(float(done.stdout))
  return statistics.median(times)


def grain_order() -> dict[str, bool]:
  """What Grain's shuffle of 1,000 rows promises a run that resumes."""
  import grain

  def stream(seed: int) -> Any:
    rows = grain.MapDataset.source(np.arange(1_000)).shuffle(seed=seed)
    return rows.repeat().batch(64)

  steps = [stream(0)[step].tolist() for step in range(40)]
  iterator = iter(stream(0)[20:].to_iter_dataset())
  resumed = [next(iterator).tolist() for _ in range(20)]
  two_epochs = np.concatenate([stream(0)[step] for step in range(32)])[:2_000]
  first_of_next_seed = np.concatenate([stream(1)[step] for step in range(16)])
  return {
    'a_step_is_a_function_of_seed_and_step': stream(0)[25].tolist()
    == steps[25],
    'resumes_at_any_step': resumed == steps[20:],
    'epoch_1_of_seed_0_is_epoch_0_of_seed_1': bool(
      np.array_equal(two_epochs[1_000:], first_of_next_seed[:1_000])
    ),
  }


def processor() -> str:
  """The model of the CPU."""
  for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
    if line.startswith('model name'):
      return line.partition(':')[2].strip()
  return platform.machine()


def main(_) -> None:
  packages = ['numpy', 'pillow', 'array_record', 'tensorflow-datasets']
  if HAS_GRAIN:
    packages.append('grain')
  results: dict[str, Any] = {'batch_size': BATCH, 'images_in_a_zip': IMAGES}
  with tempfile.TemporaryDirectory() as folder:
    for side in (32, 64):
      path = pathlib.Path(folder) / f'{side}.zip'
      write_zip(path, side)
      open_zip = functools.partial(files.open_files, path)
      results[f'png_zip_{side}'] = measure(open_zip)
    for side, count in ((32, 3_000), (64, 1_000)):
      path = pathlib.Path(folder) / f'latents_{side}.zip'
      write_latents(path, side, count)
      open_zip = functools.partial(files.open_files, path)
      results[f'latents_zip_{side}'] = measure(open_zip)
    results['array_record_digits'] = measure(
      functools.partial(open_digits, folder)
    )
  results['import_seconds'] = {
    'ddo_jax.data.loader': import_seconds('ddo_jax.data.loader')
  }
  if HAS_GRAIN:
    results['import_seconds']['grain'] = import_seconds('grain')
    results['grain_order'] = grain_order()
  results['environment'] = {
    'device': f'{processor()}, {os.cpu_count()} cores',
    'load_average': os.getloadavg()[1],
    'python': platform.python_version(),
    'versions': {name: metadata.version(name) for name in packages},
  }
  records.write_json(pathlib.Path(_OUTPUT.value), results)
  print(json.dumps(results, indent=1))


if __name__ == '__main__':
  app.run(main)
