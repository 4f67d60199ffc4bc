"""Reads released networks (.pkl) of EDM, EDM2 and DDO without running them.

Such a pickle names a function that would execute the source text which the
file carries. Here that name stands for a function that returns a `Record`: the
class's name, its attributes, and the source text as text.
"""

from collections.abc import Iterator
import dataclasses
import functools
import hashlib
import pathlib
from typing import Any

import numpy as np

from ddo_jax import errors
from ddo_jax.assets import table
from ddo_jax.weights import arrays
from ddo_jax.weights import files
from ddo_jax.weights import pickle_machine
from ddo_jax.weights import provenance
from ddo_jax.weights import torch_legacy

Record = arrays.Record

_WANTED = 'the .pkl of an EDM, EDM2 or DDO network, or of plain arrays'
_CONTAINERS = ('ModuleDict', 'ModuleList', 'Sequential')
_MAX_MODULES = 2**16  # each visit counts, so that shared ones cannot multiply


@dataclasses.dataclass(frozen=True)
class Network:
  """A released network.

  Attributes:
    class_name: 'EDMPrecond', 'Precond' (EDM2), 'VPPrecond', ...
    state_dict: official key -> read-only array, in official order.
    init_kwargs: the constructor's arguments: the whole architecture.
    attributes: the object's own plain values: sigma_data, label_dim, ...
    encoder: EDM2's encoder, by its class and attributes; None for EDM.
    augment: the probability of each augmentation in its training; 0: none.
    provenance: what `provenance.describe` returned, and as `class_sha256` the
      hash of the source text that the file carries.
  """

  class_name: str
  state_dict: dict[str, np.ndarray]
  init_kwargs: dict[str, Any]
  attributes: dict[str, Any]
  encoder: Record | None
  augment: float
  provenance: dict[str, str]


def _persistent(meta: Any) -> Record:
  """Returns the record of an object of NVIDIA's persistent classes."""
  kinds = {
    'type': str,
    'version': int,
    'module_src': str,
    'class_name': str,
    'state': dict,
  }
  for name, kind in kinds.items():
    if not isinstance(meta, dict) or not isinstance(meta.get(name), kind):
      raise ValueError(f'a persistent object without its {name}')
  if meta['type'] != 'class':
    raise ValueError('a persistent object that is no class')
  return Record(meta['class_name'], meta['state'], meta['module_src'])


def _empty_record(name: str) -> Record:
  """Returns the record of a container, which gets its state afterwards."""
  return Record(name)


def _empty_dict() -> dict[str, Any]:
  return {}


def _names(budget: pickle_machine.Budget) -> pickle_machine.Names:
  """The globals of plain weights, and those that released networks add."""
  load = functools.partial(torch_legacy.load_from_bytes, budget)
  table = arrays.names(budget) | {
    'torch.storage._load_from_bytes': load,
    'torch_utils.persistence._reconstruct_persistent_obj': _persistent,
    'dnnlib.EasyDict': _empty_dict,
    'dnnlib.util.EasyDict': _empty_dict,
  }
  for name in _CONTAINERS:
    made = functools.partial(_empty_record, name)
    table[f'torch.nn.modules.container.{name}'] = made
  return table


def read(path: pathlib.Path) -> Any:
  """Reads a whole pickle.

  Args:
    path: a file that pickle.dump wrote in protocol 2 to 5.

  Returns:
    Plain values, numpy arrays in place of tensors, `Record`s in place of
    objects.

  Raises:
    errors.UserError: the file is missing, damaged or over the limits, or
      names anything that weights do not need.
  """
  with files.refusing(path, _WANTED):
    stream = files.map_file(path)
    if stream[:2] == b'PK':
      raise ValueError('a zip archive, as .pth and .npz files are')
    budget = pickle_machine.Budget.of(len(stream))
    machine = pickle_machine.Machine(stream, _names(budget), budget)
    tree = machine.run()
    if stream.tell() != len(stream):
      raise ValueError(f'{len(stream) - stream.tell()} bytes behind the end')
    return arrays.resolve(tree, budget)


def _table(record: Record, name: str) -> dict[str, Any]:
  """Returns one of the tables that every module has, with text for keys."""
  state = record.state
  table = state.get(name) if isinstance(state, dict) else None
  is_table = isinstance(table, dict) and all(
    isinstance(key, str) for key in table
  )
  if not is_table:
    raise ValueError(f'the object {record.name!r} is no module: no {name}')
  return table


def _entries(
  record: Record, prefix: str, visits: Iterator[int]
) -> Iterator[tuple[str, Any]]:
  """Yields a module's own parameters and buffers, then its children's.

  Args:
    record: the module.
    prefix: what its keys begin with.
    visits: yields an item for each module that may still be visited.
  """
  next(visits)
  if len(prefix) > files.MAX_KEY:
    raise ValueError('its modules hold one another without end')
  parameters = _table(record, '_parameters')
  buffers = _table(record, '_buffers')
  transient = record.state.get('_non_persistent_buffers_set') or ()
  for name, value in parameters.items():
    if value is not None:
      yield prefix + name, value
  for name, value in buffers.items():
    if value is not None and name not in transient:
      yield prefix + name, value
  for name, child in _table(record, '_modules').items():
    if isinstance(child, Record):
      yield from _entries(child, f'{prefix}{name}.', visits)
    elif child is not None:
      raise ValueError(f'{prefix}{name} is no module')


def state_dict(module: Record) -> dict[str, np.ndarray]:
  """Returns a module's arrays under the official keys, in official order.

  Args:
    module: a record that `read` returned.

  Raises:
    ValueError: the record is no module, or holds itself.
  """
  state = {}
  try:
    for key, value in _entries(module, '', iter(range(_MAX_MODULES))):
      if not isinstance(value, np.ndarray) or key in state:
        raise ValueError(f'{pickle_machine.quote(key)} is no array, or twice')
      state[key] = value
  except RuntimeError as error:  # `visits` ended inside a generator
    raise ValueError(f'more than {_MAX_MODULES} modules') from error
  return state


def _attributes(state: dict[str, Any]) -> dict[str, Any]:
  """Returns an object's own plain values, without PyTorch's private ones."""
  plain = (type(None), bool, int, float, str, list, tuple, np.generic)
  return {
    name: value
    for name, value in state.items()
    if not name.startswith('_') and isinstance(value, plain)
  }


def read_network(
  path: pathlib.Path, which: str = 'ema', source: str = ''
) -> Network:
  """Reads a released network.

  Args:
    path: the .pkl file.
    which: the entry of the file's table; a release's network is its 'ema'.
    source: the address that the file was fetched from, if any.

  Raises:
    errors.UserError: the file is unreadable, as `read` says, or holds no such
      network.
  """
  tree = read(path)
  if not isinstance(tree, dict) or not isinstance(tree.get(which), Record):
    found = list(tree) if isinstance(tree, dict) else type(tree).__name__
    raise errors.UserError(
      f'{path} holds no network {which!r} (it holds {str(found)[:120]});'
      f' wanted {_WANTED}'
    )
  with files.refusing(path, _WANTED):
    network = tree[which]
    encoder = tree.get('encoder')
    pipe = tree.get('augment_pipe')
    augment = pipe.state.get('p', 0) if isinstance(pipe, Record) else 0
    origin = provenance.describe(path, source, table.NVIDIA)
    origin['class_sha256'] = hashlib.sha256(network.source.encode()).hexdigest()
    return Network(
      class_name=network.name,
      state_dict=state_dict(network),
      init_kwargs=_table(network, '_init_kwargs'),
      attributes=_attributes(network.state),
      encoder=encoder if isinstance(encoder, Record) else None,
      augment=float(augment),
      provenance=origin,
    )
