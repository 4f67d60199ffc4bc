"""The knobs of a sweep."""

import pytest

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax.models import toy
from ddo_jax.samplers import heun


def make(**knobs):
  config = config_lib.Config(model=toy.ToyConfig(), sampler=heun.Heun())
  config.tune = config_lib.Tune(**knobs)
  config.ddo.rhythm.eval_images = 512
  return config


def test_ranges_are_those_given():
  tune = config_lib.Tune(members=3, beta=(0.1, 1.0), learning_rate=(1e-3, 1e-3))
  assert tune.ranges() == {'beta': (0.1, 1.0), 'learning_rate': (1e-3, 1e-3)}
  config_lib.validate(make(members=3, beta=(0.1, 1.0)))


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('members', -1),
    ('reduction', 0),
    ('finalists', 0),
    ('alpha', (1.0,)),
    ('beta', (1.0, 0.1)),
    ('beta', (0.0, 0.1)),
    ('learning_rate', (1e-3, float('inf'))),
    ('merges', (-1.0,)),
    ('widths', (0.5,)),
  ],
)
def test_senseless_knobs_are_refused_by_name(field, value):
  with pytest.raises(errors.UserError) as caught:
    config_lib.validate(make(**{field: value}))
  assert str(caught.value).startswith(f'config.tune.{field} is ')


def test_a_sweep_needs_evaluations():
  config = make(members=2)
  config.ddo.rhythm.eval_images = 0
  with pytest.raises(errors.UserError, match=r'config\.ddo\.rhythm\.eval_imag'):
    config_lib.validate(config)
