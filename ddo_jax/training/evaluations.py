"""The evaluations of a phase, by which a checkpoint is promoted."""

from collections.abc import Iterable
import logging
import pathlib
from typing import Any

from ddo_jax import errors
from ddo_jax.runtime import processes
from ddo_jax.runtime import records

_LOGGER = logging.getLogger(__name__)


class Evaluations:
  """What the evaluations of a phase found, by step.

  Every checkpoint carries what was found before it was saved. What is found
  after that stands in evaluations.json, until the next checkpoint carries it.
  The log repeats all of it for people, and nothing is decided by the log.
  """

  def __init__(self, folder: pathlib.Path, stage: str):
    """Of no state yet; see `resume`.

    Args:
      folder: the stage's folder.
      stage: its name, which must be in the file.
    """
    self._path = folder / 'evaluations.json'
    self._stage = stage
    self._by_step: dict[int, dict[str, Any]] = {}
    self._ended: dict[str, Any] = {}

  def resume(self, step: int, carried: Iterable[dict[str, Any]]) -> None:
    """Takes what is known of the states up to the one that the phase goes on.

    Later ones will be made again, and so will be their evaluations.

    Args:
      step: where the phase goes on; 0: from its start.
      carried: what the checkpoint of that step carries; it is right where the
        file says something else.
    """
    read = processes.decide('evaluations', self._read) or {}
    found = {record['step']: record for record in read.get('evaluations', [])}
    found |= {record['step']: record for record in carried}
    self._by_step = {at: found[at] for at in sorted(found) if at <= step}
    ended = read.get('ended', {})
    self._ended = ended if ended and ended['step'] <= step else {}
    if self._content() != read:
      self._write()

  def add(self, record: dict[str, Any]) -> None:
    """Keeps what an evaluation found.

    Args:
      record: `step`, `profile`, `selection`, and scores: JSON values.
    """
    self._by_step[record['step']] = record
    self._write()

  def end(self, reason: str) -> None:
    """Keeps that the phase ended at its newest evaluation, and why."""
    self._ended = {'step': self.all()[-1]['step'], 'reason': reason}
    self._write()

  @property
  def ended(self) -> str:
    """Why the phase ended before its last step; '' where it did not."""
    return self._ended.get('reason', '')

  def __contains__(self, step: int) -> bool:
    return step in self._by_step

  def all(self) -> list[dict[str, Any]]:
    """Returns the records, in the order of their steps."""
    return list(self._by_step.values())

  def best(self) -> dict[str, Any] | None:
    """Returns the record of the lowest selection; of equal ones the first."""
    found = self.all()
    return min(found, key=lambda record: record['selection'], default=None)

  def _content(self) -> dict[str, Any]:
    content = {'stage': self._stage, 'evaluations': self.all()}
    return content | ({'ended': self._ended} if self._ended else {})

  def _write(self) -> None:
    records.write_json(self._path, records.sealed(self._content()))

  def _read(self) -> dict[str, Any] | None:
    """Returns what the file holds; None where that is of no use."""
    if not self._path.exists():
      return {'stage': self._stage, 'evaluations': []}
    try:
      content = records.unsealed(records.read_json(self._path))
    except (errors.UserError, ValueError) as error:
      found = f'damaged ({str(error).partition(";")[0]})'
    else:
      if content['stage'] == self._stage:
        return content
      found = f'of {content["stage"]}'
    _LOGGER.warning(
      '%s is %s; what the newest checkpoint does not carry is evaluated again',
      self._path,
      found,
    )
    return None
