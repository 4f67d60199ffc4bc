"""Reads golden vectors, which are in PyTorch's layouts, as the package's."""

import contextlib
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.models import edm
from ddo_jax.models import edm2
from ddo_jax.models import edm_layers
from ddo_jax.models import layers
from ddo_jax.weights import edm_names

# Frequencies and phases: among the params, but never trained.
CONSTANTS = ('freqs', 'phases')
FOLDER = pathlib.Path(__file__).parent / 'golden'


@functools.lru_cache
def load(name: str) -> dict[str, np.ndarray]:
  """All arrays of a golden file."""
  with np.load(FOLDER / name, allow_pickle=False) as arrays:
    return dict(arrays)


def read_json(golden: dict[str, np.ndarray], name: str) -> Any:
  return json.loads(str(golden[name]))


def nhwc(x: np.ndarray) -> np.ndarray:
  return np.moveaxis(x, 1, -1)


def labels(one_hot: np.ndarray) -> np.ndarray:
  """Rows of class labels to int32; a row of zeros is "no label"."""
  none = one_hot.shape[1]
  return np.where(one_hot.any(1), one_hot.argmax(1), none).astype(np.int32)


def state_dict(golden: dict[str, np.ndarray], prefix: str = 'sd/'):
  return {
    key.removeprefix(prefix): value
    for key, value in golden.items()
    if key.startswith(prefix)
  }


def params(
  golden: dict[str, np.ndarray], dtype: Any, prefix: str = 'sd/', taps=()
):
  """Flax params of a golden state dict, as NumPy arrays.

  NumPy casts and reshapes at once where jax would compile for every shape.
  """
  tree = edm_names.to_flax(state_dict(golden, prefix), taps)
  return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), tree)


def count(tree: Any) -> int:
  """Scalars of all leaves but the constants that stand among the params."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return sum(
    leaf.size for path, leaf in leaves if path[-1].key not in CONSTANTS
  )


def edm_config(options: dict[str, Any]) -> edm.EdmConfig:
  """The config of the golden networks of EDM."""
  network = 'adm'
  if options['model_type'] == 'SongUNet':
    assert options['decoder_type'] == 'standard'
    fourier = options['embedding_type'] == 'fourier'
    network = 'ncsnpp' if fourier else 'ddpmpp'
    assert options['encoder_type'] == ['standard', 'residual'][fourier]
    assert options['channel_mult_noise'] == 1 + fourier
    taps = tuple(options['resample_filter'])
    assert taps == [edm_layers.DDPMPP, edm_layers.NCSNPP][fourier].taps
  return edm.EdmConfig(
    network=network,
    image_shape=_image_shape(options),
    num_classes=options['label_dim'],
    augment_dim=options['augment_dim'],
    augment=0.0,
    channels_per_head=options.get('channels_per_head', 64),
    **_common(options),
  )


def edm2_config(options: dict[str, Any]) -> edm2.Edm2Config:
  """The config of the golden networks of EDM2."""
  names = ('channels_per_head', 'logvar_channels')
  return edm2.Edm2Config(
    image_shape=_image_shape(options),
    num_classes=options['label_dim'],
    **{name: options[name] for name in names},
    **_common(options),
  )


def _image_shape(options: dict[str, Any]) -> tuple[int, int, int]:
  side = options['img_resolution']
  return (side, side, options['img_channels'])


def _common(options: dict[str, Any]) -> dict[str, Any]:
  tuples = ('channel_mult', 'attn_resolutions')
  names = ('model_channels', 'num_blocks', 'dropout')
  return {name: tuple(options[name]) for name in tuples} | {
    name: options[name] for name in names
  }


def check_trace(golden: dict[str, np.ndarray], captured: Any, taps=()) -> None:
  """Compares every named submodule's output with the original's.

  Args:
    golden: with trace_names and trace_stats: mean, population standard
      deviation and the first eight values in NCHW order.
    captured: Linen's 'intermediates' of the same call, batch leading.
    taps: of the filter that is part of an `aux_residual` layer there.
  """
  found = 0
  stats = golden['trace_stats']
  for name, wanted in zip(read_json(golden, 'trace_names'), stats, strict=True):
    node = captured['network'].get(name.replace('.', '_', 1))
    if node is None:
      assert name == 'map_noise'  # a function, without parameters
      continue
    found += 1
    out = node['__call__'][0]
    if name.endswith('aux_residual'):
      out = layers.downsample(out, taps, pad=0)
    out = np.moveaxis(np.asarray(out), -1, 1)
    got = [out.mean(), out.std(), *out.ravel()[:8]]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-10, err_msg=name)
  assert found >= len(stats) - 1


def max_error(got: Any, wanted: np.ndarray) -> float:
  got = np.asarray(got)
  assert got.shape == wanted.shape, (got.shape, wanted.shape)
  return float(np.max(np.abs(got - wanted)))


def relative_error(got: Any, wanted: np.ndarray) -> float:
  """In the L2 norm."""
  difference = np.linalg.norm(np.asarray(got) - wanted)
  return float(difference / np.linalg.norm(wanted))


@contextlib.contextmanager
def precision(name: str):
  """Computes in 'f64' or 'f32'; yields the dtype."""
  with jax.enable_x64(name == 'f64'):
    yield {'f64': np.float64, 'f32': np.float32}[name]


def fix_noise(monkeypatch, sigma, noise, p_mean, p_std, dtype):
  """Makes a model under a log-normal law draw these; see `fix_draws`.

  Args:
    monkeypatch: pytest's.
    sigma: [B].
    noise: [B,H,W,C], unit variance.
    p_mean: mean of ln σ.
    p_std: its standard deviation.
    dtype: of the draws.
  """
  z = (np.log(sigma) - p_mean) / p_std
  return fix_draws(monkeypatch, z, noise, dtype)


def fix_draws(monkeypatch, z, noise, dtype):
  """Makes a model draw these; returns the rows' keys [B].

  `diffusion` draws one normal vector a row: the noise law's number, then the
  unit noise. Here it is looked up by the row's key.

  Args:
    monkeypatch: pytest's.
    z: the noise law's normal numbers, [B].
    noise: [B,H,W,C], unit variance.
    dtype: of the draws.
  """
  table = np.concatenate([z[:, None], noise.reshape(len(z), -1)], 1)
  table = jnp.asarray(table, dtype)
  keys = jax.random.split(jax.random.key(0), len(z))
  known = jax.random.key_data(keys)

  def normal(key, shape):
    assert shape == table.shape[1:]
    match = known == jax.random.key_data(key)[None, :]
    return table[jnp.argmax(match.all(1))]

  monkeypatch.setattr(jax.random, 'normal', normal)
  return keys
