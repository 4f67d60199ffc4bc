"""Optimizers, schedules and averages, VAR's among them."""

import golden_io
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddo_jax.method import likelihood
from ddo_jax.training import state as state_lib


class OneDecays(likelihood.WeightRules):
  """Only p1 decays."""

  def decay_mask(self, params):
    return {name: name == 'p1' for name in params}


def schedule(optimizer, images):
  return [float(optimizer.factor(jnp.int32(seen), 100)) for seen in images]


def test_the_learning_rate_warms_up_and_decays():
  optimizer = state_lib.Optimizer(warmup_images=10)
  assert schedule(optimizer, [0, 5, 10, 99]) == [0, 0.5, 1, 1]
  optimizer = state_lib.Optimizer(decay='linear', decay_images=20)
  assert schedule(optimizer, [0, 80, 90, 100]) == [1, 1, 0.5, 0]
  optimizer = state_lib.Optimizer(decay='inverse_sqrt', decay_images=10)
  assert schedule(optimizer, [0, 10, 40]) == pytest.approx([1, 1, 0.5])


def test_the_average_halves_what_is_old_in_its_halflife():
  averages = state_lib.Averages(halflife=(16.0,))
  rules = likelihood.WeightRules()
  transform = state_lib.Optimizer(1.0).transform(rules, 8, 100)
  state = state_lib.create({'a': jnp.full(3, 2.0)}, transform, averages)
  zero = {'a': jnp.zeros(3)}
  state = state.replace(params=zero)
  for _ in range(2):  # two steps of 8 images, without a gradient
    state = state_lib.apply_gradients(
      state, zero, transform, averages, rules, batch_size=8
    )
  (average,) = state.ema.values()
  np.testing.assert_allclose(average['a'], np.ones(3), rtol=1e-6)
  assert state.step == 2


@pytest.mark.golden
def test_only_what_var_decays_decays():
  """AdamW: three steps of the original, clipped; p2 is exempt."""
  golden = golden_io.load('loss_functions.npz')
  with golden_io.precision('f64'):
    names = ('p1', 'p2')
    averages = state_lib.Averages()
    rules = OneDecays()
    start = {n: jnp.asarray(golden[f'aw_{n}_0']) for n in names}
    state = None
    for step in range(3):
      grads = {n: jnp.asarray(golden[f'aw_g{n[1]}_{step}']) for n in names}
      norm = float(golden['aw_norms'][step])
      assert abs(float(optax.tree.norm(grads)) - norm) <= 1e-10
      # The original divides by the norm + 1e-6 where it clips.
      transform = state_lib.Optimizer(
        learning_rate=golden['aw_lr'],
        adam_b2=0.95,
        weight_decay=0.05,
        clip_norm=2 * norm / (norm + 1e-6),
      ).transform(rules, 1, 100)
      state = state or state_lib.create(start, transform, averages)
      state = state_lib.apply_gradients(
        state, grads, transform, averages, rules, batch_size=1
      )
      for n in names:
        wanted = golden[f'aw_{n}_{step + 1}']
        assert golden_io.max_error(state.params[n], wanted) <= 1e-10


@pytest.mark.golden
@pytest.mark.parametrize(
  ('name', 'batch', 'warmup'), [('d16', 128, 200), ('d30', 32, 801)]
)
def test_the_schedule_of_var(name, batch, warmup):
  """loss_functions.npz: the rate at micro-iterations of DDO's scripts."""
  golden = golden_io.load('loss_functions.npz')
  steps = int(golden[f'sched_{name}_iters'])
  optimizer = state_lib.Optimizer(
    warmup_images=warmup * batch,
    warmup_start=0.005,
    decay='lin0',
    decay_images=(steps - 1) * batch,
    decay_end=0.1,
  )
  with golden_io.precision('f64'):
    for step, wanted in zip(
      golden[f'sched_{name}_g_it'], golden[f'sched_{name}_lr_mult'], strict=True
    ):
      seen = jnp.float64(step) * batch
      got = optimizer.factor(seen, 100_352)
      assert abs(float(got) - wanted) <= 1e-12, step
