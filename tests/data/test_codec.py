"""Stored rows, model units and images: pixels and latents."""

import functools

import golden_io
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax import config
from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.data import codec
from ddo_jax.data import labels as labels_lib
from ddo_jax.method import ddo
from ddo_jax.method import diffusion
from ddo_jax.method import generate
from ddo_jax.method import likelihood
from ddo_jax.method import negatives
from ddo_jax.method import noise
from ddo_jax.models import dit_presets
from ddo_jax.models import edm2
from ddo_jax.models import presets
from ddo_jax.models import toy
from ddo_jax.models import vae
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.samplers import heun
from ddo_jax.training import state as state_lib
from ddo_jax.training import step as step_lib

SMALL = vae.AutoencoderKL((4, 4), 0, 4, 2)
LATENTS = codec.Latents(SMALL)


@pytest.fixture(scope='module')
def autoencoder():
  """Params of SMALL, large enough that images are not all grey."""
  shapes = jax.eval_shape(
    SMALL.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3))
  )
  random = np.random.default_rng(0)

  def draw(s):
    return 0.4 * random.standard_normal(s.shape, np.float32)

  return jax.tree.map(draw, shapes['params'])


def keys(count):
  return rng.per_example(rng.stream(0), np.arange(count, dtype=np.uint32))


def raw_latents(count=3):
  random = np.random.default_rng(0)
  mean = 4 * random.standard_normal((count, 4, 4, 4))
  std = random.uniform(0.1, 1, mean.shape)
  return np.concatenate([mean, std], axis=-1).astype(np.float32)


# --- EDM2's encoders ----------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize('compile_', [lambda f: f, jax.jit])
def test_pixels(compile_):
  """encoders.npz: rgb_*, exact."""
  golden = golden_io.load('encoders.npz')
  pixels = codec.Pixels()
  encode = compile_(lambda raw: pixels.encode({}, raw, None))
  decode = compile_(functools.partial(pixels.decode, {}))
  raw = jnp.arange(256, dtype=jnp.uint8)
  x = encode(raw)
  assert x.dtype == jnp.float32
  np.testing.assert_array_equal(x, golden['rgb_encode'])
  got = decode(golden['rgb_decode_in'])
  assert got.dtype == jnp.uint8
  np.testing.assert_array_equal(got, golden['rgb_decode'])
  np.testing.assert_array_equal(decode(x), golden['rgb_decode_of_encode'])
  np.testing.assert_array_equal(decode(x), raw)
  np.testing.assert_array_equal(pixels.render({}, raw), raw)


@pytest.mark.golden
def test_latents(monkeypatch):
  """encoders.npz: vae_*."""
  golden = golden_io.load('encoders.npz')
  scale, bias = LATENTS.affine()
  np.testing.assert_allclose(scale.ravel(), golden['vae_scale'], rtol=1e-7)
  np.testing.assert_allclose(bias.ravel(), golden['vae_bias'], rtol=2e-7)
  noise = golden_io.nhwc(golden['vae_eps'])
  known = jax.random.key_data(keys(len(noise)))

  def normal(key, shape, dtype):
    assert shape == noise.shape[1:]
    match = known == jax.random.key_data(key)[None, :]
    return jnp.asarray(noise, dtype)[jnp.argmax(match.all(1))]

  monkeypatch.setattr(jax.random, 'normal', normal)
  raw = jnp.asarray(golden_io.nhwc(golden['vae_raw_mean_std']))
  x = LATENTS.encode({}, raw, keys(len(noise)))
  wanted = golden_io.nhwc(golden['vae_latent'])
  assert golden_io.max_error(x, wanted) <= 1e-6
  mean = LATENTS.decode({}, jnp.asarray(wanted))[..., :4]
  wanted = golden_io.nhwc(golden['vae_decoder_input'])
  assert golden_io.max_error(mean, wanted) <= 1e-6


def test_digits_come_back_too():
  pixels, raw = codec.Pixels(17), jnp.arange(17, dtype=jnp.uint8)
  x = pixels.encode({}, raw, None)
  np.testing.assert_allclose(x, np.linspace(-1, 1, 17), atol=1e-7)
  np.testing.assert_array_equal(pixels.decode({}, x), raw)
  assert pixels.stored_shape((8, 8, 1)) == (8, 8, 1)


# --- Latents ------------------------------------------------------------------


def test_the_noise_of_a_latent_is_its_rows():
  raw, rows = raw_latents(3), keys(3)
  whole = LATENTS.encode({}, raw, rows)
  np.testing.assert_array_equal(
    LATENTS.encode({}, raw[1:2], rows[1:2]), whole[1:2]
  )
  assert np.abs(LATENTS.encode({}, raw, rows[::-1]) - whole).max() > 0.01
  same = LATENTS.encode({}, np.stack([raw[0]] * 2), rows[:2])
  assert np.abs(same[0] - same[1]).max() > 0.01


def test_the_noise_has_the_stored_deviation():
  raw = np.tile(raw_latents(1), (4_000, 1, 1, 1))
  x = LATENTS.encode({}, raw, keys(len(raw)))
  mean, std = np.split(raw[0], 2, axis=-1)
  scale, bias = LATENTS.affine()
  z = (np.asarray(x) - bias) / scale
  assert np.abs(z.mean(0) - mean).max() < 0.08
  np.testing.assert_allclose(z.std(0), std, rtol=0.06)


def test_a_fake_latent_comes_back_as_it_was_drawn():
  x = 0.5 * np.random.default_rng(1).standard_normal((3, 4, 4, 4))
  x = x.astype(np.float32)
  raw = LATENTS.decode({}, x)
  assert raw.shape == (3, *LATENTS.stored_shape((4, 4, 4))) == (3, 4, 4, 8)
  assert raw.dtype == np.float32 and not raw[..., 4:].any()
  for rows in (keys(3), keys(6)[3:]):  # whatever the noise
    np.testing.assert_allclose(LATENTS.encode({}, raw, rows), x, atol=3e-7)


def test_images_are_cut_off_to_levels(autoencoder, monkeypatch):
  frozen = {'vae': autoencoder}
  values = [-0.5, 0.0, 0.9 / 255, 1.1 / 255, 254.9 / 255, 1.0, 1.5]
  image = jnp.tile(jnp.array(values)[None, :, None, None], (1, 1, 7, 3))
  monkeypatch.setattr(vae.AutoencoderKL, 'decode', lambda *_: image)
  images = LATENTS.render(frozen, raw_latents(1))
  assert images.dtype == jnp.uint8
  assert images[0, :, 0, 0].tolist() == [0, 0, 0, 1, 254, 255, 255]


def test_images_come_of_means_by_the_decoder_alone(autoencoder):
  raw = raw_latents(2)
  half = {k: v for k, v in autoencoder.items() if 'decoder' in k}
  half['post_quant_conv'] = autoencoder['post_quant_conv']
  images = jax.jit(LATENTS.render)({'vae': half}, raw)
  assert images.shape == (2, 8, 8, 3)
  assert len(np.unique(images)) > 20

  def decode(params, x):
    return SMALL.apply({'params': params}, x, method='decode')

  decoded = jax.jit(decode)(autoencoder, raw[..., :4])
  wanted = 255 * np.clip(decoded, 0, 1)
  assert np.abs(np.asarray(images, np.float32) + 0.5 - wanted).max() <= 0.51


class Plain:
  """An autoencoder whose images are its latents."""

  def apply(self, params, x, method):
    return x[..., :3]


@pytest.mark.parametrize(
  ('nearest', 'wanted'),
  [(False, [0, 0, 7, 254, 255]), (True, [0, 1, 8, 255, 255])],
)
def test_pixel_values_are_cut_off_or_rounded(nearest, wanted):
  """EDM2's program does the one, DiT's, trunc(127.5 x + 128), the other."""
  decoder = codec.Latents(Plain(), nearest=nearest)
  mean = np.float32([-3, 0.6, 7.7, 254.9, 300]) / 255
  stored = np.broadcast_to(mean[:, None, None, None], (5, 1, 1, 8))
  images = decoder.render({'vae': None}, jnp.asarray(stored))
  np.testing.assert_array_equal(images[:, 0, 0, 0], wanted)
  decoder = codec.Latents(Plain(), nearest=nearest, signed=True)
  images = decoder.render({'vae': None}, jnp.asarray(2 * stored - 1))
  np.testing.assert_array_equal(images[:, 0, 0, 0], wanted)


def test_edm2s_images_lie_in_0_to_1_and_dits_in_minus_1_to_1():
  ranges = {
    'edm2-img512-xs': (0, 1),
    'DiT-S-2-256x256': (-1, 1),
    'SiT-S-2-256x256': (-1, 1),
  }
  for name, wanted in ranges.items():
    known = presets if name in presets.EDM2 else dit_presets
    model = known.get(name).build()
    assert model.codec.image_range == wanted
    side = 512 if '512' in name else 256
    shape = model.codec.image_shape(model.example_shape)
    assert shape == (side, side, 3)


def test_raw_latents_of_images(autoencoder):
  images = np.random.default_rng(2).integers(0, 256, (2, 8, 8, 3), np.uint8)
  raw = jax.jit(LATENTS.compress)({'vae': autoencoder}, images)

  def encode(params, x):
    return SMALL.apply({'params': params}, x, method='encode_moments')

  x = np.float32(images) / np.float32(255)
  mean, std = jax.jit(encode)(autoencoder, x)
  np.testing.assert_allclose(raw[..., :4], mean, atol=1e-4)
  np.testing.assert_allclose(raw[..., 4:], std, rtol=1e-4)


def test_images_need_the_autoencoder():
  with pytest.raises(errors.UserError, match=r'config\.vae_from'):
    LATENTS.render({'guide': {}}, raw_latents(1))


# --- Models of latents --------------------------------------------------------


def test_presets_of_512_have_latents_and_no_others():
  for name in presets.EDM2:
    model = presets.get(name).build()
    stored_shape = model.codec.stored_shape(model.example_shape)
    wanted = (64, 64, 8) if 'img512' in name else (64, 64, 3)
    assert stored_shape == wanted and model.codec.pixel_values == 256
    check = functools.partial(
      likelihood.check_source,
      model,
      'data',
      num_classes=model.num_classes,
      pixel_values=256,
    )
    check(wanted)
    with pytest.raises(errors.UserError, match='the model takes'):
      check((64, 64, 11 - wanted[-1]))
  assert model.codec == codec.Latents(vae.AutoencoderKL())


def test_latents_follow_sigma_data():
  model_config = edm2.Edm2Config(
    image_shape=(64, 64, 4), latents=True, sigma_data=1.0
  )
  scale, _ = model_config.build().codec.affine()
  np.testing.assert_allclose(scale, 2 * LATENTS.affine()[0])


def test_latents_of_three_channels_are_refused():
  model_config = edm2.Edm2Config(latents=True)
  with pytest.raises(errors.UserError, match='wanted 4 channels'):
    model_config.build()


class Denoiser:
  """Shrinks x to the variance of unit latents; hashable, no params."""

  def apply(self, params, x, sigma, label):
    del params, label
    return x * (0.25 / (0.25 + sigma**2))[:, None, None, None]


def test_fakes_are_stored_as_latents_and_shown_as_images(tmp_path, autoencoder):
  model = diffusion.Diffusion(
    denoiser=Denoiser(),
    example_shape=(4, 4, 4),
    num_classes=3,
    weight=noise.EdmWeight(0.5),
    codec=LATENTS,
  )
  executor = devices_lib.Executor(config.Executor(), 1)
  sampler = heun.Heun(4, 0.02, 20.0)
  frozen = executor.replicate({'vae': autoencoder})
  generator = generate.Generator(model, frozen, sampler, executor, 4)
  pool = negatives.FakePool(tmp_path, 10, 4, {})
  key = rng.stream(0, 'fakes')
  generator.fill(pool, {}, key, labels_lib.Shares((0, 2, 1)))
  source = pool.source(num_classes=3, pixel_values=256)
  likelihood.check_source(
    model, source.name, source.stored_shape, 3, source.pixel_values
  )
  stored, labels = source.read(np.arange(10))
  assert np.bincount(labels).tolist() == [0, 7, 3]
  assert stored.shape == (10, 4, 4, 8) and stored.dtype == np.float32
  x = model.sample(
    {},
    frozen,
    jnp.asarray(labels),
    rng.per_example(key, np.arange(10)),
    sampler,
  )
  again = model.codec.encode(frozen, stored, keys(10))
  np.testing.assert_allclose(again, x, atol=1e-5)
  images = generator.images({}, key, np.arange(10), labels)
  assert images.shape == (10, 8, 8, 3) and images.dtype == np.uint8
  np.testing.assert_array_equal(images, generator.render(stored))


def test_a_step_on_latents_starts_at_chance():
  """Real and fake latents through encode; law 1."""
  knobs = toy.ToyConfig('mlp', 8, 1, (4, 4, 4), 3)
  model = knobs.build(noise=noise.LogNormal(-0.4, 1.0)).replace(codec=LATENTS)
  params = jax.jit(model.init)(rng.stream(0))
  phase = config.at_round(
    config.Phase(objective=ddo.DDO(alpha=(2.0,), beta=(0.05,)), batch_size=8), 0
  )
  step = jax.jit(step_lib.train_step)
  label = np.arange(8, dtype=np.int32) % 3
  real = {'stored': raw_latents(8), 'label': label}
  fake = {'stored': LATENTS.decode({}, raw_latents(8)[..., :4]), 'label': label}
  real['id'] = np.arange(8, dtype=np.uint32)
  transform = phase.optimizer.transform(model.rules, 8, phase.images)
  state, metrics = step(
    state_lib.create(params, transform, phase.averages),
    params,
    {},
    real,
    fake,
    model,
    phase,
    rng.stream(1),
  )
  np.testing.assert_allclose(metrics['loss'], metrics['chance_loss'], rtol=1e-6)
  np.testing.assert_allclose(metrics['loss'], 3 * np.log(2), rtol=1e-6)
  assert metrics['grad_norm'] > 0 and np.isfinite(metrics['grad_norm'])
  assert state.step == 1
