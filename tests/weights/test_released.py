"""Released files to folders of params and back, with where they come from."""

from concurrent import futures
import dataclasses
import json
import pathlib
import time

import golden_io
import jax
import numpy as np
import official_files
import pytest

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import main
from ddo_jax.assets import download
from ddo_jax.assets import table
from ddo_jax.models import edm
from ddo_jax.models import edm2
from ddo_jax.models import presets
from ddo_jax.runtime import checkpoint
from ddo_jax.weights import arrays
from ddo_jax.weights import edm_configs
from ddo_jax.weights import edm_names
from ddo_jax.weights import pickle_reader
from ddo_jax.weights import released
from ddo_jax.weights import torch_zip

SONG = {
  'model_type': 'SongUNet',
  'img_resolution': 8,
  'img_channels': 3,
  'label_dim': 3,
  'use_fp16': False,
  'model_channels': 8,
  'channel_mult': [1, 2],
  'num_blocks': 1,
  'attn_resolutions': [4],
  'dropout': 0.13,
  'augment_dim': 9,
}
DDPMPP = SONG | {
  'embedding_type': 'positional',
  'encoder_type': 'standard',
  'decoder_type': 'standard',
  'channel_mult_noise': 1,
  'resample_filter': [1, 1],
}
NCSNPP = SONG | {
  'embedding_type': 'fourier',
  'encoder_type': 'residual',
  'decoder_type': 'standard',
  'channel_mult_noise': 2,
  'resample_filter': [1, 3, 3, 1],
}
ADM = {
  'model_type': 'DhariwalUNet',
  'img_resolution': 8,
  'img_channels': 3,
  'label_dim': 3,
  'model_channels': 8,
  'channel_mult': [1, 2],
  'num_blocks': 1,
  'attn_resolutions': [4],
  'dropout': 0.1,
}
EDM2 = {
  'img_resolution': 8,
  'img_channels': 3,
  'label_dim': 3,
  'use_fp16': True,
  'model_channels': 8,
  'channel_mult': [1, 2],
  'num_blocks': 1,
  'attn_resolutions': [4],
  'dropout': 0.0,
}
COMMON = {
  'image_shape': (8, 8, 3),
  'num_classes': 3,
  'model_channels': 8,
  'channel_mult': (1, 2),
  'num_blocks': 1,
  'attn_resolutions': (4,),
}
CASES = {
  'ddpmpp': (
    'EDMPrecond',
    DDPMPP,
    edm.EdmConfig('ddpmpp', augment=0.12, **COMMON),
  ),
  'ncsnpp': (
    'VEPrecond',
    NCSNPP,
    edm.EdmConfig('ncsnpp', 've', augment=0.12, **COMMON),
  ),
  'adm': (
    'EDMPrecond',
    ADM,
    edm.EdmConfig('adm', dropout=0.1, augment_dim=0, augment=0.0, **COMMON),
  ),
  'edm2': ('Precond', EDM2, edm2.Edm2Config(**COMMON)),
}
PIPE = official_files.Persistent('AugmentPipe', {'p': 0.12})


def state_of(config, dtype=np.float32):
  """Random official weights of a config; none is 0, no two are alike."""
  model = config.build()
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  draw = np.random.default_rng(0)
  params = jax.tree.map(lambda s: draw.normal(size=s.shape), shapes)
  params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), params)
  return edm_names.to_official(params, edm_configs.taps_of(config))


def write_pkl(path, case, dtype=np.float32, **changes):
  class_name, kwargs, config = CASES[case]
  state = state_of(config, dtype)
  table = official_files.released(
    class_name, state, kwargs | changes, augment_pipe=PIPE
  )
  path.write_bytes(official_files.dumps(table))
  return state


def same_bits(a, b):
  assert a.keys() == b.keys()
  for key in a:
    assert a[key].dtype == b[key].dtype, key
    np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def convert(source, output, **options):
  return main.convert(str(source), pathlib.Path(output), **options)


def test_params_may_be_a_released_file(tmp_path, monkeypatch):
  """--params=x.pkl is converted on the way, once for what the file holds."""
  path = tmp_path / 'edm-x.pkl'
  write_pkl(path, 'edm2')
  folder = main.params_folder(path, config_lib.Config(), tmp_path / 'out')
  assert folder == tmp_path / 'out' / 'weights' / 'edm-x'
  assert released.load_folder(folder).config == CASES['edm2'][2]
  assert main.params_folder(folder, config_lib.Config(), tmp_path) == folder
  assert main.params_folder(None, config_lib.Config(), tmp_path) is None
  with monkeypatch.context() as patch:
    patch.setattr(released, 'read', None)
    main.params_folder(path, config_lib.Config(), tmp_path / 'out')
  write_pkl(path, 'adm')
  main.params_folder(path, config_lib.Config(), tmp_path / 'out')
  assert released.load_folder(folder).config == CASES['adm'][2]


@pytest.mark.parametrize('case', CASES)
def test_the_config_inside_the_file(tmp_path, case):
  path = tmp_path / 'edm-x.pkl'
  write_pkl(path, case)
  assert released.read(path).config == CASES[case][2]


@pytest.mark.parametrize(
  'name',
  [
    'edm-cifar10-32x32-cond-vp',
    'edm-imagenet-64x64-cond-adm',
    'edm2-img64-s',
  ],
)
def test_released_arguments_give_the_preset(name):
  """What the release's training script passes; the rest are defaults."""
  interface = {'img_resolution': 32, 'img_channels': 3, 'label_dim': 10}
  kwargs = interface | {
    name: DDPMPP[name]
    for name in DDPMPP.keys() - interface.keys()
    if name not in ('num_blocks', 'attn_resolutions')
  }
  kwargs |= {'model_channels': 128, 'channel_mult': [2, 2, 2]}
  class_name, augment = 'EDMPrecond', 0.12
  if name == 'edm-imagenet-64x64-cond-adm':
    kwargs = {'img_resolution': 64, 'img_channels': 3, 'label_dim': 1000}
    kwargs |= {'model_type': 'DhariwalUNet', 'model_channels': 192}
    kwargs |= {'channel_mult': [1, 2, 3, 4], 'dropout': 0.1}
  if name == 'edm2-img64-s':
    kwargs = {'img_resolution': 64, 'img_channels': 3, 'label_dim': 1000}
    kwargs |= {'model_channels': 192, 'dropout': 0.0, 'use_fp16': True}
    class_name, augment = 'Precond', 0.0
  network = pickle_reader.Network(class_name, {}, kwargs, {}, None, augment, {})
  assert edm_configs.config_of(network) == presets.get(name)


def latent_network(encoder):
  kwargs = {'img_resolution': 64, 'img_channels': 4, 'label_dim': 1000}
  kwargs |= {'model_channels': 192}
  return pickle_reader.Network('Precond', {}, kwargs, {}, encoder, 0.0, {})


@pytest.mark.golden
def test_networks_of_latents():
  """encoders.npz: vae_scale, vae_bias, as such files have them."""
  golden = golden_io.load('encoders.npz')
  scale, bias = golden['vae_scale'], golden['vae_bias']
  wanted = presets.get('edm2-img512-s')
  assert wanted.latents
  state = {'scale': scale, 'bias': bias, 'vae_name': 'a/vae'}
  encoder = arrays.Record('StabilityVAEEncoder', state)
  for given in (None, encoder):
    assert edm_configs.config_of(latent_network(given)) == wanted
  for state, name in (
    ({'scale': 1.001 * scale, 'bias': bias}, 'scale'),
    ({'scale': scale, 'bias': -bias}, 'bias'),
    ({'scale': scale[:3], 'bias': bias}, 'scale'),
    ({'scale': scale}, 'bias'),
    (None, 'scale'),
  ):
    encoder = arrays.Record('StabilityVAEEncoder', state)
    with pytest.raises(errors.UserError, match=f'have the {name} ') as hit:
      edm_configs.config_of(latent_network(encoder))
    assert '\n' not in str(hit.value)


@pytest.mark.parametrize(
  ('case', 'change', 'line'),
  [
    ('ddpmpp', {'encoder_type': 'skip'}, "encoder_type='skip'; .* standard"),
    ('ddpmpp', {'channel_mult_emb': 8}, 'has channel_mult_emb=8; .* have 4'),
    ('ddpmpp', {'model_type': 'ViT'}, "is a 'ViT'; known: SongUNet"),
    ('adm', {'secret': 1}, 'has secret=1; .* no such argument'),
    ('edm2', {'clip_act': 9}, 'has clip_act=9; .* have 256'),
  ],
)
def test_networks_that_are_not_built_here(tmp_path, case, change, line):
  path = tmp_path / 'edm-x.pkl'
  write_pkl(path, case, **change)
  with pytest.raises(errors.UserError, match=line):
    released.read(path)


def test_files_that_say_too_little(tmp_path):
  path = tmp_path / 'edm-x.pkl'
  kwargs = {k: v for k, v in DDPMPP.items() if k != 'channel_mult'}
  table = official_files.released('EDMPrecond', {}, kwargs)
  path.write_bytes(official_files.dumps(table))
  with pytest.raises(errors.UserError, match="not say its 'channel_mult'"):
    released.read(path)
  table = official_files.released('Generator', {}, DDPMPP)
  path.write_bytes(official_files.dumps(table))
  with pytest.raises(errors.UserError, match='holds a Generator; known'):
    released.read(path)


def test_another_architecture_is_refused(tmp_path):
  path = tmp_path / 'edm-x.pkl'
  write_pkl(path, 'edm2', num_blocks=2)
  with pytest.raises(errors.UserError, match='stored nothing, wanted'):
    released.read(path)


@pytest.mark.parametrize(
  ('case', 'dtype'), [('ncsnpp', np.float32), ('edm2', np.float16)]
)
@pytest.mark.parametrize('suffix', released.SUFFIXES)
def test_files_are_rewritten_to_the_bit(tmp_path, case, dtype, suffix):
  """`.pkl` to another format and to a third: types and bits are kept."""
  path, first = tmp_path / 'edm2-x.pkl', tmp_path / f'first{suffix}'
  state = write_pkl(path, case, dtype)
  config = config_lib.Config(model=CASES[case][2])
  convert(path, first)
  convert(first, tmp_path / 'second.pth', config=config)
  same_bits(torch_zip.read(tmp_path / 'second.pth'), state)


@pytest.mark.parametrize('case', ['ddpmpp', 'edm2'])
def test_a_folder_is_float32_and_projected_once(tmp_path, case):
  path = tmp_path / 'edm-x.pkl'
  state = write_pkl(path, case, np.float16)
  folder = convert(path, tmp_path / 'folder')
  first = released.load_folder(folder)
  assert first.config == CASES[case][2]
  leaves = jax.tree.leaves(first.params)
  assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
  key = ('network', 'out_conv' if case == 'edm2' else 'map_layer0', 'kernel')
  kernel = first.params[key[0]][key[1]][key[2]]
  if case == 'edm2':
    rms = np.sqrt(np.mean(kernel**2, axis=(0, 1, 2)))
    np.testing.assert_allclose(rms, 1 - 1e-4, rtol=1e-5)
  else:
    wanted = state['model.map_layer0.weight'].T.astype(np.float32)
    np.testing.assert_array_equal(kernel, wanted)
  convert(folder, tmp_path / 'ours.safetensors')
  convert(tmp_path / 'ours.safetensors', tmp_path / 'again')
  again = released.load_folder(tmp_path / 'again')
  jax.tree.map(np.testing.assert_array_equal, again.params, first.params)


def test_where_it_comes_from_goes_along(tmp_path):
  path = tmp_path / 'edm-x.pkl'
  write_pkl(path, 'ddpmpp')
  digest = download.sha256_of(path)
  folder = convert(path, tmp_path / 'folder')
  meta = checkpoint.load_meta(folder)
  origin = meta['provenance']
  assert origin['file'] == 'edm-x.pkl'
  assert origin['sha256'] == digest
  assert origin['licence'] == table.NVIDIA
  convert(folder, tmp_path / 'x.pth')
  beside = json.loads((tmp_path / 'x.pth.json').read_text())
  assert beside['provenance'] == origin
  convert(folder, tmp_path / 'x.safetensors')
  again = released.read(tmp_path / 'x.safetensors').provenance
  assert again['licence'] == table.NVIDIA


def test_mistakes(tmp_path):
  path = tmp_path / 'edm-x.pkl'
  write_pkl(path, 'ddpmpp')
  with pytest.raises(errors.UserError, match=r'sha256 .*; wanted 000'):
    convert(path, tmp_path / 'folder', sha256='0' * 64)
  assert not (tmp_path / 'folder').exists()
  with pytest.raises(errors.UserError, match=r'no file .*lost\.pkl'):
    convert(tmp_path / 'lost.pkl', tmp_path / 'folder')
  with pytest.raises(errors.UserError, match=r'wanted \.pkl, \.safet'):
    convert(__file__, tmp_path / 'folder')
  with pytest.raises(errors.UserError, match='no params in'):
    convert(tmp_path, tmp_path / 'x.pth')
  convert(path, tmp_path / 'x.pth')
  with pytest.raises(errors.UserError, match='give the --config'):
    convert(tmp_path / 'x.pth', tmp_path / 'folder')
  other = config_lib.Config(
    model=dataclasses.replace(CASES['ddpmpp'][2], model_channels=16)
  )
  with pytest.raises(errors.UserError, match='another architecture'):
    convert(tmp_path / 'x.pth', tmp_path / 'folder', config=other)
  torch_zip.write(tmp_path / 'y.pth', {'a': np.ones(1), 'a.b': np.ones(1)})
  with pytest.raises(errors.UserError, match=r'y\.pth'):
    convert(tmp_path / 'y.pth', tmp_path / 'folder', config=other)


@pytest.mark.golden
def test_converted_weights_denoise_as_the_original(tmp_path):
  """edm_ddpmpp.npz: D of a file in the official layout, end to end."""
  golden = golden_io.load('edm_ddpmpp.npz')
  options = golden_io.read_json(golden, 'config')
  class_name = options.pop('precond')
  table = official_files.released(
    class_name, golden_io.state_dict(golden), options
  )
  path = tmp_path / 'edm-x.pkl'
  path.write_bytes(official_files.dumps(table))
  weights = released.load_folder(convert(path, tmp_path / 'folder'))
  model = weights.config.build()
  x = golden_io.nhwc(golden['x'])
  label = golden_io.labels(golden['class_labels'])
  got = jax.jit(model.denoise)(
    weights.params, x.astype(np.float32), golden['sigma'], label
  )
  assert golden_io.max_error(got, golden_io.nhwc(golden['D_noaug_f32'])) < 5e-6


@pytest.fixture
def converted(tmp_path, monkeypatch):
  """Has net.pth converted by a stand-in, which lists the folders it makes."""
  folders = []

  def read(path, source, config):
    return released.Weights(config, {}, {'licence': 'none'})

  def save_folder(folder, weights):
    folders.append(folder.name)
    time.sleep(0.05)
    (folder / 'params').mkdir(parents=True, exist_ok=True)
    (folder / 'params' / 'x').write_bytes(b'weights')

  (tmp_path / 'net.pth').write_bytes(b'net')
  monkeypatch.setattr(released, 'read', read)
  monkeypatch.setattr(released, 'save_folder', save_folder)
  monkeypatch.setattr(released, '_is_of', lambda folder, path: True)
  return folders


def test_two_starts_convert_weights_once(tmp_path, converted, caplog):
  def ask(_):
    source = str(tmp_path / 'net.pth')
    return released.folder_of(source, tmp_path / 'weights', '--x')

  caplog.set_level('INFO')
  with futures.ThreadPoolExecutor(4) as pool:
    made = set(pool.map(ask, range(4)))
  assert made == {tmp_path / 'weights' / 'net'}
  assert converted == ['net']
  assert 'waiting for another process, which converts net' in caplog.text
  assert 'earlier version' not in caplog.text


def test_damaged_conversions_are_made_again(tmp_path, converted, caplog):
  def ask():
    source = str(tmp_path / 'net.pth')
    return released.folder_of(source, tmp_path / 'weights', '--x')

  made = ask()
  assert ask() == made == tmp_path / 'weights' / 'net'
  assert converted == ['net'] and not caplog.records
  (made / 'params' / 'x').write_bytes(b'Weights')
  assert ask() == made and converted == ['net', 'net']
  assert f'{made / "params" / "x"} is damaged: converting' in caplog.text
  assert ask() == made and len(converted) == 2
