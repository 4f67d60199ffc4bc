"""Sets of latents that are written here, in the layout of EDM2's programs.

A set is a folder: files `00000/img-mean-std-00000000.npy`, each the float32
[2C,H,W] of an image's means and deviations, a thousand to a folder, and a
dataset.json with the labels. `files` reads it, and so do those programs. Beside
these stand

* latents.json, which says what the rows depend on;
* in each folder of a thousand a manifest.json with the checksums of its files.
  It is written when all of them are: a folder without one is begun anew.
"""

from collections.abc import Mapping
import io
import json
import logging
import pathlib
from typing import Any

import numpy as np

from ddo_jax import errors
from ddo_jax.data import encoded
from ddo_jax.data import files
from ddo_jax.runtime import disk
from ddo_jax.runtime import manifest as manifest_lib
from ddo_jax.runtime import processes
from ddo_jax.runtime import records

_LOGGER = logging.getLogger(__name__)
SHARD = 1_000  # rows in a folder, as EDM2's programs have it


def _folder_name(shard: int) -> str:
  return f'{shard:05d}'


def _file_name(row: int) -> str:
  """Returns the name of a row's file, inside its folder."""
  return f'img-mean-std-{row:08d}.npy'


def _bytes_of(latents: np.ndarray) -> bytes:
  """Returns the .npy of a row [H,W,2C]."""
  file = io.BytesIO()
  np.save(file, np.ascontiguousarray(np.moveaxis(latents, -1, 0)))
  return file.getvalue()


class LatentSet:
  """A set that is being written, which survives being cut off anywhere.

  Which rows a shard holds follows from its number alone. Of several processes,
  process 0 reads and writes.

  Attributes:
    folder: where it is.
    size: N, the number of its rows.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    labels: np.ndarray | None,
    identity: Mapping[str, Any],
  ):
    """Opens a set, or begins one in an empty folder.

    Args:
      folder: the folder.
      labels: [N] the rows' classes; None in a set without classes.
      identity: what the rows depend on, as JSON values; `rows` is N.

    Raises:
      errors.UserError: the folder holds a set of another identity, or something
        else, or cannot be written.
    """
    self.folder = folder
    self.size = identity['rows']
    self._labels = labels
    self._missing: list[int] = processes.decide(
      f'open {folder}', lambda: self._open(dict(identity))
    )

  def _open(self, identity: dict[str, Any]) -> list[int]:
    """Opens or begins the set; returns the numbers of the missing shards."""
    path = self.folder / files.RECORD
    if path.exists():
      self._check(records.read_json(path), identity)
    else:
      self._check_empty()
      records.write_json(path, identity)
    self._write_labels()
    return [shard for shard in self._shards() if not self._holds(shard)]

  def _check(self, recorded: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raises UserError where the recorded identity is not the given one."""
    for name, wanted in identity.items():
      got = recorded.get(name)
      if got != wanted:
        raise errors.UserError(
          f'{self.folder} holds latents made with {name} ='
          f' {errors.brief(got)}, and this command has {errors.brief(wanted)}:'
          ' name another --output, or delete that folder'
        )

  def _check_empty(self) -> None:
    """Raises UserError where a new set would stand beside something else."""
    if not self.folder.exists():
      return
    with disk.guarded(self.folder):
      names = sorted(entry.name for entry in self.folder.iterdir())
    for name in names:
      if not name.startswith('.') and not name.endswith('.partial'):
        raise errors.UserError(
          f'{self.folder} holds {name}, and no set of latents that was begun:'
          ' name another --output, or empty that folder'
        )

  def _write_labels(self) -> None:
    entries = None
    if self._labels is not None:
      names = [
        f'{_folder_name(row // SHARD)}/{_file_name(row)}'
        for row in range(self.size)
      ]
      entries = list(zip(names, self._labels.tolist(), strict=True))
    with disk.whole(self.folder / files.LABELS) as file:
      file.write(json.dumps({'labels': entries}).encode())

  def _shards(self) -> range:
    """The numbers of all shards."""
    return range(-(-self.size // SHARD))

  def rows(self, shard: int) -> np.ndarray:
    """Returns the numbers of a shard's rows, int64 [n]."""
    start = shard * SHARD
    return np.arange(start, min(start + SHARD, self.size))

  def missing(self) -> list[int]:
    """Returns the numbers of the shards that are still to be written."""
    return list(self._missing)

  def _holds(self, shard: int) -> bool:
    """Returns whether a shard is there, and as it was written."""
    folder = self.folder / _folder_name(shard)
    try:
      if manifest_lib.digest(folder) is None:
        return False
      faults = manifest_lib.faults(folder)
    except errors.UserError:
      faults = {manifest_lib.FILE: 'is damaged'}
    for name, fault in faults.items():
      _LOGGER.warning('%s %s: encoding its folder again', folder / name, fault)
      return False
    return True

  def write(self, shard: int, latents: np.ndarray) -> None:
    """Writes a shard.

    Args:
      shard: its number.
      latents: float32 [n,H,W,2C], as all processes have them.

    Raises:
      errors.UserError: they are not finite, or the disk is full.
    """
    fault = encoded.fault_of_latents(latents)
    if fault:
      raise errors.UserError(
        f'shard {shard} of {self.folder} would hold {fault}: the weights of'
        ' --config.vae_from are not those of this autoencoder, or damaged'
      )

    def write():
      folder = self.folder / _folder_name(shard)
      with disk.guarded(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / manifest_lib.FILE).unlink(missing_ok=True)
        names = [_file_name(row) for row in self.rows(shard).tolist()]
        for name, row in zip(names, latents, strict=True):
          (folder / name).write_bytes(_bytes_of(row))
      manifest_lib.Manifest(folder, ()).add(*names)

    processes.decide(f'write {self.folder} {shard}', write)


def check_range(
  source: str, image_range: tuple[float, float], setting: str
) -> None:
  """Refuses latents of images in another range than a model's.

  One autoencoder's latents of images in [0, 1] and in [−1, 1] look alike, and a
  model of the one is at a loss with the other. Only sets that were written here
  say which they are.

  Args:
    source: what the data are named by.
    image_range: what the model's autoencoder is given.
    setting: what names the source, for the error.

  Raises:
    errors.UserError: they are of another range.
  """
  path = pathlib.Path(source).expanduser() / files.RECORD
  if not path.is_file():
    return
  got = records.read_json(path).get('image_range')
  if got != list(image_range):
    raise errors.UserError(
      f'{setting} is {source}, latents of images in {got}; the model wants'
      f' those of images in {list(image_range)}: encode them with the recipe'
      ' that reads them'
    )
