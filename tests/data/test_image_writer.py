"""Sets of images written for other programs, and read back."""

import numpy as np
import sets

from ddo_jax.data import image_writer


def fill(path, images, labels):
  """Writes a set in two batches, the later ids first."""
  writer = image_writer.ImageWriter(path)
  for ids in (np.arange(4, 7), np.arange(4)):
    writer.add(ids, images[ids], labels[ids])
  writer.close()


def test_a_folder_is_a_set_in_the_order_of_the_ids(tmp_path):
  images, labels = sets.make_images(7)
  fill(tmp_path / 'set', images, labels)
  source = sets.open_set(tmp_path / 'set')
  got, got_labels = sets.read_all(source)
  np.testing.assert_array_equal(got, images)
  np.testing.assert_array_equal(got_labels, labels)


def test_an_npz_keeps_images_with_their_labels_shuffled(tmp_path):
  images, labels = sets.make_images(7)
  fill(tmp_path / 'set.npz', images, labels)
  with np.load(tmp_path / 'set.npz') as file:
    written = file['arr_0']
    order = np.random.RandomState(0).permutation(7)
    np.testing.assert_array_equal(written, images[order])
    np.testing.assert_array_equal(file['arr_1'], labels[order])
  assert not np.array_equal(written, images)
