"""Named protocols, and numbers that must not be compared."""

import dataclasses

import numpy as np
import pytest

from ddo_jax import errors
from ddo_jax.evaluation import protocols


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


def test_blocks_of_seeds_are_disjoint():
  protocol = protocols.get('edm-cifar10')
  blocks = [protocol.ids(b) for b in range(3)]
  together = np.concatenate(blocks)
  np.testing.assert_array_equal(together, np.arange(150_000))
  assert len(protocols.get('adm-img256').first_seeds) == 1
  with pytest.raises(errors.UserError, match='overlap'):
    dataclasses.replace(protocol, first_seeds=(0, 49_999))


def test_balanced_classes():
  protocol = protocols.get('edm2-img64')
  classes = protocol.classes(protocol.ids(1), 1_000, seed=0)
  assert classes.dtype == np.int32
  assert (np.bincount(classes) == 50).all()
  with pytest.raises(errors.UserError, match='over 999 classes'):
    protocol.classes(protocol.ids(0), 999, seed=0)
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
  printed = dataclasses.replace(b, reference_sha256='')
  assert protocols.difference(a, printed) == pytest.approx(0.61)
  random = dataclasses.replace(protocol, labels='random')
  half_pixel = dataclasses.replace(protocol, resize='half_pixel')
  for change, said in (
    ({'metric': 'fd_dinov2'}, 'metric fid and fd_dinov2'),
    ({'num_images': 10_000}, 'num_images 50000 and 10000'),
    ({'reference_sha256': 'b' * 64}, 'reference_sha256 aaa'),
    ({'protocol': random}, 'labels balanced and random'),
    ({'protocol': half_pixel}, 'resize tf1 and half_pixel'),
    ({'protocol': protocols.get('edm2-img512')}, 'reference img64'),
  ):
    with pytest.raises(errors.UserError, match=said):
      protocols.difference(a, dataclasses.replace(b, **change))


@pytest.mark.parametrize('field', ['labels', 'pixels', 'resize'])
def test_unknown_rules_are_refused(field):
  with pytest.raises(errors.UserError, match=f"{field} is 'x'; wanted one of"):
    dataclasses.replace(protocols.get('edm-cifar10'), **{field: 'x'})
