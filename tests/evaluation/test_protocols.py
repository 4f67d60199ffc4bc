"""Named protocols, and numbers that must not be compared."""

import dataclasses
import json

import numpy as np
import pytest

from ddo_jax import errors
from ddo_jax.evaluation import protocols
from ddo_jax.weights import fid_stats


def test_the_names():
  assert list(protocols.PROTOCOLS) == [
    'edm-cifar10',
    'edm2-img64',
    'edm2-img512',
    'adm-img256',
  ]
  for name, protocol in protocols.PROTOCOLS.items():
    assert protocols.get(name) is protocol and protocol.name == name
    assert protocol.num_images == 50_000 and protocol.resize == 'tf1'
    assert hash(protocol)
  with pytest.raises(errors.UserError, match="'fid50k'; wanted one of edm-c"):
    protocols.get('fid50k')


def test_blocks_and_what_is_printed():
  protocol = protocols.get('edm-cifar10')
  assert (protocol.num_blocks, protocol.printed) == (3, 'minimum')
  single = protocols.get('adm-img256')
  assert (single.num_blocks, single.printed) == (1, 'single')
  with pytest.raises(errors.UserError, match='0 blocks of 50000 images'):
    dataclasses.replace(protocol, num_blocks=0)
  with pytest.raises(errors.UserError, match="'single' of 2 blocks"):
    dataclasses.replace(single, num_blocks=2)


def test_a_recorded_protocol_is_read_again():
  """Also as earlier versions recorded it."""
  protocol = protocols.get('edm-cifar10')
  recorded = json.loads(json.dumps(dataclasses.asdict(protocol)))
  assert protocols.from_json(recorded) == protocol
  recorded['first_seeds'] = [0, 50_000, 100_000]
  recorded['reference'] = recorded.pop('fid_stats')
  recorded['pixels'] = 'edm'
  del recorded['num_blocks']
  assert protocols.from_json(recorded) == protocol


@pytest.fixture
def own(tmp_path):
  """A protocol of one's own, beside its statistics."""
  protocol = dataclasses.replace(protocols.get('edm-cifar10'), name='own')
  (tmp_path / 'fid.npz').write_bytes(b'moments')
  protocols.write(tmp_path, protocol)
  return tmp_path


@pytest.mark.parametrize(
  ('name', 'read'),
  [
    ('fid.npz', fid_stats.read),
    ('protocol.json', fid_stats.read),
    ('protocol.json', protocols.get),
  ],
)
def test_damaged_statistics_are_named(own, name, read):
  """By the protocol, whose file is small, and where they are read."""
  assert protocols.get(str(own)).name == 'own'
  content = (own / name).read_bytes()
  (own / name).write_bytes(content[:-3] + b'}' + content[-2:])
  with pytest.raises(errors.UserError, match=f'{own / name} is damaged'):
    read(own if read is fid_stats.read else str(own))


@pytest.mark.parametrize(
  'change',
  [
    {'num_images': '5'},
    {'image_shape': [32, 32]},
    {'image_shape': 'abc'},
    {'features': [1]},
    {'class_shares': [-1]},
    {'name': 3},
    {'resize': []},
    {'more': 1},
  ],
)
def test_a_protocol_of_another_form_is_one_line(own, change):
  recorded = json.loads((own / 'protocol.json').read_text()) | change
  (own / 'manifest.json').unlink()  # as earlier versions wrote none
  (own / 'protocol.json').write_text(json.dumps(recorded))
  with pytest.raises(errors.UserError) as caught:
    protocols.get(str(own))
  assert '\n' not in str(caught.value)


def test_balanced_classes():
  protocol = protocols.get('edm2-img64')
  ids = np.arange(50_000, 100_000)
  classes = protocol.classes(ids, 1_000, seed=0)
  assert classes.dtype == np.int32
  assert (np.bincount(classes) == 50).all()
  with pytest.raises(errors.UserError, match='over 999 classes'):
    protocol.classes(ids, 999, seed=0)
  assert (protocol.classes(np.arange(4), 0, seed=0) == 0).all()


def test_random_classes_hang_on_seed_and_id_alone():
  protocol = protocols.get('edm-cifar10')
  ids = np.arange(5_000)
  classes = protocol.classes(ids, 10, seed=3)
  counts = np.bincount(classes, minlength=10)
  assert counts.sum() == 5_000 and len(counts) == 10
  assert 400 < counts.min() < 490 and 510 < counts.max() < 600  # not balanced
  some = np.array([4_321, 7, 99])
  np.testing.assert_array_equal(protocol.classes(some, 10, 3), classes[some])
  assert (protocol.classes(ids, 10, seed=4) != classes).mean() > 0.8


def test_scores_of_one_protocol_are_compared_and_others_refused():
  protocol = protocols.get('edm2-img64')
  a = protocols.Score('fid', 1.58, protocol, 50_000, 'a' * 64)
  b = dataclasses.replace(a, value=0.97)
  assert protocols.difference(a, b) == pytest.approx(0.61)
  printed = dataclasses.replace(b, fid_stats_sha256='')
  assert protocols.difference(a, printed) == pytest.approx(0.61)
  random = dataclasses.replace(protocol, labels='random')
  half_pixel = dataclasses.replace(protocol, resize='half_pixel')
  for change, said in (
    ({'metric': 'fd_dinov2'}, 'metric fid and fd_dinov2'),
    ({'num_images': 10_000}, 'num_images 50000 and 10000'),
    ({'fid_stats_sha256': 'b' * 64}, 'fid_stats_sha256 aaa'),
    ({'protocol': random}, 'labels balanced and random'),
    ({'protocol': half_pixel}, 'resize tf1 and half_pixel'),
    ({'protocol': protocols.get('edm2-img512')}, 'fid_stats img64'),
  ):
    with pytest.raises(errors.UserError, match=said):
      protocols.difference(a, dataclasses.replace(b, **change))


@pytest.mark.parametrize(
  'field', ['labels', 'resize', 'inception_score', 'printed']
)
def test_unknown_rules_are_refused(field):
  with pytest.raises(errors.UserError, match=f"{field} is 'x'; wanted one of"):
    dataclasses.replace(protocols.get('edm-cifar10'), **{field: 'x'})
