"""Images of any source as a set of latents, cut off and gone on with."""

import json
import zipfile

from data import sets
from evaluation import test_fidelity
import jax
import numpy as np
import pytest
import several

from ddo_jax import errors
from ddo_jax import main
from ddo_jax.data import latent_set
from ddo_jax.data import sources
from ddo_jax.models import vae
from ddo_jax.training import encode
from ddo_jax.training import workspace
from ddo_jax.weights import safetensors_file
from ddo_jax.weights import vae_names
from tests.strangers import tiny_latents

COUNT = 37
SHARD = 16


def write_autoencoder(path):
  """Writes weights of the tiny autoencoder, large enough for all latents."""
  random = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: 0.4 * random.standard_normal(leaf.shape, np.float32),
    vae.param_shapes(tiny_latents.AUTOENCODER),
  )
  safetensors_file.write(path, vae_names.to_official(params), {})


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setattr(latent_set, 'SHARD', SHARD)
  two = jax.local_devices()[:2]  # each of which compiles
  monkeypatch.setattr(jax, 'local_devices', lambda: two)


@pytest.fixture(scope='module')
def images():
  return sets.make_images(COUNT, (8, 8, 3))[0]


def make_config(folder):
  """A config whose images and autoencoder are in a folder."""
  config = tiny_latents.get_config()
  config.vae_from = str(folder / 'vae.safetensors')
  config.data.source = str(folder / 'images.npz')
  return config


@pytest.fixture
def config(images, tmp_path):
  write_autoencoder(tmp_path / 'vae.safetensors')
  np.savez(tmp_path / 'images.npz', image=images, label=np.arange(COUNT) % 3)
  return make_config(tmp_path)


@jax.jit
def moments(params, images):
  return tiny_latents.AUTOENCODER.apply(
    {'params': params}, images, method='encode_moments'
  )


def files_of(folder):
  """Name -> bytes of all files that are not hidden."""
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file() and not path.name.startswith('.')
  }


def open_set(path):
  return sources.open_source(sources.Data(source=str(path)), 'train')


@pytest.mark.parametrize('signed', [False, True])
def test_a_set_is_read_back_as_it_was_made(config, images, tmp_path, signed):
  config.model.signed = signed
  written = main.encode(config, tmp_path / 'set', mirrored=True)
  source = open_set(written)
  stored, labels = sets.read_all(source)
  run = workspace.Run(config, None)
  both = np.concatenate([images, images[:, :, ::-1]])
  wanted = encode._compress(run.vae, both, run.model.codec)
  assert stored.dtype == np.float32 and stored.shape == (74, 4, 4, 8)
  np.testing.assert_allclose(stored, wanted, rtol=1e-4, atol=1e-5)
  assert np.abs(stored[:COUNT] - stored[COUNT:]).max() > 0.1
  x = np.float32(both) / np.float32(255)
  mean, _ = moments(run.vae, 2 * x - 1 if signed else x)
  np.testing.assert_allclose(stored[..., :4], mean, rtol=1e-3, atol=1e-4)
  assert labels.tolist() == [*(np.arange(COUNT) % 3)] * 2
  assert (source.num_classes, source.stored_shape) == (3, (4, 4, 8))
  # It fits the model that it was made for, and no other.
  config.data.source = str(written)
  assert workspace.Run(config, None).real.stored_shape == (4, 4, 8)
  config.model.signed = not signed
  with pytest.raises(errors.UserError, match=r'latents of images in \['):
    _ = workspace.Run(config, None).real
  # As a zip it is EDM2's.
  with zipfile.ZipFile(tmp_path / 'set.zip', 'w') as archive:
    for name, content in files_of(written).items():
      archive.writestr(name, content)
  again, same = sets.read_all(open_set(tmp_path / 'set.zip'))
  assert (
    again.tobytes() == stored.tobytes() and same.tolist() == labels.tolist()
  )


def test_a_set_that_was_cut_off_goes_on_to_the_byte(
  config, tmp_path, monkeypatch
):
  wanted = files_of(main.encode(config, tmp_path / 'whole'))
  assert len(wanted) == COUNT + 3 + 2  # the manifests, labels and the record
  write = latent_set.LatentSet.write
  encoded = []

  def die(self, shard, latents):
    if shard == 1:
      raise KeyboardInterrupt
    write(self, shard, latents)

  def count(self, shard, latents):
    encoded.append(shard)
    write(self, shard, latents)

  with monkeypatch.context() as patch:
    patch.setattr(latent_set.LatentSet, 'write', die)
    with pytest.raises(KeyboardInterrupt):
      main.encode(config, tmp_path / 'set')
  # A row of the shard that was under way, and a manifest that says less.
  (tmp_path / 'set' / '00001').mkdir()
  (tmp_path / 'set' / '00001' / 'img-mean-std-00000016.npy').write_bytes(b'x')
  with pytest.raises(errors.UserError, match='holds 17 of 37 latents'):
    open_set(tmp_path / 'set')
  monkeypatch.setattr(latent_set.LatentSet, 'write', count)
  # On one device it is the same.
  device = jax.local_devices()[:1]
  monkeypatch.setattr(jax, 'local_devices', lambda: device)
  main.encode(config, tmp_path / 'set')
  assert encoded == [1, 2]
  assert files_of(tmp_path / 'set') == wanted
  # What has changed since is made again.
  (tmp_path / 'set' / '00002' / 'img-mean-std-00000033.npy').write_bytes(b'x')
  (tmp_path / 'set' / '00000' / 'manifest.json').write_bytes(b'x')
  (tmp_path / 'set' / 'dataset.json').unlink()
  main.encode(config, tmp_path / 'set')
  assert encoded == [1, 2, 0, 2]
  assert files_of(tmp_path / 'set') == wanted
  main.encode(config, tmp_path / 'set')
  assert encoded == [1, 2, 0, 2]


def test_two_processes_write_the_same_bytes(config, tmp_path):
  """They take turns at three shards."""
  whole = main.encode(config, tmp_path / 'whole')
  scene = {'folder': str(tmp_path), 'output': str(tmp_path / 'set')}
  for status, printed in several.play(2, 1, ('encode', scene)):
    assert status == 0, printed
  assert files_of(tmp_path / 'set') == files_of(whole)


def refusal(config, output, **options):
  with pytest.raises(errors.UserError) as caught:
    main.encode(config, output, **options)
  line = str(caught.value)
  assert '\n' not in line
  return line


def test_a_folder_of_another_set_is_refused(config, images, tmp_path):
  folder = main.encode(config, tmp_path / 'set')
  before = files_of(folder)
  assert 'made with rows = 37, and this command has 74' in refusal(
    config, folder, mirrored=True
  )
  np.savez(tmp_path / 'images.npz', image=images, label=np.zeros(COUNT, int))
  assert 'made with images = ' in refusal(config, folder)
  np.savez(tmp_path / 'images.npz', image=255 - images, label=np.arange(37) % 3)
  assert 'made with images = ' in refusal(config, folder)
  write_autoencoder(tmp_path / 'other.safetensors')
  config.vae_from = str(tmp_path / 'other.safetensors')
  np.savez(tmp_path / 'images.npz', image=images, label=np.arange(COUNT) % 3)
  main.encode(config, folder)  # the same bytes under another name
  config.model.signed = False
  assert 'made with image_range = ' in refusal(config, folder)
  assert files_of(folder) == before
  line = refusal(config, tmp_path)
  assert f'{tmp_path} holds images.npz, and no set of latents' in line
  (folder / 'latents.json').write_bytes(b'{')
  assert 'latents.json' in refusal(config, folder)
  with pytest.raises(errors.UserError, match='is damaged'):
    open_set(folder)


def test_a_set_without_classes(config, images, tmp_path):
  np.savez(tmp_path / 'images.npz', image=images)
  config.model.num_classes = 0
  source = open_set(main.encode(config, tmp_path / 'set'))
  assert (source.num_classes, len(source)) == (0, COUNT)
  written = json.loads((tmp_path / 'set' / 'dataset.json').read_text())
  assert written == {'labels': None}


@pytest.mark.parametrize(
  ('shape', 'words'),
  [
    ((9, 8, 3), 'images are [9, 8, 3]; the model reads latents [4, 4, 4], whose'
     ' sides are 1/2 of those of images [8, 8, 3]: --config.data.resize=8'
     ' --config.data.resize_by=adm'),
    ((8, 8, 1), '--config.data.channels=3'),
    ((16, 16, 3), '--config.data.resize=8'),
  ],
)  # fmt: skip
def test_images_of_another_shape_are_refused(config, tmp_path, shape, words):
  pixels = sets.make_images(5, shape)[0]
  np.savez(tmp_path / 'images.npz', image=pixels, label=np.arange(5) % 3)
  assert words in refusal(config, tmp_path / 'set')
  assert not (tmp_path / 'set').exists()


def test_what_cannot_be_encoded_is_refused(config, tmp_path):
  output = tmp_path / 'set'
  config.data.source = 'digits'
  config.data.resize = 8
  config.data.channels = 3
  assert 'pixels are 0 .. 16; wanted 0 .. 255' in refusal(config, output)
  config.data = type(config.data)(source=str(tmp_path / 'latents.npz'))
  latents = np.ones((4, 4, 4, 8), np.float32)
  np.savez(tmp_path / 'latents.npz', image=latents, label=np.arange(4) % 3)
  assert 'holds latents already' in refusal(config, output)
  config.vae_from = ''
  line = "config.vae_from is ''; it must be the autoencoder's weights"
  assert refusal(config, output).startswith(line)
  config.model = tiny_latents.tiny.get_config().model
  assert 'is a ToyConfig, which reads pixels' in refusal(config, output)
  from configs import digits_var

  config.model = digits_var.get_config().model
  assert 'which reads tokens' in refusal(config, output)
  assert not output.exists()


def test_weights_that_make_no_numbers(config, tmp_path, monkeypatch):
  def broken(params, images, codec):
    return np.full((len(images), 4, 4, 8), np.nan, np.float32)

  monkeypatch.setattr(encode, '_compress', broken)
  line = refusal(config, tmp_path / 'set')
  assert 'shard 0' in line and 'would hold NaN or Inf' in line


def test_from_a_folder_of_images_to_a_round(tmp_path, monkeypatch):
  """The road of docs/data.md, with a projection in Inception's place."""
  test_fidelity.stand_in(monkeypatch)
  folder = tmp_path / 'images'
  pixels, labels = sets.make_images(60, (5, 6, 3))
  for number, (image, label) in enumerate(zip(pixels, labels % 3, strict=True)):
    test_fidelity.save_png(folder / f'{label}' / f'{number}.png', image)
  write_autoencoder(tmp_path / 'vae.safetensors')

  def on(source):
    config = make_config(tmp_path)
    config.model.image_shape = (2, 2, 4)
    config.data.source = str(source)
    config.evaluation.inception = config.vae_from  # a file that is there
    return config

  of_images = on(folder)
  of_images.data.resize = 4
  of_images.evaluation.samples = 48
  main.encode(of_images, tmp_path / 'latents', mirrored=True)
  main.fid_stats(of_images, tmp_path / 'stats')
  config = on(tmp_path / 'latents')
  config.evaluation.protocol = str(tmp_path / 'stats')
  config.evaluation.metric = 'fid'
  main.selfplay(config, tmp_path / 'run')
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  score = summary['rounds'][0]['after']['fid']
  assert np.isfinite(score['mean']) and score['sd'] > 0
