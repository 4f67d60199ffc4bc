"""Models: one file or folder a network, each with its settings."""

import dataclasses
from typing import Any

from ddo_jax import errors
from ddo_jax import settings
from ddo_jax.models import dit
from ddo_jax.models import edm
from ddo_jax.models import edm2
from ddo_jax.models import llamagen
from ddo_jax.models import llamagen_vq
from ddo_jax.models import sit
from ddo_jax.models import toy
from ddo_jax.models import var
from ddo_jax.models import vqvae

CONFIGS = (
  toy.ToyConfig,
  edm.EdmConfig,
  edm2.Edm2Config,
  var.VarConfig,
  dit.DitConfig,
  sit.SitConfig,
  llamagen.LlamagenConfig,
  llamagen.PixelGptConfig,
)
_PARTS = (
  *CONFIGS,
  vqvae.VqvaeConfig,
  llamagen_vq.VqConfig,
)  # what a recorded config may hold
_RENAMED = {'levels': 'pixel_values'}  # in records of earlier versions


def _kinds_of(config: Any) -> list[type]:
  """Returns the dataclasses of a model's settings and of their parts."""
  kinds = [type(config)]
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      kinds += _kinds_of(value)
  return kinds


def from_json(recorded: dict[str, Any], recipe: Any = None) -> Any:
  """Returns the model's settings among what `settings.to_json` wrote of a run.

  A record never imports anything: the class is looked up by its name among the
  package's and the recipe's.

  Args:
    recorded: values by dotted name.
    recipe: the model's settings of the recipe at hand, if there is one.

  Raises:
    errors.UserError: it is of no known model, of another version, or holds a
      value that no model has.
  """
  if not isinstance(recorded, dict):
    raise errors.UserError(
      f'the record of a model is {errors.brief(recorded)}; wanted its settings'
      ' by name'
    )
  known: dict[str, Any] = {kind.__name__: kind for kind in _PARTS}
  if recipe is not None:
    known |= {kind.__name__: kind for kind in _kinds_of(recipe)}
  try:
    config = _from_json(recorded, 'model.', known)
  except (KeyError, TypeError, RecursionError) as error:
    name = errors.brief(recorded.get('model.type'))
    raise errors.UserError(
      f'the weights were written with the model {name} ({str(error)[:200]}),'
      ' which is not known here; known:'
      f' {", ".join(kind.__name__ for kind in CONFIGS)}'
    ) from error
  settings.check_recorded(config, 'the recorded model')
  return config


def _from_json(
  recorded: dict[str, Any], prefix: str, known: dict[str, Any]
) -> Any:
  """Returns the dataclass whose fields, and those of its parts, have a prefix.

  Args:
    recorded: values by dotted name.
    prefix: the dotted name of the dataclass, with a dot at its end.
    known: the classes by name.
  """
  fields: dict[str, Any] = {}
  parts = set()
  for name, value in recorded.items():
    if not name.startswith(prefix):
      continue
    name = name.removeprefix(prefix)
    if '.' in name:
      parts.add(name.split('.')[0])
    else:
      name = _RENAMED.get(name, name)
      fields[name] = tuple(value) if isinstance(value, list) else value
  for part in parts:
    fields[part] = _from_json(recorded, f'{prefix}{part}.', known)
  return known[fields.pop('type')](**fields)
