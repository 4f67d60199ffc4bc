"""Key streams: pure functions of names and ids."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import rng


def numbers(key):
  return np.asarray(jax.random.key_data(key)).tolist()


def test_a_stream_is_its_seed_and_its_names():
  key = rng.stream(3, 'train', 'round_001')
  assert numbers(key) == numbers(rng.stream(3, 'train', 'round_001'))
  others = [
    rng.stream(4, 'train', 'round_001'),
    rng.stream(3, 'train', 'round_002'),
    rng.stream(3, 'round_001', 'train'),
    rng.stream(3, 'train'),
    rng.stream(3, 'train', 1),
  ]
  distinct = {tuple(numbers(k)) for k in [key, *others]}
  assert len(distinct) == len(others) + 1


def test_streams_stay_the_same_for_good():
  # A change here would change every recorded number.
  assert numbers(rng.stream(0, 'train', 'round_000')) == [
    3797097762,
    2513272540,
  ]
  assert rng.order_seed(0, 'round_000', 'real') == 4115510623


def test_a_row_draws_the_same_beside_other_rows():
  key, ids = rng.stream(0), jnp.arange(8, dtype=jnp.uint32)
  keys = rng.per_example(key, ids)
  chex.assert_shape(keys, (8,))
  assert len({tuple(row) for row in numbers(keys)}) == 8
  order = jnp.array([5, 2, 7])
  assert numbers(rng.per_example(key, ids[order])) == numbers(keys[order])
  assert numbers(rng.split_rows(keys, 'a')[5]) == numbers(
    rng.split_rows(keys[order], 'a')[0]
  )


def test_purposes_of_a_row_are_apart():
  keys = rng.per_example(rng.stream(0), jnp.arange(4, dtype=jnp.uint32))
  purposes = [keys, *(rng.split_rows(keys, n) for n in ('encode', 'start', 3))]
  rows = {tuple(row) for purpose in purposes for row in numbers(purpose)}
  assert len(rows) == 16


def test_orders_differ_by_stage_and_kind():
  seeds = [
    rng.order_seed(seed, stage, kind)
    for seed in (0, 1)
    for stage in ('round_000', 'round_001')
    for kind in ('real', 'fake')
  ]
  assert len(set(seeds)) == 8
  assert all(0 <= seed < 2**32 for seed in seeds)
