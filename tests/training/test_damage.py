"""A run's files are damaged one by one, and its writes fail one by one.

Nothing is silent, and there is no traceback: what is damaged is named, and made
again or not; a full disk is one line, and the run goes on after it.
"""

import dataclasses
import errno
import logging
import os
import pathlib
import shutil
import sys

import pytest
import test_resume as resume

from ddo_jax import errors
from ddo_jax.training import run as run_lib

images = resume.images
compiled = resume.compiled
traces = resume.traces
whole = resume.whole


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of file of a run.

  Attributes:
    path: a glob in the run's folder; the largest file that it finds is damaged.
    sibling: a glob of the file that it is swapped with.
    spare: whether the run needs it no more; it stays as it is, and may be
      deleted without a word.
  """

  path: str
  sibling: str
  spare: bool = False


KINDS = [
  Kind('config.json', 'pretrain/done.json'),
  Kind('manifest.json', 'round_000/manifest.json'),
  Kind('pretrain/manifest.json', 'round_000/manifest.json'),
  Kind('pretrain/done.json', 'round_000/done.json'),
  Kind('pretrain/params/**/d/*', 'round_000/promoted/**/d/*'),
  Kind('pretrain/params/meta/data.json', 'round_000/promoted/meta/data.json'),
  Kind('round_000/manifest.json', 'round_001/manifest.json'),
  Kind('round_000/done.json', 'round_000/eval.json'),
  Kind('round_000/eval.json', 'round_000/done.json'),
  Kind('round_000/after.png', 'round_000/before.png'),
  Kind('round_000/neighbours.png', 'round_000/real.png'),
  Kind('round_000/promoted/**/d/*', 'round_000/reference/**/d/*'),
  Kind(
    'round_000/promoted/params/_METADATA', 'round_000/promoted/meta/data.json'
  ),
  Kind(
    'round_000/promoted/meta/data.json', 'round_000/reference/meta/data.json'
  ),
  Kind('round_000/reference/**/d/*', 'round_000/promoted/**/d/*', spare=True),
  Kind('round_000/fakes/000001.npz', 'round_000/fakes/000000.npz', spare=True),
  Kind('round_001/manifest.json', 'round_000/manifest.json'),
  Kind('round_001/reference/**/d/*', 'round_000/reference/**/d/*'),
  Kind('round_001/reference/meta/data.json', 'pretrain/params/meta/data.json'),
  Kind('round_001/fakes/000001.npz', 'round_001/fakes/000000.npz'),
  Kind('round_001/fakes/000002.npz', 'round_000/fakes/000002.npz'),
  Kind('round_001/fakes/pool.json', 'round_000/fakes/pool.json'),
  Kind('round_001/fakes/manifest.json', 'round_000/fakes/manifest.json'),
  Kind('round_001/selection/12/*_30/*.rows', 'round_001/fakes/000000.npz'),
]
FINISHED = [
  Kind('summary.json', 'config.json'),
  Kind('round_001/done.json', 'round_000/done.json'),
  Kind('round_001/eval.json', 'round_000/eval.json'),
  Kind('round_001/after.png', 'round_000/before.png'),
  Kind('round_001/promoted/**/d/*', 'pretrain/params/**/d/*'),
  Kind('round_001/reference/**/d/*', 'pretrain/params/**/d/*', spare=True),
  Kind('round_001/fakes/000001.npz', 'round_000/fakes/000001.npz', spare=True),
  Kind('pretrain/params/**/d/*', 'round_000/promoted/**/d/*'),
]
DAMAGES = ('truncated', 'flipped', 'emptied', 'deleted', 'swapped')


def find(workdir, pattern):
  return max(workdir.glob(pattern), key=lambda path: path.stat().st_size)


def damage(workdir, kind, how):
  """Damages a file; returns its path."""
  path = find(workdir, kind.path)
  content = path.read_bytes()
  if how == 'truncated':
    path.write_bytes(content[: len(content) // 2])
  elif how == 'flipped':
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    path.write_bytes(changed)
  elif how == 'emptied':
    path.write_bytes(b'')
  elif how == 'deleted':
    path.unlink()
  else:
    other = find(workdir, kind.sibling)
    assert other.read_bytes() != content
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)
  return path


@pytest.fixture(scope='module')
def half(images, whole, tmp_path_factory):
  """A run that was cut off in the last selection of its second round."""
  del whole  # has compiled all
  workdir = tmp_path_factory.mktemp('half')
  scores = resume.Evaluator.scores

  def cut_off(*args, **kwargs):
    if any(workdir.glob('round_001/selection/12/*/*.rows')):
      raise KeyboardInterrupt
    return scores(*args, **kwargs)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(resume.Evaluator, 'scores', cut_off)
    with pytest.raises(KeyboardInterrupt):
      run_lib.play(resume.make_config(images), workdir)
  return workdir


def play(images, workdir):
  """Returns how a run goes on: a line that ends it, or warnings."""
  messages = []

  class Handler(logging.Handler):
    def emit(self, record):
      messages.append(record.getMessage())

  handler = Handler(logging.WARNING)
  logger = logging.getLogger('ddo_jax')
  logger.addHandler(handler)
  try:
    run_lib.play(resume.make_config(images), workdir)
  except errors.UserError as error:
    return str(error), messages
  finally:
    logger.removeHandler(handler)
  return '', messages


def check(images, whole, start, kind, how, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(start, workdir)
  path = damage(workdir, kind, how)
  place = str(path.relative_to(workdir))
  line, warnings = play(images, workdir)
  text = f'CELL {kind.path} | {how} | {line or "healed"} | {warnings}'
  print(text.replace(f'{workdir}/', ''))
  if line:
    assert '\n' not in line
    # Both are damaged, and the first that is asked for is named.
    assert place in line or (how == 'swapped' and 'manifest.json' in line)
    return
  # What nobody needs any more stays as it is. The first round's pool is that,
  # and may be what the file was swapped with.
  for pool in start.glob('round_*/fakes' if kind.spare else 'round_000/fakes'):
    copy = workdir / pool.relative_to(start)
    shutil.copytree(pool, copy, dirs_exist_ok=True)
  resume.assert_same(workdir, whole)
  if kind.spare and how == 'deleted':
    return
  assert place in '\n'.join(warnings)
  if (
    not kind.spare and how != 'swapped'
  ):  # it is healed, and nothing more is said
    assert play(images, workdir) == ('', [])


QUICK = [
  ('config.json', 'emptied'),
  ('pretrain/params/**/d/*', 'flipped'),
  ('round_000/done.json', 'swapped'),
  ('round_000/promoted/**/d/*', 'flipped'),
  ('round_001/manifest.json', 'truncated'),
  ('round_001/reference/**/d/*', 'flipped'),
  ('round_001/fakes/000001.npz', 'swapped'),
]


@pytest.mark.parametrize('path, how', QUICK)
def test_some_of_them(images, whole, half, path, how, tmp_path):
  (kind,) = [kind for kind in KINDS if kind.path == path]
  check(images, whole, half, kind, how, tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize('how', DAMAGES)
@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.path)
def test_a_run_that_goes_on(images, whole, half, kind, how, tmp_path):
  check(images, whole, half, kind, how, tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize('how', DAMAGES)
@pytest.mark.parametrize('kind', FINISHED, ids=lambda kind: kind.path)
def test_a_run_that_is_done(images, whole, kind, how, tmp_path):
  check(images, whole, whole, kind, how, tmp_path)


_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Disk:
  """Counts what this process writes in a folder; one write fails.

  Attributes:
    folder: the folder; None: nothing is watched.
    left: writes until one fails.
    place: what the failing one was to write; None: it has not come.
  """

  folder: pathlib.Path | None = None
  left = 0
  place: str | None = None
  error = errno.ENOSPC

  def hear(self, event, args):
    if self.folder is None:
      return
    if event == 'open':
      path, _, flags = args
      if not flags & _WRITES:
        return
    elif event in ('os.mkdir', 'os.rename'):
      path = args[0]
    else:
      return
    if not isinstance(path, str | os.PathLike):
      return
    if not os.fspath(path).startswith(str(self.folder)):
      return
    if event == 'os.mkdir' and os.path.isdir(path):
      return  # nothing is written
    self.left -= 1
    if self.left == 0:
      self.place = os.fspath(path)
      raise OSError(self.error, os.strerror(self.error))

  def fail(self, folder, at, error):
    self.folder = folder
    self.left = at
    self.place = None
    self.error = error


DISK = Disk()
sys.addaudithook(DISK.hear)


def attempt(images, workdir, at, error=errno.ENOSPC):
  """Plays until the at-th write fails; returns the line, and its place."""
  DISK.fail(workdir, at, error)
  try:
    run_lib.play(resume.make_config(images), workdir)
  except errors.UserError as caught:
    return str(caught), DISK.place
  finally:
    DISK.folder = None
  return '', DISK.place


def check_line(line, words):
  assert '\n' not in line and words in line, line
  assert 'run the same command again' in line, line


def test_some_writes_fail(images, whole, tmp_path):
  """Each attempt goes on from the one before it."""
  workdir = tmp_path / 'run'
  for at, error, words in (
    (4, errno.EROFS, 'cannot write'),
    (50, errno.ENOSPC, 'disk full while writing'),
    (60, errno.EDQUOT, 'disk full while writing'),
  ):
    line, place = attempt(images, workdir, at, error)
    assert place
    check_line(line, words)
  assert attempt(images, workdir, 0) == ('', None)
  resume.assert_same(workdir, whole)


@pytest.mark.faults
def test_each_write_fails_once(images, whole, tmp_path):
  """Each attempt fails one write further than the one before it."""
  workdir = tmp_path / 'run'
  at = 1
  line, place = attempt(images, workdir, at)
  while place:
    check_line(line, 'disk full while writing')
    print('WRITE', at, place.removeprefix(f'{workdir}/'), line)
    at += 1
    line, place = attempt(images, workdir, at)
  assert not line and at > 40
  resume.assert_same(workdir, whole)
