"""Official state dicts to Flax params and back, to the bit."""

import golden_io
import jax
import numpy as np
import pytest

from ddo_jax import errors
from ddo_jax.models import presets
from ddo_jax.weights import edm_names

TAPS = {'ddpmpp': (1, 1), 'ncsnpp': (1, 3, 3, 1), 'adm': (1, 1)}


def _check_round_trip(golden, model, taps):
  """All keys and bits come back; what lies between fits the model."""
  state = golden_io.state_dict(golden)
  params = edm_names.to_flax(state, taps)
  back = edm_names.to_official(params, taps)
  assert back.keys() == state.keys()
  for key, tensor in state.items():
    if not key.endswith('resample_filter'):
      assert back[key].dtype == tensor.dtype
      assert back[key].flags.c_contiguous
    np.testing.assert_array_equal(back[key], tensor, err_msg=key)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
  assert golden_io.count(shapes) == golden['n_params']


@pytest.mark.golden
@pytest.mark.parametrize('network', ['ddpmpp', 'ncsnpp', 'adm'])
def test_round_trip_of_edm(network):
  """edm_ddpmpp.npz, edm_ncsnpp.npz, edm_adm.npz: sd, n_params."""
  golden = golden_io.load(f'edm_{network}.npz')
  config = golden_io.edm_config(golden_io.read_json(golden, 'config'))
  model = config.build()
  _check_round_trip(golden, model, TAPS[network])


@pytest.mark.golden
@pytest.mark.parametrize('case', ['cond', 'uncond'])
def test_round_trip_of_edm2(case):
  """edm2_cond.npz, edm2_uncond.npz: sd, n_params."""
  golden = golden_io.load(f'edm2_{case}.npz')
  config = golden_io.edm2_config(golden_io.read_json(golden, 'config'))
  _check_round_trip(golden, config.build(), ())


def test_another_filter_is_refused():
  state = golden_io.state_dict(golden_io.load('edm_ncsnpp.npz'))
  for taps in ((1, 1), ()):
    with pytest.raises(errors.UserError, match='resample_filter is not'):
      edm_names.to_flax(state, taps)


@pytest.mark.parametrize(
  ('name', 'tensors', 'scalars'),
  [
    ('edm-cifar10-32x32-cond-vp', 427, 32),
    ('edm-cifar10-32x32-cond-ve', 434, 288),
  ],
)
def test_released_state_dict(name, tensors, scalars):
  """As many tensors as released, and scalars of the buffers among them."""
  config = presets.get(name)
  model = config.build()
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.int8), shapes)
  state = edm_names.to_official(params, TAPS[config.network])
  assert len(state) == tensors
  buffers = ('freqs', 'resample_filter')
  assert scalars == sum(
    leaf.size for key, leaf in state.items() if key.endswith(buffers)
  )
  block = 'model.dec.32x32_block4'
  assert state[f'{block}.conv0.weight'].shape == (256, 384, 3, 3)
  assert f'{block}.qkv.weight' not in state
  assert state['model.dec.16x16_block4.qkv.weight'].shape == (768, 256, 1, 1)
