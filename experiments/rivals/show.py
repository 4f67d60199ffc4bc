"""The rivals' table and pictures."""

import pathlib
from typing import Any

import matplotlib

matplotlib.use('Agg')
from matplotlib import ticker
import matplotlib.pyplot as plt
import numpy as np

from ddo_jax.report import cost
from ddo_jax.report import figures
from ddo_jax.report import grid
from experiments import tables
from experiments.rivals import bench as bench_lib

_SCORES = (
  'fd_train',
  'fd_test',
  'precision',
  'recall',
  'density',
  'coverage',
  'accuracy',
  'memorised',
)
# In the pictures; Okabe & Ito's colours.
_COLOURS = {
  'reference': '#000000',
  'mle': '#999999',
  'ddo': '#d55e00',
  'ddo_merged': '#f0a080',
  'neon': '#0072b2',
  'sims': '#56b4e9',
  'autoguidance': '#009e73',
  'cfg': '#cc79a7',
  'dg': '#e69f00',
}

Results = list[dict[str, Any]]


def _of(results: Results, name: str) -> list[dict[str, Any]]:
  """Returns what a method found on each seed; [] where it has no place."""
  found = [result['methods'][name] for result in results]
  return [one for one in found if 'scores' in one]


def table(results: Results, metric: str) -> str:
  """Returns Markdown: a row a method, mean ± sd over the pretraining seeds.

  Args:
    results: the seeds', see `__main__.one_seed`.
    metric: the score by which selection was made, and of the column at equal
      sampling.
  """
  first = results[0]['methods']
  known = next(one['scores'] for one in first.values() if 'scores' in one)
  scores = [name for name in _SCORES if name in known]
  columns = [
    *scores,
    'training F',
    'search F',
    'sampling F an image',
    f'{metric} at equal sampling F',
  ]
  rows = {}
  for name, one in first.items():
    found = _of(results, name)
    if not found:
      rows[one['title']] = [f'n/a: {one["unfit"]}', *[''] * (len(columns) - 1)]
      continue
    cells = [
      tables.mean_and_sd([seed['scores'][score] for seed in found])
      for score in scores
    ]
    searched = [
      seed['trained'] - seed['training'] + seed['selection'] for seed in found
    ]
    cells += [
      cost.short(np.mean([seed['training'] for seed in found])),
      cost.short(np.mean(searched)),
      f'{np.mean([seed["sampling"] for seed in found]):.1f}',
    ]
    alike = [seed.get('equal_sampling', seed) for seed in found]
    if None in alike:
      cells.append('n/a')
    else:
      values = [seed['scores'][metric] for seed in alike]
      cells.append(tables.mean_and_sd(values))
    rows[one['title']] = cells
  return tables.markdown(columns, rows)


def _against_training(axes: Any, results: Results, name: str) -> None:
  """Draws the best look so far against the compute behind it, on the mean."""
  found = _of(results, name)
  if not found or not found[0]['looks']:
    return
  spent = sorted({look['training'] for one in found for look in one['looks']})
  start = [result['first_look'] for result in results]
  curves = []
  for one, first in zip(found, start, strict=True):
    best = [
      min(
        [first]
        + [look['selection'] for look in one['looks'] if look['training'] <= at]
      )
      for at in spent
    ]
    curves.append([first, *best])
  axes.plot(
    [0, *spent],
    np.mean(curves, axis=0),
    marker='.',
    color=_COLOURS[name],
    label=found[0]['title'],
  )


def _against_sampling(axes: Any, results: Results, name: str) -> None:
  """Draws the score against the compute of an image, on the mean."""
  curves = [one['curve'] for one in _of(results, name) if 'curve' in one]
  if not curves:
    return
  points = [
    [[point['sampling'], point['score']] for point in curve] for curve in curves
  ]
  spent, score = np.mean(points, axis=0).T
  title = results[0]['methods'][name]['title']
  axes.plot(spent, score, marker='.', color=_COLOURS[name], label=title)


def picture(path: pathlib.Path, results: Results, metric: str) -> None:
  """Draws score against training compute, and against sampling compute.

  The second is left out where no sampler has steps to leave out.
  """
  methods = results[0]['methods']
  names = [name for name in _COLOURS if name in methods]
  count = 1 + any('curve' in methods[name] for name in names)
  with plt.rc_context(figures.STYLE):
    figure, panels = plt.subplots(
      1, count, figsize=(4.5 * count, 3.6), squeeze=False
    )
    left, right = panels[0, 0], panels[0, -1]
    for name in names:
      _against_training(left, results, name)
      if count == 2:
        _against_sampling(right, results, name)
    if count == 2:
      right.set(
        title='shorter sampling',
        xlabel='sampling, forward-equivalents an image',
        ylabel=f'{metric}, reporting seed',
      )
    left.set(
      title='best look so far',
      xlabel='training, forward-equivalents, pool included',
      ylabel=f'{metric}, selection seed',
    )
    for axes in panels[0]:
      axes.xaxis.set_major_formatter(ticker.EngFormatter())
      low, high = axes.dataLim.intervaly
      if high > 3 * low:
        axes.set_yscale('log')
        axes.yaxis.set_major_formatter('{x:g}')
        axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter('{x:g}')
    lines = {line.get_label(): line for line in (*left.lines, *right.lines)}
    figure.legend(
      lines.values(),
      lines.keys(),
      loc='upper center',
      bbox_to_anchor=(0.5, 0),
      ncols=2 * count,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=figures.DPI, bbox_inches='tight')
    plt.close(figure)


def sheet(path: pathlib.Path, folder: pathlib.Path, results: Results) -> None:
  """Draws the same seeds of every method, a row each, in the table's order.

  Args:
    path: the picture's.
    folder: that of the first seed, where the methods left their samples.
    results: the seeds'.
  """
  names = [name for name in results[0]['methods'] if _of(results[:1], name)]
  pixel_values = results[0]['pixel_values']
  rows = [np.load(folder / name / 'first.npy') for name in names]
  images = grid.grid(np.concatenate(rows), bench_lib.SHOWN, pixel_values)
  titles = [results[0]['methods'][name]['title'] for name in names]
  with plt.rc_context(figures.STYLE):
    height = 0.32 * len(names)
    figure, axes = plt.subplots(figsize=(9, height))
    axes.imshow(images.squeeze(), cmap='gray', interpolation='nearest')
    step = images.shape[0] / len(names)
    axes.set_yticks([(row + 0.5) * step for row in range(len(names))], titles)
    axes.set_xticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
      spine.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=figures.DPI, bbox_inches='tight')
    plt.close(figure)


def write(
  output: pathlib.Path,
  results: Results,
  metric: str,
  workdir: pathlib.Path,
) -> None:
  """Writes the table and the pictures beside the output."""
  text = table(results, metric)
  output.with_suffix('.md').write_text(text + '\n')
  picture(output.with_suffix('.png'), results, metric)
  sheet(
    output.with_name(f'{output.stem}_samples.png'),
    workdir / f'seed_{results[0]["seed"]}',
    results,
  )
