"""Where weights come from, as the metadata of all made from them say."""

import datetime
import pathlib
import re
import urllib.parse

from ddo_jax.assets import download
from ddo_jax.assets import table

UNKNOWN = 'not known to ddo_jax: see the publisher of the file'

_LICENCES = (
  (re.compile(r'(edm|edm2|baseline)-.*|.*-ddo\.\w+'), table.NVIDIA),
  (re.compile(r'var_d\d+\.pth|vae_ch160v4096z32\.pth'), table.VAR),
)


def licence_of(name: str) -> str:
  """Returns the licence notice of a released file, by its published name."""
  for pattern, licence in _LICENCES:
    if pattern.fullmatch(name):
      return licence
  return UNKNOWN


def describe(
  path: pathlib.Path, source: str = '', licence: str = ''
) -> dict[str, str]:
  """Returns what the metadata of a checkpoint say of the file it comes from.

  Args:
    path: the file.
    source: the address that it was fetched from, if any. A user, a password
      and a query, which may be a secret, are left out.
    licence: the notice; '' takes the one that goes with the file's name.

  Returns:
    {'file', 'sha256', 'licence', 'date' (UTC, ISO 8601)} and, for a fetched
    file, 'source'. Only the file's name is kept, not its folder.
  """
  origin = {
    'file': path.name,
    'sha256': download.sha256_of(path),
    'licence': licence or licence_of(path.name),
    'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
  }
  parts = urllib.parse.urlsplit(source)
  if parts.scheme in ('http', 'https', 'hf'):
    host = parts.netloc.rpartition('@')[2]
    origin['source'] = f'{parts.scheme}://{host}{parts.path}'
  return origin
