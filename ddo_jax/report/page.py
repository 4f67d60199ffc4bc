"""A run's folder as one HTML page that needs nothing beside it."""

import base64
import collections
import dataclasses
import datetime
import html
import itertools
import json
import math
import pathlib
from typing import Any

import numpy as np

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax.report import figures
from ddo_jax.runtime import records

_LOWER = ('lower is better', lambda v: v)
_HIGHER = ('higher is better', lambda v: -v)
# Metric: (what is good, its cost: less is better, what it measures).
_METRICS = {
  'fd_train': (*_LOWER, 'Fréchet distance of samples to the training images'),
  'fd_test': (*_LOWER, 'Fréchet distance of samples to held-out images'),
  'accuracy': (*_HIGHER, 'Share of samples classified as the class asked for'),
  'precision': (*_HIGHER, 'Share of samples that lie among the real images'),
  'recall': (*_HIGHER, 'Share of real images that lie among the samples'),
  'nn_ratio': (
    'near 1 is better: below, samples are copies; above, off the data',
    lambda v: abs(v - 1),
    'Distance to the nearest training image, over that of held-out images',
  ),
  # By definition 0.02 of the held-out images: to have fewer is no merit.
  'memorised': (
    'up to 0.02 is good',
    lambda v: max(v - 0.02, 0),
    'Share of samples nearer to a training image than 98 % of held-out images',
  ),
}
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
  """What is on disk: results of rounds that are done, records by stage."""

  folder: pathlib.Path
  config: dict[str, Any]
  summary: dict[str, Any]
  rounds: list[dict[str, Any]]
  columns: list[dict[str, Any]]  # scores of the reference, then after rounds
  stages: figures.Stages  # of the rounds, done or not
  pretrain: list[dict[str, Any]]


def _read(workdir: pathlib.Path) -> _Run:
  """Reads a run's folder, finished or not; UserError if it is none."""
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
  rounds = [rounds[index] for index in sorted(rounds)]
  columns = [r['before'] for r in rounds[:1]] + [r['after'] for r in rounds]
  stages = collections.defaultdict(list)
  for record in records.read_log(workdir):
    stages[record['stage']].append(record)
  pretrain = stages.pop('pretrain', [])
  stages.pop('tokenizer', None)
  return _Run(workdir, config, summary, rounds, columns, dict(stages), pretrain)


def _table(head: list[str], rows: list[list[str]], css: str = '') -> str:
  """A table of cells that are HTML already."""
  row = lambda cells, tag: ''.join(f'<{tag}>{c}</{tag}>' for c in cells)
  body = ''.join(f'<tr>{row(cells, "td")}</tr>\n' for cells in rows)
  return (
    f'<table class="{css}"><thead><tr>{row(head, "th")}</tr></thead>\n'
    f'<tbody>{body}</tbody></table>\n'
  )


def _figure(content: bytes | None, note: str, size: str = 'width="960"') -> str:
  """A picture under a line on how to read it; '' if there is none."""
  if content is None:
    return ''
  kind = 'png' if content.startswith(b'\x89PNG') else 'jpeg'
  source = f'data:image/{kind};base64,{base64.b64encode(content).decode()}'
  return (
    f'<figure><figcaption>{note}</figcaption>'
    f'<img {size} alt="" src="{source}"></figure>\n'
  )


def _decimals(scores: list[dict[str, Any]], digits: int) -> int:
  """Decimals that show so many digits of the typical standard deviation."""
  sizes = [s['sd'] for s in scores if s['sd']]
  if not sizes:  # a single seed: digits of the value itself
    sizes, digits = [abs(s['mean']) for s in scores if s['mean']], digits + 2
  return max(0, digits - 1 - math.floor(math.log10(np.median(sizes or [1]))))


def _text(score: dict[str, Any], decimals: int) -> str:
  if score['mean'] is None:
    return '–'
  sd = '' if score['sd'] is None else f' ± {score["sd"]:.{decimals}f}'
  return f'{score["mean"]:.{decimals}f}{sd}'


def _mark(name: str, before: dict[str, Any], after: dict[str, Any]) -> str:
  """Says better or worse where all seeds do; one seed says nothing."""
  pairs = list(zip(before['values'], after['values'], strict=False))
  if name in _METRICS and len(pairs) > 1 and None not in sum(pairs, ()):
    cost = _METRICS[name][1]
    if all(cost(old) > cost(new) for old, new in pairs):
      return '<span class="mark better" title="better">✓</span>'
    if all(cost(old) < cost(new) for old, new in pairs):
      return '<span class="mark worse" title="worse">✗</span>'
  return '<span class="mark"></span>'


def _headline(run: _Run) -> str:
  """The selection metric, from the reference on."""
  metric = run.config['evaluation.metric']
  scores = [column[metric] for column in run.columns if metric in column]
  if not scores:
    return f'0 of {run.config["rounds"]} rounds done'
  decimals, count = _decimals(scores, 1), len(run.rounds)
  path = ' → '.join(_text(score, decimals) for score in scores)
  return f'{html.escape(metric)} {path} in {count} round{"s" * (count != 1)}'


def _header(run: _Run) -> str:
  config, alert = run.config, ''
  if not run.summary or len(run.rounds) < config['rounds']:
    alert = f'Unfinished: {len(run.rounds)} of {config["rounds"]} rounds done.'
    logs = [run.pretrain, *run.stages.values()]
    for last in logs[-1][-1:]:
      alert += f' Last record: {last["stage"]}, {last["images"]:,} images.'
  now = datetime.datetime.now().astimezone().strftime('%Y-%m-%d %H:%M %Z')
  about = (
    f'data {config["data.source"]} · model {config["model.type"]} · objective'
    f' {config["ddo.objective"]} · page written {now}'
  )
  if run.rounds:
    made = run.rounds[-1]['environment']
    about += f' · run on {made["devices"]} with jax {made["jax"]}'
    if origin := run.rounds[-1]['provenance']:
      about += f' · from {origin["file"]}, {origin["licence"]}'
  return (
    f'<h1>{html.escape(config["name"])}</h1>\n'
    f'<p class="headline">{_headline(run)}</p>\n'
    f'<p class="alert">{html.escape(alert)}</p>\n'
    f'<p class="note">{html.escape(about)}</p>\n'
  )


def _scores(run: _Run) -> str:
  if not run.columns:
    return ''
  rows = []
  for name in run.columns[0]:
    wish, _, meaning = _METRICS.get(name, ('not judged', None, 'A score'))
    scores = [column[name] for column in run.columns]
    decimals = _decimals(scores, 2)
    marks = ['', *(_mark(name, *pair) for pair in itertools.pairwise(scores))]
    cells = [_text(score, decimals) for score in scores]
    rows.append(
      [f'{html.escape(name)}<span class="note">{meaning}; {wish}.</span>']
      + [f'{c} {mark}' for c, mark in zip(cells, marks, strict=True)]
    )
  head = ['', 'reference'] + [f'after round {r["round"]}' for r in run.rounds]
  seeds, samples = (run.config[f'evaluation.{k}'] for k in ('seeds', 'samples'))
  return _table(head, rows) + (
    f'<p class="note">{seeds} × {samples:,} samples: mean ± standard deviation'
    ' over the seeds, none of which chose a checkpoint. <span class="better">✓'
    '</span> better, <span class="worse">✗</span> worse than the column before'
    ' with every seed, the same seeds in all columns.</p>\n'
  )


def _grids(run: _Run) -> str:
  parts = []
  for r in run.rounds:
    folder, chosen = run.folder / f'round_{r["round"]:03d}', r['promoted']
    note = 'the reference stays: no evaluation was better'
    if chosen['step']:
      note = f'step {chosen["step"]} promoted ({chosen["images"]:,} images'
      note += f', {chosen["profile"]})'
    names = ('alpha', 'beta', 'learning_rate')
    for name in names if run.config['ddo.objective'] == 'ddo' else names[2:]:
      value = config_lib.pick(run.config[f'ddo.{name}'], r['round'])
      note += f', {name} {value:g}'
    note = f'<span class="note">{html.escape(note)}</span>'
    parts.append(f'<h3>Round {r["round"]} {note}</h3>\n<div class="pair">')
    for name in ('before', 'after'):
      picture, small = figures.sample_grid(folder / f'{name}.png')
      size = 'class="pixels"' if small else ''
      parts.append(_figure(picture, f'{name.title()}.', size))
    parts.append('</div>\n')
  return ''.join(parts)


def _curves(run: _Run, control: _Run | None) -> str:
  metric = run.config['evaluation.metric']
  note = f'One seed for all evaluations; {metric} chooses what is promoted.'
  note = html.escape(note)
  if control:
    who = (
      f'{control.config["name"]}, objective {control.config["ddo.objective"]}'
    )
    note += f' Dashed: the control {html.escape(who)}; {_headline(control)}.'
  png = figures.evaluations(
    run.stages,
    list(dict.fromkeys([metric, 'fd_train', 'fd_test'])),
    {f'round_{r["round"]:03d}': r['promoted']['step'] for r in run.rounds},
    control.stages if control else {},
  )
  return _figure(png, note)


def _warnings(run: _Run) -> str:
  lines = [(r['round'], line) for r in run.rounds for line in r['warnings']]
  return ''.join(
    f'<p class="alert">Round {index}: {html.escape(line)}.</p>\n'
    for index, line in lines
  )


def _seconds(run: _Run) -> str:
  """Where the time went, a row a stage."""
  stages, spent = ('fakes', 'train', 'evaluate'), {}
  pretrain = run.summary.get('seconds', {}).get('pretrain')
  done = run.folder / 'pretrain' / 'done.json'
  if pretrain is None and done.exists():
    pretrain = records.read_json(done)['seconds']
  if pretrain is not None:
    spent['pretraining'] = [0, pretrain, 0]
  for r in run.rounds:
    spent[f'round {r["round"]}'] = [r['seconds'][stage] for stage in stages]
  if not spent:
    return ''
  spent['all'] = np.sum(list(spent.values()), axis=0).tolist()
  text = lambda values: [f'{v:,.1f}' if v else '' for v in values]
  rows = [[name, *text([*v, sum(v)])] for name, v in spent.items()]
  return _table(['seconds', *stages, 'all'], rows)


def _sections(run: _Run, control: _Run | None) -> dict[str, str]:
  """HTML by heading, in the order of the page; '' where nothing is yet."""
  fields = [(name, json.dumps(value)) for name, value in run.config.items()]
  config = [list(map(html.escape, field)) for field in fields]
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
      figures.by_level(run.stages),
      'One batch, the last record of each round. Equal bins of ln σ over its'
      ' mean ± 2 standard deviations; the outer ones are open.',
    ),
    'Warnings': _warnings(run) or '<p class="note">None.</p>\n',
    'Time': _seconds(run),
    'Config': '<details><summary>All fields</summary>'
    + _table(['field', 'value'], config, 'plain')
    + '</details>\n',
  }


def write(
  workdir: pathlib.Path, control: pathlib.Path | None = None
) -> pathlib.Path:
  """Writes report.html: one page, viewed without a network.

  An unfinished run gives a page of what exists. JAX starts, to name the device:
  beside a run in progress, set JAX_PLATFORMS=cpu.

  Args:
    workdir: of a run.
    control: of a run with the objective 'mle', drawn beside the curves.

  Returns:
    The path of the page.

  Raises:
    errors.UserError: a folder holds no run, or a file of it is damaged.
  """
  run, other = _read(workdir), _read(control) if control else None
  sections = _sections(run, other).items()
  body = ''.join(f'<h2>{name}</h2>\n{part}' for name, part in sections if part)
  path = workdir / 'report.html'
  path.write_text(
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<title>{html.escape(run.config["name"])}</title>\n<style>{_CSS}</style>'
    f'</head><body>\n{_header(run)}{body}</body></html>\n',
    encoding='utf-8',
  )
  return path
