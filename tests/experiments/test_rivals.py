"""The rivals: exact ends of their scales, equal compute, looks that resume."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from strangers import tiny

from ddo_jax import config as config_lib
from ddo_jax import rng
from ddo_jax.method import ddo
from ddo_jax.method import negatives
from ddo_jax.method import objective
from ddo_jax.models import llamagen
from ddo_jax.models import toy
from ddo_jax.runtime import checkpoint
from ddo_jax.samplers import ancestral
from ddo_jax.training import loop as loop_lib
from ddo_jax.training import workspace
from experiments.rivals import __main__ as driver
from experiments.rivals import bench as bench_lib
from experiments.rivals import methods
from experiments.rivals import show

LOOKS = bench_lib.LOOKS


@pytest.fixture(scope='module')
def bench(tmp_path_factory):
  """A bench whose reference is drawn and not trained."""
  folder = tmp_path_factory.mktemp('rivals')
  config = tiny.get_config()
  config.ddo.images = 300 * 16
  run = workspace.Run(config, folder / 'base')
  params = run.executor.make_state(run.model.init, rng.stream(0))
  # The last layer of a fresh network is zero, and knows no weights.
  params = jax.tree.map(lambda leaf: leaf + 0.1, params)
  checkpoint.save_params(folder / 'origin', params, {})
  return bench_lib.Bench(run, folder / 'origin', folder)


@pytest.fixture(scope='module')
def other(bench):
  """What stands for θ_s."""
  noise = rng.stream(1)

  def move(leaf):
    return leaf + 0.01 * jax.random.normal(noise, leaf.shape)

  return jax.tree.map(move, bench.reference)


def test_neon_ends_at_the_reference_and_at_the_self_trained(bench, other):
  def neon(weight):
    return methods.extrapolated(bench, lambda: other, weight)

  assert neon(0.0) is bench.reference
  assert neon(-1.0) is other
  wanted = jax.tree.map(lambda r, s: 1.5 * r - 0.5 * s, bench.reference, other)
  chex.assert_trees_all_close(neon(0.5), wanted, atol=1e-6)


def test_a_guide_of_no_strength_is_not_asked(bench, other):
  def drawn(generator):
    ids = np.arange(4)
    labels = ids.astype(np.int32)
    parts = generator.stream(bench.reference, rng.stream(2), ids, labels)
    return np.concatenate(list(parts))

  plain = drawn(bench.run.generator())
  np.testing.assert_array_equal(drawn(bench.guided(0.0, other)), plain)
  assert (drawn(bench.guided(30.0, other)) != plain).any()


def test_all_spend_what_the_recipe_spends(bench):
  draw = bench.forwards(bench.run.generator())
  assert draw == pytest.approx(7, abs=0.1)  # 2·4 − 1 evaluations
  assert bench.pool_cost == 64 * draw
  assert bench.budget == 64 * draw + 8 * 300 * 16
  third = LOOKS // len(methods.RATES)
  mle = config_lib.Phase(objective=objective.MLE(), batch_size=16)
  cases = {
    'ddo': (bench.phase, LOOKS),
    'mle': (mle, third),
    'self': (methods._self_phase(bench, 1e-3), third),
  }
  for name, (phase, looks) in cases.items():
    sized = bench.sized(phase, looks)
    spent = bench.before(phase) + sized.images * bench.step_cost(phase)
    step = 16 * bench.step_cost(phase)
    assert bench.budget - step < spent <= bench.budget, name
    # The reference's look, at step 0, is not the method's.
    assert loop_lib.evaluations(sized) - 1 == looks, name
  assert bench.sized(bench.phase, LOOKS).images == bench.phase.images
  warmup = bench.sized(bench.phase, LOOKS, bench.budget / 2).optimizer
  assert warmup.warmup_images < bench.phase.optimizer.warmup_images


def test_two_networks_cost_two(bench, other):
  plain = bench.forwards(bench.run.generator())
  guided = bench.guided(0.5, other)
  assert bench.forwards(guided) == pytest.approx(2 * plain, rel=0.01)
  sampler = bench.run.config.sampler
  sigma = bench_lib.levels(sampler)
  wanted = sampler.sigmas()
  np.testing.assert_allclose(sigma[::2], wanted[:-1], rtol=1e-6)
  np.testing.assert_allclose(sigma[1::2], wanted[1:-1], rtol=1e-6)
  half = bench.guided(0.5, other, guidance_max=float(sigma[3]))
  share = np.mean(sigma <= sigma[3])
  assert bench.forwards(half) == pytest.approx((1 + share) * plain, rel=0.01)
  alike = bench._within(guided, plain)
  assert alike.sampler == dataclasses.replace(guided.sampler, num_steps=2)


def test_discriminators_share_the_budget(bench):
  settings = methods.smaller(bench)
  model = settings.beside(bench.run.model)
  cost = methods.training.costs(bench.run, model)
  assert cost.row <= 0.25
  phases = methods.discriminator_phases(bench, cost.pair)
  left = bench.budget - bench.pool_cost
  spent = cost.pair * sum(phase.images for phase in phases.values())
  step = cost.pair * bench.run.config.discriminator.batch_size
  assert 0 <= left - spent < step * len(phases)


def test_a_discriminator_that_is_never_small_does_not_play(bench, monkeypatch):
  monkeypatch.setattr(methods, '_SMALL', 0.0)
  with pytest.raises(bench_lib.Unfit, match='however narrow'):
    methods.smaller(bench)


def test_a_correction_costs_where_it_is_made(bench):
  settings = methods.smaller(bench)
  model = settings.beside(bench.run.model)
  cost = methods.training.costs(bench.run, model)
  generator = bench.run.generator()
  plain = bench.forwards(generator)
  sigma = bench_lib.levels(generator.sampler)
  generator.model = bench.run.model.with_discriminator(model.network)
  shapes = jax.eval_shape(model.init, rng.stream(0))
  generator.frozen = bench.run.frozen | {'discriminator': shapes}
  generator.sampler = dataclasses.replace(
    generator.sampler,
    discriminator=1.0,
    discriminator_min=float(sigma[4]),
    discriminator_max=float(sigma[1]),
  )
  corrected = np.sum((sigma[4] < sigma) & (sigma <= sigma[1]))
  assert 0 < corrected < len(sigma)
  wanted = plain + corrected * cost.gradient
  assert bench.forwards(generator) == pytest.approx(wanted, rel=0.02)
  assert bench._within(generator, plain).sampler.num_steps < 4
  assert bench._within(generator, 0.5) is None  # a single step costs more


def test_a_search_goes_on_where_it_stopped(bench, monkeypatch):
  seen = []

  def look(self, params, folder=None, generator=None):
    seen.append(params)
    if len(seen) == 3:
      raise KeyboardInterrupt
    return {'fd_train': float(abs(params - 2))}

  monkeypatch.setattr(bench_lib.Bench, 'look', look)
  generator = bench.run.generator()

  def candidates():
    for number in range(5):
      yield bench_lib.Candidate({'n': number}, lambda: number, generator, 0.0)  # noqa: B023

  with pytest.raises(KeyboardInterrupt):
    bench.search('some', candidates())
  played = bench.search('some', candidates())
  assert seen == [0, 1, 2, 2, 3, 4]
  assert played.best.settings == {'n': 2}
  assert [one['selection'] for one in played.looks] == [2, 1, 0, 1, 2]
  path = bench.folder / 'some' / 'looks.json'
  assert json.loads(path.read_text())['looks'] == played.looks


def test_a_training_may_not_end_at_its_start_where_it_must_move(
  bench, monkeypatch
):
  """θ_ref is the best of both trainings, and the second best is known."""
  phase = bench.sized(methods._self_phase(bench, 1e-3), 2)
  scores = {'a': (1.0, 4.0, 3.0), 'b': (1.0, 5.0, 2.0)}
  period = phase.rhythm.eval_images

  def train(self, name, phase):
    del self, phase
    evaluations = [
      {'step': i * period // 16, 'images': i * period, 'selection': score}
      for i, score in enumerate(scores[name[-1]])
    ]
    return loop_lib.Promotion('θ_ref', 0, 'params', 1.0, evaluations)

  def snapshots(self, name, phase):
    del self, phase
    return [
      bench_lib.Snapshot(i * period, lambda i=i: (name, i), 0.0) for i in (1, 2)
    ]

  monkeypatch.setattr(bench_lib.Bench, 'train', train)
  monkeypatch.setattr(bench_lib.Bench, 'snapshots', snapshots)
  cells = {'a': phase, 'b': phase}
  assert bench.trained('some', cells).best.params() == 'θ_ref'
  played = bench.trained('some', cells, start=False)
  assert played.best.params() == ('some/b', 2)
  assert played.best.settings == {'cell': 'b', 'step': 2 * period // 16}
  assert len(played.looks) == 4
  once = 2 * period * 3
  assert played.best.training == bench.pool_cost + once
  assert played.trained == bench.pool_cost + 2 * once


@pytest.fixture
def ends_at_other(other, monkeypatch):
  """Every training ends at what `other` says, and its last look is best."""

  def train(self, name, phase):
    del self, name
    period = phase.rhythm.eval_images
    evaluations = [
      {'step': i * period // 16, 'images': i * period, 'selection': 9.0 - i}
      for i in range(4)
    ]
    last = evaluations[-1]['step']
    return loop_lib.Promotion(other, last, 'params', 6.0, evaluations)

  monkeypatch.setattr(bench_lib.Bench, 'train', train)


@pytest.mark.usefixtures('ends_at_other')
def test_a_merge_of_ddo_shares_its_looks(bench, other, monkeypatch):
  wanted = jax.tree.map(lambda r, s: 2 * s - r, bench.reference, other)

  def look(self, params, folder=None, generator=None):
    del self, folder, generator
    gaps = jax.tree.map(lambda p, w: jnp.sum((p - w) ** 2), params, wanted)
    return {'fd_train': float(sum(jax.tree.leaves(gaps)))}

  monkeypatch.setattr(bench_lib.Bench, 'look', look)
  played = methods.ddo_merged(bench)
  assert len(played.looks) == LOOKS
  assert played.best.settings['merge'] == 2.0
  chex.assert_trees_all_close(played.best.params(), wanted, atol=1e-6)
  assert played.best.training == played.trained <= bench.budget


@pytest.mark.usefixtures('ends_at_other')
def test_guidance_after_ddo_shares_its_looks(bench, other, monkeypatch):
  def look(self, params, folder=None, generator=None):
    del self, folder
    assert params is other
    return {'fd_train': abs(generator.sampler.guidance - 1.6)}

  monkeypatch.setattr(bench_lib.Bench, 'look', look)
  played = methods.ddo_guided(bench)
  assert len(played.looks) == LOOKS
  assert played.best.settings['strength'] == 0.6
  assert played.best.generator.sampler.guidance == 1.6
  assert bench.forwards(played.best.generator) == pytest.approx(14, abs=0.2)


def test_a_result_that_is_there_is_not_made_again(bench, monkeypatch):
  found = {'title': 'some', 'looks': [], 'scores': {'fd_train': 1.0}}
  path = bench.folder / 'ddo' / 'result.json'
  path.parent.mkdir()
  path.write_text(json.dumps(found))
  monkeypatch.setattr(bench_lib.Bench, 'trained', None)
  assert driver.play(bench, 'ddo') == found


def test_guides_of_tokens_cost_what_they_are_large(tmp_path):
  model = llamagen.PixelGptConfig(width=16, heads=2, depth=1, hidden=16)
  config = config_lib.Config(
    model=model,
    sampler=ancestral.Ancestral(),
    data=config_lib.Data(source='digits'),
    ddo=config_lib.Phase(negatives=negatives.Online()),
  )
  run = workspace.Run(config, tmp_path / 'base')
  params = run.executor.make_state(run.model.init, rng.stream(0))
  checkpoint.save_params(tmp_path / 'origin', params, {})
  tokens = bench_lib.Bench(run, tmp_path / 'origin', tmp_path)
  assert tokens.forwards(run.generator()) == 1
  assert tokens.forwards(tokens.guided(0.5)) == 2
  assert tokens.forwards(tokens.guided(0.5, tokens.reference)) == 2
  small = methods._halved(model).build()
  weights = jax.eval_shape(small.init, rng.stream(0))
  guided = tokens.guided(0.5, weights, small)
  assert 1.1 < tokens.forwards(guided) < 1.6
  # Of one strength at all stages, whatever the recipe's convention.
  assert guided.sampler.strength(0.0) == guided.sampler.strength(1.0) == 0.5


def test_a_guide_is_as_narrow_as_can_be():
  wide = toy.ToyConfig(network='unet', hidden=16)
  assert methods._halved(wide).hidden == 8
  assert methods._halved(methods._halved(wide)).hidden == 8  # of eight groups
  assert methods._halved(toy.ToyConfig(hidden=8)).hidden == 4


def test_the_halves_of_ddo_are_ddo():
  whole = ddo.DDO(alpha=2.0, beta=0.5)
  numbers = {'alpha': 2.0, 'beta': 0.5}
  args = (
    jnp.array([0.3, -1.0]),
    jnp.array([2.0, 0.1]),
    objective.Rows.plain(2),
  )
  real, fake = whole.loss(*args)
  np.testing.assert_array_equal(
    methods.RealOnly(**numbers).loss(*args), (real, jnp.zeros(2))
  )
  np.testing.assert_array_equal(
    methods.FakeOnly(**numbers).loss(*args), (jnp.zeros(2), fake)
  )


def test_the_table():
  def seed(score):
    one = {
      'title': 'a method',
      'scores': {'fd_train': score},
      'training': 100.0,
      'trained': 300.0,
      'selection': 1_000.0,
      'sampling': 14.0,
      'equal_sampling': {'scores': {'fd_train': 2 * score}},
    }
    none = {'title': 'another', 'unfit': 'no labels'}
    return {'methods': {'one': one, 'none': none}}

  text = show.table([seed(1.0), seed(2.0)], 'fd_train')
  assert text.splitlines()[0] == (
    '| | fd_train | training F | search F | sampling F an image'
    ' | fd_train at equal sampling F |'
  )
  assert text.splitlines()[2:] == [
    '| a method | 1.500 ± 0.707 | 100  | 1.2 k | 14.0 | 3.000 ± 1.414 |',
    '| another | n/a: no labels |  |  |  |  |',
  ]
