"""Features of images, to the same bits whatever the number of devices.

A compiled network may round a row differently in another place of the batch,
or in a batch of another size. Every image therefore has its place by its id,
row id % ROWS of block id // ROWS, always in a program of ROWS images on one
device. A GPU's compiler may choose its convolutions by timing them; bits that
are to outlive the process need its deterministic setting as well.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

ROWS = 64  # images in a block


def by_blocks(
  network: Callable[[Any, jax.Array], Any],
  params: Any,
  images: Callable[[np.ndarray], np.ndarray],
  ids: np.ndarray,
  devices: Sequence[jax.Device] = (),
  rows: int = ROWS,
) -> Iterator[tuple[np.ndarray, Any]]:
  """Yields ids [B] and what the network makes of their images, by blocks.

  While the caller works, two blocks a device are under way: one that is
  computed, and one that waits, so that no device waits for the host.

  Args:
    network: a jitted function (params, [rows,H,W,C]) -> tree of [rows,...] that
      works row by row: a row's result depends on that row alone.
    params: the network's arrays; a copy goes to every device.
    images: gives the images [B,H,W,C] of ids [B].
    ids: the images' ids, whole numbers from 0, in any order.
    devices: blocks take turns on these; () takes this process's.
    rows: the number of images in a block, which is part of what fixes the bits.

  Returns:
    A generator of (ids, tree of numpy arrays [B,...]), ids ascending.
  """
  devices = list(devices) or jax.local_devices()
  copies = [jax.device_put(params, device) for device in devices]
  ids = np.unique(ids)
  pending = []
  begin = np.flatnonzero(np.diff(ids // rows, prepend=-1))
  for turn, mine in enumerate(np.split(ids, begin)[1:]):
    given = images(mine)
    block = np.zeros((rows, *given.shape[1:]), given.dtype)
    block[mine % rows] = given
    place = turn % len(devices)
    out = network(copies[place], jax.device_put(block, devices[place]))
    pending.append((mine, out))
    if len(pending) >= 2 * len(devices):
      oldest, done = pending.pop(0)
      yield oldest, _fetch(done, oldest % rows)
  for mine, out in pending:
    yield mine, _fetch(out, mine % rows)


def _fetch(out: Any, places: np.ndarray) -> Any:
  """Fetches some rows of a block from its device."""

  def fetch(leaf: jax.Array) -> np.ndarray:
    return np.asarray(leaf)[places]

  return jax.tree.map(fetch, out)
