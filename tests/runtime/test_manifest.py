"""What does not hold its checksum is named, and not trusted."""

import logging
import os
import shutil

import pytest

from ddo_jax import errors
from ddo_jax.runtime import manifest
from ddo_jax.runtime import records


def open_manifest(folder):
  return manifest.Manifest(folder, ('*.json', 'params'))


@pytest.fixture
def stage(tmp_path):
  """A stage with a record, and a folder of two files."""
  folder = tmp_path / 'run' / 'round_000'
  kept = open_manifest(folder)
  kept.write_json('done.json', {'a': 1})
  (folder / 'params' / 'd').mkdir(parents=True)
  (folder / 'params' / 'd' / 'x').write_bytes(b'weights')
  (folder / 'params' / 'meta').write_bytes(b'about')
  kept.add_params('params', 'abc')
  return folder


def test_what_was_left_holds(stage, caplog):
  kept = open_manifest(stage)
  assert kept.read_json('done.json') == {'a': 1}
  assert kept.holds('done.json') and kept.holds('params')
  assert kept.faults() == manifest.faults(stage) == {}
  assert not kept.lists('eval.json') and not kept.holds('eval.json')
  assert not kept.lists('par')  # a part of a name is no name
  shutil.move(stage.parent, stage.parent.with_name('moved'))
  moved = stage.parents[1] / 'moved' / 'round_000'
  assert open_manifest(moved).holds('params')
  assert not caplog.records


@pytest.mark.parametrize('name', ['done.json', 'params/d/x'])
@pytest.mark.parametrize('damage', ['truncated', 'flipped', 'deleted'])
def test_what_does_not_hold_is_named(stage, caplog, name, damage):
  path = stage / name
  content = path.read_bytes()
  fault = 'is damaged'
  if damage == 'truncated':
    path.write_bytes(content[:-1])
  elif damage == 'flipped':
    path.write_bytes(bytes([content[0] ^ 4]) + content[1:])
  else:
    path.unlink()
    fault = 'is missing'
  kept = open_manifest(stage)
  assert kept.faults() == {name: fault}
  assert not kept.holds(name.partition('/')[0], 'remedy')
  assert f'{path} {fault}: remedy' in caplog.text
  assert kept.read_json('done.json') == (None if 'json' in name else {'a': 1})


def test_large_files_are_read_only_where_asked(stage, monkeypatch):
  monkeypatch.setattr(manifest, '_SMALL', 6)
  (stage / 'params' / 'd' / 'x').write_bytes(b'WEIGHTS')
  (stage / 'params' / 'meta').write_bytes(b'About')  # a small one
  assert manifest.faults(stage, deep=False) == {'params/meta': 'is damaged'}
  assert len(manifest.faults(stage, 'params')) == 2


def test_a_file_is_listed_before_it_takes_its_place(stage, monkeypatch):
  """So that none is there that is not listed, wherever a run is cut off."""
  replace = os.replace

  def cut_off(source, target):
    if target == stage / 'done.json':
      raise KeyboardInterrupt
    replace(source, target)

  monkeypatch.setattr(os, 'replace', cut_off)
  with pytest.raises(KeyboardInterrupt):
    open_manifest(stage).write_json('done.json', {'a': 2})
  assert open_manifest(stage).faults() == {'done.json': 'is damaged'}
  monkeypatch.undo()
  open_manifest(stage).write_json('done.json', {'a': 2})
  assert open_manifest(stage).read_json('done.json') == {'a': 2}


@pytest.mark.parametrize(
  'damage',
  [
    lambda content: b'',
    lambda content: content[:-9],
    lambda content: b'[1]',
    lambda content: content.replace(b'round_000', b'round_001'),
    lambda content: content.replace(b'size": 7', b'size": 8'),
  ],
)
def test_a_damaged_manifest_is_one_line(stage, damage):
  path = stage / manifest.FILE
  path.write_bytes(damage(path.read_bytes()))
  for look in (open_manifest, manifest.faults):
    with pytest.raises(errors.UserError) as caught:
      look(stage)
    line = str(caught.value)
    assert f'{path} is damaged' in line and 'delete it' in line
    assert '\n' not in line


def test_that_of_another_stage_is_refused(stage):
  other = stage.with_name('round_001')
  shutil.copytree(stage, other)
  with pytest.raises(errors.UserError, match=r'manifest\.json is damaged'):
    open_manifest(other)


def test_a_folder_of_an_earlier_version_is_taken_as_it_is(stage, caplog):
  (stage / manifest.FILE).unlink()
  (stage / 'bad.json').write_text('{"a": ')
  assert manifest.faults(stage) == {}  # without one, nothing is known
  kept = open_manifest(stage)
  assert kept.holds('done.json') and kept.holds('params')
  assert not kept.lists('bad.json')
  warnings = [r.getMessage() for r in caplog.records]
  assert len(warnings) == 2
  assert f'{stage / "bad.json"} is damaged' in warnings[0]
  assert f'{stage}/manifest.json is missing' in warnings[1]
  caplog.clear()
  assert open_manifest(stage).holds('params') and not caplog.records


def test_params_that_are_made_again_are_the_same(stage):
  kept = open_manifest(stage)
  kept.add_params('params', 'abc')
  with pytest.raises(errors.UserError, match=r'and had abc.*from a backup'):
    kept.add_params('params', 'abd')


def test_a_record_is_held_to_the_manifest_beside_it(stage, caplog):
  caplog.set_level(logging.WARNING)
  path = stage / 'done.json'
  assert manifest.read_json(path) == {'a': 1}
  records.write_json(path, {'a': 2})
  with pytest.raises(errors.UserError, match=f'{path} is damaged'):
    manifest.read_json(path)
  (stage / manifest.FILE).unlink()
  assert manifest.read_json(path) == {'a': 2}
