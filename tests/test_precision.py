"""The precision of a network's products, in training and in sampling."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.data import labels as labels_lib
from ddo_jax.method import likelihood
from ddo_jax.method import negatives
from ddo_jax.method import noise
from ddo_jax.models import edm
from ddo_jax.models import edm2
from ddo_jax.models import toy
from ddo_jax.runtime import manifest
from ddo_jax.runtime import records
from ddo_jax.runtime import work
from ddo_jax.samplers import heun
from ddo_jax.training import round as round_lib
from ddo_jax.training import workspace

SMALL = {
  'image_shape': (4, 4, 1),
  'num_classes': 3,
  'model_channels': 4,
  'channel_mult': (1,),
  'num_blocks': 1,
  'attn_resolutions': (4,),
}
MODELS = {
  'toy': toy.ToyConfig('unet', 8, 1, (4, 4, 1), 3),
  'edm': edm.EdmConfig(**SMALL, augment=0.0),
  'edm2': edm2.Edm2Config(**SMALL, channels_per_head=4),
}
SAMPLER = heun.Heun(num_steps=2, sigma_min=0.02, sigma_max=40.0)


def traced(config, call):
  """The precisions of all products in a call of a config's model."""
  model = config.build(noise=noise.LogNormal(-0.5, 1.2))
  params = jax.eval_shape(model.init, rng.stream(0))
  x = jnp.zeros((2, 4, 4, 1))
  ids = jnp.zeros(2, jnp.uint32)
  batch = likelihood.Batch(x, jnp.zeros(2, jnp.int32), ids)
  keys = rng.per_example(rng.stream(0), ids)
  jaxpr = jax.make_jaxpr(lambda p: call(model, p, batch, keys))(params)
  return set(work.count(jaxpr.jaxpr).flops)


def ddo(model, params, batch, keys):
  reference = jax.tree.map(jnp.zeros_like, params)

  def loss(params):
    return model.log_ratio(params, reference, {}, batch, keys)[0].sum()

  return jax.grad(loss)(params)


def mle(model, params, batch, keys):
  return model.mle_loss(params, {}, batch, keys)


def sample(model, params, batch, keys):
  return model.sample(params, {}, batch.label, keys, SAMPLER)


@pytest.mark.parametrize('name', MODELS)
def test_every_product_has_the_precision_of_the_model(name):
  for precision in ('highest', 'default'):
    config = dataclasses.replace(MODELS[name], precision=precision)
    assert traced(config, ddo) == {precision}
    # EDM2 has one more network, of the noise level alone.
    assert traced(config, mle) <= {precision, 'default'}
    assert precision in traced(config, mle)


def test_samples_have_the_precision_of_the_sampler(monkeypatch):
  config = dataclasses.replace(MODELS['toy'], precision='default')
  assert traced(config, sample) == {'highest'}
  monkeypatch.setattr(SAMPLER, 'precision', 'high')
  assert traced(config, sample) == {'high'}


@pytest.mark.parametrize('name', MODELS)
def test_other_names_are_refused(name, monkeypatch):
  config = dataclasses.replace(MODELS[name], precision='BF16_BF16_F32_X3')
  with pytest.raises(errors.UserError, match=r'config\.model\.precision'):
    config.build()
  monkeypatch.setattr(SAMPLER, 'precision', 'hihg')
  with pytest.raises(errors.UserError, match='did you mean high'):
    traced(MODELS[name], sample)


def open_pool(tmp_path, sampler):
  """Opens the pool of a round, without drawing it."""
  config = config_lib.Config()
  shares = labels_lib.Shares(())
  generator = types.SimpleNamespace(
    sampler=sampler, fill=lambda pool, *args: pool.folder.mkdir(exist_ok=True)
  )
  run = types.SimpleNamespace(
    config=config,
    shares=shares,
    real=types.SimpleNamespace(num_classes=3, pixel_values=17),
    sample_batch=100,
    generator=lambda guided: generator,
  )
  round_lib.fake_pool(run, tmp_path, {}, {'sha256': 'of the reference'})


def test_another_precision_is_another_pool(tmp_path):
  with pytest.raises(errors.UserError, match='lacks 500 shards'):
    open_pool(tmp_path, SAMPLER)
  # A pool of an earlier version, which did not know of it, is still this one.
  path = tmp_path / 'fakes' / 'pool.json'
  recorded = records.read_json(path)
  assert recorded.pop('precision') == 'highest'
  assert recorded.pop('guidance_channels') == 0
  assert recorded.pop('discriminator') == 0
  del recorded['discriminator_min']
  del recorded['discriminator_max']
  assert not recorded['sampler'].keys() & negatives.LATER.keys()
  records.write_json(path, recorded)
  with pytest.raises(errors.UserError, match='lacks 500 shards'):
    open_pool(tmp_path, SAMPLER)
  with pytest.raises(errors.UserError, match="drawn with precision = 'highest"):
    open_pool(tmp_path, dataclasses.replace(SAMPLER, precision='default'))


def test_a_changed_precision_is_refused_in_a_begun_folder(tmp_path):
  config = config_lib.Config(model=MODELS['toy'], sampler=SAMPLER)
  workspace.claim_workdir(config, tmp_path)
  recorded = records.read_json(tmp_path / 'config.json')
  del recorded['model.precision']  # as an earlier version left it
  del recorded['sampler.precision']
  records.write_json(tmp_path / 'config.json', recorded)
  (tmp_path / manifest.FILE).unlink()
  (tmp_path / 'pretrain' / 'params').mkdir(parents=True)
  workspace.check_workdir(config, tmp_path)
  config.model = dataclasses.replace(MODELS['toy'], precision='high')
  with pytest.raises(errors.UserError, match=r'model\.precision: .highest'):
    workspace.check_workdir(config, tmp_path)
