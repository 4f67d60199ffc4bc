"""What a round's log says of it, on records made up here.

test_doctor.py has records of real rounds.
"""

import pytest

from ddo_jax.tuning import findings

NUMBERS = {'alpha': 1.0, 'beta': 0.1, 'learning_rate': 1e-3}
# Of a healthy round on the digits.
HEALTHY = {
  'loss': 1.29,
  'chance_loss': 1.386,
  'accuracy': 0.56,
  'saturated': 0.01,
  'mle_loss': 23.0,
  'log_ratio_real_std': 2.5,
  'log_ratio_fake_std': 4.0,
  'waiting': 0.1,
  'images_per_second': 20_000.0,
}


def log_of(scores=(0.9, 0.5, 0.3), early=HEALTHY, **late):
  """A log of eleven records, and evaluations spread over them."""
  log = []
  for step in range(0, 110, 10):
    record = {'kind': 'train', 'step': step}
    log.append(record | early | (late if step > 50 else {}))
  gap = 100 // max(len(scores) - 1, 1)
  for place, score in enumerate(scores):
    log.append({'kind': 'eval', 'step': place * gap, 'selection': score})
  return log


def ill(log, **numbers):
  found = findings.of_log(log, NUMBERS | numbers)
  assert [each.kind for each in found] == [
    'saturated',
    'dead',
    'overshooting',
    'starved',
  ]
  for each in found:
    assert bool(each.advice) == bool(each.flags) == bool(each.found)
  return {each.kind: each for each in found if each.found}


def only(log, **numbers):
  (each,) = ill(log, **numbers).values()
  return each


def test_a_healthy_round():
  assert ill(log_of()) == {}
  assert findings.warnings(log_of(), NUMBERS) == []


def test_saturated():
  """The second half of a round counts."""
  bad = HEALTHY | {'saturated': 1.0, 'accuracy': 0.5, 'loss': 1.386}
  assert ill(log_of(early=bad, **HEALTHY)) == {}
  assert ill(log_of(saturated=0.49)) == {}
  found = only(log_of(saturated=0.6), beta=10.0)
  assert found.kind == 'saturated'
  assert '|βΔ| > 4 on 60% of the rows' in found.evidence
  assert found.flags == ('--config.ddo.objective.beta=0.2',)  # 1/4 in one digit


def test_dead_where_logits_are_at_zero():
  found = only(log_of(), beta=1e-3)
  assert found.kind == 'dead'
  assert 'logits spread by 0.004 (β 0.001 · std(Δ) 4 nats)' in found.evidence
  assert found.flags == ('--config.ddo.objective.beta=0.2',)
  assert ill(log_of(), beta=6e-3) == {}


def test_dead_where_the_weights_have_hardly_moved():
  still = {'log_ratio_real_std': 0.01, 'log_ratio_fake_std': 0.02}
  found = only(log_of(early=HEALTHY | still))
  assert found.kind == 'dead'
  assert found.flags == ('--config.ddo.optimizer.learning_rate=0.01',)


def test_dead_where_the_discriminator_guesses():
  guesses = {'accuracy': 0.5, 'loss': 1.38}
  assert only(log_of(**guesses)).kind == 'dead'
  # Worse than chance, or better while all rows go one way, is not dead.
  assert ill(log_of(**guesses | {'loss': 1.8})) == {}
  assert ill(log_of(**guesses | {'loss': 1.0})) == {}


@pytest.mark.parametrize(
  ('scores', 'found'),
  [
    ((0.9, 0.3, 0.5, 0.8), False),  # past its best, which is promoted
    ((0.9, 0.3, 0.5, 1.0), False),
    ((0.9, 0.3, 0.5, 1.2), True),
    ((0.9, 1.2, 0.5, 0.3), True),  # it came back, by luck
    ((0.9, 0.92, 0.95, 0.95), False),  # nothing gained, and nothing lost
    ((0.9, 0.92, 0.95, 1.02), True),
    ((0.9, 9.0), False),  # too early
  ],
)
def test_overshooting_by_scores(scores, found):
  assert ('overshooting' in ill(log_of(scores))) == found


def test_overshooting_by_other_signs():
  found = only(log_of(mle_loss=50.0), alpha=4.0)
  assert 'loss on real rows rose from 23 to 50' in found.evidence
  assert found.flags == (
    '--config.ddo.objective.alpha=1',
    '--config.ddo.optimizer.learning_rate=0.0003',
  )
  log = log_of((0.9, 0.5, 0.3, 0.3))
  recalls = iter((0.8, 0.8, 0.6, 0.6))
  for record in log:
    if record['kind'] == 'eval':
      record['recall'] = next(recalls)
  assert 'recall fell from 0.800 to 0.600' in only(log).evidence


def test_what_runs_away_is_dead_and_overshoots():
  """Nothing brakes a round whose logits are at zero."""
  found = ill(log_of((0.9, 0.5, 9.0)), beta=1e-5)
  assert list(found) == ['dead', 'overshooting']
  assert found['overshooting'].flags == found['dead'].flags


def test_starved():
  found = only(log_of(waiting=0.9) + log_of(early=HEALTHY | {'waiting': 0.8}))
  assert 'for up to 80% of the time, at 20,000 images/s' in found.evidence
  assert not found.afresh
  log = [{n: v for n, v in r.items() if n != 'waiting'} for r in log_of()]
  assert findings.of_log(log, NUMBERS)[-1].found is None  # an earlier version


def test_too_early_to_tell():
  for count in (0, 1, 4):
    for each in findings.of_log(log_of()[:count], NUMBERS):
      assert each.found is None
  bad = [r | {'bad': True} for r in log_of(()) if r['step']]
  assert findings.of_log(bad, NUMBERS)[0].found is None
  control = [{'kind': 'train', 'step': step, 'loss': 1.0} for step in range(9)]
  assert all(each.found is None for each in findings.of_log(control, NUMBERS))


def test_a_warning_is_one_line_with_its_remedy():
  (line,) = findings.warnings(log_of(saturated=0.6), NUMBERS)
  assert line.startswith('saturated: |βΔ| > 4 on 60% of the rows')
  assert line.endswith('--config.ddo.objective.beta=0.2')
