"""Checkpoints and folders of params: what comes back, and what is refused."""

import errno
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as orbax_v0
import pytest
import tensorstore

from ddo_jax import errors
from ddo_jax.method import likelihood
from ddo_jax.runtime import checkpoint
from ddo_jax.training import state as state_lib

AVERAGES = state_lib.Averages(halflife=(10.0, 20.0))
HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def make_params(value=0.0, width=3):
  return {
    'dense': {'kernel': jnp.full((2, width), value), 'bias': jnp.zeros(width)}
  }


def make_state(step=0, width=3, averages=AVERAGES):
  """A state whose every leaf depends on the step, whose averages differ."""
  transform = state_lib.Optimizer(clip_norm=1.0).transform(
    likelihood.WeightRules(), batch_size=1, images=1
  )
  state = state_lib.create(make_params(width=width), transform, averages)
  state = jax.tree.map(lambda leaf: leaf + step, state)
  ema = {
    name: jax.tree.map(lambda leaf, i=i: leaf + i, params)
    for i, (name, params) in enumerate(state.ema.items(), 1)
  }
  return state.replace(step=jnp.int32(step), ema=ema)


def abstract(tree):
  return checkpoint.abstract(tree, jax.tree.map(lambda _: HERE, tree))


def saved(folder, steps, best=None):
  """Saves the state of each step; `best` gives the best one before it."""
  with checkpoint.Checkpoints(folder) as checkpoints:
    for step in steps:
      checkpoints.save(make_state(step), step, best=(best or {}).get(step))
  return folder


def assert_equal(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize(
  'averages', [AVERAGES, state_lib.Averages()], ids=['ema', 'plain']
)
def test_a_state_comes_back(tmp_path, averages):
  state = make_state(7, averages=averages)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state, 7)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [7]
    assert_equal(checkpoints.restore(7, abstract(state))[0], state)


def test_an_empty_folder_has_no_step(tmp_path):
  with checkpoint.Checkpoints(tmp_path / 'new') as checkpoints:
    assert checkpoints.steps() == []
    assert checkpoints.restore_newest(abstract(make_state())) is None


def kept(folder):
  return sorted(int(path.name) for path in folder.glob('[0-9]*'))


@pytest.mark.parametrize(
  ('best', 'expected'),
  [
    ({}, [6, 8]),
    ({4: 2, 6: 4, 8: 4}, [4, 6, 8]),
    ({4: 2, 6: 4, 8: 6}, [6, 8]),
    ({2: 0, 4: 0, 6: 0, 8: 0}, [6, 8]),  # the reference, which is elsewhere
  ],
)
def test_the_newest_two_and_the_best_are_kept(tmp_path, best, expected):
  assert kept(saved(tmp_path, [2, 4, 6, 8], best)) == expected


def test_the_best_is_kept_across_a_resume(tmp_path):
  saved(tmp_path, [2, 4], {4: 2})
  saved(tmp_path, [6, 8], {6: 2, 8: 2})
  assert kept(tmp_path) == [2, 6, 8]


def test_the_state_may_be_donated_while_it_is_saved(tmp_path):
  step = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
  state, expected = make_state(5), make_state(5)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state, 5)
    for _ in range(3):
      state = step(state)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert_equal(checkpoints.restore(5, abstract(expected))[0], expected)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
  saved(tmp_path, [3])
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(errors.UserError) as caught:
      checkpoints.restore(3, abstract(make_state(width=4)))
  line = str(caught.value)
  assert f'{tmp_path / "3"} holds another architecture' in line
  assert 'dense/kernel: stored (2, 3), wanted (2, 4)' in line


def damage(path, kind, other):
  """Damages a file; `other` is its counterpart in another checkpoint."""
  raw = bytearray(path.read_bytes())
  if kind == 'deleted':
    path.unlink()
    return
  if kind == 'flipped':
    raw[len(raw) // 2] ^= 4
  content = {
    'flipped': raw,
    'truncated': raw[: len(raw) // 2],
    'emptied': b'',
    'swapped': other.read_bytes(),
  }
  path.write_bytes(content[kind])


KINDS = ('flipped', 'truncated', 'emptied', 'deleted', 'swapped')


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """The checkpoints of steps 2 and 4; nobody may change them."""
  return saved(tmp_path_factory.mktemp('two') / 'checkpoints', [2, 4])


@pytest.fixture
def folder(two, tmp_path):
  return shutil.copytree(two, tmp_path / 'checkpoints')


def go_on(folder):
  """Returns the newest step that holds, and checks what is in it."""
  with checkpoint.Checkpoints(folder) as checkpoints:
    step, state, _ = checkpoints.restore_newest(abstract(make_state()))
    assert_equal(state, make_state(step))
    assert checkpoints.steps() == [at for at in (2, 4) if at <= step]
  return step


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
  'file', ['state/d/*', 'ema/d/*', 'ema/manifest.ocdbt', 'record/data.json']
)
def test_of_a_damaged_checkpoint_the_one_before_is_used(
  folder, file, kind, caplog
):
  (path,) = (folder / '4').glob(file)
  (other,) = (folder / '2').glob(file)
  damage(path, kind, other)
  assert go_on(folder) == 2
  (line,) = [r for r in caplog.messages if str(folder) in r]
  assert line.startswith(f'{folder / "4"} is damaged (')
  assert line.endswith(f'; it was moved to {folder.parent / "damaged" / "4"}')
  assert '\n' not in line


@pytest.mark.parametrize('item', ['state', 'ema'])
def test_a_flipped_bit_of_an_array_is_found(tmp_path, item, caplog):
  numbers = np.random.default_rng(0).standard_normal((64, 64))
  state = make_state(3)
  large = {'kernel': jnp.asarray(numbers, jnp.float32)}
  state = state.replace(params=large, ema={'average': large})
  folder = tmp_path / 'checkpoints'
  with checkpoint.Checkpoints(folder) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(state, step)
  files = (folder / '3' / item).rglob('*/d/*')
  largest = max(files, key=lambda path: path.stat().st_size)
  for place in (0, -100):  # TensorStore itself finds those of its own numbers
    raw = bytearray(largest.read_bytes())
    raw[len(raw) // 2 + place] ^= 1
    largest.write_bytes(raw)
  with checkpoint.Checkpoints(folder) as checkpoints:
    step, restored, _ = checkpoints.restore_newest(abstract(state))
  assert step == 2
  assert_equal(restored, state)
  assert f'({item}/' in caplog.text
  assert 'does not match its checksum' in caplog.text


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
  'file', ['_CHECKPOINT_METADATA', 'state/_METADATA', 'ema/_sharding']
)
def test_what_orbax_keeps_of_its_own_is_made_do_without(folder, file, kind):
  damage(folder / '4' / file, kind, folder / '2' / file)
  assert go_on(folder) in (2, 4)


def test_metadata_with_which_orbax_opens_nothing_are_set_aside(folder, caplog):
  path = folder / '4' / '_CHECKPOINT_METADATA'
  path.write_text(path.read_text().replace('metrics', 'netrics'))
  assert go_on(folder) == 2
  assert f'{folder / "4"} is damaged' in caplog.text


def test_a_checkpoint_under_another_step_is_damaged(folder, caplog):
  shutil.rmtree(folder / '4')
  shutil.copytree(folder / '2', folder / '4')
  assert go_on(folder) == 2
  assert '(it is the checkpoint of step 2); it was moved' in caplog.text


def test_where_no_checkpoint_holds_there_is_none(folder, caplog):
  for step in (2, 4):
    (folder / str(step) / 'record' / 'data.json').unlink()
  with checkpoint.Checkpoints(folder) as checkpoints:
    assert checkpoints.restore_newest(abstract(make_state())) is None
    assert kept(folder.parent / 'damaged') == [2, 4]
    checkpoints.forget_damaged()
  assert f'{folder}: none is left; it begins again' in caplog.text
  assert not (folder.parent / 'damaged').exists()


def test_a_checkpoint_that_may_not_be_read_stays(folder, monkeypatch):
  def denied(*args, **kwargs):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

  with checkpoint.Checkpoints(folder) as checkpoints:
    monkeypatch.setattr(tensorstore, 'open', denied)
    with pytest.raises(errors.UserError, match='4 may not be read'):
      checkpoints.restore_newest(abstract(make_state()))
  assert kept(folder) == [2, 4]


def test_processes_go_back_together(monkeypatch):
  """Where one cannot read its part, the others have read theirs in vain."""
  monkeypatch.setattr(checkpoint.processes, 'count', lambda: 2)
  for other, failed in (([0], False), ([1], True)):
    sent = []

    def exchange(flag, other=other, sent=sent):
      sent.extend(flag)
      return np.concatenate([flag, np.uint32(other)])

    monkeypatch.setattr(checkpoint.devices, 'exchange', exchange)
    if failed:
      with pytest.raises(checkpoint.DamagedError, match='another process'):
        checkpoint._on_all(int)
    else:
      assert checkpoint._on_all(int) == 0
    assert sent == [0]


def test_notes_come_back(tmp_path):
  notes = [{'step': 0, 'selection': 0.1}]
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(make_state(3), 3, notes)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(3, abstract(make_state()))[1] == notes


def test_a_checkpoint_of_an_earlier_version_is_restored(tmp_path):
  folder = tmp_path / 'checkpoints'
  state = make_state(2)
  save = orbax_v0.args.StandardSave
  items = checkpoint._items(state)
  with orbax_v0.CheckpointManager(folder) as manager:
    items = {name: save(tree) for name, tree in items.items()}
    manager.save(2, args=orbax_v0.args.Composite(**items))
  target = abstract(state)
  with checkpoint.Checkpoints(folder) as checkpoints:
    step, restored, notes = checkpoints.restore_newest(target)
    assert_equal(restored, state)
    assert (step, notes) == (2, None)
    checkpoints.save(make_state(4), 4)
    with pytest.raises(errors.UserError, match='2 holds another architecture'):
      checkpoints.restore(2, abstract(make_state(width=4)))
  assert go_on(folder) == 4


def test_a_folder_of_params_of_an_earlier_version_is_read(tmp_path):
  folder = tmp_path / 'params'
  params = make_params(2.0)
  meta = {'stage': 'a', 'sha256': checkpoint.tree_hash(params)}
  handler = orbax_v0.CompositeCheckpointHandler(
    params=orbax_v0.StandardCheckpointHandler(),
    meta=orbax_v0.JsonCheckpointHandler(),
  )
  with orbax_v0.Checkpointer(handler) as writer:
    items = orbax_v0.args.Composite(
      params=orbax_v0.args.StandardSave(params),
      meta=orbax_v0.args.JsonSave(meta),
    )
    writer.save(folder, args=items)
  got, found = checkpoint.load_params(folder, abstract(params))
  assert_equal(got, params)
  assert found == meta


def split(tree, devices):
  """Shardings of a tree whose leaves' last axes are split over devices."""
  mesh = jax.make_mesh((devices,), ('d',), devices=jax.devices()[:devices])

  def place(leaf):
    axes = [None] * leaf.ndim
    if axes and leaf.shape[-1] % devices == 0:
      axes[-1] = 'd'
    spec = jax.sharding.PartitionSpec(*axes)
    return jax.sharding.NamedSharding(mesh, spec)

  return jax.tree.map(place, tree)


def test_checksums_hold_on_other_numbers_of_devices(tmp_path):
  state = make_state(1, width=16)
  described = []
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    for step, devices in enumerate((8, 4, 2, 1, 8), 1):
      target = checkpoint.abstract(state, split(state, devices))
      if step == 1:
        placed = jax.device_put(state, split(state, devices))
      else:
        placed, _ = checkpoints.restore(step - 1, target)
      assert len(placed.params['dense']['kernel'].devices()) == devices
      assert_equal(placed, state)
      described.append(checkpoint._describe(placed))
      checkpoints.save(placed, step)
      checkpoints.wait()
  assert described == described[:1] * 5


def test_what_lies_in_the_hosts_memory_is_saved_and_verified(tmp_path):
  state = make_state(1)
  offloaded = HERE.with_memory_kind('pinned_host')
  placed = jax.device_put(state, offloaded)
  target = jax.tree.map(lambda _: offloaded, state)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(placed, 1)
    checkpoints.wait()
    target = checkpoint.abstract(state, target)
    _, restored, _ = checkpoints.restore_newest(target)
  assert_equal(restored, state)
  for leaf in jax.tree.leaves(restored):
    assert leaf.sharding.memory_kind == 'pinned_host'
  assert checkpoint._describe(placed) == checkpoint._describe(state)


@pytest.mark.parametrize(
  'dtype', ['float32', 'bfloat16', 'int8', 'bool', 'int32']
)
def test_a_checksum_knows_every_bit_and_its_place(dtype):
  numbers = np.arange(6).reshape(2, 3) % 2
  array = jnp.asarray(numbers, dtype)
  sums = {int(checkpoint._checksum(array))}
  for place in np.ndindex(2, 3):
    changed = array.at[place].set((1 - numbers[place]).astype(dtype))
    sums.add(int(checkpoint._checksum(changed)))
  sums.add(int(checkpoint._checksum(array[::-1])))
  assert len(sums) == 8


def test_a_checksum_tells_zeros_apart():
  zero = jnp.zeros(2)
  assert checkpoint._checksum(zero) != checkpoint._checksum(-zero)
  assert int(checkpoint._checksum(jnp.zeros((0, 3)))) == 0


def full_disk(*args, **kwargs):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
  saved(tmp_path, [2])
  with monkeypatch.context() as patch:
    patch.setattr(tensorstore, 'open', full_disk)  # by it Orbax writes arrays
    with pytest.raises(errors.UserError) as caught:
      with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(4), 4)
        checkpoints.wait()
  line = str(caught.value)
  assert f'disk full while writing {tmp_path} (' in line
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [2]
    state, _ = checkpoints.restore(2, abstract(make_state()))
  assert_equal(state, make_state(2))


def test_a_full_disk_leaves_no_half_of_a_folder(tmp_path, monkeypatch):
  folder, params = tmp_path / 'params', make_params()
  with monkeypatch.context() as patch:
    patch.setattr(tensorstore, 'open', full_disk)
    with pytest.raises(errors.UserError, match=f'disk full .* {folder} '):
      checkpoint.save_params(folder, params, {})
  with pytest.raises(errors.UserError, match='no params'):
    checkpoint.load_params(folder, abstract(params))
  checkpoint.save_params(folder, params, {})  # what it left is no obstacle
  checkpoint.load_params(folder, abstract(params))


def test_another_failure_to_save_is_not_called_a_full_disk(
  tmp_path, monkeypatch
):
  def denied(*args, **kwargs):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

  monkeypatch.setattr(tensorstore, 'open', denied)
  line = f'cannot write {tmp_path} .*Permission denied'
  with pytest.raises(errors.UserError, match=line):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(make_state(4), 4)
      checkpoints.wait()


def test_params_come_back_with_what_is_kept_beside_them(tmp_path):
  folder, params = tmp_path / 'params', make_params(2.0)
  for value in (1.0, 2.0):  # an earlier folder is replaced
    checkpoint.save_params(folder, make_params(value), {'stage': 'a'})
  got, meta = checkpoint.load_params(folder, abstract(params))
  assert_equal(got, params)
  assert meta == {'stage': 'a', 'sha256': checkpoint.tree_hash(params)}
  assert checkpoint.load_meta(folder) == meta


def test_a_folder_without_params_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match=f'no params in {tmp_path}; name'):
    checkpoint.load_params(tmp_path, abstract(make_params()))


def test_params_of_another_architecture_are_refused(tmp_path):
  checkpoint.save_params(tmp_path / 'a', make_params(), {})
  other = {'dense': {'kernel': jnp.zeros((2, 4))}, 'new': jnp.zeros(1)}
  with pytest.raises(errors.UserError) as caught:
    checkpoint.load_params(tmp_path / 'a', abstract(other))
  line = str(caught.value)
  assert '(3 arrays differ)' in line
  assert 'dense/bias: stored (3,), wanted nothing' in line
  assert 'dense/kernel: stored (2, 3), wanted (2, 4)' in line
  assert 'new: stored nothing, wanted (1,)' in line


def test_changed_params_are_refused(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint, 'tree_hash', lambda params: '0' * 64)
    checkpoint.save_params(tmp_path / 'a', make_params(), {})
  with pytest.raises(errors.UserError, match='do not match their sha256'):
    checkpoint.load_params(tmp_path / 'a', abstract(make_params()))


@pytest.mark.parametrize('damage', ['a byte', 'half a file', 'no file'])
def test_a_damaged_folder_is_named(tmp_path, damage):
  folder = tmp_path / 'a'
  numbers = np.random.default_rng(0).standard_normal((64, 64))
  checkpoint.save_params(folder, {'a': jnp.asarray(numbers)}, {})
  files = (path for path in folder.rglob('*') if path.is_file())
  largest = max(files, key=lambda path: path.stat().st_size)
  raw = bytearray(largest.read_bytes())
  raw[len(raw) // 2] ^= 1
  if damage == 'no file':
    largest.unlink()
  else:
    largest.write_bytes(raw[: len(raw) // 2] if damage[0] == 'h' else raw)
  line = f'the params in {folder} (cannot be read .*|do not match .*); copy'
  with pytest.raises(errors.UserError, match=line) as caught:
    checkpoint.load_params(folder, abstract({'a': jnp.asarray(numbers)}))
  assert '\n' not in str(caught.value)


def test_a_damaged_record_is_named(tmp_path):
  checkpoint.save_params(tmp_path / 'a', make_params(), {})
  (tmp_path / 'a' / 'meta' / 'data.json').write_text('{"sha256":')
  with pytest.raises(errors.UserError, match=f'in {tmp_path}/a cannot be read'):
    checkpoint.load_meta(tmp_path / 'a')


@pytest.fixture
def hashes(monkeypatch):
  """Counts how often params are hashed."""
  calls = []
  tree_hash = checkpoint.tree_hash

  def counted(params):
    calls.append(None)
    return tree_hash(params)

  monkeypatch.setattr(checkpoint, 'tree_hash', counted)
  return calls


def test_params_are_hashed_where_they_are_saved_and_verified(tmp_path, hashes):
  params = make_params(2.0)
  target = abstract(params)
  checkpoint.save_params(tmp_path / 'a', params, {'stage': 'a'})
  assert len(hashes) == 1
  copied, meta = checkpoint.copy_params(
    tmp_path / 'a', tmp_path / 'round' / 'b', target
  )
  assert len(hashes) == 2
  again, beside = checkpoint.load_params(
    tmp_path / 'round' / 'b', target, verify=False
  )
  assert len(hashes) == 2
  assert_equal(copied, params)
  assert_equal(again, params)
  assert meta == beside == checkpoint.load_meta(tmp_path / 'a')


def test_a_copy_replaces_what_is_there(tmp_path, monkeypatch):
  folder = tmp_path / 'b'
  target = abstract(make_params())
  (folder / 'params').mkdir(parents=True)
  (folder / 'params' / 'damaged').touch()

  def denied(path):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

  checkpoint.save_params(tmp_path / 'a', make_params(3.0), {})
  with monkeypatch.context() as patch:
    patch.setattr(shutil, 'rmtree', denied)
    with pytest.raises(errors.UserError, match=f'cannot write {folder}'):
      checkpoint.copy_params(tmp_path / 'a', folder, target)
  checkpoint.copy_params(tmp_path / 'a', folder, target)
  copied, _ = checkpoint.load_params(folder, target)
  assert_equal(copied, make_params(3.0))
  assert not (folder / 'params' / 'damaged').exists()


def test_params_that_do_not_fit_are_not_copied(tmp_path, monkeypatch):
  checkpoint.save_params(tmp_path / 'a', make_params(), {})
  folder = tmp_path / 'b'
  wide = abstract(make_params(width=4))
  with pytest.raises(errors.UserError, match='another architecture'):
    checkpoint.copy_params(tmp_path / 'a', folder, wide)
  monkeypatch.setattr(checkpoint, 'tree_hash', lambda params: '0' * 64)
  line = f'the params in {tmp_path}/a do not match'
  with pytest.raises(errors.UserError, match=line):
    checkpoint.copy_params(tmp_path / 'a', folder, abstract(make_params()))
  assert not folder.exists()


def test_a_copy_that_was_cut_off_is_made_again(tmp_path, monkeypatch):
  target = abstract(make_params())
  checkpoint.save_params(tmp_path / 'a', make_params(), {})
  folder = tmp_path / 'b'
  with monkeypatch.context() as patch:
    patch.setattr(shutil, 'copyfile', full_disk)  # by it copytree copies
    with pytest.raises(errors.UserError, match=f'disk full .* {folder} '):
      checkpoint.copy_params(tmp_path / 'a', folder, target)
  assert not folder.exists()
  params, _ = checkpoint.copy_params(tmp_path / 'a', folder, target)
  assert_equal(params, make_params())
  assert sorted(p.name for p in tmp_path.iterdir()) == ['a', 'b']


def test_bfloat16_is_hashed(tmp_path):
  params = {'a': jnp.full((2, 3), 2.0, jnp.bfloat16), 'b': jnp.float32(1)}
  checkpoint.save_params(tmp_path / 'a', params, {})
  assert_equal(
    checkpoint.load_params(tmp_path / 'a', abstract(params))[0], params
  )


def test_the_hash_is_what_older_folders_have():
  params = {'a': np.arange(3, dtype=np.float32), 'b': {'c': np.int32(7)}}
  assert checkpoint.tree_hash(params) == (
    '1f9f68eef2bbcacd73b025b844b216b28114cee7ab77790a2f9fcf40687d40c5'
  )


@pytest.mark.parametrize(
  'other',
  [
    {'b': np.zeros((2, 3), np.float32)},
    {'a': np.zeros((3, 2), np.float32)},
    {'a': np.zeros((2, 3), np.int32)},
    {'a': np.full((2, 3), -0.0, np.float32)},
  ],
)
def test_the_hash_tells_names_shapes_types_and_bytes_apart(other):
  tree = {'a': np.zeros((2, 3), np.float32)}
  assert checkpoint.tree_hash(tree) == checkpoint.tree_hash(
    jax.tree.map(jnp.asarray, tree)
  )
  assert checkpoint.tree_hash(tree) != checkpoint.tree_hash(other)
