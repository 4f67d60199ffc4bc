"""The only file that knows Orbax: checkpoints of a phase, folders of params."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import hashlib
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ddo_jax import errors

# How the operating system, Orbax and TensorStore say that a disk is full.
_FULL_DISK = ('No space left', 'RESOURCE_EXHAUSTED', 'Disk quota')


def tree_hash(params: Any) -> str:
  """Returns the sha256 of a pytree's names, shapes, types and bytes, as hex.

  The params come to the host one leaf at a time. This reads every byte of
  them, so params are hashed when they are saved and when they are verified,
  and not at every read.
  """
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    array = np.ascontiguousarray(jax.device_get(leaf))
    name = jax.tree_util.keystr(path)
    digest.update(f'{name}{array.shape}{array.dtype}'.encode())
    digest.update(array)  # type: ignore[arg-type]
  return digest.hexdigest()


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
  stored_shapes = _shapes(stored)
  wanted_shapes = _shapes(target)
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


def _guarded(
  folder: pathlib.Path, call: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
  """Makes a call that writes; says what survives where the disk is full."""
  try:
    return call(*args, **kwargs)
  except (OSError, ValueError) as error:
    if not any(sign in str(error) for sign in _FULL_DISK):
      raise
    raise errors.UserError(
      f'disk full while saving in {folder}; what was saved before is whole:'
      ' free some space and run the same command again'
    ) from error


class _NewestAndBest:
  """Orbax asks it which checkpoints to keep."""

  best: int | None = None

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    del context
    kept = (checkpoints[-1].step, self.best)
    return [info.step in kept for info in checkpoints]


class Checkpoints:
  """Numbered checkpoints of one phase: the newest, and the best so far.

  Saves are asynchronous; a save that is cut off leaves the earlier ones whole.
  """

  def __init__(self, folder: pathlib.Path):
    """Opens or creates `folder`."""
    self.folder = folder.absolute()
    self._policy = _NewestAndBest()
    options = ocp.CheckpointManagerOptions(
      preservation_policy=self._policy, cleanup_tmp_directories=True
    )
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=options,
      item_handlers={
        'state': ocp.StandardCheckpointHandler(),
        'ema': ocp.StandardCheckpointHandler(),
      },
    )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception: Any) -> None:
    _guarded(self.folder, self._manager.close)

  def latest_step(self) -> int | None:
    """Returns the newest complete step, or None."""
    return self._manager.latest_step()

  def save(self, state: Any, step: int, best: int | None = None) -> None:
    """Starts to save a TrainState; earlier ones are removed when it is whole.

    Args:
      state: the TrainState; it may be donated as soon as this returns.
      step: its number.
      best: the step of an earlier checkpoint that is kept; None: there is none.
    """
    self._policy.best = best
    items = {'state': ocp.args.StandardSave(_without_ema(state))}
    if state.ema:
      items['ema'] = ocp.args.StandardSave(state.ema)
    _guarded(
      self.folder,
      self._manager.save,
      step,
      args=ocp.args.Composite(**items),
      force=True,
    )

  def wait(self) -> None:
    """Blocks until the saves under way are whole on disk."""
    _guarded(self.folder, self._manager.wait_until_finished)

  def restore(self, step: int, target: Any) -> Any:
    """Returns the TrainState of a step.

    Args:
      step: a step that is on disk.
      target: a TrainState of `abstract` leaves.

    Raises:
      errors.UserError: the checkpoint is of another architecture.
    """
    wanted = {'state': _without_ema(target)}
    if target.ema:
      wanted['ema'] = target.ema
    metadata = self._manager.item_metadata(step)
    arguments = {}
    for name, tree in wanted.items():
      # Compared as saved: Orbax stores tuples and dataclasses as dicts.
      skeleton = ocp.utils.serialize_tree(tree, keep_empty_nodes=True)
      check_shapes(metadata[name].tree, skeleton, self.folder / str(step))
      arguments[name] = ocp.args.StandardRestore(tree)
    restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
    ema = restored['ema'] if target.ema else {}
    return target.replace(ema=ema, **restored['state'])


def _without_ema(state: Any) -> dict[str, Any]:
  """The part of a TrainState that every checkpoint has."""
  return {
    'step': state.step,
    'params': state.params,
    'opt_state': state.opt_state,
  }


def _checkpointer() -> ocp.Checkpointer:
  handler = ocp.CompositeCheckpointHandler(
    params=ocp.StandardCheckpointHandler(), meta=ocp.JsonCheckpointHandler()
  )
  return ocp.Checkpointer(handler)


@contextlib.contextmanager
def _reading(folder: pathlib.Path) -> Iterator[None]:
  """Names the folder where Orbax cannot make sense of what is in it."""
  try:
    yield
  except (errors.UserError, jax.errors.JaxRuntimeError):
    raise  # already a line of ours, or the devices are at fault
  except Exception as error:  # a damaged file makes Orbax raise no less
    reason = str(error).strip().partition('\n')[0] or type(error).__name__
    raise errors.UserError(
      f'the params in {folder} cannot be read ({reason[:200]}); copy them again'
    ) from error


def save_params(
  folder: pathlib.Path, params: Any, meta: dict[str, Any]
) -> None:
  """Writes a folder of params, whole or not at all.

  Args:
    folder: replaced if it exists.
    params: a pytree of arrays.
    meta: JSON values kept beside them; the hash of the params is added as
      `sha256`.

  Raises:
    errors.UserError: the disk is full.
  """
  folder = folder.absolute()
  meta = meta | {'sha256': tree_hash(params)}
  items = ocp.args.Composite(
    params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta)
  )
  with _checkpointer() as writer:
    _guarded(folder, writer.save, folder, args=items, force=True)


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
  with _reading(folder), _checkpointer() as reader:
    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    return reader.restore(folder.absolute(), args=args).meta


def check_params(folder: pathlib.Path, target: Any) -> None:
  """Checks a folder of params without reading them.

  Args:
    folder: the folder.
    target: a pytree of `abstract` leaves.

  Raises:
    errors.UserError: the folder holds no params, or those of another
      architecture.
  """
  load_meta(folder)
  with _reading(folder), _checkpointer() as reader:
    stored = reader.metadata(folder.absolute()).item_metadata
    check_shapes(stored['params'].tree, target, folder)


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
  meta = load_meta(folder)
  with _reading(folder), _checkpointer() as reader:
    stored = reader.metadata(folder.absolute()).item_metadata
    check_shapes(stored['params'].tree, target, folder)
    args = ocp.args.Composite(params=ocp.args.StandardRestore(target))
    params = reader.restore(folder.absolute(), args=args).params
  if verify and tree_hash(params) != meta['sha256']:
    raise errors.UserError(
      f'the params in {folder} do not match their sha256; copy them again'
    )
  return params, meta


def copy_params(
  source: pathlib.Path, folder: pathlib.Path, target: Any
) -> tuple[Any, dict[str, Any]]:
  """Copies a folder of params unless it is copied; returns what it holds.

  What is returned was verified, in the source where this call copies and in
  the copy where an earlier one did. Later reads of `folder` by this process
  need not verify it again.

  Args:
    source: a folder that `save_params` wrote.
    folder: the copy; it is whole or absent, however the call ends.
    target: a pytree of `abstract` leaves.

  Returns:
    (params, meta) as `load_params` returns them.

  Raises:
    errors.UserError: see `load_params`; or the disk is full.
  """
  if folder.exists():
    return load_params(folder, target)
  params, meta = load_params(source, target)
  partial = folder.with_name(folder.name + '.partial')
  shutil.rmtree(partial, ignore_errors=True)  # of a copy that was cut off
  folder.parent.mkdir(parents=True, exist_ok=True)
  _guarded(folder.parent, shutil.copytree, source, partial)
  os.replace(partial, folder)
  return params, meta
