"""The only file that knows Orbax: checkpoints of a phase, folders of params."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import shutil
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from ddo_jax import errors
from ddo_jax.runtime import devices
from ddo_jax.runtime import disk
from ddo_jax.runtime import processes
from ddo_jax.runtime import records

_LOGGER = logging.getLogger(__name__)


def tree_hash(params: Any) -> str:
  """Returns the sha256 of a pytree's names, shapes, types and bytes, as hex.

  The params come to the host one leaf at a time. This reads every byte of
  them, so params are hashed when they are saved and when they are verified,
  and not at every read.
  """
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    array = np.ascontiguousarray(jax.device_get(devices.gathered(leaf)))
    name = jax.tree_util.keystr(path)
    digest.update(f'{name}{array.shape}{array.dtype}'.encode())
    digest.update(array)  # type: ignore[arg-type]
  return digest.hexdigest()


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
  """Returns a checksum of an array's bits, uint32.

  It is computed where the array lies, and is the same however the array is
  split over devices and processes: the sum, modulo 2³², of a hash of each
  element's bits and its place. At a place the hash is one to one, so that a
  change of one element never goes unseen; any other does once in 2³².
  """
  size = array.dtype.itemsize
  if array.dtype == jnp.bool_:
    bits = array.astype(jnp.uint32)
  elif size < 4:
    bits = jax.lax.bitcast_convert_type(array, f'uint{8 * size}')
    bits = bits.astype(jnp.uint32)
  else:
    bits = jax.lax.bitcast_convert_type(array, jnp.uint32)
  place = jnp.uint32(0)
  for axis, length in enumerate(bits.shape):
    index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    place = place * jnp.uint32(length) + index
  # The finalizer of MurmurHash3.
  mixed = bits ^ (place * jnp.uint32(0x9E3779B9))
  mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
  mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
  return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _describe(tree: Any) -> dict[str, dict[str, Any]]:
  """Returns the shape, type and checksum of every leaf under its name."""
  arrays = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    arrays[name] = {
      'shape': list(leaf.shape),
      'dtype': str(leaf.dtype),
      'checksum': f'{int(_checksum(devices.from_host(leaf))):08x}',
    }
  return arrays


def abstract(tree: Any, shardings: Any) -> Any:
  """Returns the shapes, types and placement to restore into."""

  def describe(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(describe, tree, shardings)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """The shape of every leaf under its name, such as 'dense/kernel'."""
  shapes = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    shapes[name] = tuple(leaf.shape)
  return shapes


def check_shapes(stored: Any, target: Any, where: pathlib.Path) -> None:
  """Raises UserError, listing the first leaves that do not fit.

  Args:
    stored: the tree on disk, or its metadata.
    target: the tree that is wanted.
    where: the file or folder, for the error.
  """
  _compare_shapes(_shapes(stored), _shapes(target), where)


def _compare_shapes(
  stored_shapes: dict[str, tuple[int, ...]],
  wanted_shapes: dict[str, tuple[int, ...]],
  where: pathlib.Path,
) -> None:
  wrong = []
  for name in sorted(stored_shapes.keys() | wanted_shapes.keys()):
    found = stored_shapes.get(name, 'nothing')
    wanted = wanted_shapes.get(name, 'nothing')
    if found != wanted:
      wrong.append(f'{name}: stored {found}, wanted {wanted}')
  if wrong:
    raise errors.UserError(
      f'{where} holds another architecture ({len(wrong)} arrays differ): '
      + '; '.join(wrong[:3])
      + '; give the config that made it, or another folder'
    )


def _context(alone: bool = False) -> ocp.Context:
  """Says to Orbax which of the things side by side are JSON values.

  Args:
    alone: whether this process works without waiting for others.
  """
  registry = ocp.handlers.local_registry()
  for name in ('meta', 'record'):
    registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
  context = ocp.Context()
  context.checkpointables.registry = registry
  if alone or processes.is_by_itself():
    me = jax.process_index()
    context.multiprocessing.primary_host = me
    context.multiprocessing.active_processes = {me}
    context.multiprocessing.barrier_sync_key_prefix = f'by_{me}'
  return context


class DamagedError(Exception):
  """A checkpoint is not what was saved; says what was found."""


class _NewestAndBest:
  """Orbax asks it which checkpoints to keep."""

  best: int | None = None
  anchor: int | None = None

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    del context
    kept = (self.best, self.anchor, *[info.step for info in checkpoints[-2:]])
    return [info.step in kept for info in checkpoints]


class Checkpoints:
  """Numbered checkpoints of one phase: the newest two, and the best so far.

  Saves are asynchronous; a save that is cut off leaves the earlier ones whole.
  Every checkpoint holds a `record`: a checksum of each array and the notes that
  the caller gave. Checkpoints of earlier versions, without one, are restored
  unverified. What does not hold is moved to the folder `damaged` beside this
  one, where it stays until the phase is whole.
  """

  def __init__(self, folder: pathlib.Path):
    """Opens or creates `folder`."""
    self.folder = folder.absolute()
    self._damaged = self.folder.with_name('damaged')
    self._policy = _NewestAndBest()
    processes.decide(f'open {self.folder}', self._set_unreadable_aside)
    self._checkpointer = ocp.training.Checkpointer(
      self.folder,
      context=_context(),
      preservation_policy=self._policy,
      cleanup_tmp_directories=True,
    )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception: Any) -> None:
    with disk.guarded(self.folder):
      self._checkpointer.close()

  def _set_unreadable_aside(self) -> None:
    """Orbax opens no checkpoint where the metadata of one is damaged."""
    for step in self._steps():
      folder = self.folder / str(step)
      try:
        with _finding_damage(folder), _context():
          ocp.checkpointables_metadata(folder)
      except DamagedError as damage:
        self._move_aside(step, damage)

  def steps(self) -> list[int]:
    """Returns the steps that are whole on disk, in order."""
    return processes.decide(f'steps in {self.folder}', self._steps)

  def _steps(self) -> list[int]:
    names = [path.name for path in self.folder.glob('*')]
    # Orbax gives a checkpoint its name when all of it is written.
    return sorted(int(name) for name in names if name.isdigit())

  def save(
    self,
    state: Any,
    step: int,
    notes: Any = None,
    best: int | None = None,
    anchor: int | None = None,
  ) -> None:
    """Starts to save a TrainState; earlier ones are removed when it is whole.

    Args:
      state: the TrainState; it may be donated as soon as this returns.
      step: its number.
      notes: a JSON value that comes back with the state.
      best: the step of an earlier checkpoint that is kept; None: there is none.
      anchor: the step of another one that is kept.
    """
    self._policy.best = best
    self._policy.anchor = anchor
    items = _items(state)
    record = {'step': step, 'arrays': _describe(items), 'notes': notes}
    with disk.guarded(self.folder):
      self._checkpointer.save_checkpointables_async(
        step, items | {'record': records.sealed(record)}, force=True
      )

  def wait(self) -> None:
    """Blocks until the saves under way are whole on disk."""
    with disk.guarded(self.folder):
      self._checkpointer.wait()

  def restore(self, step: int, target: Any) -> tuple[Any, Any]:
    """Returns the TrainState of a step and its notes, both verified.

    Args:
      step: its number.
      target: a TrainState of `abstract` leaves.

    Returns:
      (state, notes). The notes are None where an earlier version made the
      checkpoint.

    Raises:
      DamagedError: it is not there, or not what was saved.
      errors.UserError: it is of another architecture, or may not be read.
    """
    folder = self.folder / str(step)
    wanted = _items(target)
    record, items = _on_all(functools.partial(_read, folder, wanted))
    if record is not None:
      found = _describe(items)
      for name, array in record['arrays'].items():
        if found[name] != array:
          raise DamagedError(f'{name} does not match its checksum')
    state = target.replace(ema=items.get('ema', {}), **items['state'])
    return state, record and record['notes']

  def restore_newest(self, target: Any) -> tuple[int, Any, Any] | None:
    """Returns the newest checkpoint that holds; those that do not are named.

    Args:
      target: a TrainState of `abstract` leaves.

    Returns:
      (step, state, notes), see `restore`; None: there is none.

    Raises:
      errors.UserError: see `restore`.
    """
    damaged = False
    for step in reversed(self.steps()):
      try:
        return step, *self.restore(step, target)
      except DamagedError as damage:
        self.set_aside(step, damage)
        damaged = True
    if damaged:
      _LOGGER.warning('%s: none is left; it begins again', self.folder)
    return None

  def set_aside(self, step: int, damage: DamagedError) -> None:
    """Moves a damaged checkpoint out of the way and says so."""
    move = functools.partial(self._move_aside, step, damage)
    processes.decide(f'set aside {self.folder / str(step)}', move)
    self._checkpointer.reload()

  def _move_aside(self, step: int, damage: DamagedError) -> None:
    source = self.folder / str(step)
    place = self._damaged / str(step)
    if not source.exists():
      _LOGGER.warning('%s is damaged (%s)', source, damage)
      return
    with disk.guarded(self._damaged):
      shutil.rmtree(place, ignore_errors=True)
      self._damaged.mkdir(exist_ok=True)
      os.replace(source, place)
    _LOGGER.warning(
      '%s is damaged (%s); it was moved to %s', source, damage, place
    )

  def drop_after(self, step: int) -> None:
    """Removes the checkpoints of later steps, which will be made again."""

    def drop():
      for later in reversed(self._steps()):
        if later > step:
          with disk.guarded(self.folder):
            shutil.rmtree(self.folder / str(later))

    processes.decide(f'drop after {self.folder / str(step)}', drop)
    self._checkpointer.reload()

  def forget_damaged(self) -> None:
    """Removes what `set_aside` kept, once there is something in its place."""
    if processes.is_main():
      shutil.rmtree(self._damaged, ignore_errors=True)


def _read(
  folder: pathlib.Path, wanted: dict[str, Any]
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
  """Returns the record and the arrays of a checkpoint as they lie on the disk.

  Each process reads its own parts of the arrays, and waits for no other.

  Args:
    folder: the checkpoint's, named by its step.
    wanted: trees of `abstract` leaves.

  Returns:
    (record, arrays); the record is None where an earlier version wrote them.

  Raises:
    DamagedError: something is missing, or not the form it should have.
    errors.UserError: the arrays are of another architecture, or may not be
      read.
  """
  if not folder.exists():
    raise DamagedError('it is not there')
  with _finding_damage(folder), _context(alone=processes.count() > 1):
    if not (folder / 'record').exists():
      stored = ocp.checkpointables_metadata(folder).metadata
      for name, tree in wanted.items():
        check_shapes(stored[name], tree, folder)
      return None, ocp.load_checkpointables(folder, wanted)
    loaded = ocp.load_checkpointables(folder, {'record': None})
    record = records.unsealed(loaded['record'])
    if record['step'] != int(folder.name):
      raise DamagedError(f'it is the checkpoint of step {record["step"]}')
    shapes = {}
    for name, array in record['arrays'].items():
      shapes[name] = tuple(array['shape'])
    _compare_shapes(shapes, _shapes(wanted), folder)
    return record, ocp.load_checkpointables(folder, wanted)


def _on_all(read: Callable[[], Any]) -> Any:
  """Calls on every process, and fails on all of them where it fails on one.

  Raises:
    DamagedError: as a call.
  """
  damage = None
  result = None
  try:
    result = read()
  except DamagedError as error:
    damage = error
  if processes.count() > 1:
    failed = devices.exchange(np.array([damage is not None], np.uint32))
    if failed.any() and damage is None:
      damage = DamagedError('another process could not read it')
  if damage is not None:
    raise damage
  return result


def _items(state: Any) -> dict[str, Any]:
  """The parts of a TrainState that are stored side by side."""
  trained = {
    'step': state.step,
    'params': state.params,
    'opt_state': state.opt_state,
  }
  items = {'state': trained}
  if state.ema:
    items['ema'] = state.ema
  return items


def _reason(error: BaseException) -> str:
  """What an exception says, or rather what it was first raised for."""
  while error.__cause__ or error.__context__:
    error = error.__cause__ or error.__context__
  words = ' '.join(str(error).split())
  if not isinstance(error, OSError | ValueError):
    words = f'{type(error).__name__} {words}'
  # TensorStore adds its whole specification.
  return words.partition(' [tensorstore_spec')[0][:300]


def _is_no_echo(record: logging.LogRecord) -> bool:
  return 'exception was never retrieved' not in record.getMessage()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
  """Keeps the libraries from printing what their exception says.

  Orbax reads arrays in tasks and raises what the first one did. Of the others
  asyncio prints tracebacks when they are collected, at any later time.
  """
  absl = logging.getLogger('absl')
  before = absl.disabled
  absl.disabled = True
  try:
    yield
  except Exception:
    logging.getLogger('asyncio').addFilter(_is_no_echo)
    message = 'coroutine .* was never awaited'
    warnings.filterwarnings('ignore', message, RuntimeWarning)
    raise
  finally:
    absl.disabled = before


@contextlib.contextmanager
def _finding_damage(folder: pathlib.Path) -> Iterator[None]:
  """Takes whatever Orbax raises over a checkpoint's files for damage."""
  try:
    with _quietly():
      yield
  except (errors.UserError, DamagedError, jax.errors.JaxRuntimeError):
    raise  # the line is there already, or the devices are at fault
  except Exception as error:  # a damaged file makes Orbax raise no less
    reason = _reason(error)
    if 'permission' in reason.lower():
      raise errors.UserError(
        f'the checkpoint {folder} may not be read ({reason}); make it readable'
        ' and run the same command again'
      ) from error
    raise DamagedError(f'it cannot be read: {reason}') from error


@contextlib.contextmanager
def _reading(folder: pathlib.Path) -> Iterator[None]:
  """Names the folder where Orbax cannot make sense of what is in it."""
  try:
    with _quietly():
      yield
  except (errors.UserError, jax.errors.JaxRuntimeError):
    raise  # already a line of ours, or the devices are at fault
  except Exception as error:  # a damaged file makes Orbax raise no less
    raise errors.UserError(
      f'the params in {folder} cannot be read ({_reason(error)});'
      ' copy them again'
    ) from error


def save_params(folder: pathlib.Path, params: Any, meta: dict[str, Any]) -> str:
  """Writes a folder of params, whole or not at all.

  Args:
    folder: replaced if it exists.
    params: a pytree of arrays.
    meta: JSON values kept beside them; the hash of the params is added as
      `sha256`.

  Returns:
    That hash.

  Raises:
    errors.UserError: the disk is full.
  """
  sha256 = tree_hash(params)
  meta = meta | {'sha256': sha256}
  if processes.is_by_itself():
    params = jax.device_get(params)  # arrays on devices are of all processes
  with disk.guarded(folder), _context():
    ocp.save_checkpointables(
      folder.absolute(), {'params': params, 'meta': meta}, overwrite=True
    )
  return sha256


def load_meta(folder: pathlib.Path) -> dict[str, Any]:
  """Returns what `save_params` kept beside the params.

  Raises:
    errors.UserError: the folder holds no params, or a damaged record.
  """
  if not (folder / 'params').exists():
    raise errors.UserError(
      f'no params in {folder}; name a folder such as <workdir>/pretrain/params'
      ' or <workdir>/round_000/promoted'
    )
  with _reading(folder), _context():
    return ocp.load_checkpointables(folder.absolute(), {'meta': None})['meta']


def check_params(folder: pathlib.Path, target: Any) -> dict[str, Any]:
  """Checks a folder of params without reading them.

  Args:
    folder: the folder.
    target: a pytree of `abstract` leaves.

  Returns:
    What `load_meta` returns.

  Raises:
    errors.UserError: the folder holds no params, or those of another
      architecture.
  """
  meta = load_meta(folder)
  with _reading(folder), _context():
    stored = ocp.checkpointables_metadata(folder.absolute()).metadata
    check_shapes(stored['params'], target, folder)
  return meta


def load_params(
  folder: pathlib.Path, target: Any, verify: bool = True
) -> tuple[Any, dict[str, Any]]:
  """Returns (params, meta) of a folder that `save_params` wrote.

  Args:
    folder: the folder.
    target: a pytree of `abstract` leaves.
    verify: whether the params are held against their sha256. False is for a
      folder that this process has verified before.

  Raises:
    errors.UserError: the folder holds no params, those of another
      architecture, or damaged ones.
  """
  meta = check_params(folder, target)
  with _reading(folder), _context():
    loaded = ocp.load_checkpointables(folder.absolute(), {'params': target})
  params = loaded['params']
  if verify and tree_hash(params) != meta['sha256']:
    raise errors.UserError(
      f'the params in {folder} do not match their sha256; copy them again'
    )
  return params, meta


def copy_params(
  source: pathlib.Path, folder: pathlib.Path, target: Any
) -> tuple[Any, dict[str, Any]]:
  """Copies a folder of params; returns what it holds.

  Later reads of `folder` by this process need not verify it again.

  Args:
    source: a folder that `save_params` wrote.
    folder: the copy; it is whole or absent, however the call ends. What stands
      there is replaced.
    target: a pytree of `abstract` leaves.

  Returns:
    (params, meta) as `load_params` returns them.

  Raises:
    errors.UserError: see `load_params`; or the copy cannot be written.
  """
  params, meta = load_params(source, target)

  def copy():
    partial = folder.with_name(folder.name + '.partial')
    with disk.guarded(folder):
      folder.parent.mkdir(parents=True, exist_ok=True)
      for earlier in (partial, folder):  # the first of a copy that was cut off
        if earlier.exists():
          shutil.rmtree(earlier)
      shutil.copytree(source, partial)
      os.replace(partial, folder)

  processes.decide(f'copy {folder}', copy)
  return params, meta
