"""The alarms, on curves that were made up and on curves of the digits."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from ddo_jax import errors
from ddo_jax.tuning import alarms

RULES = alarms.Alarms()
# What metrics.jsonl held of rounds of the digits' recipe, of 600 steps and
# evaluated at each 25th (--config.rounds=1 --config.ddo.images=153600
# --config.ddo.rhythm.eval_images=6400), by α and β, and where they are ended.
CURVES = json.loads(
  (pathlib.Path(__file__).parent / 'digits_curves.json').read_text()
)


def evaluations(*scores, recall=None):
  records = [
    {'step': 50 * i, 'selection': score} for i, score in enumerate(scores)
  ]
  for record, value in zip(records, recall or (), strict=False):
    record['recall'] = value
  return records


def train(mle_loss, saturated=0.0):
  """Records of the log, with the noise of single batches."""
  noise = np.random.default_rng(0).normal(size=len(mle_loss))
  return [
    {'step': 10 * i, 'mle_loss': loss + 0.05 * loss * n, 'saturated': saturated}
    for i, (loss, n) in enumerate(zip(mle_loss, noise, strict=True))
  ]


def test_the_score_must_be_past_its_best_for_a_while():
  # The limit is the best and 4 times 3 % of it: 0.56.
  for scores in (
    (1.0, 0.5),
    (1.0, 0.5, 0.7),  # once
    (1.0, 0.5, 0.55, 0.55, 0.55),  # within the noise
    (1.0, 0.5, 0.7, 0.55),
    (1.0, 0.5, 0.55, 0.7),
    (0.5, 0.7, 0.49),  # it recovers
  ):
    assert alarms.reason(evaluations(*scores), [], RULES) is None
  line = alarms.reason(evaluations(1.0, 0.5, 0.7, 0.8), [], RULES)
  assert line == (
    'overshoot: the score is 0.8, and was above 0.56 in the last 2'
    ' evaluations; its best is 0.5, at step 50'
  )
  patient = dataclasses.replace(RULES, patience=3)
  assert alarms.reason(evaluations(1.0, 0.5, 0.7, 0.8), [], patient) is None
  assert alarms.reason(evaluations(1.0, 0.5, 2, 2, 2), [], patient)
  # The reference counts: a member that never beat it is ended too.
  assert alarms.reason(evaluations(1.0, 1.2, 1.3), [], RULES)
  off = dataclasses.replace(RULES, margin=0.0)
  assert alarms.reason(evaluations(1.0, 0.5, 0.7, 0.8), [], off) is None


def test_a_best_below_zero_is_no_limit_by_itself():
  """Unbiased scores, such as those of infinitely many images, cross zero."""
  scores = (1.0, 0.001, 0.005, 0.005)
  assert alarms.reason(evaluations(*scores), [], RULES) is None
  assert alarms.reason(evaluations(1.0, -0.001, 0.02, 0.02), [], RULES)


def test_the_mle_loss_must_rise_beyond_its_noise():
  worse = evaluations(1.0, 0.9, 0.91, 0.92)
  flat = train([20.0] * 40)
  slightly = train(np.linspace(20, 25, 40))
  rising = train(np.linspace(20, 60, 40))
  assert alarms.reason(worse, flat, RULES) is None
  assert alarms.reason(worse, slightly, RULES) is None
  line = alarms.reason(worse, rising, RULES)
  assert line.startswith('forgetting: the MLE loss on real rows rose from 2')
  assert alarms.reason(worse, rising[:5], RULES) is None  # too few
  off = dataclasses.replace(RULES, mle_rise=0.0)
  assert alarms.reason(worse, rising, off) is None
  # A single large batch is no rise.
  noisy = train([20.0] * 40)
  noisy[-1]['mle_loss'] = 400.0
  assert alarms.reason(worse, noisy, RULES) is None
  # A bad step's loss is none, nor is one that a record lacks.
  odd = [{'mle_loss': 1e9, 'bad': True}, {'mle_loss': float('nan')}, {}]
  assert alarms.reason(worse, [*rising, *odd], RULES) == line


def test_recall_must_have_fallen():
  scores = (1.0, 0.9, 0.91, 0.92)
  fallen = evaluations(*scores, recall=(0.8, 0.79, 0.69, 0.6))
  line = alarms.reason(fallen, [], RULES)
  assert line == 'narrowing: recall fell from 0.800 to 0.600'
  once = evaluations(*scores, recall=(0.8, 0.79, 0.71, 0.6))
  assert alarms.reason(once, [], RULES) is None
  off = dataclasses.replace(RULES, recall_fall=0.0)
  assert alarms.reason(fallen, [], off) is None


def test_late_steps_must_be_saturated():
  worse = evaluations(1.0, 0.9, 0.91, 0.92)
  late = train([20.0] * 30) + train([20.0] * 8, saturated=0.7)
  line = alarms.reason(worse, late, RULES)
  assert line == 'saturation: |βΔ| > 4 on 70% of the rows in the last 8 records'
  early = late[30:] + late[:30]
  assert alarms.reason(worse, early, RULES) is None
  off = dataclasses.replace(RULES, saturated=0.0)
  assert alarms.reason(worse, late, off) is None


def test_a_member_at_its_best_is_left_alone():
  """Whatever its other records say."""
  better = evaluations(1.0, 0.9, 0.8, recall=(0.8, 0.5, 0.5))
  records = train(np.linspace(20, 80, 40), saturated=0.9)
  assert alarms.reason(better, records, RULES) is None
  once = evaluations(1.0, 0.9, 0.91, recall=(0.8, 0.5, 0.5))
  assert alarms.reason(once, records, RULES) is None
  assert alarms.reason([], records, RULES) is None


def records_of(curve):
  """The evaluations and the log of one of the curves."""
  every = [
    dict(zip(('step', 'selection', 'recall'), row, strict=True))
    for row in curve['evaluations']
  ]
  log = [
    dict(zip(('step', 'mle_loss', 'saturated'), row, strict=True))
    for row in curve['train']
  ]
  return every, log


def ended(curve):
  """[step, alarm] at which a round of the digits is ended, and its best."""
  every, log = records_of(curve)
  for count in range(1, len(every) + 1):
    step = every[count - 1]['step']
    seen = [record for record in log if record['step'] < step]
    line = alarms.reason(every[:count], seen, RULES)
    if line:
      break
  end = [step, line.partition(':')[0]] if line else None
  return end, min(record['selection'] for record in every[:count])


@pytest.mark.parametrize('name', list(CURVES))
def test_rounds_of_the_digits(name):
  end, _ = ended(CURVES[name])
  assert end == CURVES[name]['ended']


def test_the_best_round_of_the_digits_is_the_same_with_alarms():
  """Some that are ended would have recovered, but not to the best."""
  whole = {}
  for name, curve in CURVES.items():
    every, _ = records_of(curve)
    whole[name] = min(record['selection'] for record in every)
  with_alarms = {name: ended(curve)[1] for name, curve in CURVES.items()}
  winner = min(whole, key=whole.get)
  assert min(with_alarms, key=with_alarms.get) == winner
  assert with_alarms[winner] == whole[winner]


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('noise', -0.1),
    ('margin', float('nan')),
    ('mle_rise', float('inf')),
    ('recall_fall', 1.5),
    ('saturated', -0.5),
    ('patience', 0),
    ('window', 2),
  ],
)
def test_a_rule_that_makes_no_sense_is_refused(field, value):
  rules = dataclasses.replace(RULES, **{field: value})
  with pytest.raises(errors.UserError) as caught:
    rules.check('tune.alarms')
  assert str(caught.value).startswith(f'config.tune.alarms.{field} is ')
  RULES.check('tune.alarms')
