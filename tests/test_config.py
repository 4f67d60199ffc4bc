"""The knobs: validation, per-round values, what must not change in a run."""

import dataclasses

import jax
import pytest

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import settings
from ddo_jax.method import ddo
from ddo_jax.method import negatives
from ddo_jax.method import noise
from ddo_jax.method import objective
from ddo_jax.method import siblings
from ddo_jax.models import toy
from ddo_jax.models import var
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


def test_each_config_has_its_own_knobs():
  changed('ddo.objective.alpha', (7.0,))
  changed('pretrain.rhythm.log_images', 7)
  assert settings.to_json(make()) == settings.to_json(
    config_lib.Config(model=toy.ToyConfig(), sampler=heun.Heun())
  )
  assert make().ddo.objective.alpha == (4.0,)


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('model', None),
    ('sampler', None),
    ('rounds', -1),
    ('seed', -1),
    ('seed', 2**32),
    ('pretrain.objective', ddo.DDO()),
    ('ddo.optimizer.decay', 'cosine'),
    ('ddo.optimizer.decay', 'linear'),  # without decay_images
    ('ddo.objective.alpha', ()),
    ('ddo.objective.alpha', (1.0, -1.0)),
    ('ddo.objective.beta', (0.0,)),
    ('ddo.objective.beta', (float('nan'),)),
    ('ddo.objective.beta', ('x',)),
    ('ddo.optimizer.learning_rate', (float('inf'),)),
    ('ddo.noise.p_std', (0.0,)),
    ('ddo.noise.p_mean', ()),
    ('ddo.averages.halflife', (0.0,)),
    ('ddo.images', 0),
    ('ddo.batch_size', 0),
    ('ddo.negatives.size', 0),
    ('ddo.rhythm.log_images', 0),
    ('ddo.rhythm.eval_images', -1),
    ('ddo.optimizer.clip_norm', -1.0),
    ('ddo.label_drop', 1.0),
    ('ddo.trains_on', 'fakes'),
    ('ddo.trains_on', 'pool'),  # DDO takes both
    ('pretrain.trains_on', 'pool'),  # whose reference there is none of
    ('discriminator.objective', objective.MLE()),
    ('discriminator_network.network', 'cnn'),
    ('discriminator_network.blocks', -1),
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
  field = 'ddo.optimizer.decay_images' if value == 'linear' else name
  assert str(caught.value).startswith(f'config.{field} is ')
  assert '\n' not in str(caught.value)


def test_a_sweep_in_which_nothing_would_vary_is_refused_at_once():
  config = changed('ddo.objective', objective.MLE())
  config.ddo.rhythm.eval_images = 10
  config.tune.members = 4
  with pytest.raises(errors.UserError, match=r'members is 4.*would vary'):
    config_lib.validate(config)
  config.tune.learning_rate = (1e-4, 1e-3)
  config_lib.validate(config)


def test_a_round_has_its_own_numbers():
  """The last value of a tuple repeats; a number holds in every round."""
  phase = config_lib.Phase(
    objective=ddo.DDO(alpha=(1.0, 2.0), beta=0.5),
    noise=noise.LogNormal(p_mean=(-1.0,), p_std=(1.0, 2.0, 3.0)),
  )
  rounds = [config_lib.at_round(phase, index) for index in range(4)]
  assert [r.objective.alpha for r in rounds] == [1.0, 2.0, 2.0, 2.0]
  assert [r.objective.beta for r in rounds] == [0.5] * 4
  assert [r.noise.p_std for r in rounds] == [1.0, 2.0, 3.0, 3.0]
  assert [r.noise.p_mean for r in rounds] == [-1.0] * 4
  assert all(r.averages == phase.averages for r in rounds)


def test_steps_cover_all_images():
  steps = [
    config_lib.Phase(images=images, batch_size=8).steps()
    for images in (1, 8, 9, 16)
  ]
  assert steps == [1, 1, 2, 2]


def test_the_compiled_step_does_not_depend_on_traced_values():
  def structure(**fields):
    phase = config_lib.Phase(**fields)
    return jax.tree.structure(config_lib.at_round(phase, 0))

  one = structure(objective=ddo.DDO(alpha=(1.0,), beta=(0.1,)))
  two = structure(
    objective=ddo.DDO(alpha=(2.0, 3.0), beta=(0.2,)),
    noise=noise.LogNormal(p_mean=(0.0,)),
    optimizer=config_lib.Optimizer(learning_rate=(1e-4,)),
  )
  assert one == two
  assert one != structure(objective=ddo.DDO(normalize=True))
  assert one != structure(label_drop=0.1)


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('seed', 1),
    ('ddo.objective.alpha', (1.0, 2.0)),
    ('ddo.rhythm.eval_images', 7),
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
    ('ddo.rhythm.save_images', 7),
    ('ddo.rhythm.log_images', 7),
    ('discriminator.images', 7),
    ('discriminator_network.hidden', 7),
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


def test_a_field_that_is_new_counts_as_its_default():
  recorded = settings.to_json(make())
  del recorded['ddo.optimizer.clip_norm']
  assert settings.science_changes(make(), recorded) == []
  (line,) = settings.science_changes(
    changed('ddo.optimizer.clip_norm', 1.0), recorded
  )
  assert line == 'ddo.optimizer.clip_norm: 0.0 -> 1.0'


def test_a_name_that_moved_leads_to_a_field():
  for before, after in config_lib.RENAMED.items():
    config = make(guide=toy.ToyConfig())
    if '.tokenizer.' in after:
      config.model = var.VarConfig()
    phase = getattr(config, after.split('.')[0])
    if '.objective.' in after:
      phase.objective = ddo.DDO()
    if '.round_trip' in after:
      phase.negatives = negatives.Online()
    names = settings.to_json(config)
    assert before not in names, before
    assert after in names or f'{after}.type' in names, after


@pytest.mark.parametrize(
  ('text', 'wanted'),
  [
    ('mle', objective.MLE()),
    ('DDO', ddo.DDO()),
    ('f_divergence(kind="kl")', siblings.FDivergence(kind='kl')),
    ('CCA(alpha=(2.0,), normalize=True)', siblings.CCA((2.0,), normalize=True)),
  ],
)
def test_an_object_is_named_on_the_command_line(text, wanted):
  assert settings.parse_object(objective.Objective, text) == wanted


@pytest.mark.parametrize(
  'text',
  ['gan', 'DDO(1.0)', 'DDO(gamma=1)', 'DDO(alpha=open("x"))', 'DDO(', '1', ''],
)
def test_what_names_no_object_is_one_line(text):
  with pytest.raises(errors.UserError, match='is no Objective') as caught:
    settings.parse_object(objective.Objective, text)
  assert 'DDO' in str(caught.value) and '\n' not in str(caught.value)


def test_fields_that_somebody_chose():
  """Those of an object count by its own defaults, those of a phase by ours."""
  standard = config_lib.Config()
  chosen = {'model.type', 'sampler.type'}
  assert set(settings.changed(make(), standard)) == chosen
  config = changed('ddo.optimizer.clip_norm', 2.0)
  config.model.hidden = 7
  config.pretrain.objective = ddo.DDO()
  chosen |= {'ddo.optimizer.clip_norm', 'model.hidden'}
  chosen.add('pretrain.objective.type')
  assert set(settings.changed(config, standard)) == chosen
