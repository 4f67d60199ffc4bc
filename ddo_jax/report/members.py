"""What the ledgers of a run say: every member of its sweeps, and the finals."""

from collections.abc import Sequence
import math
from typing import Any

from ddo_jax.report import cost
from ddo_jax.report import figures
from ddo_jax.report import markup
from ddo_jax.report import run_folder
from ddo_jax.runtime import manifest

_WIDTH = 120  # of a member's curve, in CSS pixels
_HEIGHT = 28
_EDGE = 4
_NAMES = {'alpha': 'α', 'beta': 'β', 'learning_rate': 'rate', 'p_std': 'p_std'}


def _ledgers(run: run_folder.Run) -> list[dict[str, Any]]:
  """Returns the ledgers of the rounds that are done and had a sweep."""
  paths = [run.path(result['round'], 'ledger.json') for result in run.rounds]
  return [manifest.read_json(path) for path in paths if path.exists()]


def _bounds(members: Sequence[dict[str, Any]]) -> tuple[int, float, float]:
  """Returns the last image and the lowest and highest ln score of all."""
  found = [record for member in members for record in member['evaluations']]
  scores = [math.log(max(r['selection'], 1e-12)) for r in found]
  return max(r['images'] for r in found) or 1, min(scores), max(scores)


def _curve(
  member: dict[str, Any], bounds: tuple[int, float, float], color: str
) -> str:
  """Returns a member's scores as a small SVG, its best one dotted."""
  images, low, high = bounds

  def place(record):
    x = _EDGE + (_WIDTH - 2 * _EDGE) * record['images'] / images
    share = math.log(max(record['selection'], 1e-12)) - low
    share /= (high - low) or 1
    return f'{x:.1f}', f'{_HEIGHT - _EDGE - (_HEIGHT - 2 * _EDGE) * share:.1f}'

  records = member['evaluations']
  points = ' '.join(','.join(place(record)) for record in records)
  x, y = place(min(records, key=lambda record: record['selection']))
  scores = ', '.join(f'{record["selection"]:.4g}' for record in records)
  return (
    f'<svg role="img" width="{_WIDTH}" height="{_HEIGHT}">'
    f'<title>{markup.text(scores)}</title>'
    f'<polyline points="{points}" fill="none" stroke="{color}"'
    f' stroke-width="1.5"/><circle cx="{x}" cy="{y}" r="3" fill="{color}"/>'
    '</svg>'
  )


def _table(ledger: dict[str, Any]) -> str:
  """Returns a row for each member, the best by selection first."""
  members = sorted(ledger['members'], key=lambda m: m['selection'])
  names = [
    name
    for name in members[0]['settings']
    if len({member['settings'][name] for member in members}) > 1
  ]
  bounds = _bounds(members)
  promoted = ledger['promoted']['member']
  rows = []
  for member in members:
    chosen = member['number'] == promoted
    name = f'{member["number"]:03d}'
    color = figures.FAKE if chosen else '#888888'
    rows.append(
      [
        f'<b>{name}</b> promoted' if chosen else name,
        markup.text(member['origin']),
        *[f'{member["settings"][name]:.3g}' for name in names],
        _curve(member, bounds, color),
        f'{member["selection"]:.4g}',
        f'{member["step"]}',
        cost.short(member['cost']['real']),
        cost.short(member['cost']['forwards']),
        _ended(member),
      ]
    )
  head = ['member', 'from', *[_NAMES.get(name, name) for name in names]]
  head += ['scores', 'best', 'at step', 'real images', 'forwards', 'ended by']
  return markup.table(head, rows)


def _ended(member: dict[str, Any]) -> str:
  """Returns why a member ended, in a word that tells the rest when asked."""
  reason = member['ended']
  if not reason:
    return 'all steps'
  short = 'bad numbers'
  for word in ('halving', 'overshoot', 'forgetting', 'narrowing', 'saturation'):
    if reason.startswith(word):
      short = word
  return f'<span title="{markup.text(reason)}">{short}</span>'


def _finals(ledger: dict[str, Any]) -> str:
  """Returns a row for each candidate that was scored once more."""
  rows = []
  for final in sorted(ledger['finals'], key=lambda f: f['rescored']):
    member = final['member']
    rows.append(
      [
        'reference' if member is None else f'member {member:03d}',
        markup.text('' if member is None else final['candidate']),
        f'{final["selection"]:.4g}',
        f'{final["rescored"]:.4g}',
      ]
    )
  rows[0] = [f'<b>{cell}</b>' for cell in rows[0]]
  head = ['finalist', 'candidate', 'selected by', 'on fresh images']
  return markup.table(head, rows, 'plain')


def _summary(ledger: dict[str, Any]) -> str:
  """Says what a round's sweep cost and where its numbers came from."""
  total = ledger['cost']
  words = (
    f'{len(ledger["members"])} members, {cost.short(total["images"])} images'
    f' ({cost.short(total["real"])} real, {cost.short(total["pool"])} in the'
    f' pool, {cost.short(total["evaluation"])} to score),'
    f' {cost.short(total["forwards"])} forward-equivalents'
  )
  if ledger['probe']:
    words += f', {cost.short(total["probe_forwards"])} of them the probe'
  return words + '.'


def section(run: run_folder.Run) -> str:
  """Returns a part for each round that had a sweep; '' without any."""
  content = ''
  for ledger in _ledgers(run):
    content += f'<h3>Round {ledger["round"]}</h3>\n'
    content += markup.note(markup.text(_summary(ledger)))
    if ledger['probe'] and ledger['probe']['fault']:
      content += f'<p class="alert">{markup.text(ledger["probe"]["fault"])}</p>'
    content += _table(ledger)
    content += markup.note(markup.text(ledger['note']))
    content += _finals(ledger)
    content += markup.note(markup.text(ledger['unit']))
  return content
