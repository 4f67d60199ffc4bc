"""A model of tokens from outside: pixels, configs, samplers, mistakes."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_var

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import models
from ddo_jax import rng
from ddo_jax import settings
from ddo_jax.method import likelihood
from ddo_jax.models import toy
from ddo_jax.samplers import ancestral
from ddo_jax.training import workspace

MODEL = tiny_var.MODEL


def test_pixels_there_and_back():
  """Whole levels survive `encode`; `decode` cuts off as published."""
  _, frozen = tiny_var.weights()
  pixels = MODEL.codec.pixels
  stored = jnp.arange(17, dtype=jnp.uint8)
  again = pixels.decode({}, pixels.encode({}, stored, None))
  np.testing.assert_array_equal(again, stored)
  x = jnp.array([-1.0, -0.876, 0.99])
  np.testing.assert_array_equal(pixels.decode({}, x), [0, 0, 15])
  nearest = dataclasses.replace(pixels, nearest=True)
  np.testing.assert_array_equal(nearest.decode({}, x), [0, 1, 16])
  ids = np.zeros((4, 5), np.int32)
  image = jax.jit(MODEL.codec.decode)(frozen, ids)
  assert (image.shape, image.dtype) == ((4, *tiny_var.SHAPE), np.uint8)


def test_drawn_images_are_those_of_the_tokens():
  """But smooth ones, which no tokens stand for."""
  params, frozen = tiny_var.weights()
  label = jnp.arange(64) % tiny_var.CLASSES
  args = (params, frozen, label, jax.random.split(rng.stream(0), 64))

  @jax.jit
  def run(*args):
    plain, smooth = ancestral.Ancestral(), ancestral.Ancestral(smooth=True)
    of_tokens = MODEL.codec.decode(frozen, MODEL.sample(*args, plain))
    return of_tokens, MODEL.draw(*args, plain), MODEL.draw(*args, smooth)

  of_tokens, drawn, smooth = (x.astype(int) for x in run(*args))
  assert np.abs(drawn - of_tokens).max() <= 1  # a rounding on the edge
  assert np.mean(drawn != of_tokens) < 0.02 < np.mean(smooth != of_tokens)


def test_a_config_survives_json():
  config = config_lib.Config(
    model=copy.deepcopy(tiny_var.CONFIG), sampler=ancestral.Ancestral()
  )
  assert models.from_json(settings.to_json(config)) == tiny_var.CONFIG
  assert workspace.build_model(config) == tiny_var.BUILT


def test_mistakes():
  params, frozen = tiny_var.weights()
  label = jnp.zeros(2, jnp.int32)
  keys = jax.random.split(rng.stream(0), 2)

  def draw(frozen, sampler):
    return MODEL.sample(params, frozen, label, keys, sampler)

  with pytest.raises(errors.UserError, match='tokenizer_from'):
    draw({}, ancestral.Ancestral())
  with pytest.raises(errors.UserError, match='smooth=False'):
    draw(frozen, ancestral.Ancestral(smooth=True))
  with pytest.raises(errors.UserError, match='and the model takes 0'):
    likelihood.check_source(MODEL, 's', tiny_var.SHAPE, tiny_var.CLASSES, 256)
  likelihood.check_source(MODEL, 's', tiny_var.SHAPE, tiny_var.CLASSES, 17)
  tokenizer = dataclasses.replace(tiny_var.TOKENIZER, vocab=7)
  others = [
    dataclasses.replace(tiny_var.CONFIG, tokenizer=tokenizer),
    toy.ToyConfig(),
  ]
  for other in others:
    guided = config_lib.Config(
      model=tiny_var.CONFIG, guide=other, sampler=ancestral.Ancestral()
    )
    with pytest.raises(errors.UserError, match='of the same tokenizer'):
      workspace.build_model(guided)
  minus = ancestral.Ancestral(2.0, 'minus_one', 5, 0.9)
  assert minus.unguided() == ancestral.Ancestral(1.0, 'minus_one')
