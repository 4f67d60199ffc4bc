"""Placing arrays on devices; samples that do not depend on them."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax import config
from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.data import codec
from ddo_jax.method import diffusion
from ddo_jax.method import generate
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.samplers import heun

TREE = {
  'matrix': np.arange(48, dtype=np.float32).reshape(3, 16),
  'wide': np.arange(128, dtype=np.float32).reshape(8, 16),
  'vector': np.arange(5, dtype=np.float32),
  'number': np.float32(3),
}


def executor(kind='pmap', devices=0):
  return devices_lib.Executor(config.Executor(kind=kind), devices)


def test_all_devices_are_taken():
  assert executor().num_devices == 8
  assert executor(devices=1).num_devices == 1


@pytest.mark.parametrize(
  ('batch', 'accumulate', 'near'), [(12, 1, 16), (24, 2, 32), (4, 1, 8)]
)
def test_a_batch_that_does_not_divide_is_refused(batch, accumulate, near):
  line = f'batch_size {batch} .* 8 devices × {accumulate} .*; try {near}$'
  with pytest.raises(errors.UserError, match=line):
    executor().check_batch(batch, accumulate)
  executor().check_batch(near, accumulate)


@pytest.mark.parametrize('kind', ['pmap', 'fsdp'])
def test_a_placed_state_is_the_same_in_new_buffers(kind):
  tree = jax.tree.map(jnp.asarray, TREE)
  placed = executor(kind).place_state(tree)
  again = executor(kind).place_state(placed)
  jax.tree.map(lambda leaf: leaf.delete(), (tree, placed))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), TREE)


def test_fsdp_splits_what_divides_over_the_devices():
  placed = executor('fsdp').place_state(TREE)
  shapes = jax.tree.map(lambda a: a.addressable_shards[0].data.shape, placed)
  split = {'matrix': (3, 2), 'wide': (8, 2), 'vector': (5,), 'number': ()}
  assert shapes == split
  whole = executor('pmap').place_state(TREE)
  shapes = jax.tree.map(lambda a: a.addressable_shards[0].data.shape, whole)
  assert shapes == jax.tree.map(np.shape, TREE)


@pytest.mark.parametrize(
  ('kind', 'shape', 'shard'),
  [('pmap', (8, 2, 3), (1, 2, 3)), ('fsdp', (16, 3), (2, 3))],
)
def test_a_batch_is_split_in_order(kind, shape, shard):
  rows = np.arange(48).reshape(16, 3)
  placed = executor(kind).place_batch(rows)
  assert placed.shape == shape
  assert {s.data.shape for s in placed.addressable_shards} == {shard}
  np.testing.assert_array_equal(np.reshape(placed, (16, 3)), rows)


def add_one(state, rows):
  return state + 1, rows.sum()


def test_equal_steps_are_compiled_once():
  one = executor()
  step = one.compile_step(lambda *args: args, accumulate=1, phase='a')
  assert one.compile_step(add_one, phase='a', accumulate=1) is step
  assert one.compile_step(add_one, phase='a', accumulate=2) is not step


@pytest.mark.parametrize('kind', ['pmap', 'fsdp'])
def test_law_7_an_array_that_nobody_placed_is_an_error(kind):
  one = executor(kind)
  rows = np.arange(8, dtype=np.float32)

  def step(state, reference, frozen, real, fake, hyper, key, axis_name=None):
    del reference, frozen, fake, hyper, key
    total = real.sum()
    return state + total, jax.lax.psum(total, axis_name) if axis_name else total

  compiled = one.compile_step(step)
  others = one.replicate((np.float32(1),) * 2)
  none = np.zeros(8, np.float32)
  real, fake = one.place_batch((rows, none))

  def call(real):
    state = one.place_state(np.float32(0))
    with one.no_implicit_transfers():
      _, total = compiled(state, None, None, real, fake, *others)
    return float(total)

  assert call(real) == 28
  shape = (8, 1) if kind == 'pmap' else (8,)
  with pytest.raises(Exception, match='Disallowed host-to-device'):
    call(rows.reshape(shape))


@pytest.mark.parametrize('batch', [3, 8, 64])
def test_rows_are_mapped_in_order_and_all(batch):
  one = executor()
  rows = {'a': np.arange(21, dtype=np.float32)}
  sizes = []

  @jax.jit
  def double(factor, rows):
    sizes.append(rows['a'].shape[0])  # once a compilation
    return factor * rows['a']

  parts = list(one.map_rows(double, one.replicate(np.float32(2)), rows, batch))
  np.testing.assert_array_equal(np.concatenate(parts), 2 * rows['a'])
  assert sizes == [-(-batch // 8) * 8]


class Denoiser(nn.Module):
  """Small, for the sampler is compiled four times."""

  @nn.compact
  def __call__(self, x, sigma, label):
    variance = (sigma**2)[:, None, None, None]
    flat = x.reshape(x.shape[0], -1) + nn.Embed(4, 16)(label)
    mixed = nn.Dense(16)(flat).reshape(x.shape)
    return (x + 0.1 * mixed) * 0.25 / (0.25 + variance)


def test_law_3_an_image_depends_on_its_id_alone():
  model = diffusion.Diffusion(
    denoiser=Denoiser(),
    example_shape=(4, 4, 1),
    num_classes=3,
    sigma_data=0.5,
    p_mean=-0.5,
    p_std=1.2,
    encoder=codec.Pixels(17),
  )
  params = model.init(rng.stream(0))
  sampler = heun.Heun(3, 0.02, 5.0)
  ids = np.arange(24)

  def draw(kind, devices, batch, ids):
    one = executor(kind, devices)
    generator = generate.Generator(model, {}, sampler, one, batch)
    placed = one.place_state(params)
    parts = generator.stream(placed, rng.stream(0, 'a'), ids, ids % 3)
    return np.concatenate(list(parts)).astype(int)

  whole = draw('pmap', 1, 24, ids)
  assert whole.shape == (24, 4, 4, 1)
  assert len({image.tobytes() for image in whole}) == 24
  shuffled = np.random.default_rng(1).permutation(ids)
  for got, expected in (
    (draw('pmap', 1, 8, ids), whole),
    (draw('pmap', 8, 8, ids), whole),
    (draw('fsdp', 8, 16, ids), whole),
    (draw('pmap', 1, 8, shuffled), whole[shuffled]),
  ):
    # A value between two levels may be rounded either way.
    assert np.abs(got - expected).max() <= 1
    assert np.mean(got != expected) < 0.02
