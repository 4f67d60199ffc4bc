"""JSON files and metrics.jsonl, whole through interruptions."""

import json
import math
import os

import numpy as np
import pytest

from ddo_jax import errors
from ddo_jax.runtime import records


def record(stage, kind, step, **values):
  head = {'stage': stage, 'kind': kind, 'step': step, 'images': 8 * step}
  return head | values


@pytest.fixture
def log(tmp_path):
  return records.MetricsLog(tmp_path / 'run')


def test_json_comes_back(tmp_path):
  path = tmp_path / 'new' / 'a.json'
  for value in ({'a': [1, 2.5, None]}, {'b': 1}):
    records.write_json(path, value)
    assert records.read_json(path) == value
  assert [p.name for p in path.parent.iterdir()] == ['a.json']


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
  path = tmp_path / 'a.json'
  records.write_json(path, {'a': 1})
  with pytest.raises(ValueError, match='JSON'):
    records.write_json(path, {'a': math.nan})
  assert records.read_json(path) == {'a': 1}


@pytest.mark.parametrize('content', [None, '{"a": '])
def test_a_missing_or_damaged_file_is_refused(tmp_path, content):
  path = tmp_path / 'a.json'
  if content is not None:
    path.write_text(content)
  with pytest.raises(errors.UserError, match=f'cannot read {path}'):
    records.read_json(path)


def test_arrays_become_plain_and_undefined_numbers_null(log):
  values = {
    'scalar': np.float32(0.5),
    'vector': np.array([1.0, np.nan, np.inf], np.float32),
    'empty': math.nan,
  }
  log.write(record('round_000', 'train', 0, **values))
  (got,) = log.read()
  expected = {'scalar': 0.5, 'vector': [1.0, None, None], 'empty': None}
  assert got == record('round_000', 'train', 0, **expected)


def test_records_are_read_by_stage_and_in_order(log):
  written = [
    record(stage, 'train', step)
    for stage in ('pretrain', 'round_000')
    for step in range(3)
  ]
  for value in written:
    log.write(value)
  assert log.read() == written
  assert log.read('round_000') == written[3:]


def test_a_line_cut_off_is_dropped(log):
  log.write(record('pretrain', 'train', 0))
  with log.path.open('a') as file:
    file.write('{"stage": "pretr')
  assert log.read() == [record('pretrain', 'train', 0)]


def test_a_line_cut_off_is_gone_after_rewind(log):
  log.write(record('pretrain', 'train', 0))
  with log.path.open('a') as file:
    file.write('{"stage": "pretr')
  log.rewind('pretrain', 1, [])
  log.write(record('pretrain', 'train', 1))
  assert [r['step'] for r in log.read()] == [0, 1]


def test_rewind_drops_what_will_be_written_again(log):
  written = [
    record('pretrain', 'train', 9),
    record('round_000', 'eval', 0),
    record('round_000', 'train', 3),
    record('round_000', 'eval', 4),
    record('round_000', 'train', 4),
    record('round_000', 'eval', 8),
  ]
  for value in written:
    log.write(value)
  # At step 4 the evaluation came before the save, training after it.
  log.rewind('round_000', 4, [written[1], written[3]])
  assert log.read() == written[:4]
  for line in log.path.read_text().splitlines():
    json.loads(line)


def test_numbers_go_to_tensorboard(log, monkeypatch):
  """The disk is waited for now and then, not at each record."""
  synced = []
  fsync = os.fsync

  def counted(file):
    synced.append(file)
    fsync(file)

  monkeypatch.setattr(os, 'fsync', counted)
  for step in range(50):
    log.write(record('round_000', 'train', step, loss=0.5, name='x'))
  (path,) = (log.path.parent / 'tensorboard').iterdir()
  content = path.read_bytes()
  assert b'round_000/loss' in content and b'name' not in content
  assert len(synced) == 1
  monkeypatch.setattr(records, '_BOARD_SECONDS', 0)
  log.write(record('round_000', 'train', 50, score=0.5))
  assert b'round_000/score' in path.read_bytes()
  assert path.read_bytes().count(b'round_000/loss') == 50


def test_rewind_of_a_fresh_run_is_no_error(log):
  log.rewind('pretrain', 0, [])
  assert log.read() == []


def test_a_damaged_line_loses_that_line_alone(log, caplog):
  written = [record('pretrain', 'train', step) for step in range(5)]
  for value in written:
    log.write(value)
  lines = log.path.read_bytes().splitlines(keepends=True)
  lines[1] = lines[1].replace(b'"step"', b'"st\xffp"')
  lines[2] = b'[1]\n'
  log.path.write_bytes(b''.join(lines))
  expected = [written[0], *written[3:]]
  assert log.read() == expected
  for number in (2, 3):
    assert f'{log.path}: line {number} is damaged and left out' in caplog.text
  log.rewind('round_000', 0, [])
  assert log.read() == expected
  assert log.path.read_bytes() == b''.join(lines)  # the damaged stay to be seen


def test_rewind_writes_the_evaluations_that_the_log_lacks(log):
  written = [
    record('pretrain', 'train', 9),
    record('round_000', 'eval', 0, score=1.0),
    record('round_000', 'train', 0),
    record('round_000', 'eval', 4, score=2.0),
    record('round_000', 'train', 4),
  ]
  changed = written[1] | {'score': 0.5}
  for value in (written[0], changed, written[2], written[4]):
    log.write(value)
  log.rewind('round_000', 5, [written[1], written[3]])
  assert log.read() == written


@pytest.mark.parametrize(
  'change', [{'a': 2}, {'b': 1}, {'sha256': '0'}, None], ids=str
)
def test_a_sealed_object_shows_a_change(change):
  value = {'a': 1, 'nested': [{'x': 0.1}]}
  sealed = json.loads(json.dumps(records.sealed(value)))
  assert records.unsealed(sealed) == value
  with pytest.raises(ValueError, match='the record'):
    records.unsealed(change and sealed | change)
