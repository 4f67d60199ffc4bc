"""What a round says of itself; test_resume.py and test_main.py play rounds."""

import numpy as np
import pytest
from strangers import tiny

from configs import digits
from configs import digits_var
from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import rng
from ddo_jax import settings
from ddo_jax.data import labels as labels_lib
from ddo_jax.method import negatives
from ddo_jax.method import objective
from ddo_jax.runtime import checkpoint
from ddo_jax.training import check
from ddo_jax.training import fit
from ddo_jax.training import loop as loop_lib
from ddo_jax.training import plan
from ddo_jax.training import round as round_lib
from ddo_jax.training import workspace


def test_the_numbers_of_a_round_are_told():
  """Those by which its log is judged, see `tuning.findings`."""
  config = digits.get_config()
  phase = config_lib.at_round(config.ddo, 1)
  numbers = {'alpha': 1.0, 'beta': 0.1, 'learning_rate': 5e-4}
  assert round_lib._numbers(phase) == numbers


@pytest.mark.parametrize(
  ('name', 'change'),
  [
    ('ddo', {'negatives': negatives.OtherLabels()}),
    ('pretrain', {'label_drop': 0.1}),
  ],
)
def test_a_model_without_classes_cannot_go_by_labels(tmp_path, name, change):
  config = digits.get_config()
  config.model.num_classes = 0
  config.pretrain.label_drop = config.ddo.label_drop = 0.0
  check.sampling(workspace.Run(config, tmp_path), tmp_path / 'x', scored=False)
  for field, value in change.items():
    setattr(getattr(config, name), field, value)
  with pytest.raises(errors.UserError, match=f'config.{name} has negatives'):
    check.training(workspace.Run(config, tmp_path))


@pytest.mark.parametrize(
  'recipes', [(digits, digits_var), (digits_var, digits)]
)
def test_the_sampler_of_another_family_is_refused_at_once(tmp_path, recipes):
  config, other = (recipe.get_config() for recipe in recipes)
  config.sampler = other.sampler
  with pytest.raises(errors.UserError, match=r'sampler is .* wants'):
    check.training(workspace.Run(config, tmp_path))


def test_the_pool_of_uneven_data_is_as_uneven(tmp_path):
  path = tmp_path / 'uneven.npz'
  labels = np.repeat([0, 1, 2, 3], [0, 10, 10, 30])
  np.savez(path, image=np.zeros((50, 8, 8, 1), np.uint8), label=labels)

  def drawn(rule='data', protocol=''):
    config = digits.get_config()
    config.model.num_classes = 4
    config.model.pixel_values = 256
    config.data.source = str(path)
    config.labels = rule
    config.evaluation.protocol = protocol
    config.evaluation.metric = 'fid' if protocol else 'fd_train'
    shares = workspace.Run(config, tmp_path).shares
    return np.bincount(shares.labels(np.arange(200)), minlength=4).tolist()

  assert drawn() == [0, 40, 40, 120]
  assert drawn('balanced') == [0, 67, 67, 66]
  # The published protocols have all classes equally often.
  assert drawn(protocol='edm-cifar10') == [0, 67, 67, 66]


def test_maximum_likelihood_may_go_by_the_pool(tmp_path, monkeypatch):
  """It reads it where the real images are read, and as they are."""
  config = tiny.get_config()
  config.ddo.objective = objective.MLE()
  config.ddo.trains_on = 'pool'
  config_lib.validate(config)
  run = workspace.Run(config, tmp_path)
  parts = plan.plan(config).parts
  assert [part.images for part in parts if part.name == 'fake pool'] == [64]
  stage = run.stage('ddo')
  assert fit.make_rows(stage, stage.build(False), 4).fake is None
  params = run.executor.make_state(run.model.init, rng.stream(0))
  checkpoint.save_params(tmp_path / 'origin', params, {})

  class Played(Exception):
    pass

  def play(job):
    raise Played(job)

  monkeypatch.setattr(loop_lib, 'run', play)
  with pytest.raises(Played) as played:
    round_lib.play_round(run, 0, tmp_path / 'origin', None)
  [job] = played.value.args
  pool = np.load(tmp_path / 'round_000' / 'fakes' / '000000.npz')
  np.testing.assert_array_equal(job.real.stored, pool['image'])
  rows, none = next(loop_lib.batches(job, 0))
  assert none is None
  read = np.asarray(rows['stored']).reshape(-1, 8, 8, 1)
  drawn = {image.tobytes() for image in pool['image']}
  assert {image.tobytes() for image in read} <= drawn


def test_an_old_phase_trained_on_real_images():
  record = settings.to_json(digits.get_config())
  del record['ddo.trains_on']
  assert not settings.science_changes(digits.get_config(), record)
  changed = digits.get_config()
  changed.ddo.trains_on = 'pool'
  [line] = settings.science_changes(changed, record)
  assert line == "ddo.trains_on: 'real' -> 'pool'"


def test_a_round_begins_with_scores_of_its_own_classes():
  """Or measures anew what an earlier version measured on other classes."""
  scores = {'fd_train': 1.0}

  class Run:
    label_rule = '2 classes as often as in the training images'
    config = digits.get_config()

  known = round_lib._known_scores
  assert known(Run, None) is None
  same = {'after': scores, 'labels': Run.label_rule}
  assert known(Run, same) is scores
  assert known(Run, {'after': scores}) is None
  Run.label_rule = labels_lib.EQUAL
  assert known(Run, {'after': scores}) is scores
  Run.label_rule = ''  # a model without classes
  assert known(Run, {'after': scores}) is scores
  Run.label_rule = 'each class at random, all equally likely'
  Run.config.evaluation.protocol = 'edm-cifar10'
  assert known(Run, {'after': scores}) is scores
