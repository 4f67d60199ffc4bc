"""The released models' sizes, traced without memory."""

import dataclasses

import golden_io
import jax
import pytest

from ddo_jax import errors
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
