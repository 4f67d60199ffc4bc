"""Where published files lie on this machine, and how missing ones come here.

The environment variable DDO_JAX_ASSETS may name a folder or a mirror that has
files under their published names. A file is looked for

1. in that folder, where it stays,
2. in the cache, ~/.cache/ddo_jax/<kind of file>, where the user may have put
   it, too,

and is otherwise fetched, from the mirror or from its publisher, into the cache.
Beside a file in the cache stands '<file>.json': its hash when it first came, to
which it is held from then on. A file that a setting names by its path is never
kept under a published name.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import datetime
import functools
import json
import logging
import os
import pathlib
from typing import NamedTuple
import urllib.parse

from ddo_jax import errors
from ddo_jax.assets import download
from ddo_jax.assets import table
from ddo_jax.assets import wholeness
from ddo_jax.runtime import processes

VARIABLE = 'DDO_JAX_ASSETS'
_CACHE = pathlib.Path('~/.cache/ddo_jax')
_LOGGER = logging.getLogger(__name__)


class Wanted(NamedTuple):
  """A published file that a run asks for.

  Attributes:
    asset: the file.
    setting: what names a copy of it, such as '--config.init_from'.
  """

  asset: table.Asset
  setting: str


def _named_folder() -> pathlib.Path | None:
  """Returns the folder that DDO_JAX_ASSETS names, if it names one.

  Raises:
    errors.UserError: it is not there.
  """
  named = os.environ.get(VARIABLE, '')
  if not named or '://' in named:
    return None
  path = pathlib.Path(named).expanduser()
  if not path.is_dir():
    raise errors.UserError(
      f'{VARIABLE} is {named!r}, which is no folder; wanted a folder or an'
      ' http(s):// address that has files under their published names'
    )
  return path


def address(asset: table.Asset) -> str:
  """Returns where a file is fetched from: the mirror, or its publisher."""
  mirror = os.environ.get(VARIABLE, '')
  if '://' not in mirror:
    return asset.address
  return f'{mirror.rstrip("/")}/{urllib.parse.quote(asset.file)}'


def folder(kind: str) -> pathlib.Path:
  """Returns the folder of the cache for one kind of files."""
  return _CACHE.expanduser() / kind


def place(asset: table.Asset) -> pathlib.Path:
  """Returns where a file lies in the cache once it is there."""
  return folder(asset.kind) / asset.file


def is_fetched(path: pathlib.Path) -> bool:
  """Returns whether a file lies in the cache, and comes again if deleted."""
  return path.absolute().is_relative_to(_CACHE.expanduser())


def is_here(asset: table.Asset) -> bool:
  """Returns whether a file is on this machine; it is not read."""
  named = _named_folder()
  in_named = named is not None and (named / asset.file).is_file()
  return in_named or place(asset).is_file()


def _fault(asset: table.Asset, path: pathlib.Path, found: str) -> str:
  """Returns what tells a file from the published one; '' for nothing."""
  size = path.stat().st_size
  if asset.size and size != asset.size:
    return f'it has {size:,} bytes, the published file {asset.size:,}'
  if not found.startswith(asset.sha256):
    return f'its sha256 is {found}, that of the published file {asset.sha256}'
  return wholeness.fault(path, asset.file)


def _record(asset: table.Asset) -> pathlib.Path:
  """Returns the path of what was recorded when a file first came."""
  path = place(asset)
  return path.with_name(f'{path.name}.json')


def _recorded(record: pathlib.Path) -> str:
  """Returns the sha256 that was recorded; '' where the record is damaged."""
  try:
    return str(json.loads(record.read_text())['sha256'])
  except (OSError, ValueError, LookupError, TypeError, RecursionError):
    return ''


def _hold(asset: table.Asset, path: pathlib.Path, source: str) -> str:
  """Holds a file to what is known of it; records it where it is new.

  Args:
    asset: which file it should be.
    path: the file, about to be used from the cache.
    source: where it came from; '' for a file that the user put there.

  Returns:
    What is wrong with it; '' for nothing.
  """
  found = download.sha256_of(path)
  fault = _fault(asset, path, found)
  if fault:
    return fault
  record = _record(asset)
  if record.is_file():
    recorded = _recorded(record)
    if recorded not in ('', found):
      return (
        f'its sha256 is {found}, and was {recorded} when it first came, as'
        f' {record} says: remove that record if its publisher replaced it'
      )
    if recorded:
      return ''
  content = {
    'file': asset.file,
    'sha256': found,
    'size': path.stat().st_size,
    'source': source,
    'licence': asset.licence,
    'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
  }
  try:
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(content, indent=2) + '\n')
  except OSError as error:
    raise errors.UserError(
      f'cannot write {record} ({error.strerror or error}); wanted a folder that'
      ' may be written, with room for it'
    ) from error
  return ''


def fetch(asset: table.Asset, setting: str) -> pathlib.Path:
  """Returns the path of a published file, fetched unless it is here.

  It is held to its published size and hash, where those are known, and to the
  hash that it had when it first came. A damaged file of the cache is fetched
  again.

  Args:
    asset: the file.
    setting: what names a copy of it, for the error.

  Raises:
    errors.UserError: it is not here and cannot be fetched, or it is another
      file than the published one. The line names its address, its places and
      the settings that name a copy.
  """
  named = _named_folder()
  if named is not None and (named / asset.file).is_file():
    path = named / asset.file
    fault = _fault(asset, path, download.sha256_of(path))
    if fault:
      raise errors.UserError(
        f'{path} is not the published {asset.file}: {fault}; copy it again, or'
        f' name your own file with {setting}'
      )
    return path
  path = place(asset)
  with processes.main_first('fetch'), download.alone(path):
    if path.is_file():
      fault = _hold(asset, path, source='')
      if not fault:
        return path
      _LOGGER.warning('%s is damaged or replaced: %s', path, fault)
      record = _record(asset)
      if record.is_file() and _recorded(record) == download.sha256_of(path):
        # It was no whole file already when it came and was recorded.
        record.unlink()
    return _bring(asset, path, setting)


@functools.cache
def _announce(line: str) -> None:
  """Logs a line once, however often a file is asked for in vain."""
  _LOGGER.info('%s', line)


def _bring(
  asset: table.Asset, path: pathlib.Path, setting: str
) -> pathlib.Path:
  """Fetches a file into the cache, or into that of the hub's library."""
  source = address(asset)

  def check(came: pathlib.Path) -> None:
    fault = _hold(asset, came, source)
    if fault:
      raise errors.UserError(f'what {source} gave is refused: {fault}')

  _announce(f'fetching {asset.file} ({asset.about()}) from {source}')
  try:
    if source.startswith('hf://'):
      path = download.fetch(source)
      check(path)
    else:
      download.to_path(source, path, check)
  except errors.UserError as error:
    raise errors.UserError(
      f'{asset.file}: {error} (put it at {place(asset)}, let {VARIABLE} name a'
      f' folder or mirror that has it, or set {setting})'
    ) from error
  if asset.kind != table.WEIGHTS:  # those say so where they are converted
    _LOGGER.info('licence of %s: %s', asset.file, asset.licence)
  return path


def preferred(names: Sequence[str]) -> table.Asset:
  """Returns one of several published files that hold the same.

  Args:
    names: the files' names; the first that is here is taken, and the very first
      if none is.
  """
  assets = [table.find(name) for name in names]
  here = [asset for asset in assets if is_here(asset)]
  return (here or assets)[0]


def asset_of(name: str) -> table.Asset | None:
  """Returns the asset that a setting names; None where it names a path.

  What is there under that path is taken before an asset of the same name.
  """
  if pathlib.Path(name).expanduser().exists():
    return None
  return table.find(name)


def resolve(name: str, setting: str, sha256: str | None = None) -> pathlib.Path:
  """Returns the path of the file that a setting names, fetched if need be.

  Args:
    name: a path, the name of a published file, http(s)://... or
      hf://owner/name/file.
    setting: the setting, for the error.
    sha256: what the file must hash to, as hex; None: not known.

  Raises:
    errors.UserError: nothing of that name is here or can be fetched.
  """
  asset = asset_of(name)
  if asset is not None:
    return download.fetch(str(fetch(asset, setting)), sha256)
  if '://' not in name and not pathlib.Path(name).expanduser().exists():
    raise errors.UserError(
      f'no file {name}; wanted a path, http(s)://, hf://owner/name/file or the'
      ' name of a published file'
      f'{errors.near_miss(name, table.ASSETS, most=3)}'
    )
  with processes.main_first('fetch'):
    return download.fetch(name, sha256)


def wanted(named: Mapping[str, str]) -> list[Wanted]:
  """Returns those of several settings' files that are published ones.

  Args:
    named: what each setting names; '' for nothing.
  """
  found = {setting: asset_of(name) for setting, name in named.items() if name}
  return [Wanted(asset, setting) for setting, asset in found.items() if asset]


def fetch_all(wanted: Sequence[Wanted]) -> list[str]:
  """Fetches files that are not here; returns a line for each that cannot be."""
  lines = []
  with processes.main_first('fetch all'):
    for asset, setting in wanted:
      try:
        fetch(asset, setting)
      except errors.UserError as error:
        lines.append(str(error))
  return lines
