"""Which field holds the classes, and what is odd about them."""

import numpy as np
import pytest

from ddo_jax import errors
from ddo_jax.data import classes


@pytest.mark.parametrize(
  ('declared', 'integers', 'asked', 'wanted'),
  [
    (['class'], ['width', 'height'], '', 'class'),
    ([], ['target'], '', 'target'),
    (['fine', 'label'], [], '', 'label'),
    (['fine'], ['label'], '', 'label'),
    (['fine', 'coarse'], [], 'coarse', 'coarse'),
    (['class'], ['id'], 'id', 'id'),
    (['class'], [], 'none', ''),
    ([], [], '', ''),
  ],
)
def test_the_one_field_is_taken(declared, integers, asked, wanted):
  assert classes.choose_field('it', declared, integers, asked) == wanted


@pytest.mark.parametrize(
  ('declared', 'integers', 'asked', 'words'),
  [
    (['fine', 'coarse'], [], '', r'may be its classes, fine, coarse: choose'),
    ([], ['id', 'age'], '', r'--config\.data\.label_field=id, or none'),
    (['fine'], ['id'], 'x', r"label_field is 'x'; .* one of \['fine', 'id'\]"),
  ],
)
def test_else_the_choice_is_asked_for(declared, integers, asked, words):
  with pytest.raises(errors.UserError, match=words):
    classes.choose_field('it', declared, integers, asked)


@pytest.mark.parametrize(
  ('counts', 'words'),
  [
    ([50, 40], ''),
    ([0, 30, 30, 30], 'labels run from 1 to 3 and class 0 is empty'),
    ([30, 0, 30], "1 classes are empty: 1 'b'"),
    ([30, 9, 30], "1 are rare: 1 'b' (9)"),
    ([2_000, 30, 2_000], "1 are rare: 1 'b' (30)"),
    ([30, 0, 9, 30, 30], "1 classes are empty: 1 'b'; 1 are rare: 2 'c' (9)"),
  ],
)
def test_odd_classes_are_named(counts, words):
  rows = np.repeat(np.arange(len(counts)), counts)
  said = classes.describe(rows, len(counts), tuple('abcde'[: len(counts)]))
  assert words in said and bool(words) == bool(said)


def test_a_long_list_is_cut():
  said = classes.describe(np.repeat([0, 20], 99), 21)
  assert said == '19 classes are empty: 1, 2, 3, 4, 5, …'
