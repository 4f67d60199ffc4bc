"""Scores under a protocol, end to end, with stand-ins for the big networks."""

import dataclasses
import io
import json
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import several

from configs import digits
from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import main
from ddo_jax import rng
from ddo_jax.data import image_writer
from ddo_jax.data import sources
from ddo_jax.evaluation import evaluator as evaluator_lib
from ddo_jax.evaluation import features
from ddo_jax.evaluation import fidelity
from ddo_jax.evaluation import measure
from ddo_jax.evaluation import protocols
from ddo_jax.evaluation import score
from ddo_jax.evaluation.metrics import fd_ratio
from ddo_jax.evaluation.metrics import frechet
from ddo_jax.evaluation.metrics import inception_score
from ddo_jax.evaluation.metrics import mind
from ddo_jax.evaluation.metrics import prdc
from ddo_jax.evaluation.networks import inception
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.training import workspace
from ddo_jax.weights import fid_stats
from ddo_jax.weights import inception as inception_weights

SHAPE = (4, 4, 3)
WIDTH = 6
COUNT = 150
SEVERAL = 2_500  # images that two processes share
TINY = dataclasses.replace(
  protocols.get('adm-img256'),
  name='tiny',
  image_shape=SHAPE,
  num_images=COUNT,
  num_blocks=3,
  fid_stats='tiny.npz',
  printed='minimum',
  features=('fid',),
)


def stand_in(patch):
  """Puts a projection in Inception's place; returns its matrix."""
  draw = np.random.default_rng(0)
  matrix = draw.normal(size=(48, WIDTH + 5)).astype(np.float32) / 500

  def apply(params, images, rule):
    assert rule == 'tf1'
    x = images.reshape(len(images), -1).astype(jnp.float32) @ params['matrix']
    x = jnp.tanh(x)
    taps = dict.fromkeys(inception.Taps._fields)
    taps |= {'features': x[:, :WIDTH], 'logits_unbiased': x[:, WIDTH:]}
    return inception.Taps(**taps)

  origin = {'file': 'stand-in', 'sha256': 'f' * 64}
  patch.setattr(inception, 'apply', apply)
  patch.setattr(inception, 'CLASSES', 5)
  patch.setattr(
    inception_weights, 'load', lambda path: ({'matrix': matrix}, origin)
  )
  patch.setitem(fid_stats.WIDTHS, 'fid', WIDTH)
  return matrix


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """A protocol of tiny images, measured by a projection."""
  monkeypatch.setitem(protocols.PROTOCOLS, 'tiny', TINY)
  return stand_in(monkeypatch)


def images_of(count=COUNT, seed=0):
  draw = np.random.default_rng(seed)
  return draw.integers(0, 256, (count, *SHAPE), np.uint8)


def save_png(path, image):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(image).save(path)


def score_images(config, path, output):
  return score.score_images(
    config.evaluation, config.seed, config.data, path, output
  )


def make_config(tmp_path, count=COUNT):
  """A config whose data are `images_of(count)`."""
  np.savez(
    tmp_path / 'data.npz', image=images_of(count), label=np.arange(count) % 3
  )
  config = digits.get_config()
  config.data.source = str(tmp_path / 'data.npz')
  config.model.image_shape = SHAPE
  config.model.num_classes = 3
  config.model.hidden = 8
  config.model.pixel_values = 256
  config.sampler.num_steps = 2
  config.executor.sample_batch = 40
  return config


@pytest.fixture
def settings(tmp_path):
  """A config whose fid_stats are those of `images_of()`."""
  config = make_config(tmp_path)
  config.evaluation = config_lib.Evaluation(
    protocol='tiny',
    metric='fid',
    selection_samples=80,
    seeds=2,  # the protocol has three
    fid_stats=str(tmp_path / 'fid.npz'),
  )
  score.write_fid_stats(config.evaluation, config.data, tmp_path)
  return config


def test_a_set_is_at_no_distance_from_itself(settings, tmp_path):
  np.savez(tmp_path / 'same.npz', arr_0=images_of())
  result = score_images(settings, tmp_path / 'same.npz', tmp_path)
  assert abs(result['scores']['fid']['mean']) < 1e-9
  assert json.loads((tmp_path / 'eval.json').read_text()) == result
  assert result['protocol']['name'] == 'tiny'
  assert result['files']['inception']['sha256'] == 'f' * 64
  assert result['files']['fid_stats']['data'].endswith('data.npz')
  assert len(result['files']['fid_stats']['sha256']) == 64
  assert result['notes'] == [
    '1 set(s) of images, where protocol tiny prints the minimum of 3'
  ]
  for estimate in ('jackknife', 'limit'):
    assert result['uncertainty']['fid'][estimate]['label']
  np.savez(tmp_path / 'other.npz', arr_0=images_of(seed=1))
  other = score_images(settings, tmp_path / 'other.npz', tmp_path)
  assert other['scores']['fid']['mean'] > 1e-4
  gap = score.compare(other, result)
  assert gap['fid'] == pytest.approx(other['scores']['fid']['mean'], abs=1e-9)
  changed = json.loads(json.dumps(result))
  changed['protocol']['labels'] = 'random'
  with pytest.raises(errors.UserError, match='labels balanced and random'):
    score.compare(other, changed)
  with pytest.raises(errors.UserError, match='without a protocol'):
    score.compare(other, {'scores': {}})
  for name, value in (
    ('files', []),
    ('samples', None),
    ('scores', {'fid': 1}),
    ('scores', {'fid': {'mean': 'low'}}),
    ('protocol', [1]),
  ):
    with pytest.raises(errors.UserError) as caught:
      score.compare(other, result | {name: value})
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_files_score_as_arrays(settings, tmp_path, kind):
  writer = image_writer.ImageWriter(tmp_path / 'set')
  writer.add(np.arange(COUNT), images_of(), np.arange(COUNT) % 3)
  writer.close()
  path = tmp_path / 'set'
  if kind == 'zip':
    with zipfile.ZipFile(tmp_path / 'set.zip', 'w') as archive:
      for file in path.rglob('*.*'):
        archive.write(file, file.relative_to(path))
    path = tmp_path / 'set.zip'
  result = score_images(settings, path, tmp_path)
  assert abs(result['scores']['fid']['mean']) < 1e-9


def test_features_go_on_where_they_were_cut_off(settings, small, tmp_path):
  extractor = features.Extractor(settings.evaluation)
  asked = []

  def chunks(ids, stop=None):
    asked.append(ids)
    for start in range(0, len(ids), 13):
      if stop is not None and start >= stop:
        raise KeyboardInterrupt
      yield images_of()[ids[start : start + 13]]

  whole = extractor.rows(chunks, COUNT)
  wanted = np.tanh(images_of().reshape(COUNT, -1) @ small)[:, :WIDTH]
  np.testing.assert_allclose(whole['fid'], wanted, atol=1e-5)
  options = {'folder': tmp_path / 'kept', 'devices': jax.local_devices()[:1]}
  with pytest.raises(KeyboardInterrupt):
    extractor.rows(lambda ids: chunks(ids, 140), COUNT, **options)
  rest = extractor.rows(chunks, COUNT, **options)
  assert 0 < len(asked[-1]) < COUNT
  for kind, rows in whole.items():
    np.testing.assert_array_equal(rest[kind], rows)
    assert np.isfinite(rows).all()


class Drawn:
  """In a generator's place: an image is its id and its label."""

  def __init__(self, batch):
    self.batch = batch
    self.model = digits.get_config().model.build()

  def stream(self, params, key, ids, labels, set_size):
    assert set_size >= len(ids)
    for start in range(0, len(ids), self.batch):
      part = slice(start, start + self.batch)
      images = np.stack([images_of(1, int(i))[0] for i in ids[part]])
      images[:, 0, 0, 0] = labels[part]
      yield images

  def render(self, stored):
    return stored


def test_drawn_images_do_not_depend_on_the_batch(settings):
  settings.evaluation.real_images = 100
  run = workspace.Run(settings, None)
  evaluator = run.evaluator

  def scores(batch, block):
    ids = evaluator.ids(block, 90)
    drawn = measure.draw(evaluator, Drawn(batch), None, None, ids)
    return evaluator.scores(*drawn)

  first = scores(7, 1)
  assert first == scores(64, 1)
  assert first != scores(64, 0)
  wanted = {'fid', 'inception_score', 'kid', 'precision', 'recall'}
  assert first.keys() == wanted
  kept = {}

  def keep(ids, images, labels):
    kept.update(zip(ids.tolist(), labels.tolist(), strict=True))
    np.testing.assert_array_equal(images[:, 0, 0, 0], labels)

  measure.draw(evaluator, Drawn(7), None, None, np.arange(COUNT), keep=keep)
  assert kept == {i: i % 10 for i in range(COUNT)}


def test_scores_that_are_asked_for(settings):
  """The limit of FID, and mind, which compares with real images."""
  settings.evaluation.metric = 'fid_inf'
  asked = ('mind', 'fd_ratio', 'density', 'coverage')
  settings.evaluation.extra = asked
  settings.data.holdout = 0.2
  with pytest.raises(errors.UserError, match='real_images is 0'):
    fidelity.FidelityEvaluator(settings.evaluation, 0)
  settings.evaluation.real_images = 100
  evaluator = workspace.Run(settings, None).evaluator
  rows, _ = measure.draw(evaluator, Drawn(64), None, None, np.arange(90))
  scores = evaluator.scores(rows)
  evaluator._extra = ()
  test, evaluator._test = evaluator._test, None
  plain = evaluator.scores(rows)
  limit = evaluator.uncertainty(rows)['fid']['limit']['value']
  assert scores['fid_inf'] == limit != scores['fid']
  real = evaluator._real['fid']
  assert scores['mind'] == mind.mind(real, rows['fid'])
  shares = prdc.density_coverage(real, rows['fid'], k=5)
  assert (scores['density'], scores['coverage']) == shares
  chunks = features.of_source(test)
  held_out = evaluator.extractor.rows(chunks, len(test), test.name)
  assert len(held_out['fid']) == 30
  ratio = fd_ratio.FdRatio(held_out['fid'], evaluator._moments['fid'])
  assert scores['fd_ratio'] == ratio(rows['fid'])
  evaluator._test = test
  assert 'fd_ratio: of fid, of 30 images a set' in evaluator.notes(90, 3)
  assert scores.keys() - plain.keys() == {'fid_inf', *asked}


def test_more_blocks_than_are_printed_are_told_of(settings, monkeypatch):
  single = dataclasses.replace(TINY, printed='single', num_blocks=1)
  monkeypatch.setitem(protocols.PROTOCOLS, 'tiny', single)
  evaluator = fidelity.FidelityEvaluator(settings.evaluation, 0)
  (line,) = evaluator.notes(COUNT, 3)
  assert line.startswith('the mean of 3 sets of images, where protocol tiny')
  assert not evaluator.notes(COUNT, 1)


@pytest.fixture
def run_folder(settings, tmp_path):
  model = settings.model.build()
  params = jax.jit(model.init)(rng.stream(0))
  checkpoint.save_params(tmp_path / 'params', params, {'config': {}})
  return tmp_path


def test_params_are_scored_and_their_images_written(settings, run_folder):
  def evaluate_run(save_images=None):
    return main.evaluate(
      settings,
      run_folder / 'run',
      params=run_folder / 'params',
      output=run_folder / 'out',
      save_images=save_images,
    )

  result = evaluate_run()
  values = result['scores']['fid']['values']
  assert len(values) == 2
  assert values[0] != values[1]
  assert result['scores']['fid']['minimum'] == min(values)
  assert result['ids'] == [0, 2 * COUNT]
  assert not list((run_folder / 'out').glob('features_*'))
  assert (run_folder / 'out' / 'eval.json').exists()
  for name in ('images', 'images.npz'):
    again = evaluate_run(save_images=run_folder / name)
    assert again['scores'] == result['scores']
    written = score_images(settings, run_folder / name, run_folder / 'out')
    # The same images; the order of an .npz is shuffled.
    assert written['scores']['fid']['mean'] == pytest.approx(
      values[0], abs=1e-12
    )
  with np.load(run_folder / 'images.npz') as arrays:
    assert (arrays['arr_1'][:20] != np.arange(20) % 3).any()
    assert np.bincount(arrays['arr_1']).tolist() == [50, 50, 50]


def test_features_of_another_seed_are_not_gone_on_with(
  settings, run_folder, monkeypatch
):
  def scores(output):
    result = main.evaluate(
      settings,
      run_folder / 'run',
      params=run_folder / 'params',
      output=run_folder / output,
    )
    return result['scores']

  def cut_off(evaluator, rows, labels, from_file):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(fidelity.FidelityEvaluator, 'scores', cut_off)
    with pytest.raises(KeyboardInterrupt):
      scores('out')
  assert list((run_folder / 'out').glob('features_*/block_0/fid.rows'))
  settings.seed = 1
  assert scores('out') == scores('fresh')


def test_features_are_kept_by_what_files_hold(settings, run_folder):
  """A guide of other weights under the same name makes other features."""
  settings.guide_from = str(run_folder / 'params')

  def digest():
    return score._digest(workspace.Run(settings, run_folder / 'run'), {})

  before = digest()
  assert digest() == before
  model = settings.model.build()
  params = jax.jit(model.init)(rng.stream(1))
  checkpoint.save_params(run_folder / 'params', params, {'config': {}})
  assert digest() != before


def test_a_round_is_selected_and_reported_by_the_protocol(settings, run_folder):
  run = workspace.Run(settings, run_folder / 'run')
  params, _ = workspace.load_params(
    run_folder / 'params', run.model, run.executor
  )
  evaluation = settings.evaluation
  arguments = (run.evaluator, run.generator(), params, evaluation, 0)
  assert measure.selection_scores(*arguments)['fid'] > 0
  report = measure.report_scores(*arguments)
  assert report['fid']['sd'] > 0
  assert report['fid']['headline'] == 'minimum'
  assert report['inception_score']['headline'] == 'mean'
  assert measure.num_images(run.evaluator, evaluation) == COUNT
  assert measure.num_blocks(run.evaluator, evaluation) == 2
  evaluation.samples = 7
  evaluation.seeds = 0
  assert measure.num_images(run.evaluator, evaluation) == 7
  assert measure.num_blocks(run.evaluator, evaluation) == 3


def encoded(image, kind):
  file = io.BytesIO()
  Image.fromarray(image).save(file, kind)
  return file.getvalue()


def test_mistakes(settings, tmp_path, monkeypatch):
  def refusal(path, config=settings):
    with pytest.raises(errors.UserError) as error:
      score_images(config, path, tmp_path)
    assert '\n' not in str(error.value)
    return str(error.value)

  np.savez(tmp_path / 'a.npz', arr_0=images_of() / 255)
  assert 'float64' in refusal(tmp_path / 'a.npz')
  np.savez(tmp_path / 'a.npz', x=images_of())
  assert 'has no array `image` (or arr_0)' in refusal(tmp_path / 'a.npz')
  np.savez(tmp_path / 'a.npz', arr_0=np.zeros((9, 5, 4, 3), np.uint8))
  assert 'measures uint8 [4, 4, 3]' in refusal(tmp_path / 'a.npz')
  assert 'no images at' in refusal(tmp_path / 'lost')
  (tmp_path / 'set').mkdir()
  (tmp_path / 'set' / 'a.jpg').write_bytes(encoded(images_of()[0], 'JPEG'))
  assert 'a.jpg: compression with loss' in refusal(tmp_path / 'set')
  (tmp_path / 'set' / 'a.jpg').unlink()
  whole = encoded(images_of()[0], 'PNG')
  (tmp_path / 'set' / 'a.png').write_bytes(whole)
  (tmp_path / 'set' / 'b.png').write_bytes(whole[:60])
  assert 'b.png' in refusal(tmp_path / 'set')
  np.savez(tmp_path / 'few.npz', arr_0=images_of(5))
  notes = score_images(settings, tmp_path / 'few.npz', tmp_path)['notes']
  assert 'not to be compared' in notes[0]
  assert 'rank-deficient' in notes[1]
  settings.evaluation.features = ('sfid',)
  assert "some of ('fid',)" in refusal(tmp_path / 'few.npz')
  settings.evaluation.features = ()
  settings.evaluation.protocol = 'edm'
  assert "is 'edm'; it must be one of" in refusal(tmp_path / 'few.npz')
  settings.evaluation.protocol = 'tiny'
  settings.evaluation.fid_stats = str(tmp_path / 'lost.npz')
  assert 'lost.npz' in refusal(tmp_path / 'few.npz')


def test_training_images_of_another_shape_are_refused_at_once(settings):
  """The pool would be drawn before a sample is measured."""

  def open_evaluator(images):
    labels = np.zeros(len(images), np.int32)
    train = sources.ArraySource('train', images, labels)
    return measure.open_evaluator(
      settings.evaluation, seed=0, train=train, open_test=None
    )

  with pytest.raises(errors.UserError, match=r'images are uint8 \[5, 4, 3\]'):
    open_evaluator(np.zeros((9, 5, 4, 3), np.uint8))
  open_evaluator(images_of())
  # What latents decode to is known only when it is seen.
  open_evaluator(np.zeros((9, 2, 2, 8), np.float32))


def test_published_files_are_found_where_they_were(settings, monkeypatch):
  path = pathlib.Path(settings.evaluation.fid_stats)
  settings.evaluation.fid_stats = ''
  monkeypatch.setenv('HOME', str(path.parent))
  cache = path.parent / '.cache' / 'ddo_jax'

  def open_evaluator():
    return measure.open_evaluator(
      settings.evaluation, seed=0, train=None, open_test=None
    )

  with pytest.raises(errors.UserError, match=r'fid_stats/tiny\.npz'):
    open_evaluator()
  for folder in ('references', 'fid_stats'):  # as earlier versions had it first
    (cache / folder).mkdir(parents=True)
    path.rename(cache / folder / 'tiny.npz')
    path = cache / folder / 'tiny.npz'
    open_evaluator()


def test_weights_that_are_not_there(settings, tmp_path, monkeypatch):
  monkeypatch.undo()
  monkeypatch.setitem(protocols.PROTOCOLS, 'tiny', TINY)
  monkeypatch.setenv('HOME', str(tmp_path))
  with pytest.raises(errors.UserError, match=r'no network to .*pt_inception'):
    features.Extractor(settings.evaluation)


def test_the_order_of_the_inception_score(settings, tmp_path):
  """A shuffled file keeps its order, as OpenAI's evaluator takes it."""
  evaluator = fidelity.FidelityEvaluator(settings.evaluation, seed=0)
  ranked = np.repeat(np.eye(5, dtype=np.float32) * 9, 2_000, axis=0)
  shuffled = np.random.default_rng(1).permutation(ranked)
  features_of = np.random.default_rng(0).normal(size=(10_000, WIDTH))

  def measured(logits, from_file):
    rows = {'fid': np.float32(features_of), features.LOGITS: logits}
    scores = evaluator.scores(rows, from_file=from_file)
    lines = evaluator.notes(10_000, 1, rows if from_file else None)
    (note,) = (line for line in lines if 'inception_score' in line)
    return scores['inception_score'], note

  permuted = inception_score.permutation(10_000)
  score, note = measured(shuffled, True)
  assert score == inception_score.openai(shuffled).mean
  assert "in the file's order" in note
  orders = []

  def spy(evaluator, logits, from_file):
    orders.append(from_file)
    return 1.0

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(fidelity.FidelityEvaluator, '_inception_score', spy)
    np.savez(tmp_path / 'same.npz', arr_0=images_of())
    score_images(settings, tmp_path / 'same.npz', tmp_path)
  assert orders == [True]
  score, note = measured(shuffled, False)
  assert score == inception_score.openai(shuffled[permuted]).mean
  assert 'fixed permutation of the images' in note
  score, note = measured(ranked, True)
  assert score == inception_score.openai(ranked[permuted]).mean
  assert 'goes by class' in note


@pytest.fixture
def own(settings, tmp_path):
  """A config under a protocol of its own: grey images, of uneven classes."""
  grey = images_of()[..., :1]
  path = tmp_path / 'grey.npz'
  labels = np.repeat([0, 1, 2], [90, 0, 60])
  np.savez(path, arr_0=grey, arr_1=labels)  # as OpenAI's files name them
  settings.data.source = str(path)
  settings.evaluation = config_lib.Evaluation(samples=120, seeds=2)
  main.fid_stats(settings, tmp_path / 'own')
  settings.evaluation.protocol = str(tmp_path / 'own')
  settings.evaluation.metric = 'fid'
  settings.model.image_shape = (4, 4, 1)
  return settings


def test_a_protocol_of_ones_own(own, tmp_path):
  recorded = json.loads((tmp_path / 'own' / 'protocol.json').read_text())
  assert recorded['name'] == 'grey-4x4'
  assert recorded['image_shape'] == [4, 4, 1]
  assert (recorded['num_images'], recorded['num_blocks']) == (120, 2)
  assert (recorded['labels'], recorded['class_shares']) == ('shares', [3, 0, 2])
  assert recorded['data'] == own.data.source
  result = score_images(own, tmp_path / 'grey.npz', tmp_path)
  assert abs(result['scores']['fid']['mean']) < 1e-9
  assert (
    'grey images are measured as RGB of three equal channels'
    in (result['notes'])
  )
  run = workspace.Run(own, tmp_path / 'run')
  assert run.label_rule.startswith('2 classes as often as in the training')
  for labels in (
    run.evaluator.labels(np.arange(120), 3),
    run.shares.labels(np.arange(120)),
  ):
    assert np.bincount(labels).tolist() == [72, 0, 48]
  assert run.evaluator.minima == ()  # the mean is printed
  # A folder that was moved is the same protocol; another class rule is not.
  moved = tmp_path / 'moved'
  (tmp_path / 'own').rename(moved)
  own.evaluation.protocol = str(moved / 'protocol.json')
  again = score_images(own, tmp_path / 'grey.npz', tmp_path)
  assert score.compare(result, again) == {'fid': 0}
  again['protocol']['class_shares'] = [1, 1, 1]
  with pytest.raises(errors.UserError, match='class_shares'):
    score.compare(result, again)
  with pytest.raises(errors.UserError, match='a protocol of images like'):
    score_images(own, tmp_path / 'data.npz', tmp_path)
  (moved / 'protocol.json').write_text('{"name": "x"}')
  with pytest.raises(errors.UserError, match='is damaged: write'):
    evaluator_lib.check(own.evaluation)
  (moved / 'manifest.json').unlink()
  with pytest.raises(errors.UserError, match='is no protocol'):
    evaluator_lib.check(own.evaluation)


def test_labels_of_a_protocol_of_ones_own(own, tmp_path):
  own.labels = 'balanced'
  own.evaluation.protocol = ''
  main.fid_stats(own, tmp_path / 'equal')
  protocol = protocols.get(str(tmp_path / 'equal'))
  ids = np.arange(6)
  assert protocol.classes(ids, 3, seed=0).tolist() == [0, 2, 0, 2, 0, 2]
  assert not protocol.classes(ids, 0, seed=0).any()
  with pytest.raises(errors.UserError, match='3 classes and the model has 2'):
    protocol.classes(ids, 2, seed=0)
  np.savez(own.data.source, image=images_of())  # without labels
  main.fid_stats(own, tmp_path / 'plain')
  assert protocols.get(str(tmp_path / 'plain')).labels == 'random'


def score_under_its_own(folder, params):
  """Makes a protocol of a data set, and scores params under it.

  Returns:
    How many of the set's images were read for the protocol, by this process.
  """
  config = make_config(folder, SEVERAL)
  config.executor.sample_batch = 400
  config.evaluation = config_lib.Evaluation(samples=SEVERAL)
  read = sources.ArraySource.read
  counts = []

  def counted(source, index):
    counts.append(len(index))
    return read(source, index)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sources.ArraySource, 'read', counted)
    main.fid_stats(config, folder / 'own')
  config.evaluation.protocol = str(folder / 'own')
  config.evaluation.metric = 'fid'
  config.evaluation.real_images = 500
  main.evaluate(config, folder / 'run', params, folder / 'out')
  return sum(counts)


def test_law_3_two_processes_score_as_one(run_folder):
  """Each reads its share of a data set, and measures its share of samples."""
  params = run_folder / 'params'
  one, two = run_folder / 'one', run_folder / 'two'
  one.mkdir()
  two.mkdir()
  assert score_under_its_own(one, params) == SEVERAL
  scene = {'folder': str(two), 'params': str(params)}
  played = several.play(2, 1, ('score', scene))
  # They take turns at 1,024 images.
  shares = (1_024 + 452, 1_024)
  for (status, printed), share in zip(played, shares, strict=True):
    assert status == 0, printed
    assert f'read {share}\n' in printed, printed
  moments = [fid_stats.read(folder / 'own').of('fid') for folder in (one, two)]
  assert moments[0].n == moments[1].n == SEVERAL
  for name in ('mean', 'covariance'):
    np.testing.assert_allclose(
      *(getattr(each, name) for each in moments), rtol=1e-5, atol=1e-7
    )
  left = [
    json.loads((folder / 'out' / 'eval.json').read_text())
    for folder in (one, two)
  ]
  assert left[0]['scores'].keys() == left[1]['scores'].keys()
  assert {'fid', 'kid', 'precision', 'recall'} == left[0]['scores'].keys()
  for name, scores in left[0]['scores'].items():
    # A pixel between two levels may be rounded either way.
    values = left[1]['scores'][name]['values']
    np.testing.assert_allclose(values, scores['values'], rtol=1e-3, atol=1e-4)
  assert 'uncertainty' in left[1]


def test_few_pixel_values_and_grey_images_are_measured_as_they_look(settings):
  protocol = dataclasses.replace(TINY, pixel_values=17)
  few = images_of() % 17
  bright = (few.astype(int) * 255 // 16).astype(np.uint8)

  def rows(protocol, images):
    extractor = features.Extractor(settings.evaluation, protocol)
    return extractor.rows(lambda ids: [images[ids]], COUNT)['fid']

  np.testing.assert_array_equal(rows(protocol, few), rows(TINY, bright))
  protocol = dataclasses.replace(TINY, image_shape=(4, 4, 1))
  grey = images_of()[..., :1]
  np.testing.assert_array_equal(
    rows(protocol, grey), rows(TINY, grey.repeat(3, axis=-1))
  )


def test_devices_agree(settings):
  """One and eight: statistics to the bit on CPU."""
  assert devices_lib.Executor(settings.executor).num_devices == 8
  extractor = features.Extractor(settings.evaluation)

  def chunks(ids):
    return [images_of(300)[ids]]

  eight = extractor.rows(chunks, 300)['fid']
  one = extractor.rows(chunks, 300, devices=jax.local_devices()[:1])['fid']
  np.testing.assert_array_equal(one, eight)
  np.testing.assert_array_equal(
    frechet.Statistics.of(one).outer, frechet.Statistics.of(eight).outer
  )
