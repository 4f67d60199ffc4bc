"""The records of a run that people read: JSON files and metrics.jsonl."""

import contextlib
import hashlib
import json
import logging
import math
import pathlib
import time
from typing import Any

from ddo_jax import errors
from ddo_jax.runtime import disk
from ddo_jax.runtime import processes
from ddo_jax.runtime import reading

_LOGGER = logging.getLogger(__name__)
_LARGEST = 2**26  # bytes of a record
_BOARD_SECONDS = 10  # after which TensorBoard's file is flushed again


def json_bytes(value: Any) -> bytes:
  """Returns a JSON value as the records' files hold it."""
  return (json.dumps(value, indent=1, allow_nan=False) + '\n').encode()


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file, whole or not at all."""
  content = json_bytes(value)
  with disk.whole(path) as file:
    file.write(content)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    errors.UserError: the file is missing or damaged, or holds something else.
  """
  try:
    value = json.loads(reading.read(path, _LARGEST))
    if not isinstance(value, dict):
      raise ValueError(f'a {type(value).__name__}, no table of names')
  except (OSError, ValueError, RecursionError) as error:
    raise errors.UserError(
      f'cannot read {path} ({error}); is this the --workdir of a run?'
    ) from error
  return value


def _digest(value: dict[str, Any]) -> str:
  """The sha256 of a JSON object, whatever the order of its names."""
  content = json.dumps(value, sort_keys=True, allow_nan=False)
  return hashlib.sha256(content.encode()).hexdigest()


def sealed(value: dict[str, Any]) -> dict[str, Any]:
  """Returns a JSON object with its own sha256, which `unsealed` verifies."""
  return value | {'sha256': _digest(value)}


def unsealed(value: Any) -> dict[str, Any]:
  """Returns the object that `sealed` was given.

  Raises:
    ValueError: it is another one.
  """
  if not isinstance(value, dict):
    raise ValueError('the record is no JSON object')
  content = {name: item for name, item in value.items() if name != 'sha256'}
  if value.get('sha256') != _digest(content):
    raise ValueError('the record does not match its sha256')
  return content


def _plain(value: Any) -> Any:
  """Returns a JSON value for an array or a number; null for NaN and Inf."""
  if hasattr(value, 'tolist'):
    value = value.tolist()
  if isinstance(value, list):
    return [_plain(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def plain(record: dict[str, Any]) -> dict[str, Any]:
  """Returns a record of numbers, text and vectors as JSON has it."""
  return {name: _plain(value) for name, value in record.items()}


def _parse(line: bytes) -> dict[str, Any] | None:
  """Returns the record of a line of metrics.jsonl; None: it is damaged."""
  try:
    record = json.loads(line.decode('ascii'))
    if isinstance(record['stage'] + record['kind'], str):
      int(record['step'])
      return record
  except (ValueError, TypeError, KeyError):
    pass
  return None


def _read_lines(
  path: pathlib.Path,
) -> list[tuple[bytes, dict[str, Any] | None]]:
  """Returns each line of metrics.jsonl with its record; names the damaged."""
  if not path.exists():
    return []
  *lines, rest = path.read_bytes().split(b'\n')
  # The rest is a line that was cut off while it was written.
  read = [(line, _parse(line)) for line in lines]
  if _parse(rest):
    read.append((rest, _parse(rest)))
  for number, (_, record) in enumerate(read, 1):
    if record is None:
      _LOGGER.warning('%s: line %d is damaged and left out', path, number)
  return read


def read_log(
  workdir: pathlib.Path, stage: str | None = None
) -> list[dict[str, Any]]:
  """Returns the records of metrics.jsonl, in order.

  A damaged line is named and left out.

  Args:
    workdir: the run's folder.
    stage: the stage whose records are wanted; None: all.
  """
  found = []
  for _, record in _read_lines(workdir / 'metrics.jsonl'):
    if record and stage in (None, record['stage']):
      found.append(record)
  return found


class MetricsLog:
  """Writes metrics.jsonl, one JSON object a line.

  Every record holds `stage` (the folder's name), `kind` ('train', 'eval' or
  'bad'), `step` and `images`. What is promoted does not hang on it. If
  tensorboardX is installed, numbers go to TensorBoard as well.
  """

  def __init__(self, workdir: pathlib.Path):
    """Opens the log of a run's folder."""
    with disk.guarded(workdir):
      workdir.mkdir(parents=True, exist_ok=True)
    self.path = workdir / 'metrics.jsonl'
    self._board = None
    if not processes.is_main():
      return
    with contextlib.suppress(ImportError), disk.guarded(workdir):
      self._board = _Board(workdir / 'tensorboard')

  def read(self, stage: str | None = None) -> list[dict[str, Any]]:
    """Returns the records, as `read_log` does."""
    return read_log(self.path.parent, stage)

  def rewind(
    self, stage: str, step: int, standing: list[dict[str, Any]]
  ) -> None:
    """Drops the records that a stage which resumes at `step` writes again.

    Args:
      stage: its name.
      step: the step that it goes on from.
      standing: the records of its evaluations and bad steps that stand. Those
        that the log lacks are written, others are dropped.
    """
    if not processes.is_main():
      return
    lines = []
    own = list(standing)
    place = None
    for line, record in _read_lines(self.path):
      if record is None or record['stage'] != stage:
        lines.append(line)  # a damaged one, too: what it says may matter
        continue
      if place is None:
        place = len(lines)
      if record['kind'] not in ('eval', 'bad') and record['step'] < step:
        own.append(record)
    # A state is evaluated before it is trained on.
    own.sort(key=lambda record: (record['step'], record['kind'] != 'eval'))
    if place is None:
      place = len(lines)
    lines[place:place] = [json.dumps(record).encode() for record in own]
    with disk.whole(self.path) as file:
      file.writelines(line + b'\n' for line in lines)

  def write(self, record: dict[str, Any]) -> None:
    """Appends a record of numbers, text and vectors; process 0 alone does."""
    if not processes.is_main():
      return
    record = plain(record)
    line = json.dumps(record, allow_nan=False) + '\n'
    with disk.guarded(self.path), self.path.open('a') as file:
      file.write(line)
    if self._board:
      with disk.guarded(self.path.parent / 'tensorboard'):
        self._board.write(record)


class _Board:
  """The numbers of the log as TensorBoard reads them.

  The library's own writer is not used: it hands them to a thread that a full
  disk ends, and then waits for it for ever. The library waits for the disk
  whenever it flushes, and so that is done now and then: a run that is killed
  may lack its last seconds here, and never in metrics.jsonl.
  """

  def __init__(self, folder: pathlib.Path):
    """Begins a file.

    Raises:
      ImportError: tensorboardX is not installed.
    """
    from tensorboardX import event_file_writer
    from tensorboardX import summary
    from tensorboardX.proto import event_pb2

    folder.mkdir(parents=True, exist_ok=True)
    self._event = event_pb2.Event
    self._scalar = summary.scalar
    self._writer = event_file_writer.EventsWriter(str(folder / 'events'))
    self._flushed = -math.inf

  def write(self, record: dict[str, Any]) -> None:
    """Writes the numbers of a record, under '<stage>/<name>'."""
    for name, value in record.items():
      if isinstance(value, float):
        event = self._event(
          wall_time=time.time(),
          step=record['images'],
          summary=self._scalar(f'{record["stage"]}/{name}', value),
        )
        self._writer.write_event(event)
    if time.monotonic() > self._flushed + _BOARD_SECONDS:
      self._writer.flush()
      self._flushed = time.monotonic()
