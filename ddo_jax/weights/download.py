"""Files from a path, an address or the Hugging Face hub: cached, verified."""

import contextlib
import errno
import hashlib
import http.client
import pathlib
import re
import urllib.error
import urllib.parse
import urllib.request

import tqdm

from ddo_jax import errors
from ddo_jax.weights import provenance

_HUB = re.compile(r'hf://([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?/([\w./-]+)')
_DIGEST = re.compile(r'[0-9a-f]{64}')
_TIMEOUT = 30  # seconds without a byte
_CHUNK = 2**20
_BY_HAND = 'or fetch it elsewhere and give its path'


def fetch(
  source: str, sha256: str | None = None, cache: pathlib.Path | None = None
) -> pathlib.Path:
  """Returns the local path of a file, fetched unless it is here already.

  A download that is cut off goes on where it stopped. A cached file is checked
  against the sha256 that was recorded when it came.

  Args:
    source: a path, http(s)://..., or hf://owner/name[@revision]/file.
    sha256: what the file must hash to, as hex; None: not known.
    cache: folder for downloads; None: the hub's own cache for hf://, and
      ~/.cache/ddo_jax/files otherwise.

  Raises:
    errors.UserError: missing, no network, refused by the server, cut off, or
      not of that sha256.
  """
  if sha256 is not None and not _DIGEST.fullmatch(sha256 := sha256.lower()):
    raise errors.UserError(
      f'sha256 is {sha256[:80]!r}; wanted 64 hexadecimal digits'
    )
  scheme = source.partition('://')[0] if '://' in source else ''
  if scheme in ('http', 'https'):
    cache = cache or pathlib.Path('~/.cache/ddo_jax/files').expanduser()
    return _fetch_url(source, sha256, cache)
  if scheme == 'hf':
    path = _fetch_hub(source, cache)
    # The hub names a large file's blob by its sha256.
    recorded = _DIGEST.fullmatch(path.resolve().name)
    sha256 = sha256 or (recorded and recorded.group())
  elif scheme:
    raise errors.UserError(
      f'{source} has the unknown scheme {scheme}://; wanted a path, http(s)://'
      ' or hf://owner/name/file'
    )
  else:
    path = pathlib.Path(source).expanduser()
  if not path.is_file():
    raise errors.UserError(
      f'no file {path}; wanted a path, http(s):// or hf://owner/name/file'
    )
  if sha256 and (found := provenance.sha256(path)) != sha256:
    raise _mismatch(path, found, sha256, 'correct the sha256 or remove it')
  return path


def _mismatch(
  where: str | pathlib.Path, found: str, wanted: str, remedy: str
) -> errors.UserError:
  return errors.UserError(
    f'{where} has sha256 {found}; wanted {wanted}: {remedy}'
  )


def _fetch_hub(source: str, cache: pathlib.Path | None) -> pathlib.Path:
  """A file of the hub, by its own library: resumed, cached, with a bar."""
  import huggingface_hub
  from huggingface_hub import errors as hub_errors

  match = _HUB.fullmatch(source)
  if match is None:
    raise errors.UserError(
      f'{source} is no file of the hub; wanted hf://owner/name/file'
    )
  repo, revision, name = match.groups()
  try:
    path = huggingface_hub.hf_hub_download(
      repo, name, revision=revision, cache_dir=cache
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
    lines = str(error).strip().splitlines() or [type(error).__name__]
    raise errors.UserError(
      f'the Hugging Face hub does not give {source} ({lines[0][:200]}): check'
      f' the name, {_BY_HAND}'
    ) from error
  return pathlib.Path(path)


def _fetch_url(
  url: str, sha256: str | None, cache: pathlib.Path
) -> pathlib.Path:
  """A file of an address: from the cache if it is whole there."""
  name = pathlib.PurePosixPath(
    urllib.parse.unquote(urllib.parse.urlsplit(url).path)
  ).name
  if not re.fullmatch(r'[\w][\w .+-]*', name):
    raise errors.UserError(f'{url} names no file; wanted http(s)://.../file')
  # Addresses that end alike do not share a place.
  folder = cache / hashlib.sha256(url.encode()).hexdigest()[:16]
  path, record = folder / name, folder / f'{name}.sha256'
  if path.exists() and record.exists():
    found = provenance.sha256(path)
    if found == record.read_text().split()[0]:
      if sha256 not in (None, found):
        remedy = 'correct the sha256, or remove the file to fetch it again'
        raise _mismatch(path, found, sha256, remedy)
      return path
    path.unlink()  # damaged since: fetch it again
  partial = folder / f'{name}.partial'
  with _saying(url, partial):
    folder.mkdir(parents=True, exist_ok=True)
    _download(url, partial)
    found = provenance.sha256(partial)
    if sha256 not in (None, found):
      partial.unlink()
      raise _mismatch(url, found, sha256, 'what came was thrown away')
    record.write_text(f'{found}  {name}\n')
    partial.replace(path)
  return path


@contextlib.contextmanager
def _saying(url: str, partial: pathlib.Path):
  """Turns the failures of a download into one line."""
  again = f'run the same command again, {_BY_HAND}'
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
      f'no network to {url} ({error.reason}): {again}'
    ) from error
  except (OSError, http.client.HTTPException) as error:
    if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT):
      raise errors.UserError(
        f'disk full while fetching {url} to {partial.parent}; free some space'
        ' and run the same command again to go on'
      ) from error
    raise errors.UserError(
      f'{url} was cut off ({error or type(error).__name__}); {again}'
    ) from error


def _download(url: str, partial: pathlib.Path) -> None:
  """Completes `partial`; beside it stands the version that it is of."""
  tag = partial.with_suffix('.version')
  have = partial.stat().st_size if partial.exists() and tag.exists() else 0
  request = urllib.request.Request(url, headers={'User-Agent': 'ddo_jax'})
  if have:
    # Go on only if the server still has that version; else it sends all.
    request.add_header('Range', f'bytes={have}-')
    request.add_header('If-Range', tag.read_text())
  try:
    response = urllib.request.urlopen(request, timeout=_TIMEOUT)
  except urllib.error.HTTPError as error:
    if not have or error.code != 416:  # nothing behind what is here
      raise
    partial.unlink()
    return _download(url, partial)
  with response:
    goes_on = response.status == 206
    if goes_on and not response.headers.get('Content-Range', '').startswith(
      f'bytes {have}-'
    ):
      raise http.client.HTTPException('the server sent another range')
    _receive(response, partial, tag, have if goes_on else 0)
  tag.unlink(missing_ok=True)


def _receive(
  response: http.client.HTTPResponse,
  partial: pathlib.Path,
  tag: pathlib.Path,
  have: int,
) -> None:
  """Writes a response's bytes behind the `have` that are there."""
  headers = response.headers
  version = headers.get('ETag', '')
  if not version or version.startswith('W/'):
    version = headers.get('Last-Modified', '')
  tag.unlink(missing_ok=True)
  length = headers.get('Content-Length')
  total = None if length is None else have + int(length)
  with (
    partial.open('ab' if have else 'wb') as file,
    tqdm.tqdm(
      total=total,
      initial=have,
      desc=partial.stem,
      unit='B',
      unit_scale=True,
      disable=None,
      leave=False,
    ) as bar,
  ):
    if version:
      tag.write_text(version)
    while chunk := response.read(_CHUNK):
      file.write(chunk)
      bar.update(len(chunk))
    size = file.tell()
  if total is not None and size != total:
    raise http.client.HTTPException(f'{size} of {total} bytes came')
