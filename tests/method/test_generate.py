"""How many images a call of the sampler draws, and when it is dispatched."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax import rng
from ddo_jax.data import labels as labels_lib
from ddo_jax.method import generate
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import layout as layout_lib


@pytest.mark.parametrize(
  ('count', 'batch', 'devices', 'wanted'),
  [
    (4, 1_000, 1, 4),
    (5, 1_000, 1, 8),
    (1, 1_000, 8, 8),
    (17, 1_000, 8, 32),
    (600, 1_000, 1, 1_000),
    (512, 1_000, 1, 512),
    (1_000, 1_000, 1, 1_000),
    (10_500, 1_000, 1, 1_000),
    (80, 64, 1, 64),
    (3, 2, 8, 2),
  ],
)
def test_a_small_set_costs_a_small_call(count, batch, devices, wanted):
  assert generate.call_size(count, batch, devices) == wanted


@dataclasses.dataclass(frozen=True)
class Model:
  """Draws rows that say which they are."""

  def draw(self, params, frozen, label, keys, sampler):
    del frozen, keys, sampler
    return jnp.stack([params + label, label], axis=1)


class Pool:
  """Seven images in shards of three, of which the first is there."""

  folder = 'pool'
  size = 7

  def __init__(self, events):
    self.events = events

  def missing(self):
    return [1, 2]

  def ids(self, shard):
    return np.arange(3 * shard, min(3 * shard + 3, 7))

  def write(self, shard, stored, labels):
    self.events.append(f'write {shard}')
    np.testing.assert_array_equal(stored[:, 1], labels)
    assert len(stored) == len(self.ids(shard))


def test_the_next_shard_is_under_way_while_one_is_written(monkeypatch):
  events = []
  sample = generate._sample

  def dispatch(weights, rows, **static):
    events.append(f'draw {np.asarray(rows["id"]).tolist()}')
    return sample(weights, rows, **static)

  monkeypatch.setattr(generate, '_sample', dispatch)
  executor = devices_lib.Executor(layout_lib.ExecutorConfig(), 1)
  generator = generate.Generator(Model(), {}, None, executor, batch=2)
  generator.fill(
    Pool(events),
    executor.replicate(np.float32(1)),
    rng.stream(0),
    labels_lib.Shares((1, 1, 1)),
  )
  assert events == [
    'draw [3, 4]',
    'draw [5, 5]',
    'draw [6, 6]',
    'write 1',
    'write 2',
  ]
