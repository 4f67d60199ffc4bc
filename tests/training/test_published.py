"""A run fetches the published files that it asks for; one command does all."""

import collections
import dataclasses
import json

import jax
import loopback
import numpy as np
import official_files
import pytest

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import main
from ddo_jax.assets import store
from ddo_jax.assets import table
from ddo_jax.configs import cifar10_edm_uncond
from ddo_jax.evaluation import protocols
from ddo_jax.evaluation.networks import inception
from ddo_jax.models import edm
from ddo_jax.runtime import checkpoint
from ddo_jax.samplers import heun
from ddo_jax.training import published
from ddo_jax.weights import edm_configs
from ddo_jax.weights import edm_names
from ddo_jax.weights import fid_stats
from ddo_jax.weights import inception as inception_weights
from ddo_jax.weights import released
from ddo_jax.weights import torch_zip

NAME = 'edm-cifar10-32x32-cond-vp'
MODEL = edm.EdmConfig(
  image_shape=(4, 4, 3),
  num_classes=3,
  model_channels=8,
  channel_mult=(1,),
  num_blocks=1,
  attn_resolutions=(),
  augment=0.0,
)


@pytest.fixture
def home(tmp_path, monkeypatch):
  """An empty cache."""
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  return tmp_path / 'home'


def test_the_papers_recipe_asks_for_all_its_files(home, tmp_path):
  """Without a network there is a line for each, with where it may come from."""
  config = cifar10_edm_uncond.get_config()
  config.data.data_dir = str(tmp_path / 'tfds')
  with pytest.raises(errors.UserError) as caught:
    main.selfplay(config, tmp_path / 'run')
  lines = str(caught.value).splitlines()
  wanted = {
    'edm-cifar10-32x32-uncond-vp.pkl': '--config.init_from',
    'cifar-10-binary.tar.gz': '--config.data.raw_dir',
    'cifar10-32x32.npz': '--config.evaluation.fid_stats',
    'pt_inception-2015-12-05-6726825d.pth': '--config.evaluation.inception',
  }
  assert len(lines) == len(wanted)
  for line, (file, setting) in zip(lines, wanted.items(), strict=True):
    assert f'no network to http://127.0.0.1:9/{file}' in line
    assert str(store.place(table.find(file))) in line
    assert f'set {setting}' in line
  assert not (tmp_path / 'run').exists()


def test_files_that_are_named_or_made_are_not_asked_for(home, tmp_path):
  config = cifar10_edm_uncond.get_config()
  config.data.raw_dir = str(tmp_path)
  config.evaluation.inception = 'inception-2015-12-05'
  config.evaluation.fid_stats = str(tmp_path / 'mine.npz')
  (tmp_path / 'mine.npz').touch()
  (tmp_path / 'weights' / config.init_from).mkdir(parents=True)
  (inception,) = published.wanted(config, tmp_path / 'weights')
  assert inception.asset.file == 'inception-2015-12-05.pkl'  # NVIDIA's
  config.evaluation.protocol = ''
  assert published.wanted(config, tmp_path / 'weights') == []


def write_released(path):
  """Writes MODEL's weights in EDM's layout."""
  shapes = jax.eval_shape(MODEL.build().init, jax.random.key(0))
  draw = np.random.default_rng(0)
  params = jax.tree.map(lambda s: np.float32(draw.normal(size=s.shape)), shapes)
  taps = edm_configs.taps_of(MODEL)
  state = edm_names.to_official(params, taps)
  kwargs = {
    'model_type': 'SongUNet',
    'img_resolution': 4,
    'img_channels': 3,
    'label_dim': 3,
    'model_channels': 8,
    'channel_mult': [1],
    'num_blocks': 1,
    'attn_resolutions': [],
    'dropout': 0.13,
    'augment_dim': 9,
    'embedding_type': 'positional',
    'encoder_type': 'standard',
    'decoder_type': 'standard',
    'channel_mult_noise': 1,
    'resample_filter': [1, 1],
  }
  content = official_files.released('EDMPrecond', state, kwargs)
  path.write_bytes(official_files.dumps(content))


def recipe(folder):
  """A round on 96 images, from the released weights, under a protocol."""
  draw = np.random.default_rng(0)
  images = draw.integers(0, 256, (96, 4, 4, 3), dtype=np.uint8)
  np.savez(folder / 'train.npz', image=images, label=np.arange(96) % 3)
  return config_lib.Config(
    rounds=1,
    init_from=NAME,
    model=dataclasses.replace(MODEL),
    sampler=heun.Heun(num_steps=2),
    data=config_lib.Data(source=str(folder / 'train.npz')),
    ddo=config_lib.Phase(
      negatives=config_lib.negatives_lib.Pool(size=32),
      images=16,
      batch_size=8,
    ),
    evaluation=config_lib.Evaluation(
      protocol='tiny', metric='fid', selection_samples=32, seeds=1
    ),
    executor=config_lib.Executor(sample_batch=32),
  )


@pytest.fixture
def mirror(tmp_path, monkeypatch):
  """What a mirror has: weights, statistics, and what stands for Inception."""

  def apply(params, images, rule):
    del params, rule
    x = images.reshape(len(images), -1)[:, :6] / 255.0
    return inception.Taps(**dict.fromkeys(inception.Taps._fields, x))

  tiny = dataclasses.replace(
    protocols.get('edm-cifar10'),
    name='tiny',
    image_shape=(4, 4, 3),
    num_images=32,
  )
  asset = dataclasses.replace(inception_weights.published(), size=0, sha256='')
  monkeypatch.setitem(protocols.PROTOCOLS, 'tiny', tiny)
  monkeypatch.setitem(table.ASSETS, asset.name, asset)
  monkeypatch.setitem(fid_stats.WIDTHS, 'fid', 6)
  monkeypatch.setattr(inception, 'apply', apply)
  monkeypatch.setattr(
    inception_weights, 'load', lambda path: ({}, {'sha256': 'f' * 64})
  )
  write_released(tmp_path / 'released.pkl')
  np.savez(tmp_path / 'fid.npz', mu=np.full(6, 0.5), sigma=np.eye(6))
  return {
    f'{NAME}.pkl': (tmp_path / 'released.pkl').read_bytes(),
    tiny.fid_stats: (tmp_path / 'fid.npz').read_bytes(),
    # It is looked at as a zip, and then not read.
    asset.file: (tmp_path / 'fid.npz').read_bytes(),
  }


def test_from_released_weights_to_a_file_of_ones_own(
  home, tmp_path, mirror, monkeypatch, caplog
):
  """Fetched from a mirror, converted, played, and handed back as .pth."""
  config = recipe(tmp_path)
  workdir = tmp_path / 'run'
  with loopback.serve(files=mirror) as site:
    monkeypatch.setenv(store.VARIABLE, site.url)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
      killed = collections.Counter()

      def kill(*args):
        killed['saves'] += 1
        raise KeyboardInterrupt

      patch.setattr(checkpoint, 'tree_hash', kill)
      main.selfplay(config, workdir)
    assert killed['saves'] == 1
    assert not (workdir / 'weights' / NAME).exists()
    with caplog.at_level('INFO'):
      main.selfplay(config, workdir)
    assert len(site.asked) == len(mirror)
  assert caplog.text.count(f'licence of {NAME}: {table.NVIDIA}') == 1
  # The folder stays: a round that goes on fetches and converts nothing again.
  monkeypatch.setenv(store.VARIABLE, 'http://127.0.0.1:9')
  store.place(table.find(NAME)).unlink()
  (workdir / 'round_000' / 'done.json').unlink()
  with monkeypatch.context() as patch:
    patch.setattr(released, 'read', None)
    assert f'init_from {NAME}' in main.check(config, workdir)
  promoted = workdir / 'round_000' / 'promoted'
  main.convert(str(promoted), tmp_path / 'ours.pth')
  ours = torch_zip.read(tmp_path / 'ours.pth')
  theirs = released.read(tmp_path / 'released.pkl')
  assert ours.keys() == released._to_official(MODEL, theirs.params).keys()
  beside = json.loads((tmp_path / 'ours.pth.json').read_text())['provenance']
  assert beside['file'] == f'{NAME}.pkl'
  assert beside['licence'] == table.NVIDIA
  assert beside['source'] == table.find(NAME).address
