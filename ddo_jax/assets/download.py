"""Fetches a file by its path, its address or its place on the Hugging Face hub.

A file of the hub is fetched by huggingface_hub. For any other address the
download is written here, since a file of weights takes gigabytes and the usual
libraries start again from nothing, or continue a file that was replaced in the
meantime.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import errno
import hashlib
import http.client
import logging
import pathlib
import re
import urllib.error
import urllib.parse
import urllib.request

import filelock

from ddo_jax import errors
from ddo_jax.runtime import progress

_LOGGER = logging.getLogger(__name__)
_CACHE = pathlib.Path('~/.cache/ddo_jax/files')
_HUB_FILE = re.compile(r'hf://([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?/([\w./-]+)')
_FILE_NAME = re.compile(r'\w[\w .+-]*')
_DIGEST = re.compile(r'[0-9a-f]{64}')
_TIMEOUT = 30  # seconds without a byte
_CHUNK = 2**20  # bytes
_BY_HAND = 'or fetch it elsewhere and give its path'


def sha256_of(path: pathlib.Path) -> str:
  """Returns the sha256 of a file's bytes, as hex."""
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
  if not path.is_file():
    raise errors.UserError(
      f'no file {path}; wanted a path, http(s):// or hf://owner/name/file'
    )
  if sha256 is not None:
    found = sha256_of(path)
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


def _fetch_address(
  url: str, sha256: str | None, cache: pathlib.Path
) -> pathlib.Path:
  """Returns the path of an address's file in the cache, downloaded if needed.

  Beside it stands '<name>.sha256', what it hashed to when it came.
  """
  decoded = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
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
      if found == record.read_text().split()[0]:
        remedy = 'correct the sha256, or remove the file to fetch it again'
        _check_digest(path, found, sha256, remedy)
        return path
      _LOGGER.warning('%s was damaged since it came: fetching it again', path)
    to_path(url, path, check)
  return path


@contextlib.contextmanager
def alone(path: pathlib.Path) -> Iterator[None]:
  """Lets one process at a time look for a file and fetch it.

  Raises:
    errors.UserError: the folder of the file cannot be written.
  """
  lock = filelock.FileLock(path.with_name(f'{path.name}.lock'))
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      lock.acquire(timeout=0)
    except filelock.Timeout:
      _LOGGER.info('waiting for another process, which fetches %s', path.name)
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
  partial = path.with_name(f'{path.name}.partial')
  with _failing_in_one_line(url, path.parent):
    _download(url, partial)
    try:
      _check_no_page(url, partial)
      check(partial)
    except errors.UserError:
      partial.unlink()
      raise
    partial.replace(path)


def _check_no_page(url: str, came: pathlib.Path) -> None:
  """Raises UserError where a web page came in place of a file.

  Proxies and log-in pages answer so, and say that all is well.
  """
  with came.open('rb') as file:
    start = file.read(256).lstrip().lower()
  if start.startswith((b'<!doctype html', b'<html')):
    raise errors.UserError(
      f'{url} gave a web page (HTML) in place of the file, as a log-in or a'
      f' proxy does: open the address in a browser, {_BY_HAND}'
    )


@contextlib.contextmanager
def _failing_in_one_line(url: str, folder: pathlib.Path) -> Iterator[None]:
  """Turns the failures of a download into one line."""
  try:
    yield
  except errors.UserError:
    raise
  except urllib.error.HTTPError as error:
    raise errors.UserError(
      f'{url}: the server answers {error.code} ({error.reason}); check the'
      f' address, {_BY_HAND}'
    ) from error
  except urllib.error.URLError as error:
    raise errors.UserError(
      f'no network to {url} ({error.reason}): run the same command again,'
      f' {_BY_HAND}'
    ) from error
  except (OSError, http.client.HTTPException) as error:
    if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT):
      raise errors.UserError(
        f'disk full while fetching {url} to {folder}; free some space and run'
        ' the same command again to go on'
      ) from error
    raise errors.UserError(
      f'{url} was cut off ({error or type(error).__name__}); run the same'
      f' command again, {_BY_HAND}'
    ) from error


def _download(url: str, partial: pathlib.Path) -> None:
  """Downloads a file to `partial`, or the rest of what is there.

  Beside a partial file stands the version that the server gave it. It is
  continued only if the server still has that version; otherwise the server
  sends the whole file, and what was there is overwritten.
  """
  version = partial.with_suffix('.version')
  have = 0
  if partial.exists() and version.exists():
    have = partial.stat().st_size
  request = urllib.request.Request(url, headers={'User-Agent': 'ddo_jax'})
  if have:
    request.add_header('Range', f'bytes={have}-')
    request.add_header('If-Range', version.read_text())
  try:
    response = urllib.request.urlopen(request, timeout=_TIMEOUT)
  except urllib.error.HTTPError as error:
    if have and error.code == 416:  # there is nothing behind what is here
      partial.unlink()
      return _download(url, partial)
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
  """
  tag = response.headers.get('ETag', '')
  if not tag or tag.startswith('W/'):  # a weak tag does not speak of bytes
    tag = response.headers.get('Last-Modified', '')
  length = response.headers.get('Content-Length')
  total = None if length is None else have + int(length)
  bar = progress.follow(partial.stem, total, unit='B', done=have)
  version.unlink(missing_ok=True)
  with partial.open('ab' if have else 'wb') as file, bar:
    if tag:
      version.write_text(tag)
    while chunk := response.read(_CHUNK):
      file.write(chunk)
      bar.update(len(chunk))
    size = file.tell()
  if total is not None and size != total:
    raise http.client.HTTPException(f'{size} of {total} bytes came')
