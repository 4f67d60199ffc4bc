"""What a report shows of the images: seed by seed, and beside the nearest."""

from typing import Any

import numpy as np
from PIL import Image

from ddo_jax.report import grid
from ddo_jax.report import markup
from ddo_jax.report import run_folder

_ROWS = 2  # of a sheet, shown large
_NEAR = 0.05  # the share of real images that count as near to another one
_SUSPICIOUS = 0.25  # the share of samples as near as that which tells of copies


def _sheets(run: run_folder.Run) -> dict[str, Image.Image]:
  """Returns the sheets of the run by name, those that there are.

  The weights that a round starts from are those that the round before ended
  with, so that only the first round's are shown.
  """
  first = run.rounds[0]['round']
  paths = {
    'real images': run.path(first, 'real.png'),
    'reference': run.path(first, 'before.png'),
  }
  for result in run.rounds:
    index = result['round']
    if result['promoted']['step']:
      paths[f'after round {index}'] = run.path(index, 'after.png')
  sheets = {}
  for name, path in paths.items():
    sheet = grid.load(path)
    if sheet:
      sheets[name] = sheet
  return sheets


def _strip(name: str, content: str) -> str:
  """Returns a row of images, or of words above them, with its name."""
  return f'<div class="strip"><span>{name}</span>{content}</div>\n'


def _columns(words: list[Any]) -> str:
  """Returns words that stand above the images of a row."""
  cells = ''.join(f'<span>{markup.text(word)}</span>' for word in words)
  cells += '<span></span>' * (grid.COLUMNS - len(words))
  return f'<div class="columns">{cells}</div>'


def _strips(
  sheets: dict[str, Image.Image], labels: list[int] | None, height: int
) -> str:
  """Returns the first rows of all sheets, each with its class above."""
  content = ''
  for index in range(_ROWS):
    block = ''
    if labels:
      start = index * grid.COLUMNS
      classes = labels[start : start + grid.COLUMNS]
      block += _strip('class', _columns(classes))
    for name, sheet in sheets.items():
      strip = grid.row(sheet, index, height)
      block += _strip(name, markup.picture(strip, name))
    content += f'<div class="group">{block}</div>\n'
  return content


def comparison(run: run_folder.Run) -> str:
  """Returns the same seeds from all weights of the run, beside real images."""
  if not run.rounds:
    return ''
  sheets = _sheets(run)
  if not sheets:
    return ''
  content = ''
  about = run.rounds[-1].get('sheets')
  if about:  # earlier versions did not say what is on a sheet
    height = about['height']
    sheets = {name: grid.cut(s, height) for name, s in sheets.items()}
    content += markup.note(
      'A column is a seed: the same noise'
      + (' and the same class' if about['labels'] else '')
      + ', drawn from the weights of each row. Real images are picked at random'
      + (', of the same class.' if about['labels'] else '.')
    )
    content += _strips(sheets, about['labels'], height)
  content += markup.note(
    'A click makes a picture larger; the arrow keys then put the next one in'
    ' its place.'
  )
  figures = ''.join(
    f'<figure>{markup.picture(sheet, name)}<figcaption>{name}</figcaption>'
    '</figure>\n'
    for name, sheet in sheets.items()
  )
  return f'{content}<div class="sheets group">{figures}</div>\n'


def _distance(value: float) -> str:
  return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def copying(near: dict[str, Any]) -> tuple[bool, str]:
  """Says whether samples are as near to training images as copies would be.

  Args:
    near: what `gallery.write` says of the neighbours.

  Returns:
    (whether that is so, a sentence with the numbers).
  """
  samples = np.array(near['samples'])
  real = np.array(near['real'])
  limit = np.quantile(real, _NEAR)
  count = int((samples <= limit).sum())
  suspicious = count > _SUSPICIOUS * len(samples)
  verdict = (
    'that suggests copying' if suspicious else 'nothing suggests copying'
  )
  exact = int((samples == 0).sum())
  copies = f' {exact} are exact copies.' if exact else ''
  return suspicious, (
    f'Of {len(samples)} samples, {count} are as near to a training image as the'
    f' nearest {_NEAR:.0%} of real ones are to another'
    f' ({_NEAR * len(samples):.0f} would be by chance): {verdict}.{copies}'
    f' Median distance to the nearest: {_distance(np.median(samples))} from'
    f' samples, {_distance(np.median(real))} from real images.'
  )


def neighbours(run: run_folder.Run) -> str:
  """Returns the newest samples that are nearest to training images."""
  for result in reversed(run.rounds):
    about = result.get('sheets', {})
    near = about.get('neighbours')
    sheet = grid.load(run.path(result['round'], 'neighbours.png'))
    if near and sheet:
      break
  else:
    return ''
  suspicious, sentence = copying(near)
  among = f'all {near["training"]:,} training images'
  if near['searched'] < near['training']:
    among = (
      f'{near["searched"]:,} of {near["training"]:,} training images, chosen at'
      ' random'
    )
  space = 'raw pixels'
  if near['space'] == 'latents':
    space = 'the means of latents'
  distances = [_distance(near['samples'][index]) for index in near['shown']]
  strips = _strip('distance', _columns(distances))
  sheet = grid.cut(sheet, about['height'])
  for index, name in enumerate(('sample', 'nearest', '2nd', '3rd')):
    strip = grid.row(sheet, index, about['height'])
    strips += _strip(name, markup.picture(strip, name))
  css = 'alert' if suspicious else 'plain'
  return (
    f'<p class="{css}">{sentence}</p>\n'
    + markup.note(
      f'The samples of round {result["round"]} that are nearest to a training'
      ' image, and the training images nearest to each. Distances are Euclidean'
      f' between {space}, among {among}; plain and smooth images are near to'
      ' many.'
    )
    + f'<div class="group">{strips}</div>\n'
  )
