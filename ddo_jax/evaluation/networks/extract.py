"""Features of images, to the same bits whatever the number of devices.

A compiled network may round a row differently in another place of the batch,
or in a batch of another size. So every image has its place by its id: block
id // ROWS, row id % ROWS, always in a program of ROWS images on one device.
A GPU's compiler may choose its convolutions by timing them; bits that are to
outlive the process need its deterministic setting as well.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

ROWS = 64  # images of a block


def by_blocks(
  network: Callable[[Any, jax.Array], Any],
  params: Any,
  images: Callable[[np.ndarray], np.ndarray],
  ids: np.ndarray,
  devices: Sequence[jax.Device] = (),
  rows: int = ROWS,
) -> Iterator[tuple[np.ndarray, Any]]:
  """Yields (ids [B], what the network says of them), block by block.

  Args:
    network: jitted, (params, [rows,H,W,C]) -> tree of [rows,...]; row-wise: a
      row's result depends on that row alone.
    params: its arrays; a copy goes to every device.
    images: gives the images [B,H,W,C] of ids [B].
    ids: whole numbers from 0, in any order; `Accumulator.missing` on resume.
    devices: blocks take turns on these; default: this process's.
    rows: of a block; part of what fixes the bits.

  Returns:
    A generator, ids ascending, of trees of numpy arrays; one block a device
    is under way while the caller works.
  """
  devices = list(devices) or jax.local_devices()
  copies = [jax.device_put(params, device) for device in devices]
  ids = np.unique(ids)
  pending = []
  for turn, number in enumerate(np.unique(ids // rows)):
    mine = ids[ids // rows == number]
    given = images(mine)
    block = np.zeros((rows, *given.shape[1:]), given.dtype)
    block[mine % rows] = given
    place = turn % len(devices)
    out = network(copies[place], jax.device_put(block, devices[place]))
    pending.append((mine, out))
    if len(pending) > len(devices):
      yield _fetch(*pending.pop(0), rows)
  for mine, out in pending:
    yield _fetch(mine, out, rows)


def _fetch(mine: np.ndarray, out: Any, rows: int) -> tuple[np.ndarray, Any]:
  return mine, jax.tree.map(lambda x: np.asarray(x)[mine % rows], out)
