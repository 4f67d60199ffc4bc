"""Checksums of what a stage leaves: what does not hold is not trusted.

manifest.json stands in a folder and lists the files that were left there, each
with its size and sha256. A file is listed before it takes its place, so that a
run which is cut off leaves no file that is not listed. Hashing takes about a
second for a gigabyte; a file is hashed when it is written, and when a later
start is about to use it.

Earlier versions wrote no manifest. What a folder without one holds is taken as
it is, with a warning, and listed.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import functools
import hashlib
import logging
import pathlib
from typing import Any
from typing import BinaryIO

import numpy as np

from ddo_jax import errors
from ddo_jax.runtime import disk
from ddo_jax.runtime import processes
from ddo_jax.runtime import records

_LOGGER = logging.getLogger(__name__)
FILE = 'manifest.json'
_SMALL = 2**20  # bytes of a file that is hashed even where sizes would do


def _entry(path: pathlib.Path) -> dict[str, Any]:
  """Returns what is listed of a file."""
  with path.open('rb') as file:
    digest = hashlib.file_digest(file, 'sha256')
    return {'size': file.tell(), 'sha256': digest.hexdigest()}


def _name_of(folder: pathlib.Path) -> str:
  """Returns what a manifest calls its folder: 'fakes' are those of a round."""
  if folder.name == 'fakes':
    return f'{folder.parent.name}/{folder.name}'
  return folder.name


def _read(folder: pathlib.Path) -> dict[str, Any] | None:
  """Reads a folder's manifest; None if it has none.

  Raises:
    errors.UserError: it is damaged, or another folder's.
  """
  path = folder / FILE
  if not path.exists():
    return None
  with contextlib.suppress(errors.UserError, ValueError):
    content = records.unsealed(records.read_json(path))
    # A run may be given another name; a stage is not another one.
    if content['top'] or content['of'] == _name_of(folder):
      return content
  raise errors.UserError(
    f'{path} is damaged, so that nothing tells whether the files beside it are'
    ' whole: delete it to take them as they are, or what it stands beside to'
    ' make that again'
  )


def _under(files: dict[str, Any], name: str) -> list[str]:
  """Returns the listed files that a name means: a file, a folder, '' all."""
  inside = f'{name}/' if name else ''
  return [f for f in files if f == name or f.startswith(inside)]


def _fault(path: pathlib.Path, entry: dict[str, Any], deep: bool) -> str:
  """Returns what is wrong with a listed file; '' for nothing."""
  try:
    if not path.is_file():
      return 'is missing'
    if path.stat().st_size != entry['size']:
      return 'is damaged'
    if deep or entry['size'] <= _SMALL:
      return '' if _entry(path) == entry else 'is damaged'
  except OSError as error:
    return f'cannot be read ({error.strerror})'
  return ''


def faults(
  folder: pathlib.Path, under: str = '', deep: bool = True
) -> dict[str, str]:
  """Returns what is wrong with the files that a folder's manifest lists.

  Args:
    folder: the folder; nothing is wrong with one that has no manifest.
    under: a file or folder in it, whose files alone are looked at; '' for all.
    deep: whether large files are read; else their sizes will do.

  Returns:
    {name in the folder: 'is damaged', 'is missing', …}.

  Raises:
    errors.UserError: the manifest is damaged.
  """
  content = _read(folder)
  files = content['files'] if content else {}
  found = {}
  for name in _under(files, under):
    fault = _fault(folder / name, files[name], deep)
    if fault:
      found[name] = fault
  return found


def check(folder: pathlib.Path, under: str, remedy: str) -> None:
  """Raises UserError, naming the first file with which something is wrong.

  Args:
    folder: see `faults`.
    under: see `faults`.
    remedy: what is to be done about it.
  """
  for name, fault in faults(folder, under).items():
    raise errors.UserError(f'{folder / name} {fault}: {remedy}')


def digest(folder: pathlib.Path) -> str | None:
  """Returns one sha256 of all the files that a folder lists, if it does."""
  content = _read(folder)
  if not content or not content['files']:
    return None
  hashes = {name: entry['sha256'] for name, entry in content['files'].items()}
  return hashlib.sha256(
    records.json_bytes(dict(sorted(hashes.items())))
  ).hexdigest()


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object that a run left, and holds it to its checksum.

  Raises:
    errors.UserError: the file is missing or damaged.
  """
  content = records.read_json(path)
  remedy = 'it is not what was written; run the same command again to make it'
  check(path.parent, path.name, f'{remedy} anew')
  return content


def _is_readable(path: pathlib.Path) -> bool:
  """Whether a file that was never listed can be what its name says."""
  try:
    if path.suffix == '.json':
      records.read_json(path)
    if path.suffix == '.npz':
      with np.load(path, allow_pickle=False) as arrays:
        _ = [arrays[name].shape for name in arrays]  # zip has checksums
  except Exception as error:  # damaged files make libraries raise all kinds
    reason = str(error).partition('\n')[0] or type(error).__name__
    _LOGGER.warning('%s is damaged (%s): making it again', path, reason)
    return False
  return True


class Manifest:
  """The manifest of one folder, to write the folder's files with.

  Of several processes, process 0 reads and writes; it tells the others what
  they ask for.
  """

  def __init__(
    self, folder: pathlib.Path, left: tuple[str, ...], top: bool = False
  ):
    """Opens the manifest of a folder, or begins one.

    Args:
      folder: the folder.
      left: patterns of the files and folders that earlier versions left in it.
      top: whether the folder has a name that its user gives, and may change.

    Raises:
      errors.UserError: the manifest is damaged, or cannot be written.
    """
    self.folder = folder
    self._faults: dict[tuple[str, bool], str] = {}  # that were found
    self._content: dict[str, Any] = {}
    self._ask('open', functools.partial(self._open, left, top))

  def _open(self, left: tuple[str, ...], top: bool) -> None:
    content = _read(self.folder)
    if content is not None:
      self._content = content
      return
    of = _name_of(self.folder)
    self._content = {'of': of, 'top': top, 'files': {}, 'params': {}}
    names = []
    for pattern in left:
      for path in sorted(self.folder.glob(pattern)):
        if path.is_dir() or _is_readable(path):
          names.append(path.name)
    if names:
      _LOGGER.warning(
        '%s is missing, as in a run of an earlier version: what is there is'
        ' taken as it is (%s)',
        self.folder / FILE,
        ', '.join(names[:5]) + (', …' if len(names) > 5 else ''),
      )
    self.add(*names)

  def _ask(self, what: str, call: Callable[[], Any]) -> Any:
    """Returns what a call returns on process 0."""
    return processes.decide(f'{what} {self.folder}', call)

  def _save(self) -> None:
    """Writes the manifest itself."""
    records.write_json(self.folder / FILE, records.sealed(self._content))

  def lists(self, name: str) -> bool:
    """Returns whether a file, or a folder's files, were left here."""

    def look():
      return bool(_under(self._content['files'], name))

    return self._ask(f'{name} in', look)

  def entry(self, name: str) -> dict[str, Any] | None:
    """Returns what is listed of a file; None if it is not."""
    return self._ask(f'{name} of', lambda: self._content['files'].get(name))

  def faults(self, name: str = '', deep: bool = True) -> dict[str, str]:
    """Returns what is wrong with listed files, as `faults` does.

    A file is read once, however often it is asked for.
    """

    def look():
      found = {}
      for each in _under(self._content['files'], name):
        key = (each, deep)
        if key not in self._faults:
          entry = self._content['files'][each]
          self._faults[key] = _fault(self.folder / each, entry, deep)
        if self._faults[key]:
          found[each] = self._faults[key]
      return found

    return self._ask(f'faults of {name} in', look)

  def holds(self, name: str, remedy: str = 'making it again') -> bool:
    """Returns whether a file or folder is listed and as it was left.

    What was left and does not hold is named in a warning.

    Args:
      name: of the file or folder.
      remedy: what is done about it, for the warning.
    """
    found = self.faults(name)
    self.warn(found, remedy)
    return self.lists(name) and not found

  def warn(self, found: dict[str, str], remedy: str) -> None:
    """Names files with which something is wrong, and what is done about it."""
    named = [f'{self.folder / name} {fault}' for name, fault in found.items()]
    rest = f' and {len(named) - 2} others' if len(named) > 2 else ''
    if named:
      _LOGGER.warning('%s%s: %s', ', '.join(named[:2]), rest, remedy)

  def read_json(self, name: str) -> dict[str, Any] | None:
    """Reads a JSON object; None unless it holds, see `holds`."""

    def read():
      path = self.folder / name
      return records.read_json(path) if self.holds(name) else None

    return self._ask(f'{name} from', read)

  @contextlib.contextmanager
  def writing(self, name: str) -> Iterator[BinaryIO]:
    """Opens a file to be written and listed; see `disk.whole`."""
    with disk.whole(self.folder / name) as file:
      yield file
      if processes.is_main():
        file.flush()
        self._forget(name)
        self._content['files'][name] = _entry(pathlib.Path(file.name))
        self._save()

  def write_json(self, name: str, value: Any) -> None:
    """Writes and lists a JSON file, whole or not at all."""
    with self.writing(name) as file:
      file.write(records.json_bytes(value))

  def add(self, *names: str) -> None:
    """Lists files and folders as they are now."""

    def look():
      for name in names:
        self._forget(name)
        path = self.folder / name
        inside = sorted(path.rglob('*')) if path.is_dir() else [path]
        for each in inside:
          if each.is_file():
            place = each.relative_to(self.folder).as_posix()
            self._content['files'][place] = _entry(each)
      self._save()

    self._ask('add to', look)

  def add_params(self, name: str, sha256: str) -> None:
    """Lists a folder of params.

    Args:
      name: of the folder.
      sha256: the hash of its arrays, which stays what it was where a folder
        that was damaged has been made again.

    Raises:
      errors.UserError: they are other params than were there before.
    """
    self.check_params(name, sha256)
    self._content.setdefault('params', {})[name] = sha256
    self.add(name)

  def check_params(self, name: str, sha256: str) -> None:
    """Raises UserError where other params were in a folder than these."""

    def look():
      before = self._content['params'].get(name, sha256)
      if before != sha256:
        raise errors.UserError(
          f'{self.folder / name} is to be made again with sha256'
          f' {sha256[:16]}…, and had {before[:16]}…: what it is made of has'
          f' changed; copy it from a backup, or delete {self.folder} to play'
          ' the stage again'
        )

    self._ask(f'{name} as in', look)

  def _forget(self, name: str) -> None:
    for known in _under(self._content['files'], name):
      del self._content['files'][known]
      self._faults.pop((known, True), None)
      self._faults.pop((known, False), None)
