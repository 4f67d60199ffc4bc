"""The scores of a run: its headline and its table."""

import math
from typing import Any

import numpy as np

from ddo_jax.evaluation.metrics import meanings
from ddo_jax.report import markup
from ddo_jax.report import run_folder


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


def headline(run: run_folder.Run) -> str:
  """Returns the path of the selection metric, from the first reference on."""
  metric = run.metric
  scores = [column[metric] for column in run.columns if metric in column]
  if not scores:
    return run.progress
  decimals = _decimals(scores, 1)
  path = ' → '.join(_text(score, decimals) for score in scores)
  count = len(run.rounds)
  rounds = 'round' if count == 1 else 'rounds'
  return f'{metric} {path} in {count} {rounds}'


def _cells(
  name: str,
  scores: list[dict[str, Any]],
  control: dict[str, Any] | None,
) -> list[str]:
  """Returns the cells of one score: what it is, then its value by column."""
  meaning = meanings.MEANINGS.get(name)
  about = 'A score; not judged.'
  if meaning:
    about = f'{meaning.measures}; {meaning.wish}.'
  cells = [f'{markup.text(name)}<span class="note">{about}</span>']
  decimals = _decimals(scores, 2)
  before = scores[0]
  for score in scores:
    mark = _mark(name, before, score)
    cells.append(f'<span>{_text(score, decimals)} {mark}</span>')
    before = score
  if control:
    cells.append(_text(control[name], decimals) if name in control else '')
  return cells


def sizes(run: run_folder.Run) -> str:
  """Returns 'seeds × samples', as they were really used."""
  result = run.rounds[0]
  any_score = next(iter(result['before'].values()))
  seeds = len(any_score['values'])
  # Rounds of earlier versions do not say; the config may have left it open.
  samples = result.get('samples', run.config['evaluation.samples'])
  return f'{seeds} × {samples:,} samples' if samples else f'{seeds} seeds'


def table(run: run_folder.Run, control: run_folder.Run | None) -> str:
  """Returns all scores; the control's last ones in a column of their own."""
  if not run.columns:
    return ''
  head = ['', 'reference']
  head += [f'after round {result["round"]}' for result in run.rounds]
  last = None
  if control and control.rounds:
    last = control.columns[-1]
    head.append('control')
  rows = [
    _cells(name, [column[name] for column in run.columns], last)
    for name in run.columns[0]
  ]
  return markup.table(head, rows, 'scores') + markup.note(
    f'{sizes(run)}: mean ± standard deviation over the seeds, none of which'
    ' chose a checkpoint. <span class="better">✓</span> better, <span'
    ' class="worse">✗</span> worse than the column before with every seed, the'
    ' same seeds in all columns.'
  )
