"""The only file that knows Orbax: a phase's checkpoints, folders of params."""

from collections.abc import Callable
import hashlib
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ddo_jax import errors

_METRIC = 'selection'


def tree_hash(params: Any) -> str:
  """sha256 of a pytree's names, shapes, types and bytes, as hex."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    array = np.ascontiguousarray(jax.device_get(leaf))
    name = jax.tree_util.keystr(path)
    digest.update(f'{name}{array.shape}{array.dtype}'.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()


def abstract(tree: Any, shardings: Any) -> Any:
  """The shapes, types and placement to restore into."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )


def check_shapes(stored: Any, target: Any, where: pathlib.Path) -> None:
  """Raises UserError listing the first leaves that do not fit."""

  def leaves(tree):
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {
      jax.tree_util.keystr(p, simple=True, separator='/'): tuple(v.shape)
      for p, v in flat
    }

  stored, target = leaves(stored), leaves(target)
  wrong = [
    f'{name}: stored {stored.get(name, "nothing")},'
    f' wanted {target.get(name, "nothing")}'
    for name in sorted(stored.keys() | target.keys())
    if stored.get(name) != target.get(name)
  ]
  if wrong:
    raise errors.UserError(
      f'{where} holds another architecture ({len(wrong)} arrays differ): '
      + '; '.join(wrong[:3])
      + '; give the config that made it, or another folder'
    )


def _guarded(folder: pathlib.Path, call: Callable, *args, **kwargs) -> Any:
  """Runs a call that writes; says what survives where the disk is full."""
  try:
    return call(*args, **kwargs)
  except (OSError, ValueError) as error:
    signs = ('No space left', 'RESOURCE_EXHAUSTED', 'Disk quota')
    if not any(sign in str(error) for sign in signs):
      raise
    raise errors.UserError(
      f'disk full while saving in {folder}; what was saved before is whole:'
      ' free some space and run the same command again'
    ) from error


class Checkpoints:
  """Numbered checkpoints of one phase: the newest, and the best so far.

  Saves are asynchronous; a save that is cut off leaves the earlier ones whole.
  """

  def __init__(self, folder: pathlib.Path):
    """Opens or creates `folder`."""
    self.folder = folder.absolute()
    selection = lambda metrics: metrics[_METRIC]
    keep = checkpoint_managers.AnyPreservationPolicy(
      [
        checkpoint_managers.LatestN(1),
        checkpoint_managers.BestN(
          get_metric_fn=selection,
          reverse=True,
          n=1,
          keep_checkpoints_without_metrics=False,
        ),
      ]
    )
    options = ocp.CheckpointManagerOptions(
      preservation_policy=keep,
      best_fn=selection,  # or else no metric is written to disk
      best_mode='min',
      cleanup_tmp_directories=True,
    )
    handlers = {
      name: ocp.StandardCheckpointHandler() for name in ('state', 'ema')
    }
    self._manager = ocp.CheckpointManager(
      self.folder, options=options, item_handlers=handlers
    )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception: Any) -> None:
    _guarded(self.folder, self._manager.close)

  def latest_step(self) -> int | None:
    """The newest complete step, or None."""
    return self._manager.latest_step()

  def save(self, state: Any, step: int, metric: float | None = None) -> None:
    """Starts saving a TrainState; `metric` (lower is better) may rank it."""
    items = {'params': state.params, 'opt_state': state.opt_state}
    saved = {'state': ocp.args.StandardSave({'step': state.step, **items})}
    if state.ema:
      saved['ema'] = ocp.args.StandardSave(state.ema)
    _guarded(
      self.folder,
      self._manager.save,
      step,
      args=ocp.args.Composite(**saved),
      metrics=None if metric is None else {_METRIC: metric},
      force=True,
    )

  def wait(self) -> None:
    """Blocks until the saves under way are whole on disk."""
    _guarded(self.folder, self._manager.wait_until_finished)

  def restore(self, step: int, target: Any) -> Any:
    """Returns the TrainState of a step.

    Args:
      step: one that is on disk.
      target: a TrainState of `abstract` leaves.

    Raises:
      errors.UserError: the checkpoint is of another architecture.
    """
    state = {
      'step': target.step,
      'params': target.params,
      'opt_state': target.opt_state,
    }
    wanted = {'state': state} | ({'ema': target.ema} if target.ema else {})
    metadata = self._manager.item_metadata(step)
    for name, tree in wanted.items():
      # Compared as saved: Orbax stores tuples and dataclasses as dicts.
      skeleton = ocp.utils.serialize_tree(tree, keep_empty_nodes=True)
      check_shapes(metadata[name].tree, skeleton, self.folder / str(step))
    args = {k: ocp.args.StandardRestore(v) for k, v in wanted.items()}
    restored = self._manager.restore(step, args=ocp.args.Composite(**args))
    return target.replace(ema=restored.get('ema') or {}, **restored['state'])


def _checkpointer() -> ocp.Checkpointer:
  handlers = {
    'params': ocp.StandardCheckpointHandler(),
    'meta': ocp.JsonCheckpointHandler(),
  }
  return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


def save_params(folder: pathlib.Path, params: Any, meta: dict) -> None:
  """Writes a folder of params, whole or not at all.

  Args:
    folder: replaced if it exists.
    params: a pytree of arrays.
    meta: JSON values kept beside them; `sha256` is added.
  """
  folder = folder.absolute()
  meta = meta | {'sha256': tree_hash(params)}
  items = ocp.args.Composite(
    params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta)
  )
  with _checkpointer() as writer:
    _guarded(folder, writer.save, folder, args=items, force=True)


def load_meta(folder: pathlib.Path) -> dict:
  """Returns what `save_params` kept beside the params.

  Raises:
    errors.UserError: the folder holds no params.
  """
  if not (folder / 'params').exists():
    raise errors.UserError(
      f'no params in {folder}; name a folder such as <workdir>/pretrain/params'
      ' or <workdir>/round_000/promoted'
    )
  with _checkpointer() as reader:
    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    return reader.restore(folder.absolute(), args=args).meta


def load_params(folder: pathlib.Path, target: Any) -> tuple[Any, dict]:
  """Returns (params, meta) of a folder that `save_params` wrote.

  Args:
    folder: the folder.
    target: a pytree of `abstract` leaves.

  Raises:
    errors.UserError: no params there, of another architecture, or damaged.
  """
  meta = load_meta(folder)
  with _checkpointer() as reader:
    stored = reader.metadata(folder.absolute()).item_metadata
    check_shapes(stored['params'].tree, target, folder)
    args = ocp.args.Composite(params=ocp.args.StandardRestore(target))
    params = reader.restore(folder.absolute(), args=args).params
  if tree_hash(params) != meta['sha256']:
    raise errors.UserError(
      f'the params in {folder} do not match their sha256; copy them again'
    )
  return params, meta
