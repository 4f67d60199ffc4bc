"""Pieces of HTML: tables, lists and pictures that need no other file."""

import base64
from collections.abc import Mapping
from collections.abc import Sequence
import html
import io

from PIL import Image

_PIXELATED = (
  468  # sheets of up to this many pixels across are shown as they are
)
_WIDEST = 1_300  # pixels across, to which larger ones are reduced


def text(value: object) -> str:
  """Returns what a value says, such that no markup is in it."""
  return html.escape(str(value))


def table(
  head: Sequence[str], rows: Sequence[Sequence[str]], css: str = ''
) -> str:
  """Returns a table.

  Args:
    head: the columns' heads, text.
    rows: cells that are HTML already. On a narrow screen each says its column.
    css: the table's class.
  """
  columns = ''.join(f'<th>{text(name)}</th>' for name in head)
  body = ''
  for row in rows:
    cells = ''.join(
      f'<td data-head="{text(name)}">{cell}</td>'
      for name, cell in zip(head, row, strict=True)
    )
    body += f'<tr>{cells}</tr>\n'
  return (
    f'<div class="wide"><table class="{css}">\n'
    f'<thead><tr>{columns}</tr></thead>\n'
    f'<tbody>{body}</tbody></table></div>\n'
  )


def note(content: str) -> str:
  """Returns a remark; its content is HTML already."""
  return f'<p class="note">{content}</p>\n'


def bullets(items: Sequence[str], css: str) -> str:
  """Returns a list of text."""
  lines = ''.join(f'<li>{text(item)}</li>\n' for item in items)
  return f'<ul class="{css}">{lines}</ul>\n'


def _image(content: bytes, kind: str, about: str, css: str) -> str:
  coded = base64.b64encode(content).decode()
  return (
    f'<img class="{css}" alt="{text(about)}"'
    f' src="data:image/{kind};base64,{coded}">'
  )


def picture(image: Image.Image, about: str) -> str:
  """Returns an image, small ones with every pixel as it is.

  Args:
    image: the image; a large one is reduced, and compressed with loss.
    about: what it shows, text.
  """
  buffer = io.BytesIO()
  if image.width <= _PIXELATED:
    image.save(buffer, 'PNG', optimize=True)
    return _image(buffer.getvalue(), 'png', about, 'pixels')
  image = image.convert('RGB')
  image.thumbnail((_WIDEST, image.height))
  image.save(buffer, 'JPEG', quality=90)
  return _image(buffer.getvalue(), 'jpeg', about, 'photo')


def panels(figure: Mapping[str, bytes], about: str) -> str:
  """Returns the panels of a figure, under a line on how to read them.

  Args:
    figure: PNGs by title; without any there is nothing, ''.
    about: the line, text.
  """
  if not figure:
    return ''
  images = ''.join(
    _image(png, 'png', title, 'plot') for title, png in figure.items()
  )
  return f'{note(text(about))}<div class="panels group">{images}</div>\n'
