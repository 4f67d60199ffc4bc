"""Tables in Markdown, for the README of the experiments."""

from collections.abc import Sequence

import numpy as np


def mean_and_sd(values: Sequence[float], digits: int = 3) -> str:
  """Returns 'mean ± sd' of one value a seed; the mean alone of one seed."""
  mean = f'{np.mean(values):.{digits}f}'
  if len(values) == 1:
    return mean
  return f'{mean} ± {np.std(values, ddof=1):.{digits}f}'


def markdown(columns: Sequence[str], rows: dict[str, Sequence[str]]) -> str:
  """Returns a table whose rows have names.

  Args:
    columns: the heads of all columns but the first, which has none.
    rows: the cells of each row, by its name.
  """
  lines = ['| | ' + ' | '.join(columns) + ' |', '|---' * (len(columns) + 1)]
  lines[1] += '|'
  lines += [f'| {name} | ' + ' | '.join(rows[name]) + ' |' for name in rows]
  return '\n'.join(lines)
