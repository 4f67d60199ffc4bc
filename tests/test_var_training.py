"""VAR's optimizer, schedule and baselines."""

import dataclasses

import golden_io
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddo_jax import config as config_lib
from ddo_jax import data
from ddo_jax import likelihood
from ddo_jax import train_state
from ddo_jax import train_step
from ddo_jax.models import var


def test_the_other_objectives():
  """Their terms, and that nothing is divided by what they do not weigh."""
  beta = 0.05
  hyper = train_state.Hyper(*map(jnp.float32, (2.0, beta, 1)))
  real, other = jnp.array([1.0, 2.0, 3.0]), jnp.array([-1.0, 0.0, 5.0])
  label = jnp.array([0, 1, 1, 2, 2, 2])  # the third pair has one label
  batch = likelihood.Batch(None, label, None)
  dropped = jnp.array([True, False, False])
  rest = (real, other, batch, dropped, hyper)
  first, second = train_step._terms('unlearning', *rest)
  np.testing.assert_array_equal(first, -real)
  np.testing.assert_array_equal(second, [1, 0, -5])
  first, second = train_step._terms('dpo', *rest)
  margin = beta * (real - other)
  np.testing.assert_allclose(first, jnp.log1p(jnp.exp(-margin)), rtol=1e-6)
  np.testing.assert_array_equal(second, 0)


@pytest.mark.golden
def test_only_what_var_decays_decays():
  """AdamW: three steps of the original, clipped; p2 is exempt."""
  golden = golden_io.load('loss_functions.npz')
  with golden_io.precision('f64'):
    names = ('p1', 'p2')
    phase = config_lib.Phase(adam_b2=0.95, weight_decay=0.05, batch_size=1)
    model = dataclasses.replace(
      var.build(var.VarConfig(), remat=False),
      decayed=lambda params: {'p1': True, 'p2': False},
    )
    start = {n: jnp.asarray(golden[f'aw_{n}_0']) for n in names}
    state = train_state.create(start, phase)
    for step in range(3):
      grads = {n: jnp.asarray(golden[f'aw_g{n[1]}_{step}']) for n in names}
      norm = float(golden['aw_norms'][step])
      assert abs(float(optax.tree.norm(grads)) - norm) <= 1e-10
      # The original divides by the norm + 1e-6 where it clips.
      clipped = dataclasses.replace(phase, clip_norm=2 * norm / (norm + 1e-6))
      state = train_state.apply_gradients(
        state, grads, golden['aw_lr'], model, clipped
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
  phase = config_lib.Phase(
    images=100_352,
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
      got = train_state.learning_rate_factor(phase, seen)
      assert abs(float(got) - wanted) <= 1e-12, step


@pytest.mark.parametrize('processes', [1, 2])
def test_other_labels_are_the_next_rows_of_the_whole_step(processes):
  labels = np.arange(12)
  images = np.zeros((12, 2, 2, 1), np.uint8)
  source = data.ArraySource('s', images, labels, 12, 17)
  parts = [
    list(data.batches(source, 0, 8, 0, 3, i, processes, other_label=True))
    for i in range(processes)
  ]
  for step in range(3):
    both = [part[step] for part in parts]
    label = np.concatenate([b['label'] for b in both])
    other = np.concatenate([b['other_label'] for b in both])
    np.testing.assert_array_equal(other, np.roll(label, -1))
