"""A run is checked before it begins; a start that failed blocks nothing."""

import dataclasses
import re
import shutil

import numpy as np
import pytest

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax.configs import digits_var
from ddo_jax.method import noise as noise_lib
from ddo_jax.method import objective
from ddo_jax.models import toy
from ddo_jax.report import cost
from ddo_jax.runtime import records
from ddo_jax.samplers import heun
from ddo_jax.training import check
from ddo_jax.training import run as run_lib
from ddo_jax.training import workspace
from tests.strangers import tiny


def write(path, count, seed, shape=(8, 8, 1)):
  draw = np.random.default_rng(seed)
  image = draw.integers(0, 256, (count, *shape), np.uint8)
  np.savez(path, image=image, label=np.arange(count) % 2)
  return image


@pytest.fixture
def config(tmp_path):
  """A run on two classes of noise, held-out images beside them."""
  write(tmp_path / 'train.npz', 64, 0)
  write(tmp_path / 'test.npz', 32, 1)
  config = tiny.get_config()
  config.data = config_lib.Data(source=f'{tmp_path}/{{split}}.npz')
  config.model = toy.ToyConfig(hidden=8, num_classes=2, pixel_values=256)
  return config


def check_run(config, workdir, **options):
  return check.training(workspace.Run(config, workdir), **options)


def faults(config, workdir):
  """The lines of all that is wrong; nothing may be written."""
  with pytest.raises(errors.UserError) as caught:
    check_run(config, workdir)
  assert not workdir.exists()
  return str(caught.value).splitlines()


def fault(config, workdir):
  (line,) = faults(config, workdir)
  return line


def test_what_is_found_is_said(config, tmp_path):
  lines = check_run(config, tmp_path / 'run')
  text = '\n'.join(lines)
  assert all(line.startswith('✓ ') for line in lines)
  for part in (
    'to do: pretrain, round_000',
    '64 images 8×8×1, 2 classes',
    'pretrain 4 steps × 16 images',
    'fd_train by a classifier',
    '4.1 kB of it fake pools',  # 64 rows of 64 bytes
    'images 8×8×1',
    'nothing is in it yet',
  ):
    assert part in text, part
  assert not (tmp_path / 'run').exists()
  # The pretraining alone asks for no held-out images.
  (tmp_path / 'test.npz').unlink()
  lines = check_run(config, tmp_path / 'run', rounds=False)
  assert not any('evaluation' in line for line in lines)


def test_all_faults_are_listed_at_once(config, tmp_path):
  config.model.network = 'unett'
  config.evaluation.metric = 'fd_tran'
  config.pretrain.rhythm.save_images = -1
  config.ddo.batch_size = 17
  config.data.source = str(tmp_path / 'none.npz')
  config.guide_from = str(tmp_path / 'no_guide')
  config.rounds = 1.5
  lines = faults(config, tmp_path / 'run')
  for part in (
    "config.model.network is 'unett'; it must be one of ('mlp', 'unet');"
    ' did you mean unet?',
    'did you mean fd_train?',
    'config.pretrain.rhythm.save_images is -1',
    'config.rounds is 1.5',
    'config.ddo.batch_size 17 is not divisible by 8 devices',
    'none.npz; wanted the path of an .npz',
    "none.npz is the split 'train', not 'test'",
  ):
    assert sum(part in line for line in lines) == 1, (part, lines)


def test_weights_are_held_to_their_models(config, tmp_path):
  config.guide_from = str(tmp_path / 'no_guide')
  config.init_from = str(tmp_path / 'no_params')
  (tmp_path / 'no_params').mkdir()
  first, second = faults(config, tmp_path / 'run')
  assert 'no params in' in first and 'no_params' in first
  assert 'no_guide' in second


@pytest.mark.parametrize(
  ('change', 'wanted'),
  [
    ({'source': '{tmp}/train.npz'}, 'holdout'),
    ({'source': '{tmp}/none.npz'}, 'none.npz'),
  ],
)
def test_held_out_images_are_asked_for_at_once(
  config, tmp_path, change, wanted
):
  source = change['source'].replace('{tmp}', str(tmp_path))
  config.data = config_lib.Data(source=source)
  assert wanted in '\n'.join(faults(config, tmp_path / 'run'))


def test_copies_of_training_images_hold_nothing_out(config, tmp_path):
  shutil.copy(tmp_path / 'train.npz', tmp_path / 'test.npz')
  assert 'are copies of training images' in fault(config, tmp_path / 'run')
  test = write(tmp_path / 'test.npz', 32, 1)
  test[:8] = np.load(tmp_path / 'train.npz')['image'][:8]
  np.savez(tmp_path / 'test.npz', image=test, label=np.arange(32) % 2)
  assert '25% of the held-out images' in fault(config, tmp_path / 'run')


def test_an_image_that_cannot_be_halved(config, tmp_path):
  for split, count in (('train', 64), ('test', 32)):
    write(tmp_path / f'{split}.npz', count, count, (9, 9, 1))
  config.model.image_shape = (9, 9, 1)
  assert check_run(config, tmp_path / 'run')
  config.model.network = 'unet'
  assert 'config.model.image_shape is (9, 9, 1)' in fault(
    config, tmp_path / 'run'
  )


def test_a_guided_model_needs_a_guide(config, tmp_path):
  """Only tracing a sample finds it."""
  config.model.num_classes = 0
  config.pretrain.label_drop = 0.0
  config.sampler = heun.Heun(num_steps=4, guidance=2.0)
  assert 'guidance is not 1' in fault(config, tmp_path / 'run')
  config.sampler = heun.Heun(num_steps=4, sigma_min=3.0, sigma_max=1.0)
  assert 'sigma' in fault(config, tmp_path / 'run')


class Elbo(toy.ToyConfig):
  def build(self, noise=None, remat=False):
    model = super().build(noise, remat)
    return model.replace(weight=noise_lib.ElboWeight())


def test_a_weight_that_asks_for_a_density(config, tmp_path):
  config.model = Elbo(hidden=8, num_classes=2, pixel_values=256)
  assert check_run(config, tmp_path / 'run')
  config.ddo.noise = noise_lib.Discrete(sigmas=(0.1, 1.0))
  assert 'Discrete has no density' in fault(config, tmp_path / 'run')


@dataclasses.dataclass
class Bare(objective.Objective):
  def loss(self, log_ratio_real, log_ratio_other, rows):
    return -log_ratio_real, log_ratio_other


class Scaled(Bare):
  beta = 0.1


class Own(Bare):
  def logit(self, log_ratio):
    return log_ratio


def test_an_objective_scales_its_log_ratio(config, tmp_path):
  for kind in (Scaled, Own):
    config.ddo.objective = kind()
    assert check_run(config, tmp_path / 'run')
  config.ddo.objective = Bare()
  line = fault(config, tmp_path / 'run')
  assert 'give Bare one, or override its `logit`' in line


def test_room_on_the_disk(config, tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(
    shutil, 'disk_usage', lambda path: usage._replace(free=100_000)
  )
  line = fault(config, tmp_path / 'run')
  assert '100 kB free' in line and 'config.rounds' in line
  monkeypatch.undo()
  (tmp_path / 'file').write_text('')
  assert 'is a file' in fault(config, tmp_path / 'file' / 'run')
  (tmp_path / 'around').symlink_to('around')
  assert '(Too many levels' in fault(config, tmp_path / 'around' / 'run')


def test_a_rollback_keeps_a_checkpoint_more(config, tmp_path, monkeypatch):
  monkeypatch.setattr(cost, 'short', str)
  config.rounds = 3
  needed = []
  for policy in ('stop', 'rollback'):
    config.ddo.bad_numbers.policy = policy
    config.ddo.rhythm.save_images = config.ddo.batch_size
    text = '\n'.join(check_run(config, tmp_path / 'run'))
    needed.append(int(re.search(r'(\d+)B to be written', text).group(1)))
  run = workspace.Run(config, tmp_path / 'run')
  phases = check.stages(run, rounds=True)
  *_, state = check._phase_bytes(check.Plan(run, phases), 'ddo', config.ddo)
  assert needed[1] - needed[0] == 3 * state > 0


def test_each_phase_divides_over_the_devices(tmp_path):
  config = digits_var.get_config()
  config.tokenizer.batch_size = 9
  config.ddo.batch_size = 0
  first, second = faults(config, tmp_path / 'run')
  assert 'config.ddo.batch_size is 0' in first
  assert 'config.tokenizer.batch_size 9 is not divisible by 8' in second


@pytest.mark.parametrize(
  ('side', 'wanted'),
  [
    (64, 'edm2-img64, or a protocol of images like these'),
    (128, 'config.evaluation.protocol to a protocol of images like these'),
  ],
)
def test_images_that_a_protocol_does_not_measure(
  config, tmp_path, monkeypatch, side, wanted
):
  """It is told beside the files that are missing."""
  monkeypatch.setenv('DDO_JAX_ASSETS', 'http://127.0.0.1:1')
  for split, count in (('train', 8), ('test', 4)):
    write(tmp_path / f'{split}.npz', count, count, (side, side, 3))
  config.model.image_shape = (side, side, 3)
  config.evaluation.protocol = 'edm-cifar10'
  config.evaluation.metric = 'fid'
  lines = faults(config, tmp_path / 'run')
  (line,) = [line for line in lines if 'measures uint8' in line]
  assert wanted in line and 'write' not in line
  assert any(line.startswith('cifar10-32x32.npz') for line in lines)


def stop(*args):
  raise KeyboardInterrupt


def test_a_start_that_failed_blocks_nothing(config, tmp_path, monkeypatch):
  workdir = tmp_path / 'run'
  good = np.load(tmp_path / 'train.npz')
  image, label = good['image'], good['label']
  np.savez(tmp_path / 'train.npz', image=image / np.float32(255), label=label)
  with pytest.raises(errors.UserError, match='float32'):
    run_lib.play(config, workdir)
  assert not workdir.exists()
  np.savez(tmp_path / 'train.npz', image=image, label=label)
  # The next start claims the folder; killed before it has made anything, it
  # leaves it to another config.
  monkeypatch.setattr(run_lib, '_pretrain', stop)
  for seed in (0, 1):
    config.seed = seed
    with pytest.raises(KeyboardInterrupt):
      run_lib.play(config, workdir)
    assert records.read_json(workdir / 'config.json')['seed'] == seed


@pytest.mark.parametrize(
  ('path', 'costs'),
  [
    ('pretrain/params', True),
    ('pretrain/checkpoints/400', True),
    ('pretrain/checkpoints/400.orbax-checkpoint-tmp-1', False),
    ('round_000/reference', False),
    ('round_000/fakes/000000.npz', True),
    ('round_000/fakes/000000.partial.npz', False),
    ('round_000/fakes/pool.json', False),
    ('round_001/promoted', True),
  ],
)
def test_a_folder_belongs_to_what_cost_time(config, tmp_path, path, costs):
  workdir = tmp_path / 'run'
  workspace.claim_workdir(config, workdir)
  path = workdir / path
  path.mkdir(parents=True)
  workspace.claim_workdir(config, workdir)
  assert path.exists()
  config.seed = 7
  if not costs:
    workspace.claim_workdir(config, workdir)
    assert not path.exists()
    return
  with pytest.raises(errors.UserError) as caught:
    workspace.claim_workdir(config, workdir)
  name = path.parent if path.suffix else path
  wanted = f'seed: 0 -> 7), which made {name.relative_to(workdir)}'
  assert wanted in str(caught.value)
  assert path.exists()
