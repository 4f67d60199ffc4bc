"""EDM's networks against the original programs' numbers."""

from flax import linen as nn
import golden_io
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax import errors
from ddo_jax.models import edm
from ddo_jax.models import edm_layers
from ddo_jax.models import layers
from ddo_jax.models import precond

TAPS = {'ddpmpp': (1, 1), 'ncsnpp': (1, 3, 3, 1), 'adm': (1, 1)}
BLOCKS = ('song_down_1331', 'song_up_1331_attn')
BLOCKS += ('adm_attn_4heads', 'adm_up', 'adm_down_newch')
CONVS = ('conv_down_k0_11', 'conv_down_k0_1331', 'conv_up_k0_1331')
CONVS += ('conv_up_k3_11', 'conv_down_k3_1331_fused')
CONVS += ('conv_down_k3_1331_unfused', 'conv_up_k3_1331_fused')


def _inputs(golden, dtype):
  x = np.asarray(golden_io.nhwc(golden['x']), dtype)
  sigma = np.asarray(golden['sigma'], dtype)
  label = np.asarray(golden_io.labels(golden['class_labels']))
  return x, sigma, label


class Mixed(precond.Precond):
  """Nine rows under EDM's preconditioning, the others under another.

  So that a network need be compiled but once.
  """

  edm: precond.Precond
  other: precond.Precond

  def coefficients(self, sigma):
    first = self.edm.coefficients(sigma[:9])
    last = self.other.coefficients(sigma[9:])
    parts = zip(first, last, strict=True)
    return precond.Coefficients(*(jnp.concatenate(part) for part in parts))


@pytest.mark.golden
@pytest.mark.parametrize('precision', ['f64', 'f32'])
@pytest.mark.parametrize(
  ('network', 'atol', 'wrapper', 'rtol'),
  [
    ('ddpmpp', 5e-6, 'vp', 1e-5),
    ('ncsnpp', 1e-5, 've', 5e-6),
    ('adm', 5e-6, None, None),
  ],
)
def test_network(network, atol, wrapper, rtol, precision):
  """edm_ddpmpp.npz, edm_ncsnpp.npz, edm_adm.npz: D, D_vp, D_ve, F, blocks."""
  golden = golden_io.load(f'edm_{network}.npz')
  config = golden_io.edm_config(golden_io.read_json(golden, 'config'))
  denoiser = edm.denoiser(config)
  other = precond.wrap(wrapper or 'edm', None, 0.5)
  mixed = Mixed(denoiser.network, precond.wrap('edm', None, 0.5), other)
  taps = TAPS[network]

  @jax.jit
  def forward(params, *rows, augment):
    variables, options = {'params': params}, {'mutable': ['intermediates']}
    return mixed.apply(
      variables, *rows, augment=augment, capture_intermediates=True, **options
    )

  with golden_io.precision(precision) as dtype:
    params = golden_io.params(golden, dtype, taps=taps)
    x, sigma, label = _inputs(golden, dtype)
    augment = np.asarray(golden['augment_labels'], dtype)
    # Zero augmentation labels are none at all.
    none, off = np.full_like(label, config.num_classes), 0 * augment
    d, captured = forward(
      params,
      np.concatenate([x] * 4),
      np.concatenate([sigma] * 4),
      np.concatenate([label, label, none, label]),
      augment=np.concatenate([augment, off, off, off]),
    )
    assert d.dtype == dtype
    names = ('D', 'D_noaug', 'D_nolabel', f'D_{wrapper}')
    for got, name in zip(np.split(np.asarray(d), 4), names, strict=True):
      if name == 'D_None':
        continue
      wanted = golden_io.nhwc(golden[f'{name}_{precision}'])
      if precision == 'f64':
        assert golden_io.max_error(got, wanted) <= 1e-10, name
      elif name in names[:3]:
        assert golden_io.max_error(got, wanted) <= atol, name
      else:
        assert golden_io.relative_error(got, wanted) <= rtol, name
    if precision == 'f64':
      rows = jax.tree.map(
        lambda v: np.asarray(v)[:3], captured['intermediates']
      )
      f = rows['network']['__call__'][0]
      assert golden_io.max_error(f, golden_io.nhwc(golden['F_f64'])) <= 1e-10
      golden_io.check_trace(golden, rows, taps)
  if wrapper:
    wanted = golden[f'{wrapper}_sigma_min_max']
    np.testing.assert_allclose(other.sigma_range, wanted, rtol=1e-12)


def _block(options):
  """The block of a golden case, by the constructor arguments there."""
  style = edm_layers.ADM
  if 'resample_filter' in options:
    style = edm_layers.NCSNPP
    assert tuple(options['resample_filter']) == style.taps
    assert options['skip_scale'] == style.skip_scale
    assert options['eps'] == style.epsilon
  heads = options.get('num_heads')
  if heads is None:
    heads = options['out_channels'] // options.get('channels_per_head', 64)
  return edm_layers.UNetBlock(
    options['out_channels'],
    style,
    'up' if options.get('up') else 'down' if options.get('down') else 'keep',
    heads if options.get('attention') else 0,
  )


@pytest.mark.golden
@pytest.mark.parametrize('precision', ['f64', 'f32'])
@pytest.mark.parametrize('case', BLOCKS)
def test_block(case, precision):
  """edm_blocks.npz: single blocks of both families."""
  golden = golden_io.load('edm_blocks.npz')
  block = _block(golden_io.read_json(golden, f'{case}/config'))
  with golden_io.precision(precision) as dtype:
    params = golden_io.params(golden, dtype, f'{case}/sd/', block.style.taps)
    x = np.asarray(golden_io.nhwc(golden[f'{case}/x']), dtype)
    embedding = np.asarray(golden[f'{case}/emb'], dtype)
    y = jax.jit(block.apply)({'params': params}, x, embedding)
  wanted = golden_io.nhwc(golden[f'{case}/y_{precision}'])
  tolerance = {'f64': 1e-11, 'f32': 1e-5}[precision]
  assert golden_io.max_error(y, wanted) <= tolerance


@pytest.mark.golden
@pytest.mark.parametrize('case', CONVS)
def test_resampling(case):
  """edm_blocks.npz: filters alone, before a convolution, and fused with it."""
  golden = golden_io.load('edm_blocks.npz')
  options = golden_io.read_json(golden, f'{case}/config')
  taps, kernel = options['resample_filter'], options['kernel']
  down, fused = options.get('down'), options.get('fused_resample')
  sample = layers.downsample if down else layers.upsample

  @jax.jit
  def apply(params, x):
    def conv(x, pad):
      if not kernel:
        return x
      conv = nn.Conv(5, (kernel, kernel), padding=pad)
      return conv.apply({'params': params}, x)

    if down and fused:
      return sample(conv(x, 2), taps, pad=0)
    if fused:
      return conv(sample(x, taps, pad=0), 0)
    return conv(sample(x, taps), 1)

  with golden_io.precision('f64') as dtype:
    params = golden_io.params(golden, dtype, f'{case}/sd/', taps)
    y = apply(params, np.asarray(golden_io.nhwc(golden[f'{case}/x']), dtype))
  wanted = golden_io.nhwc(golden[f'{case}/y_f64'])
  assert golden_io.max_error(y, wanted) <= 1e-11


@pytest.mark.golden
def test_positional_embedding():
  """edm_blocks.npz: with the endpoint (SongUNet) and without (ADM)."""
  golden = golden_io.load('edm_blocks.npz')
  with golden_io.precision('f64') as dtype:
    c_noise = np.asarray(golden['emb/c_noise'], dtype)
    for name, endpoint in (
      ('positional_endpoint', True),
      ('positional', False),
    ):
      got = edm_layers.positional(c_noise, 16, endpoint)
      assert golden_io.max_error(got, golden[f'emb/{name}_f64']) <= 1e-11


@pytest.mark.golden
def test_groups_of_norm():
  """edm_blocks.npz: groups by the number of channels."""
  golden = golden_io.load('edm_blocks.npz')
  groups = []

  class Norm(nn.Module):
    @nn.compact
    def __call__(self, x):
      return edm_layers.ADM.norm(x, 'norm')

  def watch(call, args, kwargs, context):
    if isinstance(context.module, nn.GroupNorm):
      groups.append(context.module.num_groups)
    return call(*args, **kwargs)

  with nn.intercept_methods(watch):
    for channels in golden['groupnorm/channels'].tolist():
      if channels < 4:  # no group: no network of theirs or ours has this
        groups.append(0)
        continue
      x = jax.ShapeDtypeStruct((1, 2, 2, channels), jnp.float32)
      jax.eval_shape(Norm().init, jax.random.key(0), x)
  assert groups == golden['groupnorm/groups'].tolist()


def _init(style, **options):
  block = edm_layers.UNetBlock(16, style, 'up', heads=1, **options)
  init = jax.jit(block.init)
  return init(jax.random.key(0), np.ones((1, 2, 2, 16)), np.ones((1, 24)))


def test_initial_weights_of_song():
  """Xavier's uniform; 1e-5 of it before each sum; √0.2 of it for qkv."""
  params = _init(edm_layers.DDPMPP)['params']
  for name, window, fans, gain in (
    ('conv0', 9, 32, 1),
    ('conv1', 9, 32, 1e-5),
    ('proj', 1, 32, 1e-5),
    ('qkv', 1, 64, np.sqrt(0.2)),
    ('affine', 1, 40, 1),
    ('skip', 1, 32, 1),
  ):
    limit = gain * np.sqrt(6 / (window * fans))
    largest = np.abs(params[name]['kernel']).max()
    assert 0.97 * limit < largest <= limit * (1 + 1e-6), name
    assert not np.any(params[name]['bias']), name


def test_initial_weights_of_adm():
  """Uniform in ±1/√fan_in, biases too; zero before each sum."""
  params = _init(edm_layers.ADM)['params']
  assert 'skip' not in params
  for name in ('conv1', 'proj'):
    assert not any(np.any(leaf) for leaf in params[name].values()), name
  for name, fan_in in (('conv0', 144), ('qkv', 16), ('affine', 24)):
    for leaf in params[name].values():
      largest = np.abs(leaf).max() * np.sqrt(fan_in)
      assert 0.8 < largest <= 1 + 1e-6, name


def test_frequencies_are_not_trained():
  embedding = edm_layers.RandomFourier(8)
  value = np.float32([0.3, -0.2])
  params = embedding.init(jax.random.key(0), value)
  grads = jax.grad(lambda p: embedding.apply(p, value).sum())(params)
  assert not np.any(grads['params']['freqs'])
  assert np.std(params['params']['freqs']) > 4


def test_dropout_is_by_row():
  """A row's mask depends on its key: not on its place, not on the others."""
  block = edm_layers.UNetBlock(8, edm_layers.ADM, dropout=0.5)
  x = np.random.default_rng(0).normal(size=(3, 4, 4, 8)).astype(np.float32)
  embedding = np.ones((3, 4), np.float32)
  init = jax.jit(block.init)
  params = init(jax.random.key(0), x, embedding)['params']
  # ADM's blocks start as the identity.
  params = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.1, params)
  keys = jax.random.split(jax.random.key(2), 3)

  @jax.jit
  def apply(rows):
    keys, x, embedding = rows
    rows = {'x': x, 'embedding': embedding}
    return layers.apply_training(block, params, keys, rows, 'highest')

  rows = (keys, x, embedding)
  together = apply(rows)
  alone = apply((keys[1:2], x[1:2], embedding[1:2]))
  np.testing.assert_allclose(together[1:2], alone, atol=1e-6)
  other = apply((keys[::-1], x, embedding))
  np.testing.assert_allclose(together[1], other[1], atol=1e-6)
  assert np.abs(together[0] - other[0]).max() > 1e-2
  still = jax.jit(block.apply)({'params': params}, x, embedding)
  assert np.abs(together - still).max() > 1e-2


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'image_shape': (28, 28, 1), 'channel_mult': (1, 2, 2, 2)}, 'of 8'),
    ({'image_shape': (32, 16, 3)}, 'square'),
    ({'network': 'dit'}, "one of .'ddpmpp', 'ncsnpp', 'adm'"),
    ({'precond': 'ddpm'}, 'did you mean iddpm'),
  ],
)
def test_impossible_configs(change, message):
  with pytest.raises(errors.UserError, match=message):
    edm.denoiser(edm.EdmConfig(**change))
