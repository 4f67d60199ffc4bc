"""Features of images, to the same bits on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.evaluation.networks import extract

WIDTH = 24


def test_the_network_gives_equal_bits_on_any_number_of_devices():
  random = np.random.default_rng(3)
  kernel = np.float32(random.normal(size=(3, 3, 3, WIDTH)))
  images = random.integers(0, 256, (150, 8, 8, 3), dtype=np.uint8)

  @jax.jit
  def network(kernel, x):
    x = jax.lax.conv_general_dilated(
      x.astype(jnp.float32) / 255,
      kernel,
      (1, 1),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    return jax.nn.relu(x).mean(axis=(1, 2))

  def run(count, ids):
    out = np.full((150, WIDTH), np.nan, np.float32)
    blocks = extract.by_blocks(
      network, kernel, images.__getitem__, ids, jax.devices()[:count], rows=16
    )
    for mine, rows in blocks:
      out[mine] = rows
    return out

  ids = np.arange(150)
  whole = run(1, ids)
  assert np.isfinite(whole).all()
  np.testing.assert_array_equal(run(3, ids), whole)
  np.testing.assert_array_equal(run(8, ids[::-1]), whole)
  some = random.permutation(150)[:61]
  part = run(2, some)
  np.testing.assert_array_equal(part[some], whole[some])
  assert np.isfinite(part).all(axis=1).sum() == 61
  expected = np.asarray(network(kernel, images))
  np.testing.assert_allclose(whole, expected, rtol=1e-5)


def test_two_blocks_a_device_are_under_way():
  given = []
  done = []

  def images(ids):
    given.append(int(ids[0]))
    return np.zeros((len(ids), 1))

  def network(params, block):
    del params
    return block

  devices = jax.devices()[:2]
  ids = np.array([0, 3, 4, 9, 10, 13, 16, 21])  # Blocks 0, 1, 2, 3, 4 and 5.
  for mine, _ in extract.by_blocks(network, (), images, ids, devices, rows=4):
    done.append(mine.tolist())
    assert len(given) == min(3 + len(done), 6)
  assert done == [[0, 3], [4], [9, 10], [13], [16], [21]]
  assert not list(extract.by_blocks(network, (), images, ids[:0], devices))
