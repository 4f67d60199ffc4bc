"""Placing arrays on devices; samples that do not depend on them."""

import dataclasses
import re

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import placing
import pytest

from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.data import codec
from ddo_jax.method import diffusion
from ddo_jax.method import generate
from ddo_jax.method import noise
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.runtime import layout
from ddo_jax.samplers import heun
from ddo_jax.training import state as state_lib

TREE = {
  'matrix': np.arange(48, dtype=np.float32).reshape(3, 16),
  'wide': np.arange(128, dtype=np.float32).reshape(8, 16),
  'vector': np.arange(5, dtype=np.float32),
  'number': np.float32(3),
}


def executor(kind='pmap', devices=0, fsdp_devices=0):
  config = layout.ExecutorConfig(kind=kind, fsdp_devices=fsdp_devices)
  return devices_lib.Executor(config, devices)


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


def test_a_batch_that_does_not_divide_is_called_by_its_name():
  line = r'^config\.ddo\.batch_size 12 is not divisible by 8 devices × 2'
  with pytest.raises(errors.UserError, match=line):
    executor().check_batch(12, accumulate=2, name='config.ddo.batch_size')


@pytest.mark.parametrize(
  ('field', 'value', 'wanted'),
  [
    ('kind', 'tpu', r"one of \('pmap', 'zero1', 'fsdp'\)"),
    ('fsdp_devices', -1, 'an integer, 0 or up'),
    ('fsdp_devices', 4, "0 where executor.kind is 'pmap', .*"),
    ('offload', ('ema',), r"\(\) where executor.kind is 'pmap'; .*"),
    ('accumulate', 0, "a positive integer or 'auto'"),
    ('sample_batch', True, "a positive integer or 'auto'"),
    ('remat', 'no', "True, False, 'dots' or 'auto'"),
    ('device_memory_gib', -1.0, '0 or more'),
  ],
)
def test_settings_that_make_no_sense_are_refused(field, value, wanted):
  settings = layout.ExecutorConfig(**{field: value})
  got = re.escape(repr(value))
  line = rf'^config\.executor\.{field} is {got}; it must be {wanted}$'
  with pytest.raises(errors.UserError, match=line):
    settings.check()


def test_only_some_parts_are_offloaded_and_only_where_there_is_a_place(
  monkeypatch,
):
  settings = layout.ExecutorConfig(kind='fsdp', offload=('ema', 'params'))
  line = (
    r"^config\.executor\.offload .* must be some of \('reference', 'ema'\)$"
  )
  with pytest.raises(errors.UserError, match=line):
    settings.check()
  settings = layout.ExecutorConfig(kind='fsdp', offload=('ema',))
  settings.check()
  monkeypatch.setattr(devices_lib, '_HOST', 'shelf')
  line = r"no memory of the kind 'shelf', only \['device', 'pinned_host', "
  with pytest.raises(errors.UserError, match=line):
    devices_lib.Executor(settings)


def test_rows_are_mapped_under_offloaded_weights():
  settings = layout.ExecutorConfig(kind='fsdp', offload=('ema',))
  one = devices_lib.Executor(settings)
  factor = placing.place_state(one, np.float32(2), part='ema')
  assert factor.sharding.memory_kind == 'pinned_host'
  kinds = []

  def double(factor, rows):
    kinds.append(factor.sharding.memory_kind)
    return factor * rows

  (got,) = one.map_rows(double, factor, [np.arange(8, dtype=np.float32)], 8)
  np.testing.assert_array_equal(got, 2 * np.arange(8))
  assert kinds == ['device']


def test_no_setting_of_the_executor_is_science():
  fields = dataclasses.fields(layout.ExecutorConfig)
  assert [field.name for field in fields if field.metadata['science']] == []
  layout.ExecutorConfig().check()


@pytest.mark.parametrize('kind', ['pmap', 'fsdp'])
def test_a_placed_state_is_the_same_in_new_buffers(kind):
  tree = jax.tree.map(jnp.asarray, TREE)
  placed = placing.place_state(executor(kind), tree)
  again = placing.place_state(executor(kind), placed)
  jax.tree.map(lambda leaf: leaf.delete(), (tree, placed))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), TREE)


def test_fsdp_splits_what_divides_over_the_devices():
  placed = placing.place_state(executor('fsdp'), TREE)
  shapes = jax.tree.map(lambda a: a.addressable_shards[0].data.shape, placed)
  split = {'matrix': (3, 2), 'wide': (8, 2), 'vector': (5,), 'number': ()}
  assert shapes == split
  whole = placing.place_state(executor('pmap'), TREE)
  shapes = jax.tree.map(lambda a: a.addressable_shards[0].data.shape, whole)
  assert shapes == jax.tree.map(np.shape, TREE)


def a_state():
  """A training state whose params are `TREE`, as shapes."""
  params = jax.eval_shape(lambda: TREE)
  return state_lib.TrainState(
    step=jax.ShapeDtypeStruct((), jnp.int32),
    params=params,
    ema={'halflife_1': params},
    opt_state=(optax.ScaleByAdamState(None, params, params),),
  )


@pytest.mark.parametrize(
  ('kind', 'fsdp_devices', 'shares'),
  # 192 + 512 bytes of what can be split, and 24 that cannot, four times.
  [
    ('pmap', 0, (4 * 728 + 4, 728)),
    ('zero1', 0, (728 + 3 * (88 + 24) + 4, 728)),
    ('zero1', 2, (728 + 3 * (352 + 24) + 4, 728)),
    ('fsdp', 0, (4 * (88 + 24) + 4, 88 + 24)),
    ('fsdp', 4, (4 * (176 + 24) + 4, 176 + 24)),
  ],
)
def test_what_is_counted_without_devices_lies_on_them(
  kind, fsdp_devices, shares
):
  config = layout.ExecutorConfig(kind=kind, fsdp_devices=fsdp_devices)
  counted = layout.Layout(config, 8)
  state = a_state()
  reference = state.params
  got = (counted.share(state), counted.share(reference, 'reference'))
  assert got == shares
  one = executor(kind, fsdp_devices=fsdp_devices)
  ones = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), state)
  placed = placing.place_state(one, ones)
  first = jax.devices()[0]
  held = 0
  for leaf in jax.tree.leaves(placed):
    shards = leaf.addressable_shards
    held += sum(s.data.nbytes for s in shards if s.device == first)
  assert held == shares[0]


def test_devices_that_share_a_state_divide_the_devices():
  config = layout.ExecutorConfig(kind='fsdp', fsdp_devices=8)
  assert layout.Layout(config, 1024).shards == 8
  line = r'^config\.executor\.fsdp_devices is 8; .* a divisor of the 4 devices$'
  with pytest.raises(errors.UserError, match=line):
    layout.Layout(config, 4)


def test_fsdp_keeps_small_leaves_whole(monkeypatch):
  monkeypatch.setattr(layout, 'SMALLEST_SPLIT', 128)
  placed = placing.place_state(executor('fsdp'), TREE)
  shapes = jax.tree.map(lambda a: a.addressable_shards[0].data.shape, placed)
  whole = {'matrix': (3, 16), 'vector': (5,), 'number': ()}
  assert shapes == whole | {'wide': (8, 2)}


@pytest.mark.parametrize('threshold', [1, 128])
def test_checkpoints_move_whichever_leaves_are_split(
  tmp_path, monkeypatch, threshold
):
  """From FSDP to another threshold, to pmap, and to fewer devices."""
  monkeypatch.setattr(layout, 'SMALLEST_SPLIT', threshold)
  checkpoint.save_params(
    tmp_path / 'a', placing.place_state(executor('fsdp'), TREE), {}
  )
  monkeypatch.setattr(layout, 'SMALLEST_SPLIT', 128 // threshold)
  shapes = jax.eval_shape(lambda: TREE)
  for target in (executor('fsdp'), executor('fsdp', 2), executor('pmap', 1)):
    shardings = target.state_shardings(shapes)
    abstract = checkpoint.abstract(shapes, shardings)
    params, _ = checkpoint.load_params(tmp_path / 'a', abstract)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), TREE)


def test_law_4_a_checkpoint_moves_between_all_kinds_and_devices(tmp_path):
  """8 devices, 4, 2, 1, and 8 again; split, offloaded and whole."""
  filled = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), a_state())
  filled = filled.replace(params=TREE)
  shapes = jax.eval_shape(lambda: filled)

  def opened(kind, devices, fsdp_devices=0, offload=()):
    settings = layout.ExecutorConfig(
      kind=kind, fsdp_devices=fsdp_devices, offload=offload
    )
    return devices_lib.Executor(settings, devices)

  state = placing.place_state(opened('fsdp', 8, 4), filled)
  # What a device has of the widest of the params, and of its moments.
  places = (
    (opened('zero1', 4), (8, 16), (8, 4)),
    (opened('fsdp', 2, offload=('ema', 'reference')), (8, 8), (8, 8)),
    (opened('pmap', 1), (8, 16), (8, 16)),
    (opened('zero1', 8, 2, ('ema',)), (8, 16), (8, 8)),
  )
  for step, (place, *parts) in enumerate(places):
    shardings = place.state_shardings(shapes)
    with checkpoint.Checkpoints(tmp_path / str(step)) as checkpoints:
      checkpoints.save(state, step)
      checkpoints.wait()
      target = checkpoint.abstract(shapes, shardings)
      state, _ = checkpoints.restore(step, target)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
    held = [tree['wide'] for tree in (state.params, state.opt_state[0].mu)]
    assert [a.addressable_shards[0].data.shape for a in held] == parts
    memory = state.ema['halflife_1']['wide'].sharding.memory_kind
    assert (memory == 'pinned_host') == ('ema' in place.offload)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), filled)


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


class Layers(nn.Module):
  """Three wide layers."""

  @nn.compact
  def __call__(self, x):
    for _ in range(3):
      x = nn.gelu(nn.Dense(256)(x))
    return x


def test_activations_stay_with_their_rows():
  """Weights, split by channels, come to the rows; no row goes to them."""
  network = Layers()

  def step(state, reference, frozen, real):
    del reference, frozen

    def loss(params):
      return jnp.sum(network.apply(params, real) ** 2)

    value, grads = jax.value_and_grad(loss)(state)
    return jax.tree.map(jnp.subtract, state, grads), value

  one = executor('fsdp')
  rows = one.place_batch(np.ones((64, 256), np.float32))
  state = one.make_state(network.init, rng.stream(0), rows)
  program = one.traceable_step(step).lower(state, None, None, rows).compile()
  assert ' all-gather(' in program.as_text()
  assert ' all-to-all(' not in program.as_text()


def test_equal_steps_are_compiled_once():
  one = executor()
  step = one.compile_step(lambda *args: args, accumulate=1, phase='a')
  assert one.compile_step(add_one, phase='a', accumulate=1) is step
  assert one.compile_step(add_one, phase='a', accumulate=2) is not step


@pytest.mark.parametrize('kind', ['pmap', 'fsdp'])
def test_law_7_an_array_that_nobody_placed_is_an_error(kind):
  one = executor(kind)
  rows = np.arange(8, dtype=np.float32)

  def step(
    state, reference, frozen, real, fake, model, phase, key, axis_name=None
  ):
    del reference, frozen, fake, model, phase, key
    total = real.sum()
    return state + total, jax.lax.psum(total, axis_name) if axis_name else total

  compiled = one.compile_step(step)
  others = one.replicate((np.float32(1),) * 3)
  none = np.zeros(8, np.float32)
  real, fake = one.place_batch((rows, none))

  def call(real):
    state = placing.place_state(one, np.float32(0))
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

  two = one.replicate(np.float32(2))
  parts = list(one.map_rows(double, two, [rows], batch))
  np.testing.assert_array_equal(np.concatenate(parts), 2 * rows['a'])
  assert sizes == [-(-batch // 8) * 8]


def test_a_call_is_dispatched_before_the_last_one_is_fetched(monkeypatch):
  """And no more than one: two results are on the devices at most."""
  events = []
  real_fetch = devices_lib.fetch

  def fetch(result):
    events.append(f'fetch {int(result[0])}')
    return real_fetch(result)

  def fn(params, rows):
    del params
    events.append(f'dispatch {int(rows[0])}')
    return rows

  monkeypatch.setattr(devices_lib, 'fetch', fetch)
  one = executor(devices=1)
  blocks = [np.arange(3), np.arange(3, 7)]  # No call takes rows of both.
  for part in one.map_rows(fn, None, blocks, batch=2):
    events.append(f'use {int(part[0])}')
  assert events == [
    'dispatch 0',
    'dispatch 2',
    'fetch 0',
    'use 0',
    'dispatch 3',
    'fetch 2',
    'use 2',
    'dispatch 5',
    'fetch 3',
    'use 3',
    'fetch 5',
    'use 5',
  ]


def test_no_rows_are_no_calls():
  assert list(executor().map_rows(None, None, [np.arange(0)], batch=2)) == []


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
    weight=noise.EdmWeight(0.5),
    codec=codec.Pixels(17),
  )
  params = model.init(rng.stream(0))
  sampler = heun.Heun(3, 0.02, 5.0)
  ids = np.arange(24)

  def draw(kind, devices, batch, ids):
    one = executor(kind, devices)
    generator = generate.Generator(model, {}, sampler, one, batch)
    placed = placing.place_state(one, params)
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
