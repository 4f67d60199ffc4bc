"""The page of a run: whole, true to the records, and never in the way."""

import base64
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import settings
from ddo_jax.method import ddo
from ddo_jax.method import objective as objective_lib
from ddo_jax.models import toy
from ddo_jax.report import figures
from ddo_jax.report import grid
from ddo_jax.report import page as report_page
from ddo_jax.samplers import heun

# Per seed: the reference's scores, and those after the round.
BEFORE = {
  'fd_train': [1.02, 0.99, 1.03],
  'fd_test': [1.10, 1.04, 1.11],
  'accuracy': [0.95, 0.96, 0.97],
  'precision': [0.66, 0.67, 0.68],
  'recall': [0.70, 0.71, 0.72],
  'nn_ratio': [1.20, 1.21, 1.22],
  'memorised': [0.0, 0.01, 0.001],
}
AFTER = {
  'fd_train': [0.25, 0.24, 0.26],  # better
  'fd_test': [1.20, 1.14, 1.21],  # worse
  'accuracy': [0.96, 0.97, 0.98],  # better
  'precision': [0.56, 0.57, 0.58],  # worse
  'recall': [0.71, 0.70, 0.73],  # the seeds disagree
  'nn_ratio': [0.95, 0.96, 0.97],  # better: nearer to 1
  'memorised': [0.01, 0.02, 0.002],  # no worse: still like held-out images
}
SECTIONS = (
  *('Scores', 'Samples', 'Choice of the checkpoint', 'Logits', 'Training'),
  *('Log-ratio by noise level', 'Warnings', 'Time', 'Config'),
)


@pytest.fixture(scope='module', autouse=True)
def _small_figures():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(figures, 'DPI', 30)
    yield


@pytest.fixture(scope='module')
def diagnostics():
  """A record's diagnostics of a batch whose top noise bin is empty: null."""
  noise = jnp.linspace(-1.0, 1.0, 16)

  def logit(log_ratio):
    return 0.5 * log_ratio

  metrics = jax.jit(ddo.diagnostics, static_argnums=(3, 4))(
    noise + 2, noise - 2, jnp.arange(16) % 7, 8, logit
  )
  metrics = {name: np.asarray(v).tolist() for name, v in metrics.items()}
  for kind in ('real', 'fake'):
    metrics[f'log_ratio_{kind}_by_noise_level'][-1] = None
  return metrics


@pytest.fixture(scope='module')
def finished(tmp_path_factory, diagnostics):
  """A finished run's folder and its page."""
  folder = make_run(tmp_path_factory.mktemp('finished') / 'run', diagnostics)
  before = set(folder.rglob('*'))
  page = page_of(folder)
  assert set(folder.rglob('*')) == before | {folder / 'report.html'}
  return folder, page


def summarize(scores):
  return {
    name: {'mean': np.mean(v), 'sd': np.std(v, ddof=1), 'values': v}
    for name, v in scores.items()
  }


def train_record(stage, step, extra):
  common = {'loss': 1.3 - step / 100, 'mle_loss': 20.0 + step, 'grad_norm': 1.0}
  where = {'stage': stage, 'kind': 'train', 'step': step, 'images': 10 * step}
  return where | common | {'reference_distance': step / 7} | extra


def make_run(folder, diagnostics, objective='ddo', **changes):
  """A finished run of one round, and config fields that differ."""
  config = config_lib.Config(model=toy.ToyConfig(), sampler=heun.Heun())
  if objective == 'mle':
    config.ddo.objective = objective_lib.MLE()
  config = settings.to_json(config) | changes
  extra = diagnostics | {'chance_loss': 1.386} if objective == 'ddo' else {}
  log = [train_record('pretrain', step, {}) for step in range(9)]
  for step in range(9):
    if step % 4 == 0:
      scores = {'fd_train': 1 / (1 + step), 'fd_test': 2 / (1 + step)}
      where = {'stage': 'round_000', 'kind': 'eval', 'step': step}
      # Scores and diagnostics share a name: 'accuracy'.
      log.append(where | {'images': 10 * step, 'accuracy': 0.9} | scores)
    log.append(train_record('round_000', step, extra))
  result = {
    'round': 0,
    'before': summarize(BEFORE),
    'after': summarize(AFTER),
    'samples': 1_234,
    'promoted': {'step': 4, 'images': 40, 'profile': 'p', 'selection': 0.2},
    'warnings': ['a <warning>'],
    'environment': {'jax': '0.0', 'devices': '1 × <cpu>'},
    'provenance': {},
    'seconds': {'fakes': 1.5, 'train': 50.25, 'evaluate': 10.0},
  }
  seconds = {'round_000': 61.75, 'pretrain': 100.0, 'total': 161.75}
  summary = {'name': 'run', 'rounds': [result], 'seconds': seconds}
  (folder / 'round_000').mkdir(parents=True)
  for name in ('before', 'after'):
    images = np.full((12, 8, 8, 1), 9, np.uint8)
    grid.save(folder / f'round_000/{name}.png', images, 17)
  write_json(folder / 'config.json', config)
  write_json(folder / 'round_000' / 'done.json', result)
  write_json(folder / 'summary.json', summary)
  write_log(folder, log)
  return folder


def write_json(path, value):
  path.write_text(json.dumps(value))


def write_log(folder, log):
  lines = [json.dumps(record) + '\n' for record in log]
  (folder / 'metrics.jsonl').write_text(''.join(lines))


def read_log(folder):
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def page_of(folder, control=None):
  path = report_page.write(folder, control)
  assert path == folder / 'report.html'
  return path.read_text()


def headings(page):
  return tuple(re.findall('<h2>(.*?)</h2>', page))


def pictures(page):
  coded = re.findall('src="data:image/[a-z]+;base64,([^"]*)"', page)
  return [Image.open(io.BytesIO(base64.b64decode(c))) for c in coded]


def test_page_is_whole_and_needs_nothing_else(finished):
  _, page = finished
  assert headings(page) == SECTIONS
  assert not re.search(r'https?:|<script|<link|@import|url\(', page)
  targets = re.findall(r'(?:src|href)\s*=\s*"([^"]{0,11})', page)
  assert targets == ['data:image/'] * 6  # two grids and four figures
  for picture in pictures(page):
    picture.load()
  assert page.count('class="pixels"') == 2
  assert 'Unfinished' not in page


def test_page_holds_the_numbers(finished):
  _, page = finished
  assert 'fd_train 1.01 ± 0.02 → 0.25 ± 0.01 in 1 round<' in page
  assert '1.013 ± 0.021' in page  # the table: one digit more
  assert '0.250 ± 0.010' in page
  assert 'step 4 promoted (40 images, p), alpha 4, beta 0.05' in page
  assert 'Round 0: a &lt;warning&gt;.' in page
  for cell in ('1.5', '50.2', '10.0', '61.8', '100.0', '150.2', '161.8'):
    assert f'<td>{cell}</td>' in page
  assert '<td>ddo.negatives.size</td><td>50000</td>' in page
  # The config leaves both open: 0.
  assert '3 × 1,234 samples: mean' in page


def test_marks_say_what_every_seed_says(finished):
  _, page = finished
  marks = {
    name: re.findall('title="(better|worse)"', row)
    for name, row in re.findall(r'<tr><td>(\w+)<span(.*?)</tr>', page)
  }
  assert marks == {
    'fd_train': ['better'],
    'fd_test': ['worse'],
    'accuracy': ['better'],
    'precision': ['worse'],
    'recall': [],
    'nn_ratio': ['better'],
    'memorised': [],
  }


def test_scores_under_a_protocol_are_printed_as_papers_do(
  tmp_path, diagnostics
):
  fields = {'evaluation.metric': 'fid', 'evaluation.protocol': 'edm-cifar10'}
  folder = make_run(tmp_path / 'run', diagnostics, **fields)
  path = folder / 'round_000' / 'done.json'
  result = json.loads(path.read_text())
  for scores in (result['before'], result['after']):
    fid = scores['fd_train']
    scores.clear()
    fid |= {'minimum': min(fid['values']), 'headline': 'minimum'}
    scores['fid'] = fid
    scores['odd'] = dict(fid, headline='mean')
  del result['samples']  # as earlier versions left it
  write_json(path, result)
  page = page_of(folder)
  assert 'fid 0.99 (mean 1.01 ± 0.02) → 0.24 (mean 0.25 ± 0.01) in 1' in page
  assert 'Fréchet distance in Inception features; lower is better.' in page
  assert 'A score; not judged.' in page
  assert '3 seeds: mean' in page


def test_a_config_of_earlier_versions(tmp_path, diagnostics):
  folder = make_run(tmp_path / 'run', diagnostics)
  config = json.loads((folder / 'config.json').read_text())
  config = {k: v for k, v in config.items() if not k.startswith('ddo.')}
  config |= {
    'ddo.objective': 'ddo',
    'ddo.alpha': [4.0],
    'ddo.beta': [0.05, 0.1],
  }
  write_json(folder / 'config.json', config | {'ddo.learning_rate': [0.001]})
  page = page_of(folder)
  assert 'p), alpha 4, beta 0.05, learning_rate 0.001<' in page
  assert 'objective ddo' in page
  new = '_by_noise_level'
  log = json.loads(json.dumps(read_log(folder)).replace(new, '_by_level'))
  write_log(folder, log)
  assert pictures(page_of(folder)) == pictures(page)


def test_names_from_files_are_escaped(tmp_path, diagnostics):
  nasty = '<script>alert("1 & 2")</script>$x'
  fields = {'name': nasty, 'data.source': nasty}
  folder = make_run(tmp_path / 'run', diagnostics, **fields)
  control = make_run(tmp_path / 'control', diagnostics, 'mle', name=nasty)
  write_log(folder, [r for r in read_log(folder) if r['kind'] == 'eval'])
  page = page_of(folder, control)
  assert '<script' not in page
  good = '&lt;script&gt;alert(&quot;1 &amp; 2&quot;)&lt;/script&gt;$x'
  assert f'<h1>{good}</h1>' in page
  assert page.count(good) == 4  # title, heading, source, control


def test_unfinished_run_shows_what_exists(tmp_path, diagnostics):
  folder = make_run(tmp_path / 'run', diagnostics, rounds=2)
  (folder / 'summary.json').unlink()
  log = read_log(folder)
  begun = {'stage': 'round_001', 'kind': 'eval', 'step': 0, 'images': 0}
  write_log(folder, [*log, begun | {'fd_train': 0.3}])
  with (folder / 'metrics.jsonl').open('a') as file:
    file.write('{"stage": "round_001", "ki')  # being written
  page = page_of(folder)
  assert 'Unfinished: 1 of 2 rounds done. Last record: round_001, 0 ' in page
  assert 'in 1 round<' in page
  assert headings(page) == SECTIONS


def test_only_the_files_of_the_top_folder(tmp_path, diagnostics):
  folder = make_run(tmp_path / 'run', diagnostics)
  for path in (folder / 'round_000').iterdir():
    path.unlink()
  write_log(folder, [r for r in read_log(folder) if r['kind'] == 'eval'])
  page = page_of(folder)
  assert headings(page) == (*SECTIONS[:3], *SECTIONS[-3:])
  assert len(pictures(page)) == 1  # no grids
  assert 'in 1 round<' in page and 'Unfinished' not in page


def test_run_without_rounds_or_records(tmp_path, diagnostics):
  folder = make_run(tmp_path / 'run', diagnostics, rounds=0)
  for path in (folder / 'round_000').iterdir():
    path.unlink()
  summary = {'name': 'run', 'rounds': [], 'seconds': {'pretrain': 9.0}}
  write_json(folder / 'summary.json', summary)
  write_log(folder, [r for r in read_log(folder) if r['stage'] == 'pretrain'])
  page = page_of(folder)
  assert headings(page) == ('Training', 'Warnings', 'Time', 'Config')
  assert '0 of 0 rounds done' in page and 'Unfinished' not in page
  (folder / 'metrics.jsonl').unlink()
  (folder / 'summary.json').unlink()
  page = page_of(folder)
  assert headings(page) == ('Warnings', 'Config')
  assert 'Unfinished: 0 of 0' in page


def test_mle_rounds_have_no_log_ratios(tmp_path, diagnostics):
  page = page_of(make_run(tmp_path / 'run', diagnostics, 'mle'))
  assert set(SECTIONS) - set(headings(page)) == {
    'Logits',
    'Log-ratio by noise level',
  }
  assert 'alpha 4' not in page


def test_single_evaluation_single_seed_and_nulls(tmp_path, diagnostics):
  folder = make_run(tmp_path / 'run', diagnostics)
  log = [r for r in read_log(folder) if r['kind'] == 'train' or r['step'] == 8]
  for record in log:
    if record['kind'] == 'train':
      record['grad_norm'] = None
      record['mle_loss'] = None if record['step'] % 2 else 3.0
  write_log(folder, log)
  path = folder / 'round_000' / 'done.json'
  result = json.loads(path.read_text())
  for scores in (result['before'], result['after']):
    for score in scores.values():
      score |= {'sd': None, 'values': score['values'][:1]}
    scores['fd_test'] = {'mean': None, 'sd': None, 'values': [None]}
  result['promoted'] |= {'step': 0, 'images': 0}
  write_json(path, result)
  page = page_of(folder)
  assert headings(page) == SECTIONS
  assert 'fd_train 1.013 → 0.250 in 1 round<' in page
  assert '<td>– </td>' in page
  assert 'the reference stays' in page
  assert 'title="better"' not in page and '>nan' not in page


def test_folder_that_is_no_run(tmp_path, finished):
  folder, _ = finished
  with pytest.raises(errors.UserError, match='is this the --workdir'):
    report_page.write(tmp_path)
  with pytest.raises(errors.UserError, match='is this the --workdir'):
    report_page.write(folder, tmp_path)
  write_json(tmp_path / 'config.json', {'name': 'of another program'})
  with pytest.raises(errors.UserError, match='not that of a run'):
    report_page.write(tmp_path)


def test_evaluations_draw_the_records(finished):
  log = read_log(finished[0])
  rounds = {'round_000': [r for r in log if r['stage'] == 'round_000']}
  control = {'round_000': [dict(r, fd_train=5.0) for r in rounds['round_000']]}
  draw = figures.evaluations.__wrapped__
  figure = draw(rounds, ['none', 'fd_train'], {'round_000': 4}, control)
  assert [axis.get_title() for axis in figure.axes] == ['fd_train']
  lines = {k.get_label(): k.get_data() for k in figure.axes[0].lines}
  images, values = lines['round 0']
  np.testing.assert_array_equal(images, [0, 40, 80])
  np.testing.assert_allclose(values, [1, 1 / 5, 1 / 9])
  np.testing.assert_array_equal(lines['control, round 0'][1], [5, 5, 5])
  ring = [line for line in figure.axes[0].lines if line.get_ms() == 10]
  np.testing.assert_allclose(ring[0].get_data(), [[40], [1 / 5]])


def test_histograms_are_shares_of_the_rows(finished):
  log = read_log(finished[0])
  rounds = {'round_000': [r for r in log if r['stage'] == 'round_000']}
  figure = figures.histograms.__wrapped__(rounds)
  assert [axis.get_title() for axis in figure.axes] == [
    'round 0, start: 0 images',
    'round 0, middle: 40 images',
    'round 0, end: 80 images',
  ]
  _, real, _, fake = (p.get_data() for p in figure.axes[0].patches)
  for stairs in (real, fake):
    np.testing.assert_allclose(stairs.values.sum(), 100)
    np.testing.assert_allclose(
      stairs.edges[[0, 1, -1]], [-6.375, -6.125, 6.375]
    )
  # β·r lies in [0.5, 1.5] on real rows, in [-1.5, -0.5] on fake ones.
  assert real.values[real.edges[:-1] < 0.25].sum() == 0
  assert fake.values[fake.edges[1:] > -0.25].sum() == 0


def test_running_mean():
  np.testing.assert_allclose(figures._smooth(np.full(60, 3.0)), 3.0)
  values = np.array([1.0, np.nan, 3.0] + [0.0] * 17)
  smooth = figures._smooth(values)
  np.testing.assert_allclose(smooth[:4], [1.0, np.nan, 1.5, 1.0])
  assert len(figures._smooth(np.array([2.0]))) == 1


def test_grids_are_kept_or_reduced(tmp_path):
  for width, small in ((468, True), (900, False)):
    path = tmp_path / f'{width}.png'
    Image.new('RGB', (width, 30)).save(path)
    assert figures.sample_grid(path) == (path.read_bytes(), small)
  Image.new('RGB', (5131, 410)).save(path)
  content, small = figures.sample_grid(path)
  picture = Image.open(io.BytesIO(content))
  assert (picture.format, picture.size, small) == ('JPEG', (936, 75), False)
  path.write_bytes(b'')  # still being written
  assert figures.sample_grid(path) == (None, False)
