"""A run's files are damaged one by one: nothing is silent, no traceback."""

import dataclasses
import logging
import shutil

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
  Kind('pretrain/params/meta/metadata', 'round_000/promoted/meta/metadata'),
  Kind('round_000/manifest.json', 'round_001/manifest.json'),
  Kind('round_000/done.json', 'round_000/eval.json'),
  Kind('round_000/eval.json', 'round_000/done.json'),
  Kind('round_000/after.png', 'round_000/before.png'),
  Kind('round_000/neighbours.png', 'round_000/real.png'),
  Kind('round_000/promoted/**/d/*', 'round_000/reference/**/d/*'),
  Kind(
    'round_000/promoted/params/_METADATA', 'round_000/promoted/meta/metadata'
  ),
  Kind('round_000/promoted/meta/metadata', 'round_000/reference/meta/metadata'),
  Kind('round_000/reference/**/d/*', 'round_000/promoted/**/d/*', spare=True),
  Kind('round_000/fakes/000001.npz', 'round_000/fakes/000000.npz', spare=True),
  Kind('round_001/manifest.json', 'round_000/manifest.json'),
  Kind('round_001/reference/**/d/*', 'round_000/reference/**/d/*'),
  Kind('round_001/reference/meta/metadata', 'pretrain/params/meta/metadata'),
  Kind('round_001/fakes/000001.npz', 'round_001/fakes/000000.npz'),
  Kind('round_001/fakes/000002.npz', 'round_000/fakes/000002.npz'),
  Kind('round_001/fakes/pool.json', 'round_000/fakes/pool.json'),
  Kind('round_001/fakes/manifest.json', 'round_000/fakes/manifest.json'),
  Kind(
    'round_001/selection/12/*_30/*.rows', 'round_001/selection/12/*_60/*.rows'
  ),
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
  if kind.spare:
    shutil.copy(start / place, path)
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
  ('round_000/after.png', 'truncated'),
  ('round_000/promoted/**/d/*', 'flipped'),
  ('round_001/manifest.json', 'truncated'),
  ('round_001/reference/**/d/*', 'flipped'),
  ('round_001/fakes/000001.npz', 'swapped'),
  ('round_001/fakes/pool.json', 'deleted'),
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
