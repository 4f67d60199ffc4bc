"""A run's folder as one HTML page that needs nothing beside it."""

import base64
import collections
import dataclasses
import datetime
import html
import json
import math
import pathlib
from typing import Any

import numpy as np

from ddo_jax import errors
from ddo_jax.evaluation.metrics import meanings
from ddo_jax.report import figures
from ddo_jax.runtime import records

_CSS = f"""
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 960px; margin: 2.5rem auto 4rem; padding: 0 1.25rem; }}
h1 {{ font-size: 1.7rem; margin: 0; }} figure {{ margin: .6rem 0; }}
h2 {{ font-size: 1.2rem; margin: 2.2rem 0 .5rem; padding-top: .8rem;
  border-top: 1px solid #ddd; }}
h3 {{ font-size: 1rem; margin: 1.2rem 0 .4rem; }}
p, figcaption {{ max-width: 50rem; margin: .4rem 0; }}
.headline {{ font-size: 1.25rem; font-weight: 600; max-width: none; }}
.note, figcaption {{ color: #555; font-size: .86rem; font-weight: 400; }}
.alert {{ border-left: 4px solid {figures.FAKE}; padding: .3rem .8rem;
  background: #fdf3ec; }}
table {{ border-collapse: collapse; margin: .6rem 0; font-size: .92rem;
  font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }}
th, td {{ text-align: right; vertical-align: top; white-space: nowrap;
  padding: .4rem 0 .4rem 1.6rem; border-bottom: 1px solid #eee; }}
tr > :first-child {{ text-align: left; padding-left: 0; }}
.plain tr > * {{ text-align: left; white-space: normal; }}
td .note {{ display: block; white-space: normal; max-width: 27rem; }}
.better {{ color: {figures.REAL}; }} .worse {{ color: {figures.FAKE}; }}
.mark {{ display: inline-block; width: 1.2em; }}
img {{ max-width: 100%; height: auto; }}
.pair {{ display: flex; flex-wrap: wrap; gap: 1.5rem; }}
.pair figure {{ margin: 0; max-width: {figures.GRID}px; }}
.pixels {{ image-rendering: pixelated; }} .alert:empty {{ display: none; }}
"""


@dataclasses.dataclass(frozen=True)
class _Run:
  """What a run's folder holds.

  Attributes:
    folder: the workdir.
    config: the recorded config, by dotted names.
    summary: summary.json; {} while the run is unfinished.
    rounds: the results of the rounds that are done.
    columns: the scores of the first reference, then those after each round.
    stages: the records of each round, done or not.
    pretrain: the records of the pretraining.
  """

  folder: pathlib.Path
  config: dict[str, Any]
  summary: dict[str, Any]
  rounds: list[dict[str, Any]]
  columns: list[dict[str, Any]]
  stages: figures.Stages
  pretrain: list[dict[str, Any]]


def _read(workdir: pathlib.Path) -> _Run:
  """Reads a run's folder, finished or not.

  Raises:
    errors.UserError: the folder holds no run, or a file of it is damaged.
  """
  config = records.read_json(workdir / 'config.json')
  if not isinstance(config, dict) or 'evaluation.metric' not in config:
    raise errors.UserError(
      f'{workdir}/config.json is not that of a run; name the --workdir of one'
    )
  path = workdir / 'summary.json'
  summary = records.read_json(path) if path.exists() else {}
  rounds = {r['round']: r for r in summary.get('rounds', [])}
  # A run in progress, or one that plays further rounds, has news here.
  for path in workdir.glob('round_*/done.json'):
    result = records.read_json(path)
    rounds[result['round']] = result
  played = [rounds[index] for index in sorted(rounds)]
  columns = [result['before'] for result in played[:1]]
  columns += [result['after'] for result in played]
  stages = collections.defaultdict(list)
  for record in records.read_log(workdir):
    stages[record['stage']].append(record)
  pretrain = stages.pop('pretrain', [])
  stages.pop('tokenizer', None)
  return _Run(workdir, config, summary, played, columns, dict(stages), pretrain)


def _table(head: list[str], rows: list[list[str]], css: str = '') -> str:
  """Returns a table of cells that are HTML already."""

  def row(cells: list[str], tag: str) -> str:
    return ''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)

  body = ''.join(f'<tr>{row(cells, "td")}</tr>\n' for cells in rows)
  return (
    f'<table class="{css}"><thead><tr>{row(head, "th")}</tr></thead>\n'
    f'<tbody>{body}</tbody></table>\n'
  )


def _figure(content: bytes | None, note: str, size: str = 'width="960"') -> str:
  """Returns a picture under a line on how to read it; '' without a picture."""
  if content is None:
    return ''
  kind = 'png' if content.startswith(b'\x89PNG') else 'jpeg'
  source = f'data:image/{kind};base64,{base64.b64encode(content).decode()}'
  return (
    f'<figure><figcaption>{note}</figcaption>'
    f'<img {size} alt="" src="{source}"></figure>\n'
  )


def _decimals(scores: list[dict[str, Any]], digits: int) -> int:
  """Returns decimals that show so many digits of the standard deviation."""
  sizes = [score['sd'] for score in scores if score['sd']]
  if not sizes:  # a single seed: digits of the value itself
    sizes = [abs(score['mean']) for score in scores if score['mean']]
    digits += 2
  typical = np.median(sizes or [1])
  return max(0, digits - 1 - math.floor(math.log10(typical)))


def _text(score: dict[str, Any], decimals: int) -> str:
  """Returns a score as it is printed.

  That is mean ± standard deviation, after the minimum where published numbers
  are minima.
  """
  if score['mean'] is None:
    return '–'
  sd = '' if score['sd'] is None else f' ± {score["sd"]:.{decimals}f}'
  mean = f'{score["mean"]:.{decimals}f}{sd}'
  if score.get('headline') == 'minimum' and score['sd'] is not None:
    return f'{score["minimum"]:.{decimals}f} (mean {mean})'
  return mean


def _mark(name: str, before: dict[str, Any], after: dict[str, Any]) -> str:
  """Says better or worse where all seeds do; one seed says nothing."""
  pairs = list(zip(before['values'], after['values'], strict=False))
  known = all(None not in pair for pair in pairs)
  if name in meanings.MEANINGS and len(pairs) > 1 and known:
    cost = meanings.MEANINGS[name].cost
    if all(cost(old) > cost(new) for old, new in pairs):
      return '<span class="mark better" title="better">✓</span>'
    if all(cost(old) < cost(new) for old, new in pairs):
      return '<span class="mark worse" title="worse">✗</span>'
  return '<span class="mark"></span>'


def _headline(run: _Run) -> str:
  """Returns the path of the selection metric, from the first reference on."""
  metric = run.config['evaluation.metric']
  scores = [column[metric] for column in run.columns if metric in column]
  if not scores:
    return f'0 of {run.config["rounds"]} rounds done'
  decimals = _decimals(scores, 1)
  path = ' → '.join(_text(score, decimals) for score in scores)
  count = len(run.rounds)
  rounds = 'round' if count == 1 else 'rounds'
  return f'{html.escape(metric)} {path} in {count} {rounds}'


def _header(run: _Run) -> str:
  config = run.config
  alert = ''
  if not run.summary or len(run.rounds) < config['rounds']:
    alert = f'Unfinished: {len(run.rounds)} of {config["rounds"]} rounds done.'
    logs = [run.pretrain, *run.stages.values()]
    for last in logs[-1][-1:]:
      alert += f' Last record: {last["stage"]}, {last["images"]:,} images.'
  now = datetime.datetime.now().astimezone().strftime('%Y-%m-%d %H:%M %Z')
  about = (
    f'data {config["data.source"]} · model {config["model.type"]} · objective'
    f' {_objective(config)} · page written {now}'
  )
  if run.rounds:
    made = run.rounds[-1]['environment']
    about += f' · run on {made["devices"]} with jax {made["jax"]}'
    origin = run.rounds[-1]['provenance']
    if origin:
      about += f' · from {origin["file"]}, {origin["licence"]}'
  return (
    f'<h1>{html.escape(config["name"])}</h1>\n'
    f'<p class="headline">{_headline(run)}</p>\n'
    f'<p class="alert">{html.escape(alert)}</p>\n'
    f'<p class="note">{html.escape(about)}</p>\n'
  )


def _score_row(name: str, scores: list[dict[str, Any]]) -> list[str]:
  """Returns the cells of one score: what it is, then its value by column."""
  meaning = meanings.MEANINGS.get(name)
  note = 'A score; not judged.'
  if meaning:
    note = f'{meaning.measures}; {meaning.wish}.'
  cells = [f'{html.escape(name)}<span class="note">{note}</span>']
  decimals = _decimals(scores, 2)
  before = None
  for score in scores:
    mark = _mark(name, before, score) if before else ''
    cells.append(f'{_text(score, decimals)} {mark}')
    before = score
  return cells


def _sizes(run: _Run) -> str:
  """Returns 'seeds × samples', as they were really used."""
  result = run.rounds[0]
  any_score = next(iter(result['before'].values()))
  seeds = len(any_score['values'])
  # Rounds of earlier versions do not say; the config may have left it open.
  samples = result.get('samples', run.config['evaluation.samples'])
  return f'{seeds} × {samples:,} samples' if samples else f'{seeds} seeds'


def _scores(run: _Run) -> str:
  if not run.columns:
    return ''
  rows = [
    _score_row(name, [column[name] for column in run.columns])
    for name in run.columns[0]
  ]
  head = ['', 'reference']
  head += [f'after round {result["round"]}' for result in run.rounds]
  return _table(head, rows) + (
    f'<p class="note">{_sizes(run)}: mean ± standard deviation over the seeds,'
    ' none of which chose a checkpoint. <span class="better">✓</span> better,'
    ' <span class="worse">✗</span> worse than the column before with every'
    ' seed, the same seeds in all columns.</p>\n'
  )


def _objective(config: dict[str, Any]) -> str:
  """Returns the name of the rounds' objective."""
  # Earlier versions recorded a word, such as 'ddo', in the place of an object.
  return config.get('ddo.objective.type') or config['ddo.objective']


def _numbers(config: dict[str, Any], index: int) -> dict[str, float]:
  """Returns the numbers that a round was played with.

  They are those of the objective, and the peak learning rate. A config records
  one entry a round, of which the last repeats.
  """
  names = [name for name in config if name.startswith('ddo.objective.')]
  names.append('ddo.optimizer.learning_rate')
  # Earlier versions recorded all numbers of a phase side by side.
  if config.get('ddo.objective') == 'ddo':
    names += ['ddo.alpha', 'ddo.beta']
  names.append('ddo.learning_rate')
  numbers = {}
  for name in names:
    values = config.get(name)
    if isinstance(values, list):
      last = len(values) - 1
      numbers[name.split('.')[-1]] = values[min(index, last)]
  return numbers


def _round_note(run: _Run, result: dict[str, Any]) -> str:
  """Says what a round promoted, and with which numbers it was played."""
  chosen = result['promoted']
  note = 'the reference stays: no evaluation was better'
  if chosen['step']:
    note = (
      f'step {chosen["step"]} promoted ({chosen["images"]:,} images,'
      f' {chosen["profile"]})'
    )
  for name, value in _numbers(run.config, result['round']).items():
    note += f', {name} {value:g}'
  return note


def _grids(run: _Run) -> str:
  parts = []
  for result in run.rounds:
    index = result['round']
    note = html.escape(_round_note(run, result))
    parts.append(
      f'<h3>Round {index} <span class="note">{note}</span></h3>\n'
      '<div class="pair">'
    )
    for name in ('before', 'after'):
      path = run.folder / f'round_{index:03d}' / f'{name}.png'
      picture, small = figures.sample_grid(path)
      size = 'class="pixels"' if small else ''
      parts.append(_figure(picture, f'{name.title()}.', size))
    parts.append('</div>\n')
  return ''.join(parts)


def _curves(run: _Run, control: _Run | None) -> str:
  metric = run.config['evaluation.metric']
  note = html.escape(
    f'One seed for all evaluations; {metric} chooses what is promoted.'
  )
  if control:
    name = html.escape(control.config['name'])
    objective = html.escape(_objective(control.config))
    note += (
      f' Dashed: the control {name}, objective {objective};'
      f' {_headline(control)}.'
    )
  metrics = [metric]
  metrics += [name for name in ('fd_train', 'fd_test') if name != metric]
  promoted = {}
  for result in run.rounds:
    promoted[f'round_{result["round"]:03d}'] = result['promoted']['step']
  png = figures.evaluations(
    run.stages, metrics, promoted, control.stages if control else {}
  )
  return _figure(png, note)


def _warnings(run: _Run) -> str:
  parts = []
  for result in run.rounds:
    for line in result['warnings']:
      text = f'Round {result["round"]}: {html.escape(line)}.'
      parts.append(f'<p class="alert">{text}</p>\n')
  return ''.join(parts)


def _pretraining_seconds(run: _Run) -> float | None:
  """Returns how long the pretraining took; None if it has not ended."""
  done = run.folder / 'pretrain' / 'done.json'
  seconds = run.summary.get('seconds', {})
  if 'pretrain' in seconds:
    return seconds['pretrain']
  return records.read_json(done)['seconds'] if done.exists() else None


def _seconds(run: _Run) -> str:
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
  return _table(['seconds', *stages, 'all'], rows)


def _config(run: _Run) -> str:
  rows = [
    [html.escape(name), html.escape(json.dumps(value))]
    for name, value in run.config.items()
  ]
  table = _table(['field', 'value'], rows, 'plain')
  return f'<details><summary>All fields</summary>{table}</details>\n'


def _sections(run: _Run, control: _Run | None) -> dict[str, str]:
  """Returns HTML by heading, in the order of the page; '' where nothing is."""
  return {
    'Scores': _scores(run),
    'Samples': _grids(run),
    'Choice of the checkpoint': _curves(run, control),
    'Logits': _figure(
      figures.histograms(run.stages),
      'βr of one batch, r the log-ratio of model and reference; bins beyond ±6'
      ' are open. All start at 0; real should move right of fake.',
    ),
    'Training': _figure(
      figures.diagnostics(run.stages, run.pretrain),
      'Thin: one batch a record. Thick: their running mean.',
    ),
    'Log-ratio by noise level': _figure(
      figures.by_noise_level(run.stages),
      'One batch, the last record of each round. Equal bins of ln σ over its'
      ' mean ± 2 standard deviations; the outer ones are open.',
    ),
    'Warnings': _warnings(run) or '<p class="note">None.</p>\n',
    'Time': _seconds(run),
    'Config': _config(run),
  }


def write(
  workdir: pathlib.Path, control: pathlib.Path | None = None
) -> pathlib.Path:
  """Writes report.html: one page, viewed without a network.

  An unfinished run gives a page of what exists so far.

  Args:
    workdir: the folder of a run.
    control: the folder of a run whose objective is MLE, whose curve is drawn
      beside.

  Returns:
    The path of the page.

  Raises:
    errors.UserError: a folder holds no run, or a file of it is damaged.
  """
  run = _read(workdir)
  other = _read(control) if control else None
  body = ''
  for name, part in _sections(run, other).items():
    if part:
      body += f'<h2>{name}</h2>\n{part}'
  title = html.escape(run.config['name'])
  path = workdir / 'report.html'
  path.write_text(
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<title>{title}</title>\n<style>{_CSS}</style>'
    f'</head><body>\n{_header(run)}{body}</body></html>\n',
    encoding='utf-8',
  )
  return path
