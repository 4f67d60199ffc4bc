"""What is said where a source does not fit a model."""

import pytest

from ddo_jax import errors
from ddo_jax.method import likelihood
from ddo_jax.models import toy

MODEL = toy.ToyConfig(
  image_shape=(32, 32, 3), num_classes=4, pixel_values=256
).build()


def check(shape=(32, 32, 3), num_classes=4, pixel_values=256):
  likelihood.check_source(MODEL, 'it', shape, num_classes, pixel_values)


@pytest.mark.parametrize('num_classes', [4, 3, 1])
def test_a_source_may_have_fewer_classes(num_classes):
  check(num_classes=num_classes)


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    (
      {'shape': (28, 28, 3)},
      r'data\.resize=32 \(or pad_to=32\), or set config',
    ),
    ({'shape': (64, 48, 3)}, r'the model takes \[32, 32, 3\]: --config\.data'),
    ({'shape': (32, 32, 1)}, r': --config\.data\.channels=3, or set'),
    ({'shape': (64, 64, 1)}, r'resize=32 --config\.data\.channels=3, or set'),
    ({'shape': (4, 4, 8)}, r'the model takes \[32, 32, 3\]: set config\.model'),
    ({'pixel_values': 17}, r'--config\.model\.pixel_values=17'),
    (
      {'num_classes': 0},
      r'folder of its own, or --config\.model\.num_classes=0',
    ),
    ({'num_classes': 5}, r'num_classes=5 \(.*first_label=1\)'),
    (
      {'shape': (8, 8, 3), 'num_classes': 9},
      r'data\.resize=32.*; labels reach',
    ),
  ],
)
def test_what_does_not_fit_is_said_with_its_remedy(fields, words):
  with pytest.raises(errors.UserError, match=words) as caught:
    check(**fields)
  assert '\n' not in str(caught.value)
