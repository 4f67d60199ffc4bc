"""The files of a run that people read: JSON values and metrics.jsonl."""

import json
import math
import os
import pathlib
from typing import Any

from ddo_jax import errors


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file, whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix('.partial')
  partial.write_text(json.dumps(value, indent=1, allow_nan=False) + '\n')
  os.replace(partial, path)


def read_json(path: pathlib.Path) -> Any:
  """Reads a JSON file.

  Raises:
    errors.UserError: it is missing or damaged.
  """
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise errors.UserError(
      f'cannot read {path} ({error}); is this the --workdir of a run?'
    ) from error


def _plain(value: Any) -> Any:
  """Arrays and numbers to JSON values; an undefined number becomes null."""
  if hasattr(value, 'tolist'):
    value = value.tolist()
  if isinstance(value, list):
    return [_plain(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def read_log(
  workdir: pathlib.Path, stage: str | None = None
) -> list[dict[str, Any]]:
  """The records of metrics.jsonl, of one stage or all, in order."""
  path = workdir / 'metrics.jsonl'
  records = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      records.append(json.loads(line))
    except ValueError:
      break  # cut off while writing: what follows is made again
  return [r for r in records if stage in (None, r['stage'])]


class MetricsLog:
  """metrics.jsonl: one JSON object a line, TensorBoard beside if installed.

  Every record holds `stage` (the folder's name), `kind` ('train' or 'eval'),
  `step` and `images`. It is the one record of in-round evaluations.
  """

  def __init__(self, workdir: pathlib.Path):
    """Opens the log of a run's folder."""
    workdir.mkdir(parents=True, exist_ok=True)
    self.path = workdir / 'metrics.jsonl'
    try:
      import tensorboardX

      self._board = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'))
    except ImportError:
      self._board = None

  def read(self, stage: str | None = None) -> list[dict[str, Any]]:
    """See `read_log`."""
    return read_log(self.path.parent, stage)

  def rewind(self, stage: str, step: int) -> None:
    """Drops what a stage that resumes at `step` will write again."""

    def stays(record):
      if record['stage'] != stage:
        return True
      # At `step` the evaluation was logged before the save, the step was not.
      end = step + (record['kind'] == 'eval')
      return record['step'] < end

    kept = [json.dumps(r) + '\n' for r in self.read() if stays(r)]
    partial = self.path.with_suffix('.partial')
    partial.write_text(''.join(kept))
    os.replace(partial, self.path)

  def write(self, record: dict[str, Any]) -> None:
    """Appends a record of numbers, strings and vectors."""
    plain = {name: _plain(value) for name, value in record.items()}
    with self.path.open('a') as file:
      file.write(json.dumps(plain, allow_nan=False) + '\n')
    if self._board:
      for name, value in plain.items():
        if isinstance(value, float):
          tag = f'{plain["stage"]}/{name}'
          self._board.add_scalar(tag, value, plain['images'])
