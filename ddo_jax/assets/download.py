"""Fetches a file by its path, its address or its place on the Hugging Face hub.

A file of the hub is fetched by huggingface_hub. For any other address the
download is written here, since a file of weights takes gigabytes and the usual
libraries start again from nothing, or continue a file that was replaced in the
meantime.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import datetime
import email.utils
import errno
import hashlib
import http.client
import logging
import pathlib
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request

import filelock

from ddo_jax import errors
from ddo_jax.assets import wholeness
from ddo_jax.runtime import progress
from ddo_jax.runtime import reading

_LOGGER = logging.getLogger(__name__)
_CACHE = pathlib.Path('~/.cache/ddo_jax/files')
_HUB_FILE = re.compile(r'hf://([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?/([\w./-]+)')
_FILE_NAME = re.compile(r'\w[\w .+-]*')
_DIGEST = re.compile(r'[0-9a-f]{64}')
_TIMEOUT = 30  # seconds without a byte
_CHUNK = 2**20  # bytes
_BUSY = (429, 500, 502, 503, 504)  # answers that pass
_WAITS = (2, 4, 8, 16, 32)  # seconds before a busy server is asked again
_LONGEST_WAIT = 600  # seconds; a server may ask for more, which is told
_MOST_BREAKS = 20  # connections that may break in one download
_VERSION = re.compile(r'[\x20-\x7e]{1,500}')
_BY_HAND = 'or fetch it elsewhere and give its path'


def sha256_of(path: pathlib.Path) -> str:
  """Returns the sha256 of a file's bytes, as hex.

  Raises:
    OSError: it cannot be read, or is no regular file.
  """
  reading.check_regular(path)
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def fetch(
  source: str, sha256: str | None = None, cache: pathlib.Path | None = None
) -> pathlib.Path:
  """Returns the local path of a file, fetched unless it is here already.

  A download that was cut off continues where it stopped. A file in the cache
  is held against the sha256 that was recorded when it came.

  Args:
    source: a path, http(s)://..., or hf://owner/name[@revision]/file.
    sha256: what the file must hash to, as hex; None: not known.
    cache: folder for downloads; None: the hub's own cache for hf://, and
      ~/.cache/ddo_jax/files otherwise.

  Raises:
    errors.UserError: the file is missing, refused by the server, cut off, or
      has another sha256; or there is no network.
  """
  if sha256 is not None:
    sha256 = sha256.lower()
    if not _DIGEST.fullmatch(sha256):
      raise errors.UserError(
        f'sha256 is {sha256[:80]!r}; wanted 64 hexadecimal digits'
      )
  scheme, separator, _ = source.partition('://')
  if not separator:
    return _check_local(pathlib.Path(source).expanduser(), sha256)
  if scheme == 'hf':
    path = _fetch_from_hub(source, cache)
    if sha256 is None and _DIGEST.fullmatch(path.resolve().name):
      sha256 = path.resolve().name  # the hub names a large file by its sha256
    return _check_local(path, sha256)
  if scheme in ('http', 'https'):
    return _fetch_address(source, sha256, cache or _CACHE.expanduser())
  raise errors.UserError(
    f'{source} has the unknown scheme {scheme}://; wanted a path, http(s)://'
    ' or hf://owner/name/file'
  )


def _check_local(path: pathlib.Path, sha256: str | None) -> pathlib.Path:
  """Returns the path of a file that is here and has the given sha256."""
  try:
    reading.check_regular(path)
    found = '' if sha256 is None else sha256_of(path)
  except OSError as error:
    raise errors.UserError(
      f'no file {path} ({error.strerror or error}); wanted a path, http(s)://'
      ' or hf://owner/name/file'
    ) from error
  if sha256 is not None:
    _check_digest(path, found, sha256, 'correct the sha256 or remove it')
  return path


def _check_digest(
  where: str | pathlib.Path, found: str, wanted: str | None, remedy: str
) -> None:
  """Raises UserError unless the sha256 is the wanted one, if one is known."""
  if wanted not in (None, found):
    raise errors.UserError(
      f'{where} has sha256 {found}; wanted {wanted}: {remedy}'
    )


def _fetch_from_hub(source: str, cache: pathlib.Path | None) -> pathlib.Path:
  """Returns the path of a file of the hub in the cache of the hub's library."""
  import huggingface_hub
  from huggingface_hub import errors as hub_errors

  match = _HUB_FILE.fullmatch(source)
  if match is None:
    raise errors.UserError(
      f'{source} is no file of the hub; wanted hf://owner/name/file'
    )
  repository, revision, name = match.groups()
  try:
    path = huggingface_hub.hf_hub_download(
      repository, name, revision=revision, cache_dir=cache
    )
  except hub_errors.LocalEntryNotFoundError as error:
    raise errors.UserError(
      f'no network to the Hugging Face hub for {source}: try again, {_BY_HAND}'
    ) from error
  except hub_errors.GatedRepoError as error:
    raise errors.UserError(
      f'{source} is gated: accept its terms on the hub and log in, {_BY_HAND}'
    ) from error
  except (OSError, ValueError, hub_errors.EntryNotFoundError) as error:
    reason = str(error).strip().partition('\n')[0] or type(error).__name__
    raise errors.UserError(
      f'the Hugging Face hub does not give {source} ({reason[:200]}): check'
      f' the name, {_BY_HAND}'
    ) from error
  return pathlib.Path(path)


def _split(url: str) -> urllib.parse.SplitResult:
  """Returns the parts of an address.

  Raises:
    errors.UserError: it is none.
  """
  try:
    parts = urllib.parse.urlsplit(url)
    parts.port  # noqa: B018 - looked at, it may be refused
  except ValueError as error:
    raise errors.UserError(
      f'{_short(url)} is no address ({error}); wanted http(s)://host/file'
    ) from error
  odd = [sign for sign in url if not '!' <= sign <= '~']
  if odd:
    raise errors.UserError(
      f'{_short(url)} holds {odd[0]!r}, which no address does; wanted'
      f' {urllib.parse.quote(odd[0])} for it, as browsers copy addresses'
    )
  return parts


def _fetch_address(
  url: str, sha256: str | None, cache: pathlib.Path
) -> pathlib.Path:
  """Returns the path of an address's file in the cache, downloaded if needed.

  Beside it stands '<name>.sha256', what it hashed to when it came.
  """
  decoded = urllib.parse.unquote(_split(url).path)
  name = pathlib.PurePosixPath(decoded).name
  if not _FILE_NAME.fullmatch(name):
    raise errors.UserError(f'{url} names no file; wanted http(s)://.../file')
  # Addresses that end alike do not share a place.
  path = cache / hashlib.sha256(url.encode()).hexdigest()[:16] / name
  record = path.with_name(f'{name}.sha256')

  def check(came: pathlib.Path) -> None:
    found = sha256_of(came)
    _check_digest(url, found, sha256, 'what came was thrown away')
    record.write_text(f'{found}  {name}\n')

  with alone(path):
    if path.exists() and record.exists():
      found = sha256_of(path)
      recorded = record.read_text(errors='replace').partition(' ')[0]
      if found == recorded and not wholeness.fault(path, name):
        remedy = 'correct the sha256, or remove the file to fetch it again'
        _check_digest(path, found, sha256, remedy)
        return path
      _LOGGER.warning('%s was damaged since it came: fetching it again', path)
    to_path(url, path, check)
  return path


@contextlib.contextmanager
def alone(path: pathlib.Path, does: str = 'fetches') -> Iterator[None]:
  """Lets one process at a time look for a file and bring it there.

  Args:
    path: the file, or a folder.
    does: what the process does with it, for those that wait.

  Raises:
    errors.UserError: the folder of the file cannot be written.
  """
  lock = filelock.FileLock(path.with_name(f'{path.name}.lock'))
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      lock.acquire(timeout=0)
    except filelock.Timeout:
      _LOGGER.info('waiting for another process, which %s %s', does, path.name)
      lock.acquire()
  except OSError as error:
    raise errors.UserError(
      f'cannot write {path.parent} ({error.strerror or error}); wanted a'
      ' folder that may be written, with room for what is fetched'
    ) from error
  try:
    yield
  finally:
    lock.release()


def to_path(
  url: str, path: pathlib.Path, check: Callable[[pathlib.Path], None]
) -> None:
  """Downloads an address to a path, whole or not at all.

  What came of a download that was cut off stays as '<name>.partial', beside the
  version that the server gave it, '<name>.version'; the next call goes on with
  it. The caller holds `alone(path)`.

  Args:
    url: http(s)://...
    path: where the file comes to lie; what is there is replaced.
    check: raises UserError where the file that came is not the wanted one; it
      is then thrown away.

  Raises:
    errors.UserError: there is no network, the server refuses, the download was
      cut off, or what came is a web page or was refused by `check`.
  """
  _split(url)
  partial = path.with_name(f'{path.name}.partial')
  with _failing_in_one_line(url, partial):
    _download(url, partial)
    try:
      fault = wholeness.fault(partial, path.name)
      if fault:
        raise errors.UserError(
          f'what {url} gave was thrown away, for {fault}: run the same command'
          f' again, {_BY_HAND}'
        )
      check(partial)
    except errors.UserError:
      partial.unlink()
      raise
    partial.replace(path)


@contextlib.contextmanager
def _failing_in_one_line(url: str, partial: pathlib.Path) -> Iterator[None]:
  """Turns the failures of a download into one line."""
  try:
    yield
  except errors.UserError:
    raise
  except urllib.error.HTTPError as error:
    raise errors.UserError(
      f'{url}: the server answers {error.code} ({_short(error.reason)}); check'
      f' the address, {_BY_HAND}'
    ) from error
  except urllib.error.URLError as error:
    raise errors.UserError(
      f'no network to {url} ({_short(error.reason)}): run the same command'
      f' again, {_BY_HAND}'
    ) from error
  except (OSError, ValueError, http.client.HTTPException) as error:
    if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT):
      partial.unlink(missing_ok=True)
      partial.with_suffix('.version').unlink(missing_ok=True)
      raise errors.UserError(
        f'disk full while fetching {url} to {partial.parent}; what came was'
        ' removed: free some space and run the same command again'
      ) from error
    raise errors.UserError(
      f'{url} was cut off ({_short(error)}); run the same command again,'
      f' {_BY_HAND}'
    ) from error


def _short(reason: object) -> str:
  """Returns what a server or a library says, as a part of one line."""
  text = ' '.join(str(reason).split())[:200] or type(reason).__name__
  return ''.join(sign if sign.isprintable() else '?' for sign in text)


def _download(url: str, partial: pathlib.Path) -> None:
  """Downloads a file to `partial`, or the rest of what is there, with patience.

  A server that is busy is asked again after a pause, and a connection that
  broke is made again where that brought more of the file.
  """
  refused = 0
  breaks = 0
  while True:
    before = _size(partial)
    try:
      return _attempt(url, partial)
    except urllib.error.HTTPError as error:
      if error.code not in _BUSY or refused == len(_WAITS):
        raise
      pause = _pause(url, error, _WAITS[refused])
      refused += 1
      _LOGGER.info(
        '%s: the server answers %d; asking again in %d s (%d of %d)',
        url,
        error.code,
        pause,
        refused,
        len(_WAITS),
      )
      time.sleep(pause)
    except (ConnectionError, TimeoutError, http.client.HTTPException) as error:
      breaks += 1
      if breaks > _MOST_BREAKS or _size(partial) <= before:
        raise
      _LOGGER.info('%s was cut off (%s): going on', url, _short(error))


def _size(partial: pathlib.Path) -> int:
  """Returns how many bytes came of a file that can be gone on with."""
  if partial.exists() and partial.with_suffix('.version').exists():
    return partial.stat().st_size
  return 0


def _pause(url: str, error: urllib.error.HTTPError, default: int) -> int:
  """Returns how many seconds to wait, as a busy server asks.

  Raises:
    errors.UserError: it asks for very long.
  """
  asked = error.headers.get('Retry-After', '').strip()
  seconds: float = default
  if re.fullmatch(r'[0-9]{1,9}', asked):
    seconds = int(asked)
  elif asked:
    with contextlib.suppress(ValueError, OverflowError):
      until = email.utils.parsedate_to_datetime(asked)
      seconds = until.timestamp() - datetime.datetime.now().timestamp()
  if seconds > _LONGEST_WAIT:
    raise errors.UserError(
      f'{url}: the server answers {error.code} and asks to wait'
      f' {seconds:,.0f} s: run the same command again then, {_BY_HAND}'
    )
  return max(round(seconds), 0)


def _attempt(url: str, partial: pathlib.Path) -> None:
  """Downloads a file to `partial`, or the rest of what is there.

  Beside a partial file stands the version that the server gave it. It is
  continued only if the server still has that version; otherwise the server
  sends the whole file, and what was there is overwritten.
  """
  version = partial.with_suffix('.version')
  have = _size(partial)
  request = urllib.request.Request(url, headers={'User-Agent': 'ddo_jax'})
  if have:
    request.add_header('Range', f'bytes={have}-')
    request.add_header('If-Range', version.read_text())
  try:
    response = urllib.request.urlopen(request, timeout=_TIMEOUT)
  except urllib.error.HTTPError as error:
    if have and error.code == 416:  # there is nothing behind what is here
      partial.unlink()
      return _attempt(url, partial)
    raise
  with response:
    span = response.headers.get('Content-Range', '')
    if response.status != 206:
      have = 0
    elif not span.startswith(f'bytes {have}-'):
      raise http.client.HTTPException('the server sent another range')
    _receive(response, partial, version, have)
  version.unlink(missing_ok=True)
  return None


def _receive(
  response: http.client.HTTPResponse,
  partial: pathlib.Path,
  version: pathlib.Path,
  have: int,
) -> None:
  """Writes a response behind the first `have` bytes of `partial`.

  Raises:
    http.client.HTTPException: the connection ended before the file did.
    errors.UserError: the disk has no room for it.
  """
  tag = response.headers.get('ETag', '')
  if not tag or tag.startswith('W/'):  # a weak tag does not speak of bytes
    tag = response.headers.get('Last-Modified', '')
  # None where the server does not say it, or says no number.
  length = response.length
  total = None if length is None else have + length
  free = shutil.disk_usage(partial.parent).free
  if length is not None and length > free:
    raise errors.UserError(
      f'{partial.stem} takes {length:,} bytes more, as its server says;'
      f' {partial.parent} has room for {free:,}: free some space'
    )
  bar = progress.follow(partial.stem, total, unit='B', done=have)
  version.unlink(missing_ok=True)
  with partial.open('ab' if have else 'wb') as file, bar:
    if _VERSION.fullmatch(tag):
      version.write_text(tag)
    while chunk := response.read(_CHUNK):
      file.write(chunk)
      bar.update(len(chunk))
    size = file.tell()
  if total is not None and size != total:
    raise http.client.HTTPException(f'{size} of {total} bytes came')
