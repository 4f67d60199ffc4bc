"""What a page says of a sweep."""

import json

from ddo_jax.report import members
from ddo_jax.report import page
from ddo_jax.report import run_folder


def member(number, selections, ended='', **settings):
  evaluations = [
    {'step': 10 * i, 'images': 160 * i, 'selection': value}
    for i, value in enumerate(selections)
  ]
  best = min(evaluations, key=lambda record: record['selection'])
  return {
    'number': number,
    'origin': 'sobol',
    'settings': {'beta': 0.1 * (1 + number), 'p_std': 1.2} | settings,
    'selection': best['selection'],
    'step': best['step'],
    'evaluations': evaluations,
    'ended': ended,
    'cost': {'real': 1_600, 'forwards': 64_000},
  }


def final(number, candidate, selection, rescored):
  return {
    'member': number,
    'candidate': candidate,
    'selection': selection,
    'rescored': rescored,
  }


FINALS = [
  final(None, 'reference', 3.0, 3.1),
  final(1, 'member', 0.5, 1.25),
  final(1, 'merge_0.5', 0.5, 1.125),
]
LEDGER = {
  'round': 0,
  'probe': {'fault': 'no <signal>'},
  'members': [
    member(0, [3.0, 2.0, 2.5], 'halving: 2 of the 2 that came so far'),
    member(1, [3.0, 1.0, 0.5]),
  ],
  'finals': FINALS,
  'promoted': FINALS[2],
  'cost': {
    'images': 9_000,
    'real': 3_200,
    'pool': 500,
    'evaluation': 5_300,
    'forwards': 200_000,
    'probe_forwards': 4_000,
  },
  'unit': 'a unit',
  'note': 'a curse',
}


def make_run(folder, ledger):
  path = folder / 'round_000' / 'ledger.json'
  path.parent.mkdir()
  if ledger:
    path.write_text(json.dumps(ledger))
  promoted = {
    'step': 20,
    'images': 320,
    'profile': 'power_0.100',
    'selection': 0.5,
    'member': 1,
    'settings': {'beta': 0.2},
    'candidate': 'merge_0.5',
  }
  result = {'round': 0, 'promoted': promoted}
  config = {'ddo.objective.beta': [0.7], 'ddo.objective.alpha': [4.0]}
  return run_folder.Run(folder, config, {}, [result], {}, [])


def test_the_members_and_the_finals_of_a_sweep(tmp_path):
  content = members.section(make_run(tmp_path, LEDGER))
  rows = content.split('<tr>')
  # The best by selection first; a column that is the same in all is left out.
  assert '<b>001</b> promoted' in rows[2] and '0.2</td>' in rows[2]
  assert '000' in rows[3] and 'p_std' not in content
  assert '>halving</span>' in rows[3]
  assert 'title="halving: 2 of the 2 that came so far"' in rows[3]
  assert 'all steps' in rows[2]
  assert '<title>3, 1, 0.5</title>' in rows[2]
  assert content.count('<svg') == 2
  assert '9 k images (3.2 k real, 500  in the pool, 5.3 k to score)' in content
  assert '200 k forward-equivalents, 4 k of them the probe.' in content
  assert 'no &lt;signal&gt;' in content
  # The finals by what they were scored anew, the promoted one first.
  assert [('merge_0.5' in row, '1.125' in row) for row in rows[5:6]] == [
    (True, True)
  ]
  assert 'a curse' in content and 'a unit' in content


def test_a_run_without_a_sweep_has_no_members(tmp_path):
  assert members.section(make_run(tmp_path, None)) == ''


def test_a_round_says_what_its_winner_was_played_with(tmp_path):
  run = make_run(tmp_path, LEDGER)
  note = page._round_note(run, run.rounds[0])
  assert 'power_0.100, merge_0.5' in note
  assert 'beta 0.2' in note and 'alpha 4' in note and '0.7' not in note


def test_the_page_begins_with_the_numbers_of_every_round(tmp_path):
  run = make_run(tmp_path, LEDGER)
  assert page._numbers(run) == ', beta 0.2, alpha 4'
  other = {'round': 1, 'promoted': {'settings': {'beta': 0.3, 'p_std': 1.5}}}
  run.rounds.append(other)
  assert page._numbers(run) == ', beta 0.2 → 0.3, alpha 4, p_std – → 1.5'
