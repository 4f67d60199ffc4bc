"""The doctor on recorded runs; see experiments/doctor_runs.py."""

import json
import operator
import pathlib
import shutil

import command_line
import numpy as np
import pytest

from configs import digits
from ddo_jax import errors
from ddo_jax import main
from ddo_jax.data import builders
from ddo_jax.report import figures
from ddo_jax.report import page
from ddo_jax.tuning import doctor

RECORDED = pathlib.Path(__file__).parent / 'recorded'
# What is wrong with each run, and the number that says so.
RUNS = {
  'healthy': {},
  'dead': {
    'dead': 'β 1e-05 · std(Δ)',
    'overshooting': 'recall fell from 0.8',
  },
  'saturated': {'saturated': '|βΔ| > 4 on 9'},
  'fast': {'overshooting': '(step 400) and 1.'},
  'overshooting': {'overshooting': 'the MLE loss on real rows rose from'},
  'unrounded': {'shortcut': 'values that real rows lack 1.00'},
  'brighter': {'shortcut': 'lowest value 1.00 (real -1, fake -0.75)'},
  'framed': {'shortcut': 'mean of the border 1.00'},
  'blurred': {'shortcut': 'finest detail 1.00'},
  'coarse': {'shortcut': 'values that fake rows lack 1.00'},
  'one_class': {'shortcut': 'share of class 7 0.20 (real 0.0995, fake 0.3)'},
  'starved': {'starved': 'the devices wait for rows for up to'},
}


@pytest.fixture(scope='module')
def stretched(tmp_path_factory):
  """A recipe of digits whose 17 grey levels are spread over 0 .. 255."""
  folder = tmp_path_factory.mktemp('stretched')
  for split, (images, labels) in builders.digits().items():
    spread = (images.astype(int) * 255 // 16).astype(np.uint8)
    np.savez(folder / f'{split}.npz', image=spread, label=labels)
  config = digits.get_config()
  config.data.source = str(folder / '{split}.npz')
  config.model.pixel_values = 256
  return config


@pytest.fixture
def run(tmp_path):
  """A copy of the healthy run, to be changed."""
  return pathlib.Path(shutil.copytree(RECORDED / 'healthy', tmp_path / 'run'))


def edit(run, **changes):
  path = run / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def lines_of(run):
  return (run / 'metrics.jsonl').read_text().splitlines(keepends=True)


def only(workdir, recipe=None):
  (stage,) = doctor.examine(workdir, recipe).stages
  return stage


@pytest.mark.parametrize('name', RUNS)
def test_what_each_run_is(name, stretched):
  recipe = stretched if name == 'unrounded' else None
  files = sorted((RECORDED / name).rglob('*'))
  stage = only(RECORDED / name, recipe)
  assert stage.ill == list(RUNS[name])
  for finding in stage.findings:
    # Runs whose pool is that of the healthy one were recorded without it.
    assert finding.found is not None or finding.kind in ('shortcut', 'starved')
    assert RUNS[name].get(finding.kind, '') in finding.evidence
  assert sorted((RECORDED / name).rglob('*')) == files  # nothing is written
  printed = str(stage)
  assert printed.startswith(f'round_000: {", ".join(RUNS[name]) or "healthy"}')
  # Each remedy is a command, of fields that there are.
  assert printed.count('\n    ddo-jax --config=digits --workdir=') == len(
    RUNS[name]
  )
  for finding in stage.findings:
    for flag in finding.flags:
      field, _, value = flag.removeprefix('--config.').partition('=')
      operator.attrgetter(field)(digits.get_config())
      assert value


def test_the_most_decisive_comes_first():
  kinds = ['shortcut', 'saturated', 'dead', 'overshooting', 'starved']
  found = only(RECORDED / 'healthy').findings
  assert [finding.kind for finding in found] == kinds


def test_an_interrupted_run_and_one_that_goes_on(run):
  lines = lines_of(run)
  path = run / 'metrics.jsonl'
  path.write_text(''.join(lines[:25]) + lines[25][:40])  # being written
  assert only(run).ill == []
  path.write_text(lines[0] + 'x' + lines[1] + ''.join(lines[2:5]))
  printed = str(only(run))
  assert '? dead: too early to tell: 3 records of training' in printed
  assert '? overshooting: too early to tell: 1 evaluations' in printed
  path.unlink()  # the pool is drawn, and nothing is trained
  (run / 'round_000' / 'fakes' / '.000001.npz.part').write_bytes(b'x')
  assert '  shortcut: ' in str(only(run))
  shutil.rmtree(run / 'round_000')
  path.write_text(lines[1])
  stage = only(run)
  assert str(stage).startswith('round_000: too early to tell\n')
  assert not doctor.Diagnosis([stage]).is_ill


def test_a_run_of_an_earlier_version(run):
  path = run / 'config.json'
  config = json.loads(path.read_text())
  for name in [n for n in config if n.startswith(('ddo.', 'evaluation.'))]:
    del config[name]
  config |= {'ddo.objective': 'ddo', 'ddo.alpha': [1.0], 'ddo.beta': [0.1]}
  config |= {'ddo.learning_rate': [1e-3], 'evaluation.metric': 'fd_train'}
  config['model.levels'] = config.pop('model.pixel_values')
  path.write_text(json.dumps(config))
  old = []
  for line in lines_of(run):
    record = json.loads(line)
    record.pop('waiting', None)
    old.append(json.dumps(record) + '\n')
  (run / 'metrics.jsonl').write_text(''.join(old))
  stage = only(run)
  assert stage.ill == []
  unknown = [each.kind for each in stage.findings if each.found is None]
  assert unknown == ['starved']
  assert 'β 0.1 ·' in str(stage)


def test_rows_that_cannot_be_read(run):
  edit(run, **{'data.source': str(run / 'gone.npz')})
  stage = only(run)
  assert '? shortcut: the rows cannot be read: no file' in str(stage)
  assert 'gone.npz' in str(stage)
  assert only(run, digits.get_config()).findings[0].found is False
  edit(run, **{'data.source': 'digits', 'model.type': 'Mine'})
  assert "model 'Mine'" in str(only(run))
  shutil.rmtree(run / 'round_000')  # samples drawn in the step leave no pool
  assert 'there is no fake pool here' in str(only(run))


def test_each_round_is_looked_at(run):
  """And a later one starts from what the one before promoted."""
  again = []
  for line in lines_of(RECORDED / 'saturated'):
    record = json.loads(line) | {'stage': 'round_001'}
    again.append(json.dumps(record) + '\n')
  (run / 'metrics.jsonl').write_text(''.join(lines_of(run) + again))
  edit(run, **{'ddo.objective.beta': [0.1, 100.0]})
  command = (
    'python -m ddo_jax.main --config=mine.py --config.rounds=2'
    f' --config.ddo.objective.alpha=1 --workdir {run}'
    ' --config.ddo.objective.beta=0.1,100'
  )
  (run / 'summary.json').write_text(json.dumps({'command': command}))
  healthy, saturated = doctor.examine(run).stages
  assert (healthy.ill, saturated.ill) == ([], ['saturated'])
  assert saturated.commands[1].startswith(
    'python -m ddo_jax.main --config=mine.py --config.ddo.objective.alpha=1'
    f' --workdir={run}_again --config.rounds=1'
    f' --config.init_from={run}/round_000/promoted'
    ' --config.ddo.objective.beta='
  )


def test_members_of_a_sweep(run):
  """Some are meant to be ill; of one that is asked for all is told."""
  members = [
    {'number': 0, 'origin': 'probe', 'settings': {'beta': 0.1}},
    {'number': 1, 'origin': 'sobol', 'settings': {'beta': 100.0, 'alpha': 2.0}},
  ]
  plan = {'members': members}
  (run / 'round_000' / 'study.json').write_text(json.dumps(plan))
  (run / 'metrics.jsonl').unlink()  # the round itself trains nothing
  for number, name in enumerate(('healthy', 'saturated')):
    folder = run / 'round_000' / 'members' / f'{number:03d}'
    folder.mkdir(parents=True)
    lines = ''.join(lines_of(RECORDED / name)).replace(
      '"round_000"', f'"round_000/{number:03d}"'
    )
    (folder / 'metrics.jsonl').write_text(lines)
  found = doctor.examine(run)
  assert not found.is_ill
  assert '\n  round_000/members/000: healthy\n' in str(found)
  assert str(found).endswith('\n  round_000/members/001: saturated')
  one = doctor.examine(folder)
  assert one.is_ill
  (stage,) = one.stages
  assert stage.findings[0].found is False  # its round's pool
  command = stage.commands[1]
  assert f'--workdir={run}_again ' in command
  assert '--config.tune.members=0 --config.ddo.objective.beta=' in command
  assert '--config.ddo.objective.alpha=2' in command
  shutil.rmtree(folder.parent / '000')
  assert doctor.examine(run).is_ill  # nothing is left that is healthy


@pytest.mark.parametrize(
  ('change', 'line'),
  [
    (shutil.rmtree, 'there is no folder'),
    (lambda run: (run / 'config.json').unlink(), 'holds no run, for it has no'),
    (lambda run: (run / 'config.json').write_text('{"na'), 'cannot read'),
    (
      lambda run: (run / 'config.json').write_text('{"a": 1}'),
      'is not that of a run',
    ),
    (lambda run: edit(run, **{'ddo.objective.type': 'MLE'}), 'is a control'),
  ],
)
def test_a_mistake_is_one_line(run, change, line):
  change(run)
  with pytest.raises(errors.UserError, match=line) as caught:
    doctor.examine(run)
  assert '\n' not in str(caught.value)


def test_a_pretraining_is_no_round(run):
  shutil.rmtree(run / 'round_000')
  record = {'stage': 'pretrain', 'kind': 'train', 'step': 9, 'images': 2304}
  (run / 'metrics.jsonl').write_text(json.dumps(record) + '\n')
  with pytest.raises(errors.UserError, match=r'no round yet, and has .* 2,304'):
    doctor.examine(run)


def test_the_command_line():
  """A program that calls it learns by its status what came of it."""
  healthy = f'--workdir={RECORDED / "healthy"}'
  status, printed = command_line.run('--mode=doctor', healthy)
  assert status == 0, printed
  assert 'round_000: healthy\n' in printed
  ill = f'--workdir={RECORDED / "saturated"}'
  status, printed = command_line.run('--mode=doctor', ill)
  assert status == 2, printed
  assert '! saturated: ' in printed


def test_the_report_shows_what_is_ill(tmp_path, monkeypatch):
  monkeypatch.setattr(figures, 'DPI', 30)
  run = shutil.copytree(RECORDED / 'saturated', tmp_path / 'run')
  text = page.write(pathlib.Path(run)).read_text()
  assert '<p class="alert">Round 0: saturated: |βΔ| &gt; 4 on' in text


def test_a_notebook_calls_it():
  assert not main.doctor(RECORDED / 'healthy').is_ill
