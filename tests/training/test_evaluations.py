"""The evaluations of a phase, through interruptions and damage."""

import pytest

from ddo_jax.training import evaluations as evaluations_lib


def record(step, selection):
  return {'step': step, 'profile': 'params', 'selection': selection}


def opened(folder, step=100, carried=()):
  """What a resumed phase knows."""
  evaluations = evaluations_lib.Evaluations(folder, 'round_000')
  evaluations.resume(step, carried)
  return evaluations


@pytest.fixture
def folder(tmp_path):
  """Of a phase that was evaluated at 0, 6 and 12."""
  evaluations = opened(tmp_path)
  for step, selection in ((0, 3.0), (6, 1.0), (12, 1.0)):
    evaluations.add(record(step, selection))
  return tmp_path


def test_the_best_is_the_first_of_equal_ones(tmp_path, folder):
  assert opened(folder).best() == record(6, 1.0)
  assert opened(tmp_path / 'new').best() is None


def test_what_was_found_of_states_that_come_again_is_forgotten(folder):
  again = opened(folder, step=6)
  assert 6 in again and 12 not in again
  assert opened(folder).all() == [record(0, 3.0), record(6, 1.0)]


def test_what_the_checkpoint_carries_is_right(folder):
  known = opened(folder, carried=[record(6, 2.0)])
  assert known.best() == record(12, 1.0)
  assert [r['step'] for r in known.all()] == [0, 6, 12]


@pytest.mark.parametrize('damage', ['flipped', 'emptied', 'foreign', 'list'])
def test_a_damaged_file_leaves_what_the_checkpoint_carries(
  folder, damage, caplog
):
  path = folder / 'evaluations.json'
  text = path.read_text()
  content = {
    'flipped': text.replace('3.0', '0.0'),
    'emptied': '',
    'list': '[]',
    'foreign': text,
  }
  path.write_text(content[damage])
  stage = 'round_001' if damage == 'foreign' else 'round_000'
  evaluations = evaluations_lib.Evaluations(folder, stage)
  evaluations.resume(100, [record(0, 3.0)])
  assert evaluations.all() == [record(0, 3.0)]
  (line,) = caplog.messages
  assert line.startswith(f'{path} is ') and line.endswith(' evaluated again')
  caplog.clear()
  evaluations.resume(100, [record(0, 3.0)])  # it was written anew
  assert not caplog.messages
