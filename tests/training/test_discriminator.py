"""A discriminator of a pool: what it learns, keeps and costs."""

import dataclasses

import numpy as np
import pytest
from strangers import tiny

from ddo_jax import errors
from ddo_jax.data import sources
from ddo_jax.method import negatives
from ddo_jax.method import noise
from ddo_jax.runtime import records
from ddo_jax.training import discriminator
from ddo_jax.training import workspace

STEPS, BATCH = 30, 64


def new_run(folder):
  config = tiny.get_config()
  phase = config.discriminator
  phase.batch_size = BATCH
  phase.images = STEPS * BATCH
  phase.rhythm.eval_images = 10 * BATCH
  phase.optimizer.learning_rate = (3e-3,)
  phase.noise = noise.LogUniform((0.05,), (2.0,))
  config.discriminator_network.hidden = 16
  config.discriminator_network.blocks = 1
  return workspace.Run(config, folder)


def new_pool(count=200):
  """A pool of grey images: nothing is told apart more easily."""
  grey = np.full((count, 8, 8, 1), 8, np.uint8)
  return sources.ArraySource('grey', grey, np.arange(count) % 10, 10, 17)


@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
  run = new_run(tmp_path_factory.mktemp('run'))
  folder = run.workdir / 'round_000' / 'discriminator'
  params = discriminator.fit(run, folder, new_pool)
  return run, params, records.read_json(folder / 'done.json')


def test_it_tells_images_apart_that_it_has_not_seen(fitted):
  _, params, done = fitted
  assert (params / 'params').is_dir()
  log = records.MetricsLog(params.parent).read('round_000/discriminator')
  losses = [record['selection'] for record in log if record['kind'] == 'eval']
  assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
  assert done['step'] > 0
  assert done['held_out_loss'] == min(losses) < 0.5


def test_one_that_is_trained_is_kept(fitted, monkeypatch):
  run, params, _ = fitted
  monkeypatch.setattr(discriminator.loop_lib, 'run', None)
  assert discriminator.fit(run, params.parent, None) == params  # no pool drawn
  other = new_run(run.workdir)
  other.config.discriminator.images += 1
  with pytest.raises(errors.UserError, match=r'other settings \(images: 1920'):
    discriminator.fit(other, params.parent, new_pool)


def test_a_tenth_of_each_class_is_held_out():
  pool = new_pool()
  held = discriminator._part(pool, True)
  rest = discriminator._part(pool, False)
  assert sorted([*held.rows, *rest.rows]) == [*range(200)]
  assert np.bincount(held.labels()).tolist() == [2] * 10
  with pytest.raises(errors.UserError, match='grey has 30 images; a disc'):
    discriminator._part(new_pool(30), True)


def test_what_is_looked_at_is_of_all_parts(monkeypatch):
  monkeypatch.setattr(discriminator, '_MOST', 60)
  pool = new_pool(100)
  ordered = dataclasses.replace(pool, classes=np.sort(pool.classes))
  rows = discriminator._read(ordered)
  assert np.bincount(rows['label']).tolist() == [16 * 5] * 10
  assert len(set(rows['id'])) == 16 * 50


def test_what_it_costs(fitted):
  """In forward passes of the generator, by what the networks multiply."""
  run, _, done = fitted
  # Of the discriminator: embeddings, layers of the input, a block, the logit.
  condition = 32 * 16 + 16 * 16
  block = 16 * 32 + 16 * 16 + 16 * 16
  once = condition + 64 * 16 + block + 16
  hidden = run.config.model.hidden
  blocks = run.config.model.blocks
  forward = 32 * hidden + hidden**2 + 2 * 64 * hidden
  forward += blocks * 4 * hidden**2
  costs = done['forwards']
  rows = 16 * (20 + 140)  # every held-out image 16 times, about
  looks = STEPS // 10 + 1
  assert costs['selection'] == pytest.approx(
    looks * rows * once / forward, rel=0.05
  )
  images = 2 * STEPS * BATCH
  assert 2 < costs['training'] / (images * once / forward) <= 3
  assert 1.5 < costs['gradient'] / (once / forward) < 2


def test_a_round_that_has_not_begun_has_no_pool(tmp_path):
  with pytest.raises(errors.UserError, match='round_003 has no reference'):
    discriminator.train(new_run(tmp_path), 3)


def test_a_round_without_a_pool_has_nothing_to_train_it_on(tmp_path):
  run = new_run(tmp_path)
  run.config.ddo.negatives = negatives.Online()
  with pytest.raises(errors.UserError, match='no pool that a discriminator'):
    discriminator.train(run)
