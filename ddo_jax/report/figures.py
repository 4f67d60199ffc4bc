"""Figures of a run's records, as PNG bytes for the page.

Figures are drawn from stages, {folder name: its records of metrics.jsonl, in
order}, and are None where these hold nothing to draw. Colours mean the same in
all of them: blue is real, vermilion is fake, and each round has its own.
"""

from collections.abc import Callable
import functools
import io
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from ddo_jax.method import ddo

Stages = dict[str, list[dict[str, Any]]]

# Okabe & Ito's colours, which the colour-blind can tell apart.
REAL = '#0072b2'
FAKE = '#d55e00'
GRID = 468  # width of the place for a sample grid, in CSS pixels
WIDTH = 9.6  # width of a figure in inches, shown as 960 CSS pixels
DPI = 200  # gives two pixels for a CSS pixel
_IMAGES = 'real images seen in the round'
_STYLE = {
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


def _as_png(draw: Callable[..., Any]) -> Callable[..., bytes | None]:
  """Wraps a function that returns a matplotlib Figure to return its PNG."""

  @functools.wraps(draw)
  def png(*args, **kwargs):
    import matplotlib

    # Without pyplot there is no window, and no state shared with a notebook.
    with matplotlib.rc_context(_STYLE):
      figure = draw(*args, **kwargs)
      if figure is None:
        return None
      buffer = io.BytesIO()
      figure.savefig(buffer, format='png', dpi=DPI)
    return buffer.getvalue()

  return png


def _panels(
  count: int, columns: int, height: float, down: float = 0.88, **share: Any
) -> Any:
  """Returns a figure and `count` axes in rows.

  Args:
    count: the number of axes.
    columns: the number of axes in a row.
    height: the height of each, in inches.
    down: the room between the rows for titles and x labels, in inches.
    **share: which axes matplotlib is to share: `sharex`, `sharey`.
  """
  import matplotlib.figure

  rows = -(-count // columns)
  # Margins [inches] are fixed: an automatic layout would take half of the time.
  left = 0.65
  right = 0.12
  top = 0.32
  bottom = 0.52
  across = 0.62
  wide = (WIDTH - left - right - across * (columns - 1)) / columns
  high = rows * height + (rows - 1) * down + top + bottom
  figure = matplotlib.figure.Figure((WIDTH, high))
  figure.subplots_adjust(
    left=left / WIDTH,
    right=1 - right / WIDTH,
    bottom=bottom / high,
    top=1 - top / high,
    wspace=across / wide,
    hspace=down / height,
  )
  axes = figure.subplots(rows, columns, squeeze=False, **share).ravel()
  for axis in axes[count:]:
    axis.set_axis_off()
  return figure, axes[:count]


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


def _holds(stages: Stages, kind: str, name: str) -> bool:
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
  rounds: Stages,
  metrics: list[str],
  promoted: dict[str, int],
  control: Stages,
) -> Any:
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
    return None
  figure, axes = _panels(len(metrics), len(metrics), 2.7)
  colors = _round_colors(max(len(rounds), len(control)))
  for axis, metric in zip(axes, metrics, strict=True):
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
    axis.set_title(metric)
  _scale(axes, _IMAGES)
  if promoted:
    axes[0].plot([], [], 'o', mfc='none', mec='#555555', ms=9, label='promoted')
  axes[0].legend()
  return figure


def _draw_histogram(axis: Any, record: dict[str, Any], edges: Any) -> None:
  """Draws the shares of a record's real and fake logits."""
  for kind, color in (('real', REAL), ('fake', FAKE)):
    counts = np.array(record[f'logit_{kind}_histogram'], float)
    share = 100 * counts / counts.sum()
    axis.stairs(share, edges, fill=True, color=color, alpha=0.25)
    axis.stairs(share, edges, color=color, lw=1.3, label=kind)
  axis.axvline(0, color='#555555', lw=0.7, ls=':')


@_as_png
def histograms(rounds: Stages) -> Any:
  """Draws logits β·r of real and fake rows: start, middle and end of rounds."""
  rows = {}
  for stage, stage_records in rounds.items():
    held = [r for r in stage_records if 'logit_real_histogram' in r]
    if held:
      rows[stage] = [held[0], held[len(held) // 2], held[-1]]
  if not rows:
    return None
  inner = ddo.HISTOGRAM_EDGES
  width = inner[1] - inner[0]
  edges = np.concatenate([[inner[0] - width], inner, [inner[-1] + width]])
  figure, axes = _panels(3 * len(rows), 3, 1.3, down=0.48, sharex=True)
  counts = sum(
    np.array(record[f'logit_{kind}_histogram'], float)
    for chosen in rows.values()
    for record in chosen
    for kind in ('real', 'fake')
  )
  used = np.flatnonzero(counts)
  low = min(-1, edges[used[0]])
  high = max(1, edges[used[-1] + 1])
  for row, (stage, chosen) in enumerate(rows.items()):
    for column, record in enumerate(chosen):
      axis = axes[3 * row + column]
      _draw_histogram(axis, record, edges)
      when = ('start', 'middle', 'end')[column]
      title = f'{_label(stage)}, {when}: {record["images"]:,} images'
      axis.set_title(title)
    axes[3 * row].set_ylabel('rows [%]')
  for axis in axes:
    axis.set_xlim(low, high)
  for axis in axes[-3:]:
    axis.set_xlabel('logit βr')
  axes[0].legend()
  return figure


def _by_noise_level(record: dict[str, Any], kind: str) -> list[float] | None:
  """Returns a record's mean log-ratios by noise level; None without them."""
  name = f'log_ratio_{kind}_by_noise_level'
  # Earlier versions had a shorter name.
  return record.get(name, record.get(f'log_ratio_{kind}_by_level'))


@_as_png
def by_noise_level(rounds: Stages) -> Any:
  """Draws the mean log-ratio by noise level, from each round's last record."""
  last = {}
  for stage, stage_records in rounds.items():
    held = [r for r in stage_records if _by_noise_level(r, 'real')]
    if held:
      last[stage] = held[-1]
  if not last:
    return None
  figure, axes = _panels(len(last), min(3, max(2, len(last))), 1.9, sharey=True)
  for axis, (stage, record) in zip(axes, last.items(), strict=False):
    for kind, color in (('real', REAL), ('fake', FAKE)):
      values = np.array(_by_noise_level(record, kind), float)
      bins = np.arange(1, len(values) + 1)
      axis.plot(bins, values, '-o', color=color, ms=3.5, label=kind)
    axis.axhline(0, color='#555555', lw=0.7, ls=':')
    axis.set_title(f'{_label(stage)}, {record["images"]:,} images')
    axis.set_xlabel('bin of ln σ: little noise → much')
    axis.set_xticks(bins)
  axes[0].set_ylabel('mean log-ratio r [nats]')
  axes[0].legend()
  return figure


def _draw_curve(axis: Any, curve: Any, color: Any, label: str = '') -> None:
  """Draws a running mean over the values themselves, which stay visible."""
  images, values = curve
  if not len(values):  # the round has just begun
    return
  axis.plot(images, values, color=color, lw=0.8, alpha=0.3)
  marker = 'o' if len(images) == 1 else ''
  axis.plot(images, _smooth(values), color=color, marker=marker, label=label)


@_as_png
def diagnostics(rounds: Stages, pretrain: list[dict[str, Any]]) -> Any:
  """Draws the diagnostics of training, a panel for each field.

  Args:
    rounds: the stages of the run's rounds.
    pretrain: the records of the pretraining, whose loss is the last panel.
  """
  shown = [p for p in _DIAGNOSTICS if _holds(rounds, 'train', p[0])]
  before = {'pretrain': pretrain}
  has_pretrain = _holds(before, 'train', 'loss')
  if not shown and not has_pretrain:
    return None
  figure, axes = _panels(len(shown) + has_pretrain, 3, 1.5)
  colors = _round_colors(len(rounds))
  for axis, (name, title, guide) in zip(axes, shown, strict=False):
    for stage, color in zip(rounds, colors, strict=True):
      curve = _series(rounds[stage], 'train', name)
      _draw_curve(axis, curve, color, _label(stage))
      if isinstance(guide, str):
        axis.plot(*_series(rounds[stage], 'train', guide), 'k:', lw=1)
    if isinstance(guide, float):
      axis.axhline(guide, color='k', ls=':', lw=1)
    axis.set_title(title)
    _scale([axis], _IMAGES)
  if has_pretrain:
    axis = axes[len(shown)]
    _draw_curve(axis, _series(pretrain, 'train', 'loss'), '#555555')
    axis.set_title('pretraining: loss')
    _scale([axis], 'real images seen')
  if shown:
    axes[0].legend()
  return figure


def sample_grid(path: pathlib.Path) -> tuple[bytes | None, bool]:
  """Returns a grid's picture, reduced to twice `GRID` if it is wider.

  Returns:
    (the bytes of a PNG or JPEG, whether it fits into `GRID` as it is). The
    bytes are None if the file is missing or still being written.
  """
  try:
    with Image.open(path) as image:
      if image.width <= 2 * GRID:
        return path.read_bytes(), image.width <= GRID
      image.thumbnail((2 * GRID, image.height))
      buffer = io.BytesIO()
      image.convert('RGB').save(buffer, 'JPEG', quality=88)
      return buffer.getvalue(), False
  except OSError:
    return None, False
