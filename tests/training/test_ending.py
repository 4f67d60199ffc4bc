"""When rounds end by themselves, and how a run goes on from there."""

import json

import pytest
from strangers import tiny

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax.training import check
from ddo_jax.training import ending
from ddo_jax.training import round as round_lib
from ddo_jax.training import run as run_lib
from ddo_jax.training import workspace


def scores(mean, sd=0.01):
  summary = {'mean': mean, 'sd': sd, 'minimum': mean, 'values': [mean] * 3}
  return {'fd_train': summary | {'headline': 'mean'}}


def result(index, before, after, **options):
  """What a round leaves, as far as its end is concerned."""
  return {
    'round': index,
    'before': scores(before, **options),
    'after': scores(after, **options),
    'promoted': {'step': 1},
    'seconds': {'fakes': 0, 'train': 0, 'evaluate': 0},
  }


def config_of(rounds='auto', most=12):
  config = tiny.get_config()
  config.rounds = rounds
  config.tune.max_rounds = most
  return config


def test_a_gain_is_held_against_the_spread_over_seeds():
  # 2 √((0.01² + 0.01²)/3) = 0.0163
  gained, noise = ending.gain(result(0, 0.5, 0.4), 'fd_train')
  assert (gained, noise) == pytest.approx((0.1, 0.01633), rel=1e-3)
  assert ending.why(config_of(), []) == ''
  assert ending.why(config_of(), [result(0, 0.5, 0.483)]) == ''
  line = ending.why(config_of(), [result(0, 0.5, 0.484)])
  assert line == (
    'round 0 gained 0.016 in fd_train, within the noise of its 3 seeds, 0.016'
  )
  assert 'gained -0.1 in' in ending.why(config_of(), [result(0, 0.5, 0.6)])
  # A round that promotes its start has gained nothing, whatever the spread.
  assert ending.why(config_of(), [result(0, 0.5, 0.5, sd=0.0)])


def test_the_ceiling_and_the_number_that_was_asked_for():
  gains = [result(0, 0.5, 0.4), result(1, 0.4, 0.3)]
  assert 'max_rounds, 2, is reached' in ending.why(config_of(most=2), gains)
  assert ending.why(config_of(most=3), gains) == ''
  assert ending.why(config_of(rounds=3), gains) == ''
  assert 'all of the 2 rounds' in ending.why(config_of(rounds=2), gains)
  assert ending.ceiling(config_of(rounds=2)) == 2
  assert ending.ceiling(config_of(most=7)) == 7


@pytest.fixture
def play(tmp_path, monkeypatch):
  """Plays runs whose rounds gain what a list says, and nothing else."""
  path = [0.9, 0.5, 0.4, 0.399, 0.2, 0.1]
  played = []

  def play_round(run, index, origin, previous):
    del origin, previous
    done = run.workdir / f'round_{index:03d}' / 'done.json'
    if not done.exists():
      played.append(index)
      done.parent.mkdir()
      found = result(index, path[index], path[index + 1])
      done.write_text(json.dumps(found))
    return json.loads(done.read_text())

  monkeypatch.setattr(round_lib, 'play_round', play_round)
  monkeypatch.setattr(run_lib, '_pretrain', lambda run: run.workdir)
  monkeypatch.setattr(run_lib, '_cost', lambda run: {})
  monkeypatch.setattr(run_lib.page, 'write', lambda workdir: None)

  def play(config):
    left = check.stages(workspace.Run(config, tmp_path), rounds=True)
    played.clear()
    summary = run_lib._play(workspace.Run(config, tmp_path), '')
    rounds = [name for name in left if name.startswith('round_')]
    return summary, list(played), rounds

  return play


def test_rounds_go_on_until_one_gains_nothing(play):
  summary, played, planned = play(config_of(most=5))
  assert played == [0, 1, 2]
  assert planned == [f'round_{i:03d}' for i in range(5)]
  assert summary['ended'].startswith('round 2 gained 0.001')
  # The same command finds nothing to do.
  again, played, planned = play(config_of(most=5))
  assert (played, planned) == ([], [])
  assert again == summary
  # More of them by hand, and then by themselves again.
  summary, played, planned = play(config_of(rounds=4))
  assert (played, planned) == ([3], ['round_003'])
  assert 'all of the 4 rounds' in summary['ended']
  summary, played, planned = play(config_of(most=5))
  assert (played, planned) == ([4], ['round_004'])
  assert 'max_rounds, 5, is reached' in summary['ended']
  assert len(summary['rounds']) == 5


def test_a_run_by_itself_goes_on_where_it_was_cut_off(play):
  _, played, _ = play(config_of(rounds=1))
  assert played == [0]
  _, played, planned = play(config_of(most=5))
  assert played == [1, 2]
  assert planned == [f'round_{i:03d}' for i in range(1, 5)]


@pytest.mark.parametrize(
  ('field', 'value', 'line'),
  [
    ('rounds', 'Auto', 'config.rounds is'),
    ('rounds', True, 'config.rounds is True'),
    ('evaluation.seeds', 1, 'config.evaluation.seeds is 1'),
    ('tune.max_rounds', 0, 'config.tune.max_rounds is 0'),
  ],
)
def test_what_makes_no_sense_is_one_line(field, value, line):
  config = config_of()
  group, _, name = field.rpartition('.')
  setattr(getattr(config, group) if group else config, name, value)
  with pytest.raises(errors.UserError, match=line):
    config_lib.validate(config)
  # It is not looked at before that.
  assert isinstance(ending.ceiling(config), int)


def test_a_protocol_of_one_block_has_no_spread_to_hold_a_gain_against():
  config = config_of()
  config.evaluation = config_lib.Evaluation('adm-img256', 'fid')
  with pytest.raises(errors.UserError, match=r'seeds is 0; it must be 2 or'):
    config_lib.validate(config)
  config.evaluation.seeds = 3
  config_lib.validate(config)
  config.evaluation = config_lib.Evaluation('edm-cifar10', 'fid')
  config_lib.validate(config)
