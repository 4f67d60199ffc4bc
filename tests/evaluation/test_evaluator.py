"""The contract of the evaluators, and the settings that choose one."""

import dataclasses
import inspect
import itertools
import json

import numpy as np
import pytest

from configs import digits
from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import main
from ddo_jax.data import image_writer
from ddo_jax.data import sources
from ddo_jax.evaluation import classifier_evaluator
from ddo_jax.evaluation import evaluator as evaluator_lib
from ddo_jax.evaluation import fidelity
from ddo_jax.evaluation import measure
from ddo_jax.evaluation import protocols
from ddo_jax.evaluation import rows as rows_lib
from ddo_jax.evaluation import score
from ddo_jax.evaluation.metrics import fd_ratio
from ddo_jax.evaluation.metrics import meanings
from ddo_jax.evaluation.metrics import memorisation
from ddo_jax.evaluation.metrics import mind
from ddo_jax.evaluation.metrics import prdc
from ddo_jax.evaluation.networks import classifier

PROTOCOLS = ('', *protocols.PROTOCOLS)
FEATURES = ('fid', 'sfid', 'fd_dinov2')
METRICS = (*meanings.MEANINGS, 'fid50k', '')
# What each protocol's file of statistics has.
KNOWN = {
  '': (),
  'edm-cifar10': ('fid',),
  'edm2-img64': ('fid', 'fd_dinov2'),
  'edm2-img512': ('fid', 'fd_dinov2'),
  'adm-img256': ('fid', 'sfid'),
}


def subsets(values):
  for size in range(len(values) + 1):
    yield from itertools.combinations(values, size)


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_every_combination_is_accepted_or_refused_at_once(protocol):
  for metric, features in itertools.product(METRICS, subsets(FEATURES)):
    settings = evaluator_lib.Evaluation(
      protocol=protocol, metric=metric, features=features
    )
    measured = features or KNOWN[protocol]
    if not protocol:
      measured = ('fd_train', 'fd_test')
    extra = tuple(f'{name}_inf' for name in measured)
    if not protocol or 'fid' in measured:
      extra += ('mind',)
    if not protocol or {'fid', 'fd_dinov2'} & set(measured):
      extra += ('fd_ratio',)
    measured += extra
    if not set(features) <= set(KNOWN[protocol]):
      wrong = ('evaluation.features', features)
    elif metric not in measured:
      wrong = ('evaluation.metric', metric)
    else:
      evaluator_lib.check(settings)
      continue
    with pytest.raises(errors.UserError) as caught:
      evaluator_lib.check(settings)
    line = str(caught.value)
    field, value = wrong
    assert line.startswith(f'config.{field} is {value!r}; it must be ')
    choices = measured if field == 'evaluation.metric' else KNOWN[protocol]
    assert all(repr(choice) in line for choice in choices)
    assert '\n' not in line


def test_the_run_checks_them_before_anything_is_drawn(tmp_path):
  config = digits.get_config()
  config.rounds = 0
  config.pretrain.stored = config.pretrain.batch_size
  config.evaluation.protocol = 'edm-cifar10'
  config.evaluation.metric = 'sfid'
  with pytest.raises(errors.UserError, match=r"evaluation.metric is 'sfid'"):
    main.selfplay(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
  config.evaluation.protocol = 'edm'
  with pytest.raises(errors.UserError, match=r'evaluation\.protocol is'):
    main.selfplay(config, tmp_path / 'run')


def test_only_files_are_free_to_change_inside_a_run():
  free = [
    field.name
    for field in dataclasses.fields(evaluator_lib.Evaluation)
    if not field.metadata.get('science', True)
  ]
  assert free == ['fid_stats', 'inception', 'dinov2']
  assert config_lib.Evaluation is evaluator_lib.Evaluation


@pytest.mark.parametrize(
  'implementation',
  [classifier_evaluator.ClassifierEvaluator, fidelity.FidelityEvaluator],
)
def test_both_implement_the_contract(implementation):
  contract = evaluator_lib.Evaluator
  for name, member in inspect.getmembers(contract, inspect.isfunction):
    if not name.startswith('_'):
      ours = inspect.signature(getattr(implementation, name))
      assert ours == inspect.signature(member), name


# --- The classifier's evaluator -----------------------------------------------


def make_source(seed, count, side=6):
  """Images whose brightness tells the class."""
  random = np.random.default_rng(seed)
  labels = np.arange(count, dtype=np.int32) % 3
  images = random.integers(0, 60, (count, side, side, 1), np.uint8)
  images += (80 * labels).astype(np.uint8)[:, None, None, None]
  return sources.ArraySource(f'set {seed}', images, labels, num_classes=3)


@pytest.fixture(scope='module', autouse=True)
def few_steps():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(classifier, '_STEPS', 100)
    yield


@pytest.fixture(scope='module')
def evaluator(few_steps):
  return measure.open_evaluator(
    evaluator_lib.Evaluation(),
    seed=0,
    train=make_source(0, 400),
    open_test=lambda: make_source(1, 200),
  )


def images_of(source, sizes=(13,)):
  """The images in chunks of these sizes, in turn."""

  def images(ids):
    turns = itertools.cycle(sizes)
    while len(ids):
      size = next(turns)
      yield source.stored[ids[:size]]
      ids = ids[size:]

  return images


def test_scores_of_a_classifier(evaluator):
  source = make_source(2, 300)
  rows, labels = measure.read(evaluator, source)
  scores = evaluator.scores(rows, labels)
  assert scores.keys() == {
    'fd_train',
    'fd_test',
    'accuracy',
    'precision',
    'recall',
    'nn_ratio',
    'memorised',
  }
  assert scores['accuracy'] > 0.9
  assert evaluator.scores(rows, (labels + 1) % 3)['accuracy'] < 0.1
  assert 'accuracy' not in evaluator.scores(rows)
  assert scores.keys() <= meanings.MEANINGS.keys()
  train = make_source(0, 400)
  distance = memorisation.nearest_distance(source.stored, train.stored)
  np.testing.assert_array_equal(rows['nearest'][:, 0], distance)
  copies, _ = measure.read(evaluator, train)
  assert evaluator.scores(copies)['memorised'] == 1
  assert abs(evaluator.scores(copies)['fd_train']) < 1e-9


def test_scores_that_are_asked_for(evaluator, monkeypatch):
  """They stand beside the others, which stay as they are."""
  rows, labels = measure.read(evaluator, make_source(2, 300))
  plain = evaluator.scores(rows, labels)
  others = ('fd_ratio', 'density')
  for metric, extra in (
    ('fd_train', ('fd_test_inf', 'mind', *others)),
    ('mind', ('fd_test_inf', *others)),
  ):
    settings = evaluator_lib.Evaluation(
      metric=metric, extra=extra, selection_samples=300
    )
    evaluator_lib.check(settings)
    asked = evaluator_lib.extras(settings)
    monkeypatch.setattr(evaluator, '_extra', asked)
    scores = evaluator.scores(rows, labels)
    added = {'fd_test_inf', 'mind', *others}
    assert scores.keys() - plain.keys() == added
    assert plain.items() <= scores.items()
    assert scores.keys() <= meanings.MEANINGS.keys()
    limit = evaluator.uncertainty(rows)['fd_test']['limit']['value']
    assert scores['fd_test_inf'] == limit
    features = evaluator._fitted.features
    assert scores['mind'] == mind.mind(features, rows['features'])
    real = evaluator._fitted.statistics['fd_train']
    held_out = evaluator._fitted.held_out_features
    ratio = fd_ratio.FdRatio(held_out, real)
    assert scores['fd_ratio'] == ratio(rows['features'])
    shares = prdc.density_coverage(features, rows['features'], k=5)
    assert scores['density'] == shares.density
  assert 0 < scores['fd_test_inf'] < scores['fd_test']


def test_finished_images_are_cut_into_stated_blocks():
  rows = {'a': np.arange(20.0)[:, None], 'b': np.arange(20)}
  labels = np.repeat([0, 1], 10)
  for samples, seeds in ((0, 3), (6, 0), (7, 3)):
    settings = evaluator_lib.Evaluation(samples=samples, seeds=seeds)
    assert measure.cut((rows, labels), settings) == [(rows, labels)]
  settings = evaluator_lib.Evaluation(samples=6, seeds=3)
  blocks = measure.cut((rows, labels), settings)
  taken = [part['b'] for part, _ in blocks]
  assert len({*np.concatenate(taken)}) == 18
  for part, classes in blocks:
    assert (np.diff(part['b']) > 0).all() and len({*classes}) == 2
    np.testing.assert_array_equal(part['a'][:, 0], part['b'])
    np.testing.assert_array_equal(classes, part['b'] // 10)
  (part, none), *_ = measure.cut((rows, None), settings)
  assert none is None


@pytest.mark.parametrize(
  ('fields', 'line'),
  [
    (
      {'extra': ('recall',)},
      "config.evaluation.extra is ('recall',); it must be () or some of"
      " ('fd_train_inf', 'fd_test_inf', 'mind', 'fd_ratio', 'density',"
      " 'coverage'), which these settings can measure",
    ),
    (
      {'metric': 'fd_test_inf', 'selection_samples': 65},
      'config.evaluation.selection_samples is 65; it must be 66 or more:'
      ' fd_test_inf is extrapolated from parts of these images',
    ),
    (
      {'protocol': 'edm-cifar10', 'metric': 'fid_inf', 'samples': 4_000},
      'config.evaluation.samples is 4000; it must be 4098 or more: fid_inf is'
      ' extrapolated from parts of these images',
    ),
  ],
)
def test_extras_that_cannot_be_measured_are_refused(fields, line):
  with pytest.raises(errors.UserError) as caught:
    evaluator_lib.check(evaluator_lib.Evaluation(**fields))
  assert str(caught.value) == line


def test_rows_go_on_where_they_were_cut_off(evaluator, tmp_path):
  source = make_source(3, 1_500)
  whole = evaluator.embed(images_of(source), 1_500, 'a')
  asked = []

  def cut_off(ids):
    asked.append(ids)
    yield source.stored[ids[:1_100]]
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    evaluator.embed(cut_off, 1_500, 'b', tmp_path)

  def rest(ids):
    asked.append(ids)
    yield from images_of(source, (7, 300))(ids)

  resumed = evaluator.embed(rest, 1_500, 'b', tmp_path)
  np.testing.assert_array_equal(asked[0], np.arange(1_500))
  np.testing.assert_array_equal(asked[1], np.arange(1_024, 1_500))
  for kind, rows in whole.items():
    np.testing.assert_array_equal(resumed[kind], rows)
  assert resumed['nearest'].dtype == np.float64


def test_a_kept_row_is_made_again_unless_it_holds(tmp_path):
  def images(ids):
    asked.append(ids.tolist())
    yield ids[:, None]

  def embed(take, ids):
    if len(ids):
      yield ids, {'a': np.repeat(take(ids), 3, axis=1).astype(np.float32)}

  def gather(folder):
    kinds = {'a': rows_lib.Kind(3)}
    return rows_lib.gather(embed, kinds, images, 5, 'rows', folder)['a']

  asked = []
  one, two = tmp_path / 'one', tmp_path / 'two'
  whole = gather(one)
  path = one / 'a.rows'
  content = path.read_bytes()
  flipped = bytearray(content)
  flipped[0] ^= 1  # of row 0
  flipped[2 * 16 + 5] ^= 64
  for damaged in (flipped, content[:-16], b'', content + b'0'):
    path.write_bytes(damaged)
    np.testing.assert_array_equal(gather(one), whole)
    np.testing.assert_array_equal(gather(one), whole)
  everything = list(range(5))
  assert asked == [everything, [0, 2], *[everything] * 3]
  # Rows of another pass are not taken for those of this one.
  two.mkdir()
  path.rename(two / 'a.rows')
  asked.clear()
  gather(two)
  assert asked == [everything]


def test_what_its_number_hangs_on(evaluator):
  identity = evaluator.identity()
  assert identity['classifier']['train'] == 'set 0'
  assert len(identity['classifier']['test_sha256']) == 64
  assert identity['classifier']['held_out_accuracy'] > 0.9
  assert identity['classifier']['held_out_images'] == 200
  assert identity['classifier']['held_out_copies'] == 0
  assert json.loads(json.dumps(identity)) == identity
  np.testing.assert_array_equal(evaluator.ids(2, 5), np.arange(5))
  np.testing.assert_array_equal(evaluator.labels(np.arange(4), 3), [0, 1, 2, 0])
  np.testing.assert_array_equal(evaluator.labels(np.arange(4), 0), [0] * 4)
  assert evaluator.notes(5_000, 3) == []
  (note,) = evaluator.notes(30, 3)
  assert 'rank-deficient' in note
  rows, _ = measure.read(evaluator, make_source(2, 300))
  found = evaluator.uncertainty(rows)
  assert found.keys() == {'fd_train', 'fd_test'}
  assert found['fd_test'].keys() == {'limit'}  # 30 images a tenth are too few


def test_a_perfect_generator_of_uneven_data_scores_well(evaluator, monkeypatch):
  """Training images drawn again, by the evaluator's labels."""
  fitted = evaluator._fitted.classifier
  monkeypatch.setattr(classifier, 'fit', lambda *_: fitted)
  whole = make_source(4, 1_500)
  labels = whole.labels()
  kept = np.flatnonzero(
    (labels == 1) | ((labels == 2) & (np.arange(1_500) < 150))
  )
  train = sources.ArraySource(
    'uneven', whole.stored[kept], labels[kept], num_classes=3
  )
  places = [np.flatnonzero(train.labels() == label) for label in range(3)]
  random = np.random.default_rng(0)

  def distance(rule):
    measured = classifier_evaluator.ClassifierEvaluator(
      train, make_source(1, 200), rule
    )
    drawn = measured.labels(np.arange(550), 3)
    index = [random.choice(places[label]) for label in drawn]
    images, _ = train.read(np.array(index))
    again = sources.ArraySource('drawn', images, drawn, num_classes=3)
    rows, labels = measure.read(measured, again)
    return measured.scores(rows, labels)['fd_train'], measured.label_rule

  follows, rule = distance('data')
  assert rule.startswith('2 classes as often as in the training images')
  equal, rule = distance('balanced')
  assert rule == 'the 2 classes that the data has, equally often'
  assert follows < 0.1 < 1 < equal


@pytest.mark.parametrize(
  ('accuracy', 'commonest', 'poor'),
  [
    (0.97, 0.1, False),
    (0.79, 0.1, True),
    (0.96, 0.9, False),
    (0.94, 0.9, True),  # it mostly answers with the commonest class
  ],
)
def test_a_classifier_too_poor_to_measure_with(accuracy, commonest, poor):
  line = classifier_evaluator.doubt(accuracy, commonest)
  assert bool(line) == poor
  assert not line or f'{accuracy:.0%}' in line


def test_a_poor_classifier_is_named_beside_its_scores(evaluator, monkeypatch):
  """Held-out labels that say nothing."""
  fitted = evaluator._fitted.classifier
  monkeypatch.setattr(classifier, 'fit', lambda *_: fitted)
  test = make_source(1, 200)
  wrong = (test.labels() + 1) % 3
  test = sources.ArraySource('test', test.stored, wrong, num_classes=3)
  found = classifier_evaluator.ClassifierEvaluator(make_source(0, 400), test)
  assert found.identity()['classifier']['held_out_accuracy'] < 0.1
  (note,) = found.notes(5_000, 3)
  assert 'too poor to measure with' in note


def test_data_that_no_classifier_can_be_fitted_to():
  def open_test():
    return make_source(1, 50)

  settings = evaluator_lib.Evaluation()
  plain = sources.ArraySource(
    'plain', make_source(0, 50).stored, np.zeros(50, np.int32)
  )
  with pytest.raises(errors.UserError, match='0 classes'):
    measure.open_evaluator(settings, 0, plain, open_test)
  with pytest.raises(errors.UserError, match='all 50 held-out images'):
    measure.open_evaluator(settings, 0, make_source(1, 50), open_test)


def test_finished_images_without_a_protocol(evaluator, tmp_path, monkeypatch):
  """The training images themselves, from an .npz and from a folder."""
  train = make_source(0, 400)
  for split, source in (('train', train), ('test', make_source(1, 200))):
    path = tmp_path / f'{split}.npz'
    np.savez(path, image=source.stored, label=source.classes)
  config = digits.get_config()
  config.data.source = str(tmp_path / '{split}.npz')
  # Fitting it takes long; these are the images that it was fitted to.
  fitted = evaluator._fitted.classifier
  monkeypatch.setattr(classifier, 'fit', lambda *_: fitted)
  np.savez(tmp_path / 'a.npz', arr_0=train.stored, arr_1=train.classes)
  np.savez(tmp_path / 'b.npz', image=train.stored)
  writer = image_writer.ImageWriter(tmp_path / 'set')
  writer.add(np.arange(400), train.stored, train.classes)
  writer.close()

  def scores(name):
    result = score.score_images(
      config.evaluation, config.seed, config.data, tmp_path / name, tmp_path
    )
    assert json.loads((tmp_path / 'eval.json').read_text()) == result
    assert result['samples'] == 400
    assert result['classifier']['train'] == str(tmp_path / 'train.npz')
    return result['scores']

  from_arrays = scores('a.npz')
  assert from_arrays['accuracy']['mean'] > 0.9
  assert from_arrays['memorised']['mean'] == 1
  assert from_arrays['fd_train']['sd'] is None
  assert scores('set') == from_arrays
  assert 'accuracy' not in scores('b.npz')

  config.evaluation.samples = 150
  config.evaluation.seeds = 2
  result = score.score_images(
    config.evaluation, config.seed, config.data, tmp_path / 'a.npz', tmp_path
  )
  assert (result['samples'], result['seeds']) == (150, 2)
  assert result['notes'][-1].startswith('300 of 400 images are measured')


def test_statistics_are_of_known_features(tmp_path):
  config = digits.get_config()
  config.evaluation.features = ('fid', 'fd_clip')
  with pytest.raises(errors.UserError, match=r"features is .*'fd_clip'"):
    score.write_fid_stats(config.evaluation, config.data, tmp_path)


# --- What is printed ----------------------------------------------------------


def test_the_published_form_of_a_score_is_printed_first():
  blocks = [{'fid': 2.5, 'kid': 0.2}, {'fid': 1.5, 'kid': 0.1}]
  scores = measure.summarize(blocks, minima=('fid',))
  lines = score.lines({'scores': scores, 'notes': ['a note']})
  assert lines == [
    'fid              1.5000 (minimum of 2; mean 2.0000 ± 0.7071)',
    'kid              0.1500 ± 0.0707',
    'note: a note',
  ]
  one = measure.summarize(blocks[:1], minima=('fid',))
  assert score.lines({'scores': one}) == [
    'fid              2.5000',
    'kid              0.2000',
  ]


def test_images_are_handed_out_in_the_portions_asked_for():
  chunks = np.split(np.arange(12), [5, 6, 6])
  take = rows_lib._Buffer(chunks)
  got = [take(np.empty(count)).tolist() for count in (2, 2, 4, 3, 1)]
  assert got == [[0, 1], [2, 3], [4, 5, 6, 7], [8, 9, 10], [11]]
