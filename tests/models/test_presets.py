"""The released models' sizes, traced without memory."""

import dataclasses
import math

import golden_io
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax import errors
from ddo_jax.models import dit_presets
from ddo_jax.models import presets

# Parameters as counted in the original programs; constants left out.
EDM = {
  'edm-cifar10-32x32-cond-vp': 55_735_299,
  'edm-cifar10-32x32-uncond-vp': 55_733_891,
  'edm-cifar10-32x32-cond-ve': 56_400_643,
  'edm-cifar10-32x32-uncond-ve': 56_397_827,
  'edm-ffhq-64x64-uncond-vp': 61_805_571,
  'edm-ffhq-64x64-uncond-ve': 62_761_091,
  'edm-imagenet-64x64-cond-adm': 295_899_267,
}
EDM2 = {
  'edm2-img64-xs': 124_710_949,
  'edm2-img64-s': 280_209_381,
  'edm2-img64-m': 497_803_173,
  'edm2-img64-l': 777_492_325,
  'edm2-img64-xl': 1_119_276_837,
  'edm2-img512-xxs': 31_309_029,
  'edm2-img512-xs': 124_713_253,
  'edm2-img512-s': 280_212_837,
  'edm2-img512-m': 497_807_781,
  'edm2-img512-l': 777_498_085,
  'edm2-img512-xl': 1_119_283_749,
  'edm2-img512-xxl': 1_523_164_773,
  # Without the embedding of a thousand classes.
  'edm2-img512-xs-uncond': 124_713_253 - 1000 * 512,
}


def _shapes(model):
  return jax.eval_shape(model.init, jax.random.key(0))


@pytest.mark.parametrize(('name', 'count'), EDM.items())
def test_parameters_of_edm(name, count):
  model = presets.get(name).build()
  assert golden_io.count(_shapes(model)) == count


@pytest.mark.parametrize(('name', 'count'), EDM2.items())
def test_parameters_of_edm2(name, count):
  """And 199 tensors, with 4 of constants; one less without classes."""
  params = _shapes(presets.get(name).build())
  assert golden_io.count(params) == count
  tensors = 202 if name.endswith('uncond') else 203
  assert len(jax.tree.leaves(params)) == tensors


def test_afhqv2_is_as_ffhq():
  """But for the dropout: so its parameters are counted above."""
  for network in ('vp', 've'):
    ffhq = presets.get(f'edm-ffhq-64x64-uncond-{network}')
    afhq = presets.get(f'edm-afhqv2-64x64-uncond-{network}')
    assert afhq == dataclasses.replace(ffhq, dropout=0.25)


def test_every_preset_is_counted():
  afhq = {f'edm-afhqv2-64x64-uncond-{network}' for network in ('vp', 've')}
  assert presets.EDM.keys() == EDM.keys() | afhq
  assert presets.EDM2.keys() == EDM2.keys()


def test_presets_are_copies():
  presets.get('edm2-img64-s').dropout = 0.5
  assert presets.get('edm2-img64-s').dropout == 0


def test_unknown_preset():
  with pytest.raises(errors.UserError, match='edm-cifar10-32x32-cond-vp'):
    presets.get('edm-cifar10')


# DiT's and SiT's, trained ones at 256 px: patches of 2, 4 and 8; and all in the
# state dict, which has the positions as well, at 256 and at 512 px.
TRANSFORMERS = {
  'S': (
    (32_865_056, 32_920_448, 33_142_016),
    (32_963_360, 32_945_024, 33_148_160),
    (33_258_272, 33_018_752, 33_166_592),
  ),
  'B': (
    (130_315_808, 130_426_496, 130_869_248),
    (130_512_416, 130_475_648, 130_881_536),
    (131_102_240, 130_623_104, 130_918_400),
  ),
  'L': (
    (457_840_672, 457_988_224, 458_578_432),
    (458_102_816, 458_053_760, 458_594_816),
    (458_889_248, 458_250_368, 458_643_968),
  ),
  'XL': (
    (674_834_720, 675_000_704, 675_664_640),
    (675_129_632, 675_074_432, 675_683_072),
    (676_014_368, 675_295_616, 675_738_368),
  ),
}


@pytest.mark.parametrize('family', ['DiT', 'SiT'])
@pytest.mark.parametrize('size', TRANSFORMERS)
def test_parameters_of_transformers(family, size):
  """Those of 512 px are as those of 256, but for more positions."""
  for i, patch in enumerate((2, 4, 8)):
    config = dit_presets.get(f'{family}-{size}-{patch}-256x256')
    # Heads are not seen in the count.
    assert config.width // config.heads == (72 if size == 'XL' else 64)
    shapes = _shapes(config.build())
    trained, small, large = (counts[i] for counts in TRANSFORMERS[size])
    assert golden_io.count(shapes) == trained
    assert trained + math.prod(config.grid) * config.width == small
    larger = dit_presets.get(f'{family}-{size}-{patch}-512x512')
    same = dataclasses.replace(larger, image_shape=config.image_shape)
    assert same == config
    assert trained + math.prod(larger.grid) * larger.width == large


@pytest.mark.parametrize('name', ['DiT-XL-2-512x512', 'SiT-XL-2-256x256'])
def test_shapes_of_transformers(name):
  """At full size, in and out, traced without memory."""
  model = dit_presets.get(name).build()
  shape = model.example_shape
  assert shape == {'5': (64, 64, 4), '2': (32, 32, 4)}[name[9]]

  def run(key):
    x, ones = jnp.zeros((2, *shape)), jnp.ones(2)
    label = jnp.zeros(2, jnp.int32)
    params = model.init(key)
    variables = {'params': params}
    arguments = (x, ones, label)
    d = model.denoise(params, *arguments)
    return d, model.denoiser.apply(variables, *arguments, method='predict')

  d, output = jax.eval_shape(run, jax.random.key(0))
  assert d.shape == (2, *shape)
  assert output.shape == (2, *shape[:-1], 8)


def test_a_fresh_transformer_predicts_0():
  config = dit_presets.get('SiT-S-8-256x256')
  model = dataclasses.replace(config, depth=1, width=16, heads=2).build()
  params = jax.jit(model.init)(jax.random.key(0))
  arguments = (jnp.ones((1, 32, 32, 4)), jnp.ones(1), jnp.zeros(1, jnp.int32))
  variables = {'params': params}
  output = model.denoiser.apply(variables, *arguments, method='predict')
  assert not np.any(output)
  table = params['network']['y_embedder']['embedding_table']['embedding']
  assert np.std(table) == pytest.approx(0.02, rel=0.1)


def test_unknown_transformer():
  with pytest.raises(errors.UserError, match='such as DiT-XL-2-256x256'):
    dit_presets.get('DiT-XL-3-256x256')


@pytest.mark.parametrize(
  ('field', 'value', 'line'),
  [
    ('image_shape', (30, 32, 4), 'image_shape is .* multiples of .*patch=8'),
    ('heads', 5, 'width is 384.*heads=5'),
    ('image_shape', (32, 32, 3), 'of 4 channels, as .*latents=True'),
    ('path', 'cubic', 'model.path'),
    ('weighting', 'velocity', "weighting is 'velocity'.*'none' for"),
  ],
)
def test_sizes_that_do_not_go_together(field, value, line):
  config = dit_presets.get('SiT-S-8-256x256')
  with pytest.raises(errors.UserError, match=line):
    dataclasses.replace(config, **{field: value}).build()
