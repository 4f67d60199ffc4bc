"""Cropping, resizing, padding and converting images."""

import numpy as np
from PIL import Image
import pytest
import sets

from ddo_jax import errors
from ddo_jax.data import sources
from ddo_jax.data import transforms

RED = np.full((6, 4, 3), (255, 0, 0), np.uint8)


def fit(pixels, **fields):
  image = Image.fromarray(pixels.squeeze())
  rule = transforms.Fit(**fields)
  shape = rule.shape('it', image)
  fitted = rule.pixels(image)
  assert fitted.shape == shape
  return fitted


def test_grey_and_rgb():
  grey = fit(RED, channels=1)
  assert grey.shape == (6, 4, 1) and (grey == 76).all()  # 0.299 · 255
  back = fit(grey, channels=3)
  assert back.shape == (6, 4, 3) and (back == 76).all()
  np.testing.assert_array_equal(fit(RED, channels=3), RED)


def test_lanczos_keeps_the_largest_centre_square():
  image = np.zeros((5, 9, 1), np.uint8)
  image[:, 2:7] = 200
  small = fit(image, resize=3)
  assert small.shape == (3, 3, 1) and (small == 200).all()
  np.testing.assert_array_equal(fit(image, resize=5), image[:, 2:7])
  noise = sets.make_images(1, (8, 8, 3))[0][0]
  wanted = Image.fromarray(noise).resize((4, 4), Image.Resampling.LANCZOS)
  np.testing.assert_array_equal(fit(noise, resize=4), np.asarray(wanted))


def test_adm_halves_by_boxes_and_crops_last():
  noise = sets.make_images(1, (9, 20, 3))[0][0]
  image = Image.fromarray(noise)
  image = image.resize((10, 4), Image.Resampling.BOX)
  image = image.resize((8, 3), Image.Resampling.BICUBIC)  # 7.5 rounds to even
  wanted = np.asarray(image)[:, 2:5]
  np.testing.assert_array_equal(fit(noise, resize=3, method='adm'), wanted)


def test_overshoot_is_cut_off():
  image = np.zeros((8, 8, 1), np.uint8)
  image[2:6, 2:6] = 16
  assert fit(image, resize=12).max() > 16
  assert fit(image, resize=12, pixel_values=17).max() == 16


def test_all_sources_fit_alike(tmp_path, monkeypatch):
  images, labels = sets.make_images(5, (6, 9, 3))
  np.savez(tmp_path / 'set.npz', image=images, label=labels)
  files = {f'{i}.png': sets.encode(image) for i, image in enumerate(images)}
  folder = sets.write(tmp_path / 'set', files)
  fields = {'resize': 4, 'channels': 1, 'pad_to': 7}
  one = sets.open_set(tmp_path / 'set.npz', **fields)
  two = sets.open_set(folder, **fields)
  assert one.stored_shape == two.stored_shape == (7, 7, 1)
  np.testing.assert_array_equal(one.stored, two.stored)
  # A large set is fitted as it is read.
  monkeypatch.setattr(sources, '_IN_MEMORY', 5 * 7 * 7 - 1)
  lazy = sets.open_set(folder, **fields)
  assert not isinstance(lazy, sources.ArraySource)
  np.testing.assert_array_equal(sets.read_all(lazy)[0], one.stored)


def test_images_of_all_kinds_and_sizes_become_alike(tmp_path):
  image = Image.new('RGB', (6, 4), (10, 20, 30))
  kinds = ('L', 'LA', 'P', 'RGB', 'RGBA', '1')
  files = {
    f'{i}.png': sets.save(image.convert(kind).resize((6 + i, 9)))
    for i, kind in enumerate(kinds)
  }
  files['cmyk.jpg'] = sets.save(image.convert('CMYK'), 'JPEG')
  path = sets.write(tmp_path / 'set', files)
  source = sets.open_set(path, resize=4, channels=3)
  assert source.stored_shape == (4, 4, 3) and len(source) == 7
  assert '--config.data.channels=3' in sets.refusal(path)
  assert '--config.data.resize' in sets.refusal(path, channels=3)
  deep = sets.save(Image.new('I;16', (6, 4)))
  path = sets.write(tmp_path / 'deep', {'a.png': deep})
  assert 'convert it to 8 bits' in sets.refusal(path, channels=1)


def test_what_cannot_be_fitted_is_refused(tmp_path):
  np.savez(tmp_path / 'a.npz', image=np.zeros((2, 4, 4, 2), np.uint8))
  line = sets.refusal(tmp_path / 'a.npz', resize=2)
  assert 'only uint8 images of 1 or 3 channels' in line
  line = sets.refusal(tmp_path / 'a.npz', resize_by='nearest')
  assert "resize_by is 'nearest'" in line
  with pytest.raises(
    errors.UserError, match=r'it is 6×4; config\.data\.pad_to'
  ):
    fit(RED, pad_to=5)
