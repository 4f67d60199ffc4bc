"""The notebooks run from top to bottom and are committed clean."""

import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / 'experiments' / 'colab').glob('*.ipynb'))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.name)
def test_committed_without_outputs(path):
  notebook = nbformat.read(path, as_version=4)
  cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert cells
  assert not any(c.outputs or c.execution_count for c in cells)


@pytest.fixture(scope='module')
def compiled(tmp_path_factory):
  """Where the notebooks share what they compile."""
  return str(tmp_path_factory.mktemp('compiled'))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.name)
def test_runs(path, compiled, monkeypatch):
  monkeypatch.setenv('DDO_JAX_QUICK', '1')
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', compiled)
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  notebook = nbformat.read(path, as_version=4)
  client = nbclient.NotebookClient(
    notebook, timeout=300, resources={'metadata': {'path': str(path.parent)}}
  )
  client.execute()
  outputs = [o for cell in notebook.cells for o in cell.get('outputs', [])]
  text = ''.join(output.get('text', '') for output in outputs)
  assert 'fd_train' in text
  assert ('report.html' in text) == ('selfplay' in str(notebook))
  assert any('image/png' in output.get('data', {}) for output in outputs)


def test_they_begin_alike():
  """The first cell clones or installs; it is the same in all of them."""
  first = set()
  for path in NOTEBOOKS:
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    first.add(cells[0].source)
  assert len(first) == 1
