"""The processes of one run: they find each other, agree, and end together.

Several processes run the same program at the same time, each with devices of
its own. What is computed on the devices they compute together. What is read of
the disk to decide what comes next, and what is written, is process 0's affair:
`decide` tells its answer to all.

A process that comes to its end says so to the others, which end with it. One
that dies without a word is noticed by the next exchange with it, or by its
heartbeat, at the latest after `_HEARTBEAT` seconds.
"""

import collections
from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import typing
from typing import Any
from typing import NoReturn

from ddo_jax import errors
from ddo_jax.runtime import interruption

# Else `initialize` imports them: a process that only reads rows needs no JAX.
if typing.TYPE_CHECKING:
  import jax
  from jax._src import distributed  # its key-value store has no public name

_JOINING = 300  # seconds in which all processes must have come
_HEARTBEAT = 60  # seconds of silence after which a process counts as dead
_GRACE = 2.0  # seconds in which processes may come to the same end
_DAY = 24 * 3600

_LOG_LEVEL = 'TF_CPP_MIN_LOG_LEVEL'
_LOST = (
  'another process of this run ended without a word (killed, out of memory, or'
  ' its machine failed); what was saved is whole: run the same command again'
  f' (with {_LOG_LEVEL}=0 in the environment the runtime says what it saw)'
)
# How the transports say that a peer is gone.
_SIGNS_OF_LOSS = ('Gloo', 'UNAVAILABLE', 'Connection reset', 'Socket closed')
# What launchers set for each of several processes.
_LAUNCHED = ('SLURM_PROCID', 'OMPI_COMM_WORLD_RANK', 'JOB_COMPLETION_INDEX')

_joined = False  # whether `initialize` found others
_alone = 0  # how many calls deep this process works by itself
_asked: collections.Counter[str] = collections.Counter()
_ending = threading.Lock()


def count() -> int:
  """Returns the number of processes that now work together."""
  if _alone or not _joined:
    return 1
  return jax.process_count()


def index() -> int:
  """Returns this process's number among them, from 0."""
  return jax.process_index() if count() > 1 else 0


def is_main() -> bool:
  """Whether this is process 0, which alone writes records."""
  return index() == 0


def is_by_itself() -> bool:
  """Whether there are others, which this process now does without."""
  return _alone > 0 and _joined


def name() -> str:
  """Returns what this process is called, such as 'process 1 of 4 (host)'."""
  state = distributed.global_state
  host = socket.gethostname()
  return f'process {state.process_id} of {state.num_processes} ({host})'


def _client() -> Any:
  return distributed.global_state.client


def _told(key: str, finished: threading.Event | None = None) -> Any:
  """Waits for a key of the store, or until it is finished: then None.

  Signals are heard meanwhile.
  """
  while finished is None or not finished.is_set():
    try:
      return json.loads(_client().blocking_key_value_get(key, 1_000))
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise
  return None


def _tell(key: str, **value: Any) -> None:
  _client().key_value_set(key, json.dumps(value))


@contextlib.contextmanager
def _by_itself() -> Iterator[None]:
  """Inside, this process works as if there were no other."""
  global _alone
  _alone += 1
  try:
    yield
  finally:
    _alone -= 1


@contextlib.contextmanager
def main_first(what: str) -> Iterator[None]:
  """Process 0 runs the body, and then all others do, each by itself.

  Such a body finds what it wants on the disk, or brings it there.

  Args:
    what: a name; all processes come to equal names in the same order.

  Raises:
    errors.UserError: as the body of process 0, in all of them.
  """
  if count() == 1:
    yield
    return
  _asked[what] += 1
  key = f'{what}/{_asked[what]}'
  if not is_main():
    _raise_if_failed(_told(key))
    with _by_itself():
      yield
    return
  try:
    with _by_itself():
      yield
  except errors.UserError as error:
    _tell(key, error=str(error))
    raise
  _tell(key)


def _raise_if_failed(told: dict[str, Any]) -> None:
  if 'error' in told:
    raise errors.UserError(told['error'])


def decide(what: str, call: Callable[[], Any]) -> Any:
  """Calls on process 0, and returns its result on all.

  Inside the call the process is by itself: nothing in it waits for another.

  Args:
    what: a name; all processes come to equal names in the same order.
    call: returns JSON values.

  Raises:
    errors.UserError: as the call, on all processes.
  """
  if count() == 1:
    return call()
  _asked[what] += 1
  key = f'{what}/{_asked[what]}'
  if is_main():
    try:
      with _by_itself():
        value = call()
    except errors.UserError as error:
      _tell(key, error=str(error))
      raise
    _tell(key, value=value)
    return value
  told = _told(key)
  _raise_if_failed(told)
  return told['value']


def gather(what: str, value: Any) -> list[Any]:
  """Returns the JSON values of all processes, which wait for each other.

  Args:
    what: a name; all processes come to equal names in the same order.
    value: this process's.
  """
  if count() == 1:
    return [value]
  _asked[what] += 1
  key = f'{what}/{_asked[what]}'
  _tell(f'{key}/{index()}', value=value)
  return [_told(f'{key}/{other}')['value'] for other in range(count())]


def check_equal(what: str, value: str) -> None:
  """Raises UserError unless a text is the same on all processes.

  Args:
    what: what it is, for the error.
    value: this process's.
  """
  values = gather(what, value)
  for other, theirs in enumerate(values):
    if theirs != values[0]:
      raise errors.UserError(
        f'{what} of process {other} is {theirs!r}, that of process 0'
        f' {values[0]!r}: start all processes with the same'
      )


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Joins the processes of a run; does nothing where there is only this one.

  Without arguments, what JAX knows of the launcher decides (SLURM, Open MPI,
  Kubernetes, TPU pods).

  Args:
    coordinator: the address of process 0, 'host:port'.
    num_processes: the number of processes; 1 looks for no launcher.
    process_id: this one's number, from 0.

  Raises:
    errors.UserError: the arguments make no sense, or the processes do not find
      each other.
  """
  _check(coordinator, num_processes, process_id)
  if num_processes == 1 or (num_processes is None and _launched_alone()):
    return
  if num_processes or any(name in os.environ for name in _LAUNCHED):
    _silence_the_runtime()
  global jax, distributed, _joined
  import jax
  from jax._src import distributed

  # It would take SIGTERM, which the loop hears itself.
  jax.config.update('jax_enable_preemption_service', False)
  wait = 'the processes did not find each other'
  if coordinator:
    wait = (
      f'process {process_id} of {num_processes} did not meet the others at'
      f' {coordinator}: start all of them with one --coordinator, which is'
      ' where process 0 runs, with one --num_processes, and each with a'
      ' --process_id of its own'
    )
  _say_at_abort(wait)
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      local_device_ids=_local_device_ids(),
      initialization_timeout=_JOINING,
      heartbeat_timeout_seconds=_HEARTBEAT,
      shutdown_timeout_seconds=_DAY,
    )
  except (RuntimeError, ValueError) as error:
    if 'coordinator_address should be defined' in str(error):
      signal.signal(signal.SIGABRT, signal.SIG_DFL)
      return  # no launcher
    reason = str(error).strip().partition('\n')[0]
    raise errors.UserError(f'{wait} ({reason})') from error
  _joined = True
  _say_at_abort(_LOST)


def _check(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
  """Raises UserError where the arguments do not go together."""
  given = {
    '--coordinator': coordinator,
    '--num_processes': num_processes,
    '--process_id': process_id,
  }
  lost = [flag for flag, value in given.items() if value is None]
  if num_processes == 1 and coordinator is None and process_id is None:
    return
  if len(lost) == 3:
    return
  if lost:
    raise errors.UserError(
      f'{" and ".join(lost)} missing: several processes want --coordinator'
      ' (host:port of process 0), --num_processes and --process_id; under'
      ' SLURM, Open MPI, Kubernetes and on TPU pods none of them'
    )
  if not re.fullmatch(r'.+:\d+', coordinator):
    raise errors.UserError(
      f'--coordinator is {coordinator!r}; it must be host:port, where process'
      ' 0 runs'
    )
  if num_processes < 1 or not 0 <= process_id < num_processes:
    raise errors.UserError(
      f'--process_id is {process_id} of --num_processes={num_processes}; it'
      f' must be from 0 to {num_processes - 1}'
    )


def _silence_the_runtime() -> None:
  """Keeps the runtime from writing many lines before it ends the process.

  It reads this from the environment when it is loaded. So the process begins
  again, which takes a second.
  """
  if os.environ.get(_LOG_LEVEL, '1') == '1':  # JAX sets 1 where nobody did
    os.environ[_LOG_LEVEL] = '4'
    os.execv(sys.executable, sys.orig_argv)


def _launched_alone() -> bool:
  """Whether the launcher started this process alone, or is none of JAX's."""
  seen = os.environ
  for sizes in ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'):
    if seen.get(sizes) == '1':
      return True
  # A pod of Kubernetes is one of several only in an indexed job.
  if 'KUBERNETES_SERVICE_HOST' in seen and 'TPU_WORKER_ID' not in seen:
    return 'JOB_COMPLETION_INDEX' not in seen
  return False


def _local_device_ids() -> list[int] | None:
  """Returns [] where this process takes all devices that it sees.

  Else JAX decides: under SLURM and Open MPI it gives each process the device
  of its rank on its machine, even where that process is the only one there, or
  was given a device of its own.
  """
  seen = os.environ
  tasks = seen.get('SLURM_STEP_TASKS_PER_NODE', '')  # such as 1(x4), or 8,7
  one_each = re.fullmatch(r'1(\(x\d+\))?', tasks) is not None
  one_each = one_each or seen.get('OMPI_COMM_WORLD_LOCAL_SIZE') == '1'
  visible = seen.get('CUDA_VISIBLE_DEVICES', '')
  if one_each or (visible and ',' not in visible):
    return []
  return None


def _check_devices() -> None:
  """Raises UserError unless all processes have equally many devices."""
  found = collections.Counter(d.process_index for d in jax.devices())
  if len(set(found.values())) > 1:
    counts = ', '.join(f'{n} of process {i}' for i, n in sorted(found.items()))
    raise errors.UserError(
      f'the processes see unequal numbers of devices ({counts}): give each'
      ' the same number'
    )


_at_abort = None  # kept, or it would be collected


def _say_at_abort(line: str) -> None:
  """Says a line in place of the runtime's abort, which no exception tells of.

  The runtime ends a process, in a thread of its own, where the coordinator is
  gone or says that another process is.
  """
  global _at_abort

  @ctypes.CFUNCTYPE(None, ctypes.c_int)
  def say(signum: int) -> None:
    del signum
    _leave(line, interruption.EX_TEMPFAIL)

  _at_abort = say
  ctypes.CDLL(None).signal(signal.SIGABRT, say)


def _leave(line: str, status: int) -> NoReturn:
  """Ends this process at once, with a line; the first call does, alone."""
  _ending.acquire()
  for each in line.splitlines():
    os.write(2, f'FATAL {each}\n'.encode())
  os._exit(status)


def _watch(finished: threading.Event) -> None:
  """Ends this process when another one has said that it ends."""
  try:
    told = _told('end', finished)
  except jax.errors.JaxRuntimeError:
    return  # the coordinator is gone, which ends this process too
  if told is None or told['name'] == name():
    return
  time.sleep(_GRACE)  # most often it is ending by itself, for the same reason
  _follow(told)


def _follow(told: dict[str, Any]) -> NoReturn:
  """Ends this process as another one has."""
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    _tell(f'gone/{jax.process_index()}')
  _leave(f'{told["name"]} ended: {told["line"]}', told['status'])


def _end(line: str, status: int, said: bool = False) -> NoReturn:
  """Says why this process ends, to its user and to the others, and ends it.

  Args:
    line: why.
    status: the exit status.
    said: whether its user knows already.
  """
  sys.stdout.flush()
  mine = {'line': line, 'status': status, 'name': name()}
  try:
    if line == _LOST:  # the others may be ending for a reason of their own
      time.sleep(_GRACE)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      _tell('end', **mine)
    told = _told('end')
    if told['name'] != mine['name'] and line == _LOST:
      _follow(told)
    # Of several that end for one reason, one says it.
    said = said or (told['name'] != mine['name'] and told['line'] == line)
    if jax.process_index() == 0:
      _see_off()
    else:
      _tell(f'gone/{jax.process_index()}')
  except jax.errors.JaxRuntimeError:
    pass  # the coordinator is gone
  _leave('' if said else line, status)


def _see_off() -> None:
  """Waits until the others have ended, for they do so with the coordinator."""
  until = time.monotonic() + 2 * _GRACE
  for other in range(1, jax.process_count()):
    left = max(until - time.monotonic(), 0.001)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      _client().blocking_key_value_get(f'gone/{other}', int(1_000 * left))


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Ends this process with the others, however the body ends.

  It ends at once where they do not have equally many devices.
  """
  if count() == 1:
    yield
    return
  finished = threading.Event()
  watcher = threading.Thread(target=_watch, args=(finished,), daemon=True)
  watcher.start()
  try:
    _check_devices()
    yield
    gather('the end', None)
  except errors.UserError as error:
    _end(str(error), 1)
  except SystemExit as left:
    status = left.code if isinstance(left.code, int) else 1
    _end('it was asked to; run the same command again', status, said=True)
  except BaseException as error:
    if any(sign in str(error) for sign in _SIGNS_OF_LOSS):
      _end(_LOST, interruption.EX_TEMPFAIL)
    traceback.print_exc()
    reason = f'{type(error).__name__}: {error}'.partition('\n')[0]
    _end(reason, 1, said=True)
  # A thread inside the runtime would not survive the interpreter's end.
  finished.set()
  watcher.join()
  jax.distributed.shutdown()
  signal.signal(signal.SIGABRT, signal.SIG_DFL)
