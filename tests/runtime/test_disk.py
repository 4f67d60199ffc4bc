"""Files are whole or absent; a disk that is full or shut is one line."""

import errno
import os
import resource

import pytest

from ddo_jax import errors
from ddo_jax.runtime import disk


def refusal(path):
  with pytest.raises(errors.UserError) as caught:
    with disk.whole(path) as file:
      file.write(b'new' * 1_000)
  line = str(caught.value)
  assert '\n' not in line and str(path) in line
  assert 'run the same command again' in line
  return line


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize('call', ['fsync', 'replace'])
def test_what_was_whole_stays_on_a_full_disk(
  tmp_path, monkeypatch, number, call
):
  path = tmp_path / 'a'
  path.write_bytes(b'old')

  def full(*args):
    raise OSError(number, os.strerror(number))

  with monkeypatch.context() as patch:
    patch.setattr(os, call, full)
    assert f'disk full while writing {path}' in refusal(path)
  assert [p.name for p in tmp_path.iterdir()] == ['a']
  assert path.read_bytes() == b'old'
  with disk.whole(path) as file:
    file.write(b'new')
  assert path.read_bytes() == b'new'


def test_the_system_says_that_a_file_is_too_large(tmp_path):
  _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
  try:
    assert 'disk full while writing' in refusal(tmp_path / 'a')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert not list(tmp_path.iterdir())


def test_paths_that_cannot_be_made(tmp_path):
  (tmp_path / 'around').symlink_to('around')
  (tmp_path / 'dangling').symlink_to('nowhere')
  (tmp_path / 'linked').symlink_to(tmp_path)
  (tmp_path / 'file').touch()
  for name, fault in (
    ('around', 'Too many levels of symbolic links'),
    ('around/x', 'Too many levels of symbolic links'),
    ('dangling', 'dangling is a link to nowhere, which is not there'),
    ('dangling/x/y', 'dangling is a link to nowhere, which is not there'),
    ('x' * 300, 'File name too long'),
    ('a/' * 3_000, 'File name too long'),
    ('a\0b', 'embedded null'),
  ):
    with pytest.raises(errors.UserError) as caught:
      disk.check_path('--workdir', tmp_path / name)
    line = str(caught.value)
    assert line.startswith('--workdir is ') and '\n' not in line
    assert fault in line and len(line) < 500
  # What is wrong with a place that is there, who writes to it says.
  for name in ('linked/x/y', 'new', 'file', 'file/x', '.'):
    disk.check_path('--workdir', tmp_path / name)


def test_a_file_where_a_folder_is_wanted(tmp_path):
  (tmp_path / 'a').write_text('')
  assert 'cannot write' in refusal(tmp_path / 'a' / 'b')
  (tmp_path / 'c').mkdir()
  assert 'cannot write' in refusal(tmp_path / 'c')


def test_other_mistakes_are_not_the_disk_s():
  with pytest.raises(ValueError, match='mine'), disk.guarded('x'):
    raise ValueError('mine')
  with pytest.raises(errors.UserError, match='disk full while writing x'):
    with disk.guarded('x'):  # as TensorStore says it
      raise ValueError('RESOURCE_EXHAUSTED: no room')
