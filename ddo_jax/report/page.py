"""A run's folder as one HTML page that needs nothing beside it."""

import datetime
import json
import pathlib
from typing import Any

import numpy as np

from ddo_jax.report import checks
from ddo_jax.report import cost
from ddo_jax.report import figures
from ddo_jax.report import markup
from ddo_jax.report import members
from ddo_jax.report import run_folder
from ddo_jax.report import samples
from ddo_jax.report import scores
from ddo_jax.runtime import disk
from ddo_jax.runtime import manifest

_HERE = pathlib.Path(__file__).parent


def _round_note(run: run_folder.Run, result: dict[str, Any]) -> str:
  """Says what a round promoted, and with which numbers it was played."""
  chosen = result['promoted']
  note = 'the reference stays: no evaluation was better'
  if chosen['step']:
    kind = chosen['profile']
    if chosen.get('candidate', 'member') != 'member':  # made of a member's
      kind += f', {chosen["candidate"]}'
    note = (
      f'step {chosen["step"]} promoted ({chosen["images"]:,} images, {kind})'
    )
  for name, value in run.numbers(result['round']).items():
    note += f', {name} {value:g}'
  return f'Round {result["round"]}: {note}.'


def _speed(stage: list[dict[str, Any]]) -> float | None:
  """Returns the median images/s of a stage's training; None if not logged."""
  # The first record has the compilation in it.
  train = [log for log in stage if log['kind'] == 'train' and log['step']]
  speeds = [log.get('images_per_second') for log in train]
  known = [speed for speed in speeds if speed is not None]
  return float(np.median(known)) if known else None


def _model(run: run_folder.Run) -> str:
  """Returns the name of the model, and what it costs."""
  about = run.config['model.type']
  found = run.summary.get('model')
  if found:
    about += (
      f', {found["parameters"]:,} parameters,'
      f' {cost.short(found["flops"])}FLOPs a forward pass of one image'
    )
  return about


def _numbers(run: run_folder.Run) -> str:
  """Returns ', alpha 2, beta 0.1 → 0.3': one number a round where they vary."""
  rounds = [run.numbers(result['round']) for result in run.rounds]
  rounds = rounds or [run.numbers(0)]
  names = dict.fromkeys(name for numbers in rounds for name in numbers)
  parts = ''
  for name in names:
    values = [
      f'{numbers[name]:.4g}' if name in numbers else '–' for numbers in rounds
    ]
    if len(set(values)) == 1:
      values = values[:1]
    parts += f', {name} {" → ".join(values)}'
  return parts


def _facts(run: run_folder.Run) -> dict[str, str]:
  """Returns what the run was made of and on, by name; text."""
  config = run.config
  facts = {'data': config['data.source'], 'model': _model(run)}
  facts['objective'] = run.objective + _numbers(run)
  if 'sampler.type' in config:
    facts['sampler'] = config['sampler.type']
    if 'sampler.num_steps' in config:
      facts['sampler'] += f', {config["sampler.num_steps"]} steps'
  if run.summary.get('ended'):
    facts['rounds ended'] = run.summary['ended']
  if run.rounds:
    made = run.rounds[-1]['environment']
    facts['run on'] = f'{made["devices"]} with jax {made["jax"]}'
    origin = run.rounds[-1]['provenance']
    if origin:
      facts['weights from'] = f'{origin["file"]}, {origin["licence"]}'
  logs = {'pretraining': run.pretrain}
  logs['rounds'] = [log for stage in run.stages.values() for log in stage]
  speeds = [
    f'{name} {_speed(log):,.0f} images/s'
    for name, log in logs.items()
    if _speed(log)
  ]
  if speeds:
    facts['training'] = ', '.join(speeds)
  now = datetime.datetime.now().astimezone()
  facts['page written'] = now.strftime('%Y-%m-%d %H:%M %Z')
  return facts


def _alerts(run: run_folder.Run) -> list[str]:
  """Returns what a reader should know first."""
  alerts = []
  if not run.is_finished:
    alert = f'Unfinished: {run.progress}.'
    logs = [run.pretrain, *run.stages.values()]
    for last in logs[-1][-1:]:
      alert += f' Last record: {last["stage"]}, {last["images"]:,} images.'
    alerts.append(alert)
  for index, warnings in run.warnings().items():
    alerts += [f'Round {index}: {warning}.' for warning in warnings]
  for stage in ('pretrain', *run.stages):
    log = run.pretrain if stage == 'pretrain' else run.stages[stage]
    bad = [str(record['step']) for record in log if record['kind'] == 'bad']
    if bad:
      alerts.append(
        f'{stage}: bad numbers at {len(bad)} of the steps, which were left out:'
        f' {", ".join(bad)}.'
      )
  return alerts


def _header(run: run_folder.Run) -> str:
  alerts = ''.join(
    f'<p class="alert">{markup.text(alert)}</p>\n' for alert in _alerts(run)
  )
  facts = ''.join(
    f'<dt>{name}</dt><dd>{markup.text(fact)}</dd>\n'
    for name, fact in _facts(run).items()
  )
  return (
    f'<h1>{markup.text(run.config["name"])}</h1>\n'
    f'<p class="headline">{markup.text(scores.headline(run))}</p>\n'
    f'{alerts}<dl>{facts}</dl>\n'
  )


def _curves(run: run_folder.Run, control: run_folder.Run | None) -> str:
  about = (
    f'One seed for all evaluations; {run.metric} chooses what is promoted.'
  )
  if control:
    about += (
      f' Dashed: the control {control.config["name"]}, objective'
      f' {control.objective}; {scores.headline(control)}.'
    )
  extra = run.config.get('evaluation.extra', ())
  metrics = list(dict.fromkeys((run.metric, *extra, 'fd_train', 'fd_test')))
  promoted = {}
  for result in run.rounds:
    promoted[f'round_{result["round"]:03d}'] = result['promoted']['step']
  panels = figures.evaluations(
    run.stages, metrics, promoted, control.stages if control else {}
  )
  notes = [_round_note(run, result) for result in run.rounds]
  return markup.panels(panels, about) + (
    markup.bullets(notes, 'plain') if notes else ''
  )


def _checks(run: run_folder.Run) -> str:
  content = ''
  if checks.checked(run):
    content += markup.bullets(checks.checked(run), 'yes')
  if checks.unchecked(run):
    content += '<h3>Not checked</h3>\n'
    content += markup.bullets(checks.unchecked(run), 'no')
  return content


def _pretraining_seconds(run: run_folder.Run) -> float | None:
  """Returns how long the pretraining took; None if it has not ended."""
  done = run.folder / 'pretrain' / 'done.json'
  seconds = run.summary.get('seconds', {})
  if 'pretrain' in seconds:
    return seconds['pretrain']
  return manifest.read_json(done)['seconds'] if done.exists() else None


def _seconds(run: run_folder.Run) -> str:
  """Returns a table of where the time went, a row a stage."""
  stages = ('fakes', 'train', 'evaluate')
  spent = {}
  pretrain = _pretraining_seconds(run)
  if pretrain is not None:
    spent['pretraining'] = [0, pretrain, 0]
  for result in run.rounds:
    seconds = [result['seconds'][stage] for stage in stages]
    spent[f'round {result["round"]}'] = seconds
  if not spent:
    return ''
  spent['all'] = np.sum(list(spent.values()), axis=0).tolist()
  rows = []
  for name, seconds in spent.items():
    values = [*seconds, sum(seconds)]
    cells = [f'{value:,.1f}' if value else '' for value in values]
    rows.append([name, *cells])
  return markup.table(['seconds', *stages, 'all'], rows)


def _fields(config: dict[str, Any]) -> str:
  rows = [
    [markup.text(name), markup.text(json.dumps(value))]
    for name, value in config.items()
  ]
  return markup.table(['field', 'value'], rows, 'plain')


def _config(run: run_folder.Run) -> str:
  """Returns how to play the run again."""
  content = ''
  command = run.summary.get('command')
  if command:
    content += f'<pre>{markup.text(command)}</pre>\n'
  changed = {
    name: run.config[name]
    for name in run.summary.get('changed', [])
    if name in run.config
  }
  if changed:
    content += markup.note('Fields that differ from their defaults:')
    content += _fields(changed)
  return (
    f'{content}<details><summary>All {len(run.config)} fields</summary>'
    f'{_fields(run.config)}</details>\n'
  )


def _sections(
  run: run_folder.Run, control: run_folder.Run | None
) -> dict[str, str]:
  """Returns HTML by heading, in the order of the page; '' where nothing is."""
  return {
    'Scores': scores.table(run, control),
    'Samples': samples.comparison(run),
    'Nearest training images': samples.neighbours(run),
    'Choice of the checkpoint': _curves(run, control),
    'Members': members.section(run),
    'Logits': markup.panels(
      figures.histograms(run.stages),
      'βr of one batch, r the log-ratio of model and reference; bins beyond ±6'
      ' are open. All start at 0; real should move right of fake.',
    ),
    'Training': markup.panels(
      figures.diagnostics(run.stages, run.pretrain),
      'Thin: one batch a record. Thick: their running mean.',
    ),
    'Log-ratio by noise level': markup.panels(
      figures.by_noise_level(run.stages),
      'One batch, the last record of each round. Equal bins of ln σ over its'
      ' mean ± 2 standard deviations; the outer ones are open.',
    ),
    'Checked': _checks(run),
    'Time': _seconds(run),
    'Play it again': _config(run),
  }


def write(
  workdir: pathlib.Path, control: pathlib.Path | None = None
) -> pathlib.Path:
  """Writes report.html: one page, viewed without a network.

  An unfinished run gives a page of what exists so far.

  Args:
    workdir: the folder of a run.
    control: the folder of a run whose objective is MLE, whose curve and last
      scores are set beside.

  Returns:
    The path of the page.

  Raises:
    errors.UserError: a folder holds no run, or a file of it is damaged.
  """
  run = run_folder.read(workdir)
  other = run_folder.read(control) if control else None
  body = _header(run)
  for name, part in _sections(run, other).items():
    if part:
      body += f'<h2>{name}</h2>\n{part}'
  style = (_HERE / 'page.css').read_text(encoding='utf-8')
  script = (_HERE / 'page.js').read_text(encoding='utf-8')
  path = workdir / 'report.html'
  content = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{markup.text(run.config['name'])}</title>
<style>
{style}</style></head>
<body>
<main>
{body}</main>
<dialog><nav><button>‹</button><span></span><button>›</button>
<button>close</button></nav><img alt=""></dialog>
<script>
{script}</script>
</body></html>
"""
  with disk.whole(path) as file:
    file.write(content.encode())
  return path
