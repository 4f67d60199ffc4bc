"""Loops of JAX as loops of Python, so that tests compile a network only once.

A sampler or a loss around a compiled network then runs operation by operation.
"""

import jax
import jax.numpy as jnp


def scan(step, carry, rows):
  """`jax.lax.scan` over the leading axis of all leaves of `rows`."""
  (count,) = {len(leaf) for leaf in jax.tree.leaves(rows)}
  kept = []
  for i in range(count):
    carry, out = step(carry, jax.tree.map(lambda leaf, i=i: leaf[i], rows))
    kept.append(out)
  return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)


def cond(predicate, true, false, *operands):
  """`jax.lax.cond` of a known predicate."""
  return true(*operands) if predicate else false(*operands)


def loops(monkeypatch):
  """From here on to the end of a test there are no compiled loops."""
  monkeypatch.setattr(jax.lax, 'scan', scan)
  monkeypatch.setattr(jax.lax, 'cond', cond)
