"""The records of a run that people read: JSON files and metrics.jsonl."""

import contextlib
import json
import math
import pathlib
import time
from typing import Any

from ddo_jax import errors
from ddo_jax.runtime import disk


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file, whole or not at all."""
  content = json.dumps(value, indent=1, allow_nan=False) + '\n'
  with disk.whole(path) as file:
    file.write(content.encode())


def read_json(path: pathlib.Path) -> Any:
  """Reads a JSON file.

  Raises:
    errors.UserError: the file is missing or damaged.
  """
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise errors.UserError(
      f'cannot read {path} ({error}); is this the --workdir of a run?'
    ) from error


def _plain(value: Any) -> Any:
  """Returns a JSON value for an array or a number; null for NaN and Inf."""
  if hasattr(value, 'tolist'):
    value = value.tolist()
  if isinstance(value, list):
    return [_plain(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def read_log(
  workdir: pathlib.Path, stage: str | None = None
) -> list[dict[str, Any]]:
  """Returns the records of metrics.jsonl, in order.

  Args:
    workdir: the run's folder.
    stage: the stage whose records are wanted; None: all.
  """
  path = workdir / 'metrics.jsonl'
  if not path.exists():
    return []
  records = []
  for line in path.read_text().splitlines():
    try:
      record = json.loads(line)
    except ValueError:
      break  # it was cut off while it was written, and will be made again
    if stage in (None, record['stage']):
      records.append(record)
  return records


class MetricsLog:
  """Writes metrics.jsonl, one JSON object a line.

  Every record holds `stage` (the folder's name), `kind` ('train' or 'eval'),
  `step` and `images`. In-round evaluations are recorded here and nowhere else.
  If tensorboardX is installed, numbers go to TensorBoard as well.
  """

  def __init__(self, workdir: pathlib.Path):
    """Opens the log of a run's folder."""
    with disk.guarded(workdir):
      workdir.mkdir(parents=True, exist_ok=True)
    self.path = workdir / 'metrics.jsonl'
    self._board = None
    with contextlib.suppress(ImportError), disk.guarded(workdir):
      self._board = _Board(workdir / 'tensorboard')

  def read(self, stage: str | None = None) -> list[dict[str, Any]]:
    """Returns the records, as `read_log` does."""
    return read_log(self.path.parent, stage)

  def rewind(self, stage: str, step: int) -> None:
    """Drops the records that a stage which resumes at `step` writes again."""

    def is_kept(record):
      if record['stage'] != stage:
        return True
      if record['kind'] == 'eval':
        return record['step'] <= step  # of a state that is saved
      return record['step'] < step

    kept = []
    for record in self.read():
      if is_kept(record):
        kept.append(json.dumps(record) + '\n')
    with disk.whole(self.path) as file:
      file.write(''.join(kept).encode())

  def write(self, record: dict[str, Any]) -> None:
    """Appends a record of numbers, text and vectors."""
    plain = {name: _plain(value) for name, value in record.items()}
    line = json.dumps(plain, allow_nan=False) + '\n'
    with disk.guarded(self.path), self.path.open('a') as file:
      file.write(line)
    if self._board:
      with disk.guarded(self.path.parent / 'tensorboard'):
        self._board.write(plain)


class _Board:
  """The numbers of the log as TensorBoard reads them.

  They are written at once: the library's own writer hands them to a thread
  that a full disk ends, and then waits for it for ever.
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
    self._writer.flush()
