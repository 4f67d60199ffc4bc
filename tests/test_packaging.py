"""The wheel: recipes by name, the console script, from any folder."""

import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

from ddo_jax import errors
from ddo_jax import main
from ddo_jax import recipes

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
  """A folder that holds what `pip install .` puts into site-packages."""
  folder = tmp_path_factory.mktemp('wheel')
  # setuptools leaves its build folders where it runs.
  source = folder / 'source'
  for name in ('ddo_jax', 'configs'):
    shutil.copytree(ROOT / name, source / name, symlinks=True)
  for name in ('pyproject.toml', 'requirements.txt', 'README.md'):
    shutil.copy(ROOT / name, source)
  build = 'from setuptools import build_meta; build_meta.build_wheel("..")'
  subprocess.run(
    [sys.executable, '-c', build], cwd=source, capture_output=True, check=True
  )
  (wheel,) = folder.glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(folder / 'site')
  return folder / 'site'


def test_the_wheel_has_the_recipes_and_the_script(installed):
  packed = {path.stem for path in (installed / 'ddo_jax/configs').iterdir()}
  assert packed == set(recipes.names()) >= {'digits', 'digits_var'}
  assert {path.name for path in installed.iterdir() if path.is_dir()} == {
    'ddo_jax',
    'ddo_jax-0.1.0.dist-info',
  }
  (scripts,) = installed.glob('*.dist-info/entry_points.txt')
  assert 'ddo-jax = ddo_jax.__main__:main' in scripts.read_text()
  # What the report is made of besides Python.
  parts = {path.name for path in (installed / 'ddo_jax/report').iterdir()}
  assert {'page.css', 'page.js'} <= parts


def test_a_recipe_by_name_after_an_install(installed, tmp_path):
  """It imports another recipe; the script is the program with its flags."""
  code = 'from ddo_jax.__main__ import main; main()'
  done = subprocess.run(
    [sys.executable, '-c', code, '--config=cifar10_edm_cond'],
    cwd=tmp_path,
    env={'PYTHONPATH': str(installed), 'PATH': '', 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stderr.startswith('FATAL --mode=selfplay wants --workdir')


def test_names_and_paths(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  digits = str(ROOT / 'ddo_jax' / 'configs' / 'digits.py')
  assert recipes.find('digits') == digits
  assert recipes.find('digits:small') == f'{digits}:small'
  (tmp_path / 'mine.py').touch()
  assert recipes.find('mine.py:3') == 'mine.py:3'
  for given in ('digit', 'configs/digit.py', 'configs/digits.py'):
    with pytest.raises(errors.UserError, match='did you mean --config=digits'):
      recipes.find(given)
  with pytest.raises(errors.UserError, match='one of cifar10_edm_cond, '):
    recipes.find('zzz')


def test_recipes_that_do_not_load(tmp_path, monkeypatch):
  parse = main.flags.FLAGS['config'].parser.parse
  with pytest.raises(errors.UserError, match='digits takes no argument'):
    parse('digits:small')
  path = tmp_path / 'mine.py'
  path.write_text('from configs import digits')
  monkeypatch.setitem(sys.modules, 'configs', None)  # as outside a checkout
  with pytest.raises(errors.UserError, match=r'ddo_jax\.configs import'):
    parse(str(path))
