"""Runs of several processes on one machine, each with simulated devices.

Run as a program it is one of them. What it does is a list of scenes, each a
function below and its arguments; all processes play the same.
"""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
  flags = [
    f'--xla_force_host_platform_device_count={devices}',
    '--xla_backend_optimization_level=0',
    '--xla_cpu_use_fusion_emitters=false',
  ]
  more = {
    'XLA_FLAGS': ' '.join(flags),
    'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}',
    'TF_CPP_MIN_LOG_LEVEL': '4',
  }
  return os.environ | more


def start(
  count: int, devices: int, *command: str, **options
) -> list[subprocess.Popen]:
  """Starts a command as several processes, told of each other by flags."""
  address = f'--coordinator=127.0.0.1:{free_port()}'
  return [
    subprocess.Popen(
      [
        *(sys.executable, *command, address),
        *(f'--num_processes={count}', f'--process_id={index}'),
      ],
      cwd=ROOT,
      env=environment(devices) | options,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(count)
  ]


def end(group: list[subprocess.Popen]) -> list[tuple[int, str]]:
  """Waits for processes; returns each one's status and what it printed."""
  try:
    printed = [process.communicate(timeout=400)[0] for process in group]
  finally:
    for process in group:
      process.kill()
  return [(p.returncode, text) for p, text in zip(group, printed, strict=True)]


def play(count: int, devices: int, *scenes, **options) -> list[tuple[int, str]]:
  """Plays scenes, each (name, arguments...), with several processes."""
  script = str(pathlib.Path(__file__))
  return end(start(count, devices, script, json.dumps(scenes), **options))


def whole(workdir, images, **fields):
  """Plays a run to its end."""
  from training import test_resume

  from ddo_jax import main

  config = test_resume.make_config(pathlib.Path(images), **fields)
  main.selfplay(config, pathlib.Path(workdir))


def whole_until(workdir, images, process, call, **fields):
  """Plays a run in which one process is killed at a step."""
  import pytest
  from training import test_resume

  from ddo_jax.runtime import processes
  from ddo_jax.training import loop

  def send():
    if processes.index() == process:
      os.kill(os.getpid(), signal.SIGKILL)

  with pytest.MonkeyPatch.context() as patch:
    test_resume.at_call(patch, loop._Logger, 'push', call, send)
    whole(workdir, images, **fields)


def make_job(folder, kind, num_devices=0):
  """Makes the job of a short round, whose evaluations draw images."""
  import numpy as np
  from training import test_loop

  from ddo_jax import config as config_lib
  from ddo_jax import rng
  from ddo_jax.method import generate
  from ddo_jax.runtime import devices
  from ddo_jax.samplers import heun

  executor = devices.Executor(config_lib.Executor(kind=kind), num_devices)
  sampler = heun.Heun(2, 0.02, 10.0)
  generator = generate.Generator(
    test_loop.MODEL, {}, sampler, executor, batch=8
  )

  def evaluate(params, folder=None):
    del folder
    ids = np.arange(12)
    images = generator.images(params, rng.stream(0), ids, ids % 3)
    return {'fd_train': float(images.mean()), 'drawn': images.tobytes().hex()}

  batch = test_loop.BATCH
  phase = dataclasses.replace(
    test_loop.PHASE,
    images=6 * batch,
    rhythm=config_lib.Rhythm(
      eval_images=6 * batch, save_images=2 * batch, log_images=batch
    ),
  )
  job = test_loop.new_job(executor, pathlib.Path(folder), evaluate)
  return dataclasses.replace(job, phase=phase)


def train(folder, kind, signal_at=0):
  """Plays a short round; at a step its last process may get SIGTERM."""
  import pytest
  from training import test_resume

  from ddo_jax.runtime import processes
  from ddo_jax.training import loop

  def send():
    if processes.index() == processes.count() - 1:
      os.kill(os.getpid(), signal.SIGTERM)

  with pytest.MonkeyPatch.context() as patch:
    if signal_at:
      test_resume.at_call(patch, loop._Logger, 'push', signal_at, send)
    try:
      promotion = loop.run(make_job(folder, kind))
    except SystemExit as left:
      print(f'left with {left.code}', flush=True)
    else:
      print(f'promoted {promotion.step} {promotion.profile}', flush=True)


def score(folder, params):
  """Scores under a protocol of one's own, with a stand-in for Inception."""
  from evaluation import test_fidelity
  import pytest

  with pytest.MonkeyPatch.context() as patch:
    test_fidelity.stand_in(patch)
    paths = map(pathlib.Path, (folder, params))
    count = test_fidelity.score_under_its_own(*paths)
  print(f'read {count}', flush=True)


def encode(folder, output):
  """Encodes the images of a test, in its small shards."""
  from training import test_encode

  from ddo_jax import main
  from ddo_jax.data import latent_set

  latent_set.SHARD = test_encode.SHARD
  config = test_encode.make_config(pathlib.Path(folder))
  main.encode(config, pathlib.Path(output))


def fail(process, line):
  """One process makes out a mistake while the others are busy."""
  from ddo_jax import errors
  from ddo_jax.runtime import processes

  if processes.index() == process:
    raise errors.UserError(line)
  time.sleep(100)


def die(process):
  """One process is killed while another one waits for it."""
  from jax.experimental import multihost_utils

  from ddo_jax.runtime import processes

  if processes.index() == process:
    os.kill(os.getpid(), signal.SIGKILL)
  multihost_utils.sync_global_devices('where the others are')


def _main(scenes, *flags) -> None:
  """Plays scenes as one of several processes."""
  from ddo_jax.runtime import interruption
  from ddo_jax.runtime import layout
  from ddo_jax.runtime import processes

  layout.SMALLEST_SPLIT = 1
  values = dict(flag.lstrip('-').split('=') for flag in flags)
  processes.initialize(
    values['coordinator'],
    int(values['num_processes']),
    int(values['process_id']),
  )
  with processes.ending_together(), interruption.handled():
    for name, arguments in json.loads(scenes):
      globals()[name](**arguments)


if __name__ == '__main__':
  _main(*sys.argv[1:])
