"""The recipes: sound, buildable, and as their headers say."""

import importlib
import json
import pathlib

import jax
import pytest

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import models
from ddo_jax import rng
from ddo_jax import settings
from ddo_jax.assets import table
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.training import workspace

FOLDER = pathlib.Path(__file__).parents[1] / 'configs'
NAMES = sorted(path.stem for path in FOLDER.glob('*.py'))


def load(name):
  module = importlib.import_module(f'configs.{name}')
  return module, module.get_config()


@pytest.mark.parametrize('name', NAMES)
def test_recipe(name):
  """Valid, divisible over eight devices, its model's shapes known."""
  module, config = load(name)
  config_lib.validate(config)
  assert config.name == name
  executor = devices_lib.Executor(config.executor)
  for phase in (config.pretrain, config.ddo):
    executor.check_batch(phase.batch_size, 1)
    model = workspace.build_model(config, phase.noise)
    assert jax.tree.leaves(jax.eval_shape(model.init, rng.stream(0)))
  recorded = json.loads(json.dumps(settings.to_json(config)))
  assert models.from_json(recorded) == config.model
  assert f'--config=configs/{name}.py' in module.__doc__
  assert f'--workdir=runs/{name}' in module.__doc__
  named = (config.init_from, config.tokenizer_from, config.vae_from)
  for weights in filter(None, named):
    assert table.ASSETS[weights].kind == table.WEIGHTS


def test_from_json_of_another_version():
  for recorded in (
    {},
    {'model.type': 'X'},
    {'model.type': 'ToyConfig', 'model.a': 1},
  ):
    with pytest.raises(errors.UserError, match='known here; known: Toy'):
      models.from_json(recorded)


def test_imagenet_learning_rate_ends_at_two_fifths():
  """The paper: warm-up, then 1/√ to about 0.4 of the peak."""
  phase = load('imagenet64_edm2_s')[1].ddo
  schedule = phase.optimizer.factor
  factor = schedule(jax.numpy.float32(phase.images), phase.images)
  assert 0.38 < factor < 0.42
  top = schedule(jax.numpy.float32(1e6), phase.images)
  assert top == 1


def test_var_recipes_stop_near_the_top_of_their_schedule():
  """loss_functions.npz has 0.9904 of the peak where the scripts stop."""
  for name in ('imagenet256_var_d16', 'imagenet256_var_d30'):
    phase = load(name)[1].ddo

    def factor(seen, phase=phase):
      return phase.optimizer.factor(seen, phase.images)

    assert factor(jax.numpy.float32(0)) == pytest.approx(0.005)
    assert factor(jax.numpy.float32(30_000)) == 1
    # After 790 microbatches of 128, or 3,157 of 32; the last are in no step.
    last = factor(jax.numpy.float32(101_000))
    assert last == pytest.approx(0.9904, abs=2e-4)
    assert phase.steps() == 98
