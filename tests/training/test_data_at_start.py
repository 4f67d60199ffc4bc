"""What a run says of its data before it computes anything."""

import numpy as np
import pytest
from strangers import tiny

from ddo_jax import errors
from ddo_jax.data import sources
from ddo_jax.training import check
from ddo_jax.training import workspace


def open_run(tmp_path, images, labels=None, **fields):
  path = tmp_path / 'set.npz'
  arrays = {} if labels is None else {'label': np.asarray(labels)}
  np.savez(path, image=images, **arrays)
  config = tiny.get_config()
  config.model.pixel_values = 256
  config.model.num_classes = fields.pop('num_classes', 4)
  config.data.source = str(path)
  for name, value in fields.items():
    setattr(config.data, name, value)
  return workspace.Run(config, tmp_path / 'run')


def fault(run):
  with pytest.raises(errors.UserError) as caught:
    check.training(run)
  assert not run.workdir.exists()
  return str(caught.value)


IMAGES = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1), np.uint8)
FROM_ONE = np.arange(300) % 3 + 1


def test_labels_that_begin_at_one_are_named(tmp_path, caplog):
  run = open_run(tmp_path, IMAGES, FROM_ONE)
  assert run.real.num_classes == 4
  assert 'labels run from 1 to 3 and class 0 is empty' in caplog.text
  run = open_run(tmp_path, IMAGES, FROM_ONE, num_classes=3)
  line = fault(run)
  assert 'labels reach 3 and the model has 3 classes' in line
  assert '--config.data.first_label=1' in line
  run = open_run(tmp_path, IMAGES, FROM_ONE, num_classes=3, first_label=1)
  caplog.clear()
  assert run.real.num_classes == 3 and not caplog.records


def test_all_faults_of_the_data_are_told_at_once(tmp_path):
  run = open_run(tmp_path, IMAGES / 255)
  assert 'images are float64 [300, 8, 8, 1]' in fault(run)
  run = open_run(tmp_path, np.tile(IMAGES, (1, 2, 2, 1)), FROM_ONE)
  lines = fault(run).splitlines()
  assert '--config.data.resize=8' in lines[0]
  # The score needs images that were not trained on.
  assert '--config.data.holdout=0.1' in lines[1] and len(lines) == 2


def test_held_out_copies_are_found_before_training(tmp_path):
  np.savez(tmp_path / 'test.npz', image=IMAGES[:50])
  fields = {'test_source': str(tmp_path / 'test.npz')}
  line = fault(open_run(tmp_path, IMAGES, FROM_ONE, **fields))
  assert 'all 50 held-out images' in line and 'are copies' in line


def test_a_source_that_does_not_fit_is_opened_once(tmp_path, monkeypatch):
  run = open_run(tmp_path, IMAGES, FROM_ONE, num_classes=3, holdout=0.1)
  opened = []
  open_source = sources.open_source

  def counted(data, split):
    opened.append(split)
    return open_source(data, split)

  monkeypatch.setattr(sources, 'open_source', counted)
  assert 'labels reach 3' in fault(run)
  assert sorted(opened) == ['test', 'train']
