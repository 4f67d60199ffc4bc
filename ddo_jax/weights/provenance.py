"""Where weights come from: kept in the metadata of all that derives of them."""

import datetime
import hashlib
import pathlib
import re
import urllib.parse

NVIDIA = (
  'CC BY-NC-SA 4.0 (NVIDIA: EDM, EDM2, DDO): non-commercial use, share alike'
)
VAR = 'MIT (FoundationVision: VAR)'
UNKNOWN = 'not known to ddo_jax: see the publisher of the file'

_LICENCES = (
  (re.compile(r'(edm|edm2|baseline)-.*|.*-ddo\.\w+'), NVIDIA),
  (re.compile(r'var_d\d+\.pth|vae_ch160v4096z32\.pth'), VAR),
)


def sha256(path: pathlib.Path) -> str:
  """The sha256 of a file's bytes, as hex."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def licence_of(name: str) -> str:
  """The licence notice of a released file, by its published name."""
  for pattern, licence in _LICENCES:
    if pattern.fullmatch(name):
      return licence
  return UNKNOWN


def describe(
  path: pathlib.Path, source: str = '', licence: str = ''
) -> dict[str, str]:
  """What a checkpoint's metadata keeps of the file that it was made from.

  Args:
    path: the file.
    source: the address it was fetched from, if any; a query (which may be a
      password) and folders of this machine are left out.
    licence: the notice; by default that of the published name.

  Returns:
    {'file', 'sha256', 'licence', 'date' (UTC, ISO 8601)} and, for a fetched
    file, 'source'.
  """
  origin = {
    'file': path.name,
    'sha256': sha256(path),
    'licence': licence or licence_of(path.name),
    'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
  }
  parts = urllib.parse.urlsplit(source)
  if parts.scheme in ('http', 'https', 'hf'):
    place = parts.netloc.rpartition('@')[2]  # without a user and password
    origin['source'] = f'{parts.scheme}://{place}{parts.path}'
  return origin
