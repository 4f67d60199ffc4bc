"""The command line: modes, and one clear line for each mistake."""

import dataclasses
import json

import command_line
import numpy as np
from PIL import Image
import pytest
from strangers import tiny as tiny_recipe

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import main
from ddo_jax import rng
from ddo_jax.runtime import checkpoint
from ddo_jax.training import samples
from ddo_jax.training import workspace


def tiny() -> config_lib.Config:
  config = tiny_recipe.get_config()
  for phase in (config.pretrain, config.ddo):
    phase.averages.halflife = (16.0,)
  return config


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  report = main.selfplay(tiny(), folder)
  assert report == folder / 'report.html'
  return folder


def test_selfplay_leaves_summary_and_report(workdir):
  summary = json.loads((workdir / 'summary.json').read_text())
  (row,) = summary['rounds']
  assert row['round'] == 0
  assert row['before'].keys() == row['after'].keys()
  assert {'mean', 'sd'} <= row['after']['fd_train'].keys()
  assert row['promoted']['step'] in (0, 2, 4)
  assert summary['seconds']['total'] > 0
  assert summary['model']['parameters'] > summary['model']['flops'] / 4 > 0
  assert {'rounds', 'model.hidden'} - set(summary['changed']) == {'rounds'}
  assert len(row['sheets']['labels']) == 80
  sheets = {path.stem for path in (workdir / 'round_000').glob('*.png')}
  assert sheets == {'real', 'before', 'after', 'neighbours'}
  assert (workdir / 'report.html').stat().st_size > 10_000


def test_sample_is_repeatable_and_guidance_changes_it(workdir, tmp_path):
  def draw(name, config):
    main.sample(config, workdir, num_samples=20, output=tmp_path / name)
    return (tmp_path / name / 'samples.npz').read_bytes()

  guided = tiny()
  guided.sampler.guidance = 100.0  # the tiny model has learned little
  assert draw('a', tiny()) == draw('b', tiny())
  assert draw('c', guided) != draw('a', tiny())
  assert (tmp_path / 'a' / 'samples.png').exists()


def test_a_discriminator_of_a_round_corrects_its_samples(workdir, tmp_path):
  def corrected(folder):
    config = tiny()
    config.discriminator_network.blocks = 0
    config.discriminator_from = str(folder)
    config.sampler.discriminator = 1000.0  # it has learned little
    return config

  def draw(name, config):
    main.sample(config, workdir, num_samples=20, output=tmp_path / name)
    return (tmp_path / name / 'samples.npz').read_bytes()

  config = tiny()
  config.discriminator_network.blocks = 0
  config.discriminator.images = 4 * 16
  config.discriminator.batch_size = 16
  folder = main.discriminator(config, workdir)
  assert folder.is_relative_to(workdir / 'round_000')
  plain = draw('plain', tiny())
  assert draw('trained', corrected(folder)) != plain
  model = config.discriminator_network.beside(config.model.build())
  checkpoint.save_params(tmp_path / 'fresh', model.init(rng.stream(0)), {})
  assert draw('fresh', corrected(tmp_path / 'fresh')) == plain
  for other in (tmp_path, folder.parent):
    with pytest.raises(errors.UserError, match='holds no params: --mode=discr'):
      draw('none', corrected(other))


def test_classes_and_seeds_are_chosen(workdir, tmp_path):
  def draw(name, **chosen):
    path = main.sample(tiny(), workdir, output=tmp_path / name, **chosen)
    drawn = np.load(tmp_path / name / 'samples.npz')
    return Image.open(path).size, drawn['image'], drawn['label'], drawn['seed']

  size, images, labels, seeds = draw('a', classes=(3, 7), seeds=range(16))
  assert labels.tolist() == [3] * 16 + [7] * 16
  assert seeds.tolist() == [*range(16)] * 2
  assert size == (4 * (16 * 9 + 1), 4 * (2 * 9 + 1))  # a row for each class
  _, some, labels, seeds = draw('b', seeds=(13, 7))
  assert (labels.tolist(), seeds.tolist()) == ([3, 7], [13, 7])
  # The image of a class and a seed is one image, but for what the size of a
  # call rounds.
  wanted = images[[13, 16 + 7]].astype(int)
  assert np.abs(some.astype(int) - wanted).max() <= 1
  assert (images[13] != images[16 + 7]).any()
  with pytest.raises(errors.UserError, match='class 10 is not there; wanted'):
    draw('c', classes=(3, 10))
  with pytest.raises(errors.UserError, match='seed 4294967296 is not there'):
    draw('c', seeds=(2**32,))
  plain = tiny()
  plain.model.num_classes = 0
  plain.pretrain.label_drop = 0.0
  with pytest.raises(errors.UserError, match='the model has no classes'):
    main.sample(plain, workdir, output=tmp_path / 'd', classes=(3,))


def test_params_remember_the_classes_of_their_data(workdir, tmp_path):
  """Of a model with ten classes, trained on data that has two."""
  promoted = workdir / 'round_000' / 'promoted'
  assert checkpoint.load_meta(promoted)['class_shares'] == [1] * 10
  run = workspace.Run(tiny(), workdir)
  params, meta = workspace.load_params(promoted, run.model, run.executor)
  two = tmp_path / 'two'
  checkpoint.save_params(two, params, meta | {'class_shares': [0, 3, 0, 8]})
  main.sample(tiny(), workdir, params=two, num_samples=4, output=tmp_path)
  labels = np.load(tmp_path / 'samples.npz')['label']
  assert labels.tolist() == [1, 3, 1, 3]


@pytest.mark.parametrize(
  'text', ['x', '3,', '5-3', '1,1', '-2', '0-99999999999']
)
def test_numbers_that_are_none(text):
  assert samples.parse_numbers('seeds', '0-2, 7') == (0, 1, 2, 7)
  with pytest.raises(errors.UserError, match='--seeds is'):
    samples.parse_numbers('seeds', text)


def test_a_guide_of_its_own(workdir, tmp_path):
  def draw(name, **changes):
    config = dataclasses.replace(tiny(), **changes)
    config.sampler.guidance = 100.0
    main.sample(config, workdir, num_samples=20, output=tmp_path / name)
    return np.load(tmp_path / name / 'samples.npz')['image']

  params = str(workdir / 'round_000' / 'promoted')
  smaller = dataclasses.replace(tiny().model, hidden=4)
  other = str(tmp_path / 'smaller')
  model = smaller.build()
  checkpoint.save_params(
    tmp_path / 'smaller', model.init(rng.stream(0)), {'config': {}}
  )
  itself = draw('a', guide_from=params)
  unguided = tiny()
  main.sample(unguided, workdir, num_samples=20, output=tmp_path / 'b')
  plain = np.load(tmp_path / 'b' / 'samples.npz')['image']
  # Guided by its own equal, labels and all, a model is what it was.
  np.testing.assert_allclose(itself.astype(int), plain.astype(int), atol=1)
  assert (draw('c', guide_from=other, guide=smaller) != plain).any()
  with pytest.raises(errors.UserError, match='another architecture'):
    draw('d', guide_from=other)
  with pytest.raises(errors.UserError, match='guide_from'):
    draw('e', guide=smaller)


def test_a_round_keeps_where_its_weights_come_from(workdir, tmp_path):
  """And its pool is drawn without the sampler's guidance."""
  origin = {'file': 'edm-x.pkl', 'licence': 'a licence'}
  config = tiny()
  run = workspace.Run(config, workdir)
  params, meta = workspace.load_params(
    workdir / 'pretrain' / 'params', run.model, run.executor
  )
  start = tmp_path / 'start'
  checkpoint.save_params(start, params, meta | {'provenance': origin})
  config.init_from = str(start)
  config.sampler.guidance = 2.0
  config.evaluation.seeds = 1
  main.selfplay(config, tmp_path / 'run')
  folder = tmp_path / 'run' / 'round_000'
  assert checkpoint.load_meta(folder / 'promoted')['provenance'] == origin
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert summary['rounds'][0]['provenance'] == origin
  assert 'a licence' in (tmp_path / 'run' / 'report.html').read_text()
  pool = json.loads((folder / 'fakes' / 'pool.json').read_text())
  assert pool['provenance'] == origin
  assert pool['sampler']['guidance'] == 1.0


def test_evaluate_agrees_with_the_round(workdir):
  result = main.evaluate(tiny(), workdir)
  summary = json.loads((workdir / 'summary.json').read_text())
  after = summary['rounds'][0]['after']
  assert result['scores']['fd_train'] == after['fd_train']
  assert json.loads((workdir / 'eval.json').read_text()) == result


def test_mistakes_on_the_command_line(tmp_path):
  recipe = '--config=configs/digits.py'
  workdir = f'--workdir={tmp_path / "run"}'
  assert '--workdir' in command_line.fatal(recipe)
  line = command_line.fatal(recipe, workdir, '--config.ddo.objective.bta=1')
  assert 'config.ddo.objective (DDO)' in line
  assert "'bta'" in line
  assert 'beta' in line
  assert 'did you mean beta?' in line
  line = command_line.fatal(recipe, workdir, '--config.ddo.objective=gan')
  assert 'FDivergence' in line
  line = command_line.fatal(recipe, workdir, '--num_samples=3')
  assert 'selfplay does not read --num_samples' in line
  assert '--mode=fid_stats' in command_line.fatal(recipe, '--mode=reference')
  line = command_line.fatal(recipe, workdir, '--config.ddo.objective.alpha=0')
  assert 'config.ddo.objective.alpha' in line
  line = command_line.fatal(recipe, workdir, '--config.ddo.beta=0.1')
  assert 'now --config.ddo.objective.beta' in line
  assert 'unexpected' in command_line.fatal(recipe, workdir, 'ddo.alpha=1')
  line = command_line.fatal(recipe, workdir, '--config.sampler=hein')
  assert 'did you mean Heun?' in line
  line = command_line.fatal(recipe, workdir, '--config.ddo.images=1.5e0')
  assert '1.5e0 is no whole number' in line
  line = command_line.fatal('--config=configs/digit.py', workdir)
  assert '--config=digits?' in line
  line = command_line.fatal(recipe, workdir, '--mode=sample')
  assert 'finished stage' in line
  assert '--source and --output' in command_line.fatal('--mode=convert')
  (tmp_path / 'link').symlink_to('nowhere')
  for flags in (
    (recipe, f'--workdir={tmp_path}/link'),
    (recipe, workdir, '--mode=sample', f'--output={tmp_path}/link/x'),
    ('--mode=report', f'--workdir={tmp_path}/link'),
  ):
    assert 'is a link to nowhere' in command_line.fatal(*flags)
  assert not (tmp_path / 'run').exists()


def test_a_recipe_beside_its_own_module(tmp_path):
  (tmp_path / 'mine_to_import.py').write_text('IMAGES = 4096\n')
  recipe = tmp_path / 'recipe.py'
  recipe.write_text(
    'import mine_to_import\n'
    'from ddo_jax.configs import digits\n'
    'def get_config():\n'
    '  config = digits.get_config()\n'
    '  config.pretrain.images = mine_to_import.IMAGES\n'
    '  return config\n'
  )
  flags = (f'--config={recipe}', f'--workdir={tmp_path / "run"}')
  status, printed = command_line.run(
    *flags, '--mode=check', '--config.ddo.images=1.024e3'
  )
  assert status == 0, printed
  assert 'pretrain 16 steps × 256 images; ddo 4 steps' in printed
  assert not (tmp_path / 'run').exists()
  status, printed = command_line.run(
    *flags, '--mode=check', '--config.model.network=a', '--config.seed=-1'
  )
  lines = [x for x in printed.splitlines() if x.startswith('FATAL ')]
  assert status == 1 and len(lines) == 2, printed
  recipe.write_text('def get_config():\n  x = 1\n  return x.y\n')
  line = command_line.fatal(*flags)
  assert f"{recipe}, line 3: AttributeError: 'int' object has no" in line
  recipe.write_text('def get_config():\n  return int("a")\n')
  assert 'line 2: ValueError: invalid literal' in command_line.fatal(*flags)
