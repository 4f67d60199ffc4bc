"""The only place that makes random keys.

Everything random is a pure function of (seed, purpose, round, step, row id):
no key is stored, carried or saved, so a run needs no iterator state to resume
and a row draws the same noise on any number of devices.
"""

from collections.abc import Sequence
import zlib

import jax


def _fold(key: jax.Array, names: Sequence[str | int | jax.Array]) -> jax.Array:
  for name in names:
    data = zlib.crc32(name.encode()) if isinstance(name, str) else name
    key = jax.random.fold_in(key, data)
  return key


def stream(seed: int, *names: str | int) -> jax.Array:
  """Returns the key of a named stream, e.g. `stream(seed, 'train', round)`.

  Args:
    seed: the run's seed.
    *names: what the stream is for. Strings are folded by their CRC-32, so that
      a stream's numbers depend on its name only, never on the order of calls.

  Returns:
    A typed PRNG key of shape [].
  """
  return _fold(jax.random.key(seed), names)


def named(key: jax.Array, name: str) -> jax.Array:
  """Returns a key of its own for what is named so."""
  return _fold(key, (name,))


def per_example(key: jax.Array, ids: jax.Array) -> jax.Array:
  """Returns one key for each row, [B], folded from `key` and the ids [B]."""
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)


def split_rows(keys: jax.Array, *names: str | int | jax.Array) -> jax.Array:
  """Returns keys [B] of the named purpose, derived from the row keys [B]."""
  return jax.vmap(lambda key: _fold(key, names))(keys)


def order_seed(seed: int, *names: str) -> int:
  """Returns the seed of a data order in [0, 2**32), for `loader.batches`."""
  return zlib.crc32('/'.join([str(seed), *names]).encode())
