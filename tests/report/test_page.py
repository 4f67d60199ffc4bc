"""The page of a run: whole, true to the records, and never in the way."""

import base64
import html
import io
import json
import pathlib
import re
import shutil
import subprocess

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
from ddo_jax.report import markup
from ddo_jax.report import page as report_page
from ddo_jax.report import samples as report_samples
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
  'Scores',
  'Samples',
  'Nearest training images',
  'Choice of the checkpoint',
  'Logits',
  'Training',
  'Log-ratio by noise level',
  'Checked',
  'Time',
  'Play it again',
)
CLASSES = [i % 10 for i in range(20)]


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
  return (
    where
    | common
    | {'reference_distance': step / 7, 'images_per_second': 5.0}
    | extra
  )


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
    'evaluator': {
      'classifier': {
        'train': 'set/train',
        'test': 'set/test',
        'held_out_accuracy': 0.987,
        'held_out_images': 3_210,
        'held_out_copies': 7,
      }
    },
    'notes': ['a note'],
    'labels': 'every class equally often',
    'sheets': {
      'labels': CLASSES,
      'height': 8,
      'neighbours': {
        'space': 'pixels',
        'searched': 40,
        'training': 1_000,
        'samples': [float(i) for i in range(20)],
        'real': [5.0] * 20,
        'shown': list(range(10)),
      },
    },
    'environment': {'jax': '0.0', 'devices': '1 × <cpu>'},
    'provenance': {},
    'seconds': {'fakes': 1.5, 'train': 50.25, 'evaluate': 10.0},
  }
  seconds = {'round_000': 61.75, 'pretrain': 100.0, 'total': 161.75}
  summary = {
    'name': 'run',
    'rounds': [result],
    'seconds': seconds,
    'model': {'parameters': 12_345, 'flops': 1_234_567},
    'command': 'python -m ddo_jax.main --config=<x>',
    'changed': ['rounds', 'model.hidden'],
  }
  (folder / 'round_000').mkdir(parents=True)
  for value, name in enumerate(('real', 'before', 'after', 'neighbours')):
    images = np.full((40, 8, 8, 1), value, np.uint8)
    grid.save(folder / f'round_000/{name}.png', images, 17)
  write_json(folder / 'config.json', config)
  write_json(folder / 'round_000' / 'done.json', result)
  write_json(folder / 'summary.json', summary)
  write_log(folder, log)
  return folder


def make_copy(folder, target):
  """A copy of a run's folder, to be changed."""
  return pathlib.Path(shutil.copytree(folder, target))


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
  assert not re.search(r'https?:|<link|@import|url\(', page)
  targets = re.findall(r'(?:src|href)\s*=\s*"([^"]{0,11})', page)
  # Two rows and the whole of three sheets, four rows of neighbours, and the
  # panels: two of scores, three of logits, eight of training, one of noise.
  assert targets == ['data:image/'] * (3 * 2 + 3 + 4 + 2 + 3 + 8 + 1)
  for picture in pictures(page):
    picture.load()
  assert page.count('class="pixels"') == 3 * 2 + 3 + 4
  assert 'Unfinished' not in page


def test_scores_that_were_asked_for_have_a_curve(tmp_path, diagnostics):
  changes = {'evaluation.extra': ['mind', 'fd_test_inf']}
  folder = make_run(tmp_path / 'run', diagnostics, **changes)
  log = [
    record | {'mind': 0.5} if record['kind'] == 'eval' else record
    for record in read_log(folder)
  ]
  write_log(folder, log)
  page = page_of(folder)
  assert 'alt="mind"' in page
  assert 'alt="fd_test"' in page
  assert 'fd_test_inf"' not in page  # nothing was measured


def test_page_holds_the_numbers(finished):
  _, page = finished
  assert 'fd_train 1.01 ± 0.02 → 0.25 ± 0.01 in 1 round<' in page
  assert '1.013 ± 0.021' in page  # the table: one digit more
  assert '0.250 ± 0.010' in page
  assert 'step 4 promoted (40 images, p), alpha 4, beta 0.05' in page
  assert 'Round 0: a &lt;warning&gt;.' in page
  for cell in ('1.5', '50.2', '10.0', '61.8', '100.0', '150.2', '161.8'):
    assert f'>{cell}</td>' in page
  field = '>ddo.negatives.size</td><td data-head="value">50000</td>'
  assert page.count(field) == 1
  field = '>model.hidden</td><td data-head="value">64</td>'
  assert page.count(field) == 2  # among the changed ones, and among all
  # The config leaves both open: 0.
  assert '3 × 1,234 samples: mean' in page
  assert 'ToyConfig, 12,345 parameters, 1.23 MFLOPs a forward pass' in page
  assert '<pre>python -m ddo_jax.main --config=&lt;x&gt;</pre>' in page
  assert 'pretraining 5 images/s, rounds 5 images/s' in page


def test_what_was_checked_and_what_was_not(finished, tmp_path):
  folder, page = finished
  good, bad = page.split('Not checked')
  assert 'largest |βr| 1.5, where a run stops above 0.001' in good
  assert '3 × 1,234 samples; the checkpoints were chosen by 5,000' in good
  assert 'fitted to set/train; set/test was held out: it names 98.7%' in good
  assert '3,210 images rightly, and 7 of them are copies' in good
  assert 'every class equally often' in good
  assert 'neither saturated' not in good  # there was a warning
  assert 'Another training seed' in bad
  assert 'A note.' in bad
  # Under a protocol, and without warnings.
  folder = make_copy(folder, tmp_path / 'copy')
  path = folder / 'round_000' / 'done.json'
  result = json.loads(path.read_text())
  protocol = {'name': 'edm-x'}
  files = {'fid_stats': {'sha256': 'a' * 64}}
  result['evaluator'] = {'protocol': protocol, 'files': files}
  result['warnings'] = []
  write_json(path, result)
  good, bad = page_of(folder).split('Not checked')
  assert (
    'the protocol edm-x, against its file of statistics (sha256 aaa' in good
  )
  assert 'neither saturated' in good
  assert 'no FID' not in bad


def test_a_column_is_a_seed(finished):
  _, page = finished
  assert 'alt="round 0, start: 0 images"' in page
  part = page.split('<h2>')[2]
  names = re.findall('<span>(real images|reference|after round 0)</span>', part)
  assert names == ['real images', 'reference', 'after round 0'] * 2
  row = ''.join(f'<span>{label}</span>' for label in CLASSES[:10])
  assert part.count(f'<div class="columns">{row}</div>') == 2
  strips = pictures(part)
  assert [strip.size for strip in strips[:6]] == [(364, 32)] * 6
  for strip, value in zip(strips, [0, 1, 2] * 2, strict=False):
    pixels = np.asarray(strip)
    assert pixels.shape == (32, 364, 2)  # grey, and clear between the images
    assert set(pixels[pixels[..., 1] > 0, 0]) == {value * 255 // 16}
    assert (pixels[0, :, 1] > 0).sum() == 10 * 32


def test_no_grid_is_shown_twice(finished, tmp_path):
  """A round starts where the one before ended."""
  folder = make_copy(finished[0], tmp_path / 'copy')
  result = json.loads((folder / 'round_000' / 'done.json').read_text())
  for index, step in ((1, 4), (2, 0)):
    (folder / f'round_{index:03d}').mkdir()
    again = result | {'round': index}
    again['promoted'] = result['promoted'] | {'step': step}
    write_json(folder / f'round_{index:03d}' / 'done.json', again)
    for name in ('before', 'after'):  # as earlier versions left them
      path = folder / f'round_{index:03d}' / f'{name}.png'
      path.write_bytes((folder / 'round_000' / 'after.png').read_bytes())
  page = page_of(folder)
  names = re.findall('<figcaption>(.*?)</figcaption>', page)
  assert names == [
    'real images',
    'reference',
    'after round 0',
    'after round 1',
  ]
  assert 'Round 2: the reference stays' in page


@pytest.mark.parametrize(
  ('samples', 'suspicious'),
  [
    (np.arange(4.0, 84.0), False),  # 4 of 80 lie at 7 or below
    (np.linspace(0, 40, 80), False),  # 16 of them do
    (np.linspace(0, 25, 80), True),  # 26 of them do
    (np.zeros(80), True),
  ],
)
def test_copies_are_told(samples, suspicious):
  near = {'samples': samples.tolist(), 'real': list(np.arange(4.0, 84.0))}
  told, sentence = report_samples.copying(near)
  assert told == suspicious
  assert ('suggests copying' in sentence) and '(4 would be' in sentence
  assert ('nothing suggests' in sentence) != suspicious
  exact = f' {sum(samples == 0)} are exact copies.'
  assert (exact in sentence) == (0 in samples)


def test_marks_say_what_every_seed_says(finished):
  _, page = finished
  marks = {
    name: re.findall('title="(better|worse)"', row)
    for name, row in re.findall(r'<tr><td[^>]*>(\w+)<span(.*?)</tr>', page)
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
  assert 'p), alpha 4, beta 0.05, learning_rate 0.001.<' in page
  assert '<dd>ddo, alpha 4, beta 0.05, learning_rate 0.001<' in page
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
  assert page.count('<script') == 1  # the page's own
  good = '&lt;script&gt;alert(&quot;1 &amp; 2&quot;)&lt;/script&gt;$x'
  assert f'<h1>{good}</h1>' in page
  assert page.count(good) == 4  # title, heading, source, control


def test_unfinished_run_shows_what_exists(tmp_path, diagnostics):
  folder = make_run(tmp_path / 'run', diagnostics, rounds=2)
  (folder / 'summary.json').unlink()
  log = read_log(folder)
  begun = {'stage': 'round_001', 'kind': 'eval', 'step': 0, 'images': 0}
  bad = {'stage': 'round_000', 'kind': 'bad', 'step': 3, 'images': 768}
  write_log(folder, [*log, bad, begun | {'fd_train': 0.3}])
  with (folder / 'metrics.jsonl').open('a') as file:
    file.write('{"stage": "round_001", "ki')  # being written
  page = page_of(folder)
  assert 'Unfinished: 1 of 2 rounds done. Last record: round_001, 0 ' in page
  assert 'in 1 round<' in page
  assert 'round_000: bad numbers at 1 of the steps, which were left' in page
  assert headings(page) == SECTIONS


def test_rounds_that_end_by_themselves(tmp_path, diagnostics):
  folder = make_run(tmp_path / 'run', diagnostics, rounds='auto')
  summary = json.loads((folder / 'summary.json').read_text())
  write_json(folder / 'summary.json', summary | {'ended': 'no gain <seen>'})
  page = page_of(folder)
  assert 'no gain &lt;seen&gt;' in page and 'Unfinished' not in page
  (folder / 'summary.json').unlink()
  assert 'Unfinished: 1 rounds done, until one gains nothing' in page_of(folder)


def test_only_the_files_of_the_top_folder(tmp_path, diagnostics):
  folder = make_run(tmp_path / 'run', diagnostics)
  for path in (folder / 'round_000').iterdir():
    path.unlink()
  write_log(folder, [r for r in read_log(folder) if r['kind'] == 'eval'])
  page = page_of(folder)
  assert headings(page) == (SECTIONS[0], SECTIONS[3], *SECTIONS[-3:])
  assert len(pictures(page)) == 2  # no sheets
  assert 'in 1 round<' in page and 'Unfinished' not in page


def test_run_without_rounds_or_records(tmp_path, diagnostics):
  folder = make_run(tmp_path / 'run', diagnostics, rounds=0)
  for path in (folder / 'round_000').iterdir():
    path.unlink()
  summary = {'name': 'run', 'rounds': [], 'seconds': {'pretrain': 9.0}}
  write_json(folder / 'summary.json', summary)
  write_log(folder, [r for r in read_log(folder) if r['stage'] == 'pretrain'])
  page = page_of(folder)
  assert headings(page) == ('Training', 'Checked', 'Time', 'Play it again')
  assert '0 of 0 rounds done' in page and 'Unfinished' not in page
  (folder / 'metrics.jsonl').unlink()
  (folder / 'summary.json').unlink()
  page = page_of(folder)
  assert headings(page) == ('Play it again',)
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
  assert '<span>– <' in page
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
  axes, legend = draw(rounds, ['none', 'fd_train'], {'round_000': 4}, control)
  assert axes.get_title() == 'fd_train'
  named = [text.get_text() for text in legend.get_legend().get_texts()]
  assert named == ['control, round 0', 'round 0', 'promoted']
  lines = {k.get_label(): k.get_data() for k in axes.lines}
  images, values = lines['round 0']
  np.testing.assert_array_equal(images, [0, 40, 80])
  np.testing.assert_allclose(values, [1, 1 / 5, 1 / 9])
  np.testing.assert_array_equal(lines['control, round 0'][1], [5, 5, 5])
  ring = [line for line in axes.lines if line.get_ms() == 10]
  np.testing.assert_allclose(ring[0].get_data(), [[40], [1 / 5]])


def test_histograms_are_shares_of_the_rows(finished):
  log = read_log(finished[0])
  rounds = {'round_000': [r for r in log if r['stage'] == 'round_000']}
  axes = figures.histograms.__wrapped__(rounds)
  assert [axis.get_title() for axis in axes] == [
    'round 0, start: 0 images',
    'round 0, middle: 40 images',
    'round 0, end: 80 images',
  ]
  _, real, _, fake = (p.get_data() for p in axes[0].patches)
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


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('height', [4, 8, 33])
def test_rows_of_a_sheet(tmp_path, height, channels):
  """At any enlargement, and with lines that are clear."""
  images = np.arange(1, 21, dtype=np.uint8)[:, None, None, None]
  images = images * np.ones((1, height, 5, channels), np.uint8)
  grid.save(tmp_path / 'sheet.png', images, 256)
  sheet = grid.load(tmp_path / 'sheet.png')
  for index in (0, 1):
    row = np.asarray(grid.row(grid.cut(sheet, height), index, height))
    zoom = max(1, 32 // height)
    assert row.shape == (zoom * height, sheet.width, channels + 1)
    shown = row[row[..., -1] > 0][:, 0].reshape(zoom * height, 10, zoom * 5)
    wanted = np.arange(1, 11)[None, :, None] + 10 * index
    np.testing.assert_array_equal(shown, np.broadcast_to(wanted, shown.shape))
  (tmp_path / 'sheet.png').write_bytes(b'')  # still being written
  assert grid.load(tmp_path / 'sheet.png') is None
  assert grid.load(tmp_path / 'none.png') is None


def test_large_pictures_are_reduced():
  small = markup.picture(Image.new('L', (468, 30), 7), 'a "small" one')
  assert 'class="pixels" alt="a &quot;small&quot; one"' in small
  (picture,) = pictures(small)
  assert (picture.format, picture.size) == ('PNG', (468, 30))
  large = markup.picture(Image.new('RGBA', (5131, 410)), 'large')
  (picture,) = pictures(large)
  assert (picture.format, picture.size) == ('JPEG', (1300, 104))


# What a reader sees and does, tried inside the page; the frame around it writes
# down what it hears.
_PROBE = """
<script>
addEventListener('load', () => {
  const images = [...document.querySelectorAll('main img')];
  const strip = document.querySelector('.strip img');
  const cell = document.querySelector('.scores td:nth-child(2)');
  const loaded = images.filter((image) => image.naturalWidth > 0).length;
  const resources = performance.getEntriesByType('resource');
  const fetched = resources.filter((entry) => !entry.name.startsWith('data:'));
  const before = strip.getBoundingClientRect().width;
  strip.click();
  const dialog = document.querySelector('dialog');
  const caption = dialog.querySelector('span');
  const opened = dialog.open && caption.textContent;
  const large = dialog.querySelector('img').getBoundingClientRect().width;
  const key = new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true});
  dialog.dispatchEvent(key);
  const turned = caption.textContent;
  dialog.querySelectorAll('button')[2].click();
  parent.postMessage(JSON.stringify({
    width: innerWidth, images: images.length, loaded,
    fetched: fetched.length, overflow: document.body.scrollWidth - innerWidth,
    columns: getComputedStyle(cell, '::before').content,
    paper: getComputedStyle(document.body).backgroundColor,
    before, opened, large, turned, closed: !dialog.open,
  }), '*');
});
</script>
"""


def _browser():
  """The path of a Chromium; skips the test where there is none."""
  for name in ('chromium', 'chromium-browser', 'google-chrome', 'chrome'):
    if shutil.which(name):
      return shutil.which(name)
  pytest.skip('no Chromium here: apt-get install chromium')


@pytest.mark.parametrize(
  ('width', 'dark'), [(1_100, False), (390, True)], ids=['desktop', 'phone']
)
def test_page_in_a_browser(finished, tmp_path, width, dark):
  (tmp_path / 'page.html').write_text(finished[1] + _PROBE)
  (tmp_path / 'frame.html').write_text(
    f'<iframe src="page.html" width="{width}" height="800" style="border:0">'
    '</iframe><script>onmessage = (event) => {'
    ' document.body.dataset.heard = event.data; }</script>'
  )
  command = [_browser(), '--headless', '--no-sandbox', '--disable-gpu']
  command += ['--disable-quic', '--no-first-run', '--disable-sync']
  command += ['--disable-background-networking', '--disable-component-update']
  command += [f'--user-data-dir={tmp_path / "profile"}', '--dump-dom']
  command += ['--window-size=1200,900', '--virtual-time-budget=5000']
  command += [f'--blink-settings=preferredColorScheme={0 if dark else 1}']
  command += [(tmp_path / 'frame.html').as_uri()]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  heard = re.search('data-heard="(.*?)"', done.stdout)
  assert heard, f'the page said nothing: {done.stderr[-2_000:]}'
  seen = json.loads(html.unescape(heard[1]))
  assert seen['width'] == width
  assert seen['images'] == seen['loaded'] > 20
  assert seen['fetched'] == 0
  assert seen['overflow'] <= 0  # nothing is wider than the screen
  level = int(re.search(r'\d+', seen['paper'])[0])
  assert level < 50 if dark else level > 200
  # A phone has no room for the columns of a table: each score names its own.
  assert ('reference' in seen['columns']) == (width < 640)
  assert seen['before'] > 0.8 * (width - 150 if width > 640 else width - 50)
  assert seen['large'] >= 800  # even where the screen is narrower
  assert seen['opened'] == 'real images (1 of 3)'
  assert seen['turned'] == 'reference (2 of 3)'
  assert seen['closed']
