"""The knobs: validation, per-round values, what must not change in a run."""

import dataclasses

import pytest

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import settings
from ddo_jax.models import toy
from ddo_jax.samplers import heun


def make(**fields):
  return config_lib.Config(model=toy.ToyConfig(), sampler=heun.Heun(), **fields)


def changed(name, value):
  """A valid config with one field, given by its dotted name, replaced."""
  config = make()
  *folders, field = name.split('.')
  owner = config
  for folder in folders:
    owner = getattr(owner, folder)
  assert hasattr(owner, field)
  setattr(owner, field, value)
  return config


def test_the_defaults_are_valid():
  config_lib.validate(make())


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('model', None),
    ('sampler', None),
    ('rounds', -1),
    ('seed', -1),
    ('seed', 2**32),
    ('pretrain.objective', 'ddo'),
    ('ddo.objective', 'gan'),
    ('ddo.decay', 'cosine'),
    ('ddo.decay', 'linear'),  # without decay_images
    ('ddo.alpha', ()),
    ('ddo.alpha', (1.0, -1.0)),
    ('ddo.beta', (0.0,)),
    ('ddo.beta', (float('nan'),)),
    ('ddo.beta', ('x',)),
    ('ddo.learning_rate', (float('inf'),)),
    ('ddo.p_std', (0.0,)),
    ('ddo.p_mean', ()),
    ('ddo.ema_halflife', (0.0,)),
    ('ddo.images', 0),
    ('ddo.batch_size', 0),
    ('ddo.pool_size', 0),
    ('ddo.log_images', 0),
    ('ddo.eval_images', -1),
    ('ddo.clip_norm', -1.0),
    ('ddo.label_drop', 1.0),
    ('evaluation.samples', -1),
    ('evaluation.seeds', -1),
    ('executor.kind', 'tpu'),
    ('executor.accumulate', 0),
    ('executor.sample_batch', 0),
  ],
)
def test_a_senseless_value_is_refused_by_name(name, value):
  with pytest.raises(errors.UserError) as caught:
    config_lib.validate(changed(name, value))
  field = 'ddo.decay_images' if value == 'linear' else name
  assert str(caught.value).startswith(f'config.{field} is ')
  assert '\n' not in str(caught.value)


def test_the_last_value_of_a_tuple_repeats():
  values = (1.0, 2.0)
  assert [config_lib.pick(values, i) for i in range(4)] == [1.0, 2.0, 2.0, 2.0]


def test_steps_cover_all_images():
  steps = [
    config_lib.Phase(images=images, batch_size=8).steps()
    for images in (1, 8, 9, 16)
  ]
  assert steps == [1, 1, 2, 2]


def test_the_compiled_step_does_not_depend_on_traced_values():
  one = config_lib.Phase(alpha=(1.0,), beta=(0.1,), learning_rate=(1e-3,))
  two = config_lib.Phase(alpha=(2.0, 3.0), beta=(0.2,), learning_rate=(1e-4,))
  assert one.static() == two.static()
  assert hash(one.static()) == hash(two.static())
  other = dataclasses.replace(one, normalize=True)
  assert one.static() != other.static()


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('seed', 1),
    ('ddo.alpha', (1.0, 2.0)),
    ('ddo.eval_images', 7),
    ('model.hidden', 7),
    ('sampler.num_steps', 7),
    ('data.source', 'cifar10'),
    ('evaluation.metric', 'fd_test'),
  ],
)
def test_science_must_not_change(name, value):
  recorded = settings.to_json(make())
  config = changed(name, value)
  (line,) = settings.science_changes(config, recorded)
  now = settings.to_json(config)[name]
  assert line == f'{name}: {recorded[name]!r} -> {now!r}'


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('name', 'other'),
    ('rounds', 7),
    ('data.data_dir', '/data'),
    ('ddo.save_images', 7),
    ('ddo.log_images', 7),
    ('executor.kind', 'fsdp'),
    ('executor.accumulate', 2),
    ('executor.remat', True),
    ('executor.sample_batch', 7),
  ],
)
def test_the_rest_may_change(name, value):
  recorded = settings.to_json(make())
  assert settings.science_changes(changed(name, value), recorded) == []


def test_another_kind_of_model_is_a_change():
  @dataclasses.dataclass
  class Other:
    hidden: int = 64

  recorded = settings.to_json(make())
  lines = settings.science_changes(changed('model', Other()), recorded)
  assert "model.type: 'ToyConfig' -> 'Other'" in lines
  assert "model.network: 'mlp' -> gone" in lines
