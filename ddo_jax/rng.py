"""The only place that makes random keys.

Everything random is a pure function of (seed, purpose, round, step, row id):
no key is stored, carried or saved, so a run needs no iterator state to resume
and a row draws the same noise on any number of devices.
"""

import zlib

import jax
import jax.numpy as jnp


def stream(seed: int, *names: str | int) -> jax.Array:
  """Returns the key of a named stream, e.g. `stream(seed, 'train', round)`.

  Args:
    seed: the run's seed.
    *names: what the stream is for. Strings are folded by their CRC-32, so a
      stream's numbers depend on its name only, never on the order of calls.

  Returns:
    A typed PRNG key, shape [].
  """
  key = jax.random.key(seed)
  for name in names:
    data = zlib.crc32(name.encode()) if isinstance(name, str) else name
    key = jax.random.fold_in(key, data)
  return key


def per_example(key: jax.Array, ids: jax.Array) -> jax.Array:
  """Returns keys [B], one a row, folded from `key` and the rows' ids [B]."""
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)


def split_rows(keys: jax.Array, name: str) -> jax.Array:
  """Returns keys [B] of the purpose `name`, derived from the row keys [B]."""
  data = jnp.uint32(zlib.crc32(name.encode()))
  return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)
