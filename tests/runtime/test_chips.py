"""The published figures by which a plan counts hours."""

import pytest

from ddo_jax import errors
from ddo_jax.runtime import chips
from ddo_jax.runtime import work


def test_an_unknown_chip_is_told_a_near_one():
  assert chips.get('H100').name == 'h100'
  with pytest.raises(errors.UserError, match='did you mean a100-40g or a100-8'):
    chips.get('a100')
  with pytest.raises(errors.UserError, match=r'one of h100, .*v6e; or measure'):
    chips.get('abacus')
  with pytest.raises(errors.UserError, match=r'did you mean v5e\?'):
    chips.get('tpu-v5e')


def test_a_device_at_hand_is_known():
  assert chips.of_device('TPU v5 lite').name == 'v5e'
  assert chips.of_device('TPU v5').name == 'v5p'
  assert chips.of_device('NVIDIA A100-SXM4-40GB').memory_gib == 40
  assert chips.of_device('cpu') is None


@pytest.mark.parametrize(
  ('precision', 'h100', 'v5e'),
  [
    ('highest', 66.9, 197 / 6),
    ('default', 494.7, 197),
    ('high', 494.7, 197 / 3),
    ('bfloat16', 989.4, 197),
    ('bf16_bf16_f32', 989.4, 197),
    ('bf16_bf16_f32_x3', 989.4 / 3, 197 / 3),
    ('tf32_tf32_f32_x3', 494.7 / 3, 197 / 3),
    ('f32_f32_f32', 66.9, 197 / 6),
  ],
)
def test_rates_by_precision(precision, h100, v5e):
  assert chips.get('h100').rate(precision) == pytest.approx(h100 * 1e12)
  assert chips.get('v5e').rate(precision) == pytest.approx(v5e * 1e12)


def test_the_time_of_a_call():
  chip = chips.get('a100-40g')
  found = work.Work({'highest': 19.5e12, 'bfloat16': 312e12}, 1.555e12, 0)
  assert chip.seconds(found) == pytest.approx(3 / chips.UTILISATION)
  found = found._replace(loops=1_000)
  busy = 3 / chips.UTILISATION
  assert chip.seconds(found) == pytest.approx(busy + 1_000 * chips.LOOP)


def test_the_memory_that_jax_takes(monkeypatch):
  for variable in ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'):
    monkeypatch.delenv(variable, raising=False)
  assert chips.get('h100').room_gib == 60
  assert chips.get('v5e').room_gib == 16
  monkeypatch.setenv('XLA_PYTHON_CLIENT_MEM_FRACTION', '.9')
  assert chips.get('h100').room_gib == 72
