"""Command lines of `ddo_jax.main`, each in a process of its own.

Nearly all the time of a command that only makes a mistake goes into imports.
Here one process imports them, and each command runs in a fork of it.
"""

import atexit
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import traceback

ROOT = pathlib.Path(__file__).parents[1]


def fatal(*args: str) -> str:
  """Returns the one line that a mistaken command prints."""
  status, printed = run(*args)
  assert status == 1, printed
  assert 'Traceback' not in printed, printed
  line = printed.strip().splitlines()[-1]
  assert line.startswith('FATAL'), printed
  return line


def run(*args: str) -> tuple[int, str]:
  """Runs a command; returns its exit status and all that it prints."""
  server = _server()
  server.stdin.write(json.dumps(args) + '\n')
  server.stdin.flush()
  return tuple(json.loads(server.stdout.readline()))


@functools.cache
def _server() -> subprocess.Popen:
  server = subprocess.Popen(
    [sys.executable, '-m', 'tests.command_line'],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  atexit.register(server.kill)
  return server


def _serve() -> None:
  """Runs the commands that come in, a JSON list of arguments a line."""
  from absl import app

  from ddo_jax import main

  for line in sys.stdin:
    with tempfile.TemporaryFile() as printed:
      child = os.fork()
      if not child:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
        # Where config_flags looks for overrides.
        sys.argv = ['ddo_jax.main', *json.loads(line)]
        _end_with(app.run, main._main, flags_parser=main._parse_flags)
      _, status = os.waitpid(child, 0)
      printed.seek(0)
      text = printed.read().decode()
    print(json.dumps([os.waitstatus_to_exitcode(status), text]), flush=True)


def _end_with(call, *args, **options) -> None:
  """Calls a function and ends the process as Python would after it."""
  status = 0
  try:
    call(*args, **options)
  except SystemExit as done:
    status = done.code or 0
    if isinstance(status, str):
      print(status, file=sys.stderr)
      status = 1
  except BaseException:
    traceback.print_exc()
    status = 1
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


if __name__ == '__main__':
  _serve()
