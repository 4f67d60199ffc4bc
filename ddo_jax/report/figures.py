"""Figures of a run's records, as PNG bytes for the page.

Figures are drawn from stages, {folder name: its records of metrics.jsonl, in
order}. Each consists of panels, {title: PNG}, which a page can set side by side
or, on a phone, one below the other; there are none where the records hold
nothing to draw. Colours mean the same in all of them: blue is real, vermilion
is fake, and each round has its own.
"""

from collections.abc import Callable
import functools
import io
from typing import Any

import numpy as np

from ddo_jax.method import ddo
from ddo_jax.report import run_folder

# Okabe & Ito's colours, which the colour-blind can tell apart.
REAL = '#0072b2'
FAKE = '#d55e00'
DPI = 200  # gives two pixels for a CSS pixel
_SIZE = (3.4, 2.3)  # of a panel, in inches
_IMAGES = 'real images seen in the round'
STYLE = {
  'font.size': 9,
  'axes.titlesize': 9.5,
  'axes.titlelocation': 'left',
  'axes.edgecolor': '#888888',
  'axes.linewidth': 0.7,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.color': '#e8e8e8',
  'grid.linewidth': 0.6,
  'xtick.color': '#888888',
  'ytick.color': '#888888',
  'xtick.labelcolor': '#333333',
  'ytick.labelcolor': '#333333',
  'legend.frameon': False,
  'lines.linewidth': 1.4,
}
# The record's field, the title, and what to compare with: another field, a
# constant or nothing.
_DIAGNOSTICS = (
  ('loss', 'loss (dotted: at chance)', 'chance_loss'),
  ('accuracy', 'accuracy (dotted: at chance)', 0.5),
  ('saturated', 'saturated share, |βr| > 4', None),
  ('margin', 'margin: mean r, real − fake [nats]', 0.0),
  ('grad_norm', 'gradient norm', None),
  ('reference_distance', 'distance to the reference, |θ − θref|', None),
  ('mle_loss', 'MLE loss on real rows', None),
)


def _as_png(draw: Callable[..., Any]) -> Callable[..., dict[str, bytes]]:
  """Wraps a function that returns axes to return the PNGs of their figures."""

  @functools.wraps(draw)
  def png(*args, **kwargs):
    import matplotlib

    pictures = {}
    # Without pyplot there is no window, and no state shared with a notebook.
    with matplotlib.rc_context(STYLE):
      for axes in draw(*args, **kwargs):
        buffer = io.BytesIO()
        axes.figure.savefig(buffer, format='png', dpi=DPI, transparent=True)
        pictures[axes.get_title(STYLE['axes.titlelocation'])] = (
          buffer.getvalue()
        )
    return pictures

  return png


def _panel(title: str) -> Any:
  """Returns the axes of a new panel."""
  import matplotlib.figure

  figure = matplotlib.figure.Figure(_SIZE)
  # Fixed margins: an automatic layout would take half of the time.
  figure.subplots_adjust(left=0.17, right=0.97, bottom=0.21, top=0.88)
  axes = figure.subplots()
  axes.set_title(title)
  return axes


def _round_colors(count: int) -> np.ndarray:
  """Returns RGBA [count, 4], from dark to light in the order of the rounds."""
  import matplotlib

  return matplotlib.colormaps['viridis'](np.linspace(0.08, 0.72, count))


def _label(stage: str) -> str:
  """Maps a folder's name to a label: 'round_003' to 'round 3'."""
  return f'round {int(stage.removeprefix("round_"))}'


def _series(
  stage: list[dict[str, Any]], kind: str, name: str
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the curve of a field.

  Args:
    stage: the records of a stage.
    kind: the kind of records to take, 'train' or 'eval'.
    name: the field; records without it are left out.

  Returns:
    (images, values), each [N] float64; null in a record becomes NaN.
  """
  rows = [r for r in stage if r['kind'] == kind and name in r]
  images = np.array([r['images'] for r in rows], float)
  return images, np.array([r[name] for r in rows], float)


def _holds(stages: run_folder.Stages, kind: str, name: str) -> bool:
  """Returns whether any record of the kind has a number in the field."""
  values = [_series(stage, kind, name)[1] for stage in stages.values()]
  return any(np.isfinite(v).any() for v in values)


def _smooth(values: np.ndarray) -> np.ndarray:
  """Returns the running mean over a tenth of a curve; NaN takes no part."""
  window = np.ones(min(len(values), 2 * (len(values) // 20) + 1))
  known = np.isfinite(values)
  total = np.convolve(np.where(known, values, 0), window, 'same')
  count = np.convolve(known, window, 'same')
  return np.where(known, total / np.maximum(count, 1), np.nan)


def _scale(axes: Any, xlabel: str) -> None:
  """Sets the scales of axes that are to be compared.

  Numbers of images read 20k or 1.5M. All y axes are logarithmic where the
  curves together span more than a factor of four.
  """
  import matplotlib.ticker as ticker

  curves = [line.get_ydata() for axis in axes for line in axis.lines]
  values = np.concatenate(curves).astype(float)
  values = values[np.isfinite(values)]
  ratio = values.max() / values.min() if values.min() > 0 else 1
  for axis in axes:
    axis.set_xlabel(xlabel)
    axis.xaxis.set_major_locator(ticker.MaxNLocator(5))
    axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
    locator: ticker.Locator = ticker.MaxNLocator(5, steps=[1, 2, 5, 10])
    if ratio > 4:
      axis.set_yscale('log')
      axis.yaxis.set_minor_locator(ticker.NullLocator())
      subs = (1, 2, 3, 5, 7) if ratio < 20 else (1, 3)
      locator = ticker.LogLocator(subs=subs)
    axis.yaxis.set_major_locator(locator)
    axis.yaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))


@_as_png
def evaluations(
  rounds: run_folder.Stages,
  metrics: list[str],
  promoted: dict[str, int],
  control: run_folder.Stages,
) -> list[Any]:
  """Draws the scores of the in-round evaluations, a panel for each metric.

  Args:
    rounds: the stages of the run's rounds.
    metrics: the names of scores; those without a number are left out.
    promoted: the step to ring in each stage.
    control: the stages of another run's rounds, drawn dashed; {} for none.
  """
  both = rounds | {f'control {k}': v for k, v in control.items()}
  metrics = [metric for metric in metrics if _holds(both, 'eval', metric)]
  if not metrics:
    return []
  colors = _round_colors(max(len(rounds), len(control)))
  panels = [_panel(metric) for metric in metrics]
  for axis, metric in zip(panels, metrics, strict=True):
    for stage, color in zip(control, colors, strict=False):
      curve = _series(control[stage], 'eval', metric)
      label = f'control, {_label(stage)}'
      axis.plot(*curve, '--s', color=color, ms=3, lw=1.1, label=label)
    for stage, color in zip(rounds, colors, strict=False):
      curve = _series(rounds[stage], 'eval', metric)
      axis.plot(*curve, '-o', color=color, ms=3.5, label=_label(stage))
      chosen = [r for r in rounds[stage] if r['step'] == promoted.get(stage)]
      ring = {'mfc': 'none', 'mec': color, 'ms': 10, 'mew': 1.6, 'ls': ''}
      axis.plot(*_series(chosen, 'eval', metric), 'o', **ring)
    if promoted:
      axis.plot([], [], 'o', mfc='none', mec='#555555', ms=9, label='promoted')
  _scale(panels, _IMAGES)
  if control:  # too many lines for a legend among them
    handles, labels = panels[0].get_legend_handles_labels()
    panels.append(_panel('legend'))
    panels[-1].set_axis_off()
    panels[-1].legend(handles, labels, loc='center left')
  else:
    panels[0].legend()
  return panels


def _draw_histogram(axis: Any, record: dict[str, Any], edges: Any) -> None:
  """Draws the shares of a record's real and fake logits."""
  for kind, color in (('real', REAL), ('fake', FAKE)):
    counts = np.array(record[f'logit_{kind}_histogram'], float)
    share = 100 * counts / counts.sum()
    axis.stairs(share, edges, fill=True, color=color, alpha=0.25)
    axis.stairs(share, edges, color=color, lw=1.3, label=kind)
  axis.axvline(0, color='#555555', lw=0.7, ls=':')


@_as_png
def histograms(rounds: run_folder.Stages) -> list[Any]:
  """Draws logits β·r of real and fake rows: start, middle and end of rounds."""
  rows = {}
  for stage, stage_records in rounds.items():
    held = [r for r in stage_records if 'logit_real_histogram' in r]
    if held:
      rows[stage] = [held[0], held[len(held) // 2], held[-1]]
  if not rows:
    return []
  inner = ddo.HISTOGRAM_EDGES
  width = inner[1] - inner[0]
  edges = np.concatenate([[inner[0] - width], inner, [inner[-1] + width]])
  counts = sum(
    np.array(record[f'logit_{kind}_histogram'], float)
    for chosen in rows.values()
    for record in chosen
    for kind in ('real', 'fake')
  )
  used = np.flatnonzero(counts)
  low = min(-1, edges[used[0]])
  high = max(1, edges[used[-1] + 1])
  panels = []
  for stage, chosen in rows.items():
    for when, record in zip(('start', 'middle', 'end'), chosen, strict=True):
      axis = _panel(f'{_label(stage)}, {when}: {record["images"]:,} images')
      _draw_histogram(axis, record, edges)
      axis.set_xlim(low, high)
      axis.set_xlabel('logit βr')
      axis.set_ylabel('rows [%]')
      panels.append(axis)
  panels[0].legend()
  return panels


def _by_noise_level(record: dict[str, Any], kind: str) -> list[float] | None:
  """Returns a record's mean log-ratios by noise level; None without them."""
  name = f'log_ratio_{kind}_by_noise_level'
  # Earlier versions had a shorter name.
  return record.get(name, record.get(f'log_ratio_{kind}_by_level'))


@_as_png
def by_noise_level(rounds: run_folder.Stages) -> list[Any]:
  """Draws the mean log-ratio by noise level, from each round's last record."""
  last = {}
  for stage, stage_records in rounds.items():
    held = [r for r in stage_records if _by_noise_level(r, 'real')]
    if held:
      last[stage] = held[-1]
  panels = []
  for stage, record in last.items():
    axis = _panel(f'{_label(stage)}, {record["images"]:,} images')
    for kind, color in (('real', REAL), ('fake', FAKE)):
      values = np.array(_by_noise_level(record, kind), float)
      bins = np.arange(1, len(values) + 1)
      axis.plot(bins, values, '-o', color=color, ms=3.5, label=kind)
    axis.axhline(0, color='#555555', lw=0.7, ls=':')
    axis.set_xlabel('bin of ln σ: little noise → much')
    axis.set_xticks(bins)
    axis.set_ylabel('mean log-ratio r [nats]')
    panels.append(axis)
  limits = np.array([axis.get_ylim() for axis in panels]).reshape(-1, 2)
  for axis in panels:
    axis.set_ylim(limits[:, 0].min(), limits[:, 1].max())
  if panels:
    panels[0].legend()
  return panels


def _draw_curve(axis: Any, curve: Any, color: Any, label: str = '') -> None:
  """Draws a running mean over the values themselves, which stay visible."""
  images, values = curve
  if not len(values):  # the round has just begun
    return
  axis.plot(images, values, color=color, lw=0.8, alpha=0.3)
  marker = 'o' if len(images) == 1 else ''
  axis.plot(images, _smooth(values), color=color, marker=marker, label=label)


@_as_png
def diagnostics(
  rounds: run_folder.Stages, pretrain: list[dict[str, Any]]
) -> list[Any]:
  """Draws the diagnostics of training, a panel for each field.

  Args:
    rounds: the stages of the run's rounds.
    pretrain: the records of the pretraining, whose loss is the last panel.
  """
  shown = [p for p in _DIAGNOSTICS if _holds(rounds, 'train', p[0])]
  colors = _round_colors(len(rounds))
  panels = []
  for name, title, guide in shown:
    axis = _panel(title)
    for stage, color in zip(rounds, colors, strict=True):
      curve = _series(rounds[stage], 'train', name)
      _draw_curve(axis, curve, color, _label(stage))
      if isinstance(guide, str):
        axis.plot(*_series(rounds[stage], 'train', guide), 'k:', lw=1)
    if isinstance(guide, float):
      axis.axhline(guide, color='k', ls=':', lw=1)
    _scale([axis], _IMAGES)
    panels.append(axis)
  if panels:
    panels[0].legend()
  if _holds({'pretrain': pretrain}, 'train', 'loss'):
    axis = _panel('pretraining: loss')
    _draw_curve(axis, _series(pretrain, 'train', 'loss'), '#555555')
    _scale([axis], 'real images seen')
    panels.append(axis)
  return panels
