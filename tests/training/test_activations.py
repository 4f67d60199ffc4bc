"""Counted activations beside what the compiler plans, a small one a family.

The compiler is told to schedule for little memory, as it does on accelerators.
"""

import jax
import jax.numpy as jnp
import pytest

from ddo_jax import config as config_lib
from ddo_jax import rng
from ddo_jax.method import objective
from ddo_jax.models import edm
from ddo_jax.models import edm2
from ddo_jax.models import var
from ddo_jax.models import vqvae
from ddo_jax.runtime import layout
from ddo_jax.runtime import memory
from ddo_jax.samplers import ancestral
from ddo_jax.samplers import heun
from ddo_jax.training import fit
from ddo_jax.training import step as step_lib

EDM = edm.EdmConfig(
  image_shape=(16, 16, 3),
  model_channels=32,
  channel_mult=(1, 2),
  num_blocks=1,
  attn_resolutions=(8,),
  augment_dim=0,
  augment=0.0,
)
EDM2 = edm2.Edm2Config(
  image_shape=(16, 16, 3),
  num_classes=3,
  model_channels=32,
  channel_mult=(1, 2),
  num_blocks=1,
  attn_resolutions=(8,),
  channels_per_head=32,
)
VQVAE = vqvae.VqvaeConfig(
  (16, 16, 3), (1, 2, 4), vocab=64, channels=8, base=32, mult=(1, 1, 2)
)
VAR = var.VarConfig(VQVAE, num_classes=3, depth=8, width=32, heads=2, chunk=21)
LONG = pytest.mark.full_size  # they compile for long
HEUN = heun.Heun(num_steps=4, sigma_min=0.02, sigma_max=40.0)


def stage(config, tokenizer=False):
  """Returns a phase of DDO on 8 pairs; MLE's where a tokenizer is trained."""
  goal = {'objective': objective.MLE()} if tokenizer else {}
  phase = config_lib.at_round(config_lib.Phase(batch_size=8, **goal), 0)
  learner = config.build_tokenizer()
  frozen = {}
  if learner and not tokenizer:
    frozen['tokenizer'] = jax.eval_shape(learner.init, rng.stream(0))

  def build(remat):
    return learner if tokenizer else config.build(phase.noise, remat)

  return fit.Stage('ddo', phase, build, frozen, None)


def planned(call, *args):
  """The bytes that XLA plans for what a call makes."""
  scheduler = {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'}
  compiled = jax.jit(call).lower(*args).compile(compiler_options=scheduler)
  found = compiled.memory_analysis()
  return found.temp_size_in_bytes + found.output_size_in_bytes


@pytest.mark.parametrize(
  ('config', 'tokenizer'),
  [
    pytest.param(EDM, False, id='edm', marks=LONG),
    pytest.param(EDM2, False, id='edm2'),
    pytest.param(VAR, False, id='var'),
    pytest.param(VAR, True, id='vqvae', marks=LONG),
  ],
)
def test_a_gradient(config, tokenizer):
  what = stage(config, tokenizer)
  model = what.build(False)
  params = fit.state_shapes(what).params

  def call(params, reference, frozen, rows):
    return step_lib.gradient_of(
      params, reference, frozen, rows, model, what.phase, None
    )[2]

  single = layout.Layout(layout.ExecutorConfig(), 1)
  parts = fit.step_parts(what, single, accumulate=1, remat=False)
  rows = fit.make_rows(what, model, 8)
  assert parts['activations'] + parts['gradient'] == pytest.approx(
    planned(call, params, params, what.frozen, rows), rel=0.2
  )


@pytest.mark.parametrize(
  ('config', 'sampler'),
  [
    pytest.param(EDM, HEUN, id='heun', marks=LONG),
    # The weights are normalized before the loop.
    pytest.param(EDM2, HEUN, id='heun of edm2'),
    pytest.param(VAR, ancestral.Ancestral(), id='ancestral', marks=LONG),
  ],
)
def test_a_call_of_a_sampler(config, sampler):
  what = stage(config)
  model = what.build(False)

  def call(params, frozen, labels, ids):
    keys = rng.per_example(rng.stream(0), ids)
    return model.draw(params, frozen, labels, keys, sampler)

  counted = fit.sample_bytes(what, sampler, 16)
  compiled = planned(
    call,
    fit.state_shapes(what).params,
    what.frozen,
    jax.ShapeDtypeStruct((16,), jnp.int32),
    jax.ShapeDtypeStruct((16,), jnp.uint32),
  )
  assert counted == pytest.approx(compiled, rel=0.2)


def test_what_is_the_same_in_every_turn_is_made_once():
  """Weights normalized in a loop's body stand beside it, each of them once."""

  def loop(x, kernels):
    def normal(kernel):
      return kernel / jnp.sqrt(jnp.sum(kernel**2, axis=0, keepdims=True))

    def turn(x, _):
      for kernel in (*kernels, *kernels):
        x = x @ normal(kernel)
      return x, None

    return jax.lax.scan(turn, x, None, length=3)[0]

  row = jax.ShapeDtypeStruct((1, 256), jnp.float32)
  kernels = [jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 3
  size = memory.size_of(kernels)
  assert size < memory.peak(loop, row, kernels) < 1.1 * size
