"""EDM's augmentation against the original's numbers."""

import golden_io
import jax
import numpy as np
import pytest

from ddo_jax import rng
from ddo_jax.data import augmentation


def _draws(golden, case):
  """The original's draws, which are stored in the order of its calls."""
  d = [
    np.float32(golden[f'{case}/draw{i:02d}']).reshape(-1, 6) for i in range(14)
  ]
  gates = (1, 3, 5, 7, 10, 13)
  return augmentation.Draws(
    gates=np.stack([d[i][0] for i in gates], axis=1),
    flips=np.stack([d[0][0], d[2][0]], axis=1),
    scale=d[4][0],
    rotation=d[6][0],
    anisotropy=d[8][0],
    axis=d[9][0],
    axis_gate=d[11][0],
    translation=d[12].T,
  )


@pytest.mark.golden
@pytest.mark.parametrize('case', ['p1', 'p012'])
def test_pipeline(case):
  """edm_augment.npz: images and labels from the original's own draws."""
  golden = golden_io.load('edm_augment.npz')
  images, labels = jax.jit(augmentation.apply)(
    golden_io.nhwc(golden['images']),
    _draws(golden, case),
    float(golden[f'{case}/p']),
  )
  wanted = golden_io.nhwc(golden[f'{case}/out'])
  assert golden_io.max_error(images, wanted) <= 2e-5
  assert golden_io.max_error(labels, golden[f'{case}/labels']) <= 1e-6


def _rows(count):
  keys = rng.per_example(rng.stream(0), np.arange(count))
  x = np.random.default_rng(0).uniform(-1, 1, (count, 8, 12, 3))
  return keys, x.astype(np.float32)


@jax.jit
def _augment(keys, x, p):
  return augmentation.apply(x, augmentation.draw(keys), p)


def test_nothing_done():
  """At p = 0 images pass, to the filter's precision, and labels are zero."""
  keys, x = _rows(40)
  images, labels = _augment(keys, x, 0.0)
  np.testing.assert_allclose(images, x, atol=2e-6)
  assert not np.any(labels)


def test_rows_are_their_own():
  """A row depends on its key, not on its batch; x-flips alone are flips."""
  keys, x = _rows(40)
  images, labels = _augment(keys, x, 0.1)
  again, _ = _augment(keys[::-1], x[::-1], 0.1)
  np.testing.assert_allclose(images, again[::-1], atol=1e-6)
  only = np.flatnonzero(~np.any(np.asarray(labels)[:, 1:], axis=1))
  assert only.size > 10
  for row in only:
    wanted = x[row][:, ::-1] if labels[row, 0] else x[row]
    np.testing.assert_allclose(images[row], wanted, atol=2e-6)


def test_frequencies():
  """x-flips are a fair coin whatever p is; the others happen with p."""
  draws = jax.jit(augmentation.draw)(
    rng.per_example(rng.stream(1), np.arange(4000))
  )
  x = np.zeros((4000, 1, 1, 1), np.float32)
  _, labels = jax.jit(augmentation.apply)(x, draws, 0.1)
  rates = np.mean(np.asarray(labels) != 0, axis=0)
  # y-flips are a fair coin, too, where they happen; half the axes are x.
  wanted = [0.5, 0.05, 0.1, 0.1, 0.1, 0.1, 0.05, 0.1, 0.1]
  sd = np.sqrt(0.25 / 4000)
  np.testing.assert_allclose(rates, wanted, atol=4 * sd)
  for normal in (draws.scale, draws.anisotropy, *draws.translation.T):
    np.testing.assert_allclose(np.std(normal), 1, atol=0.05)
  angles = np.asarray(labels)[:, 3:5][np.asarray(labels)[:, 4] != 0]
  turned = np.arctan2(angles[:, 1], angles[:, 0] + 1)
  assert np.all(np.histogram(turned, 4, (-np.pi, np.pi))[0] > 60)
