"""LlamaGen's transformer and tokenizer against the original's numbers."""

import dataclasses
import functools
import zlib

import golden_io
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax import errors
from ddo_jax import rng
from ddo_jax.data import codec
from ddo_jax.method import likelihood
from ddo_jax.models import llamagen
from ddo_jax.models import llamagen_layers
from ddo_jax.models import llamagen_presets
from ddo_jax.models import llamagen_vq
from ddo_jax.models import vqvae
from ddo_jax.samplers import ancestral
from ddo_jax.weights import llamagen_names

GOLDEN = 'llamagen_gpt.npz'
GENERATED = {'cfg1_interval-1': 0, 'cfg1.75_interval-1': 0, 'cfg4_interval3': 5}
FILTERS = ((1, 1.0), (5, 1.0), (0, 0.9), (20, 0.8), (2000, 0.96), (0, 0.0))
PRESETS = {
  'B': (110_888_448, 88),
  'L': (342_910_976, 172),
  'XL': (774_699_520, 256),
  'XXL': (1_410_972_672, 340),
  '3B': (3_096_659_200, 172),
}
TOKENIZERS = {'vq_ds16_c2i': 71_883_403, 'vq_ds8_c2i': 70_109_835}
TINY = llamagen.PixelGptConfig(
  image_shape=(1, 3, 1),
  pixel_values=4,
  num_classes=2,
  depth=2,
  width=16,
  heads=2,
  hidden=16,
  chunk=2,
)


def network_of(options):
  """The golden's transformer; `chunk` does not divide its tokens."""
  side = round(options['block_size'] ** 0.5)
  hidden = 8 * options['dim'] // 3
  unit = options.get('multiple_of', 256)
  return llamagen.Gpt(
    grid=(side, side),
    vocab=options['vocab_size'],
    num_classes=options['num_classes'],
    width=options['dim'],
    depth=options['n_layer'],
    heads=options['n_head'],
    shared_heads=options.get('n_kv_head', options['n_head']),
    hidden=-(-hidden // unit) * unit,
    chunk=5,
  )


def params_of(golden, dtype, prefix='sd/'):
  state = golden_io.state_dict(golden, prefix)
  tree = llamagen_names.transformer_to_flax(state)
  return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), tree)


@functools.lru_cache
def compiled(network):
  """All that a teacher-forced pass says, and the weighted sum's gradient."""

  @jax.jit
  def forward(params, label, ids):
    variables = {'params': params}
    logits, captured = network.apply(
      variables,
      label,
      ids,
      capture_intermediates=True,
      mutable=['intermediates'],
    )
    chosen = network.apply(variables, label, ids, method='token_log_prob')
    return logits, chosen, captured['intermediates']

  @jax.jit
  @jax.grad
  def gradient(params, label, ids, weights):
    chosen = network.apply(
      {'params': params}, label, ids, method='token_log_prob'
    )
    return jnp.sum(weights * jnp.sum(chosen, axis=1))

  return forward, gradient


@pytest.mark.golden
@pytest.mark.parametrize('precision', ['f64', 'f32'])
def test_forward(precision):
  """llamagen_gpt.npz: logits, log-probabilities, the trace, gradients."""
  golden = golden_io.load(GOLDEN)
  network = network_of(golden_io.read_json(golden, 'config'))
  with golden_io.precision(precision) as dtype:
    params = params_of(golden, dtype)
    rows = (golden['labels'].astype(np.int32), golden['ids'].astype(np.int32))
    forward, gradient = compiled(network)
    logits, chosen, trace = jax.tree.map(np.asarray, forward(params, *rows))
    weights = golden['grad_row_weights'].astype(dtype)
    grads = jax.tree.map(np.asarray, gradient(params, *rows, weights))
  assert logits.dtype == dtype
  exact = precision == 'f64'

  def check(got, name, atol):
    wanted = golden[f'{name}_{precision}']
    error = golden_io.max_error(got, wanted)
    assert error <= (1e-10 if exact else atol), (name, error)

  check(logits, 'logits', 2e-5)
  check(chosen, 'logp_tokens', 2e-5)
  check(chosen.sum(1), 'logp_rows', 5e-5)
  check(-chosen.mean(), 'ce_mean', 2e-5)
  if exact:
    (blocks, _) = trace['blocks']['__call__'][0]
    attention = trace['blocks']['attention']['__call__'][0][0]
    first = trace['cls_embedding']['__call__'][0][:, None]
    tokens = trace['tok_embeddings']['__call__'][0]
    check(np.concatenate([first, tokens], axis=1), 'h0', 0)
    check(attention[0], 'attn0', 0)
    check(blocks[0], 'block0', 0)
    check(blocks[1], 'block1', 0)
    check(trace['norm']['__call__'][0], 'h_norm', 0)
  state = llamagen_names.transformer_to_official(grads)
  names = golden_io.read_json(golden, 'grad_params')
  assert len(names) == 6
  for key in names:
    sparse = key.endswith(('wqkv.weight', 'w3.weight'))
    got = state[key][:: 8 if sparse else 1]
    wanted = golden[f'grad/{key}_{precision}']
    error = golden_io.relative_error(got, wanted)
    assert error <= (1e-10 if exact else 2e-5), (key, error)


@pytest.mark.golden
@pytest.mark.parametrize('precision', ['f64', 'f32'])
def test_shared_heads(precision):
  """llamagen_gpt.npz: gqa/*, six heads of queries on two of keys."""
  golden = golden_io.load(GOLDEN)
  network = network_of(golden_io.read_json(golden, 'gqa/config'))
  with golden_io.precision(precision) as dtype:
    params = params_of(golden, dtype, 'gqa/sd/')
    logits = jax.jit(network.apply)(
      {'params': params},
      golden['labels'].astype(np.int32),
      golden['ids'].astype(np.int32),
    )
    error = golden_io.max_error(logits, golden[f'gqa/logits_{precision}'])
  assert error <= {'f64': 1e-10, 'f32': 2e-5}[precision]


@pytest.mark.golden
def test_rotations():
  """llamagen_gpt.npz: rope and rope_*; position 0 has none."""
  golden = golden_io.load(GOLDEN)
  tables = {'rope': ((4, 4), 16, slice(None))}
  for side, channels in ((16, 64), (24, 64), (24, 100)):
    name = f'rope_{side}_{channels}'
    tables[name] = ((side, side), channels, golden[f'{name}_rows'])
  for name, (grid, channels, rows) in tables.items():
    got = llamagen_layers.rotations(grid, channels)[rows]
    exact = golden['rope' if name == 'rope' else f'{name}_f64']
    assert golden_io.max_error(got, exact) <= 1e-12, name
    single = golden[f'{name}_f32']
    assert golden_io.max_error(got.astype(np.float32), single) <= 5e-6, name


@pytest.mark.golden
@pytest.mark.parametrize('precision', ['f64', 'f32'])
def test_generation(precision, monkeypatch):
  """llamagen_gpt.npz: gen/*, guided through the cache, a token at a time."""
  golden = golden_io.load(GOLDEN)
  network = llamagen.NextToken(
    network_of(golden_io.read_json(golden, 'config'))
  )
  keep = ancestral.keep
  label = golden['gen/labels'].astype(np.int32)

  logits = []

  def record(x, top_k, top_p):
    # As bits, because a callback hands over no float64.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    jax.debug.callback(
      lambda bits: logits.append(np.array(bits).view(x.dtype)),
      bits,
      ordered=True,
    )
    return keep(x, top_k, top_p)

  monkeypatch.setattr(ancestral, 'keep', record)

  @functools.partial(jax.jit, static_argnums=1)
  def draw(params, sampler):
    keys = jax.random.split(rng.stream(0), len(label))
    tokens, _ = sampler(network.stages(params, {}), label, keys)
    return tokens

  with golden_io.precision(precision) as dtype:
    params = params_of(golden, dtype)
    for name, stages in GENERATED.items():
      sampler = ancestral.Ancestral(
        guidance=float(name.partition('_')[0].removeprefix('cfg')),
        convention='constant',
        top_k=1,
        guided_stages=stages,
      )
      logits.clear()
      tokens = draw(params, sampler)
      jax.effects_barrier()
      np.testing.assert_array_equal(tokens, golden[f'gen/{name}/ids'])
      got = np.stack(logits, axis=1).reshape(*tokens.shape, -1)
      error = golden_io.max_error(got, golden[f'gen/{name}/logits_f64'])
      assert error <= {'f64': 1e-10, 'f32': 1e-4}[precision], name
      assert golden[f'gen/{name}/gap'] > 2 * error


@pytest.mark.golden
@pytest.mark.parametrize(('top_k', 'top_p'), FILTERS)
def test_filters(top_k, top_p):
  """llamagen_gpt.npz: filter/*; its p of 0 keeps one token, its 1 all."""
  golden = golden_io.load(GOLDEN)
  name = f'k{top_k}_p{top_p}'
  ours = {1.0: 0.0, 0.0: 1e-12}.get(top_p, top_p)
  with golden_io.precision('f64') as dtype:
    kept = ancestral.keep(golden['filter/logits'].astype(dtype), top_k, ours)
    probs = jax.nn.softmax(kept)
    np.testing.assert_array_equal(np.isfinite(kept), golden[f'filter/{name}'])
    wanted = golden[f'filter/probs_{name}_f64']
    assert golden_io.max_error(probs, wanted) <= 1e-10


@functools.cache
def tiny():
  """A tiny model with random weights."""
  model = TINY.build()
  draw = np.random.default_rng(0).normal
  shapes = jax.eval_shape(model.init, rng.stream(0))
  return model, jax.tree.map(
    lambda leaf: draw(size=leaf.shape).astype(np.float32) / 2, shapes
  )


def test_probabilities_sum_to_one():
  """Law 6: over all images of three pixels, for every label."""
  model, params = tiny()
  images = np.indices([4] * 3).reshape(3, -1).T
  log_prob = jax.jit(model.log_prob)
  keys = jax.random.split(rng.stream(0), len(images))
  for label in range(TINY.num_classes + 1):
    labels = np.full(len(images), label, np.int32)
    batch = likelihood.Batch(images.astype(np.int32), labels, labels)
    total = jnp.sum(jnp.exp(log_prob(params, {}, batch, keys)))
    assert total == pytest.approx(1, abs=1e-5)
  # Law 1, and the log-ratio to another is a difference.
  ratio, _ = model.log_ratio(params, params, {}, batch, keys)
  np.testing.assert_array_equal(ratio, np.zeros(len(images)))


def test_a_token_sees_only_those_before_it():
  """Law 6: by the gradients of the logits in what is read."""
  model, params = tiny()
  network = model.network.transformer
  length = network.length
  x = jax.random.normal(rng.stream(0), (1, length, TINY.width))

  def logits(x):
    h, _ = network.apply({'params': params}, x, 0, None, method='_trunk')
    return jnp.sum(h[0] ** 3, axis=-1)

  jacobian = np.abs(jax.jit(jax.jacobian(logits))(x)[:, 0]).max(-1)
  # The class, at position 0, has no key or query but a value, so it is seen.
  np.testing.assert_array_equal(jacobian > 0, np.tri(length, dtype=bool))


def test_what_is_drawn_is_what_is_scored():
  """Law 6: cached decoding is the full pass; a draw depends on its key."""
  model, params = tiny()
  label = jnp.arange(6, dtype=jnp.int32) % 3
  keys = jax.random.split(rng.stream(1), 6)
  drawn = jax.jit(model.sample, static_argnums=4)
  tokens = drawn(params, {}, label, keys, ancestral.Ancestral(top_k=1))
  logits = model.network.transformer.apply({'params': params}, label, tokens)
  np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), tokens)
  assert len(np.unique(tokens)) > 1
  # A temperature near 0 draws the likeliest, too.
  cold = drawn(params, {}, label, keys, ancestral.Ancestral(temperature=1e-5))
  np.testing.assert_array_equal(cold, tokens)
  images = model.codec.decode({}, tokens)
  assert (images.shape, images.dtype) == ((6, 1, 3, 1), np.uint8)
  np.testing.assert_array_equal(model.codec.encode({}, images, keys), tokens)


def test_a_reduced_reference_is_the_same_function():
  model = dataclasses.replace(TINY, dtype='bfloat16').build()
  _, params = tiny()
  small = model.rules.reduce(params)
  assert small['blocks']['attention']['wo']['kernel'].dtype == jnp.bfloat16
  assert small['head']['kernel'].dtype == np.float32
  ids = np.arange(12, dtype=np.int32).reshape(4, 3) % 4
  batch = likelihood.Batch(ids, ids[:, 0] % 3, ids[:, 0])
  ratio = jax.jit(lambda *p: model.log_ratio(*p, {}, batch, None)[0])
  np.testing.assert_array_equal(ratio(params, small), np.zeros(4))
  decays = model.rules.decay_mask(params)
  assert not decays['norm']['scale'] and decays['head']['kernel']
  assert TINY.build().rules.reduce(params) is params


@pytest.mark.parametrize('size', PRESETS)
def test_parameters(size):
  """And tensors, with the blocks unstacked."""
  count, tensors = PRESETS[size]
  config = llamagen_presets.get(f'c2i_{size}_384')
  model = config.build()
  assert model.network.length == 576
  shapes = jax.eval_shape(model.init, rng.stream(0))
  assert golden_io.count(shapes) == count
  stacked = len(jax.tree.leaves(shapes['blocks']))
  leaves = len(jax.tree.leaves(shapes))
  assert leaves + (config.depth - 1) * stacked == tensors


@pytest.mark.parametrize('name', TOKENIZERS)
def test_parameters_of_tokenizers(name):
  config = llamagen_presets.TOKENIZERS[name]
  module = config.module()
  shapes = jax.eval_shape(
    module.init, rng.stream(0), jnp.zeros((1, *config.image_shape))
  )
  assert golden_io.count(shapes) == TOKENIZERS[name]


def test_mistakes():
  for change, words in (
    ({'heads': 3}, 'multiple of 4'),
    ({'shared_heads': 3, 'heads': 4}, 'divide the first'),
    ({'dtype': 'float8'}, 'must be one of'),
    ({'image_shape': (8, 8, 3)}, 'a pixel is a token'),
  ):
    with pytest.raises(errors.UserError, match=words):
      dataclasses.replace(TINY, **change).build()
  with pytest.raises(errors.UserError, match='multiples of 16'):
    llamagen_vq.VqConfig(image_shape=(40, 32, 3)).module()
  with pytest.raises(errors.UserError, match='c2i_B_256'):
    llamagen_presets.get('c2i_C_256')
  model, params = tiny()
  with pytest.raises(errors.UserError, match='temperature'):
    sampler = ancestral.Ancestral(temperature=0.0)
    model.sample(params, {}, jnp.zeros(1, int), rng.stream(0)[None], sampler)


def weights_by_rule(golden, name):
  """The tokenizer's state dict by the rule of the golden files."""
  keys = bytes(golden[f'{name}/keys_utf8']).decode().split('\n')
  mult = {'lvq16': (1, 1, 2, 2, 4), 'lvq8': (1, 2, 2, 4)}[name]
  config = llamagen_vq.VqConfig(
    image_shape=(*golden[f'{name}/images_u8'].shape[2:], 3),
    vocab=64,
    features=32,
    base=32,
    mult=mult,
  )
  module = config.module()
  shapes = jax.eval_shape(
    module.init, rng.stream(0), jnp.zeros((1, *config.image_shape))
  )['params']
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
  state = llamagen_names.tokenizer_to_official(zeros, len(mult))
  del state['quantize.codebook_used']
  assert state.keys() == set(keys)
  for i, key in enumerate(keys):
    shape = state[key].shape
    seed = zlib.crc32(f'{name}/{key}'.encode())
    x = np.random.RandomState(seed).standard_normal(shape)
    if key == 'quantize.embedding.weight':
      x = 0.6 * x
    elif key.endswith('.bias'):
      x = 0.1 * x
    elif x.ndim == 1:
      x = 1 + 0.1 * x
    else:
      x = x / np.sqrt(np.prod(shape[1:]))
    state[key] = x.astype(np.float32)
    assert state[key].ravel()[0] == golden[f'{name}/w_first'][i], key
    total = state[key].astype(np.float64)
    assert total.sum() == pytest.approx(golden[f'{name}/w_sum'][i], abs=1e-6)
    wanted = golden[f'{name}/w_abs'][i]
    assert np.abs(total).sum() == pytest.approx(wanted, abs=1e-6)
  count = sum(leaf.size for leaf in state.values())
  assert count == golden[f'{name}/n_params']
  return config, llamagen_names.tokenizer_to_flax(state, len(mult))


@functools.cache
def tokenize(module):
  """Features, tokens, vectors and images, of images."""

  @jax.jit
  def run(params, image):
    variables = {'params': params}
    before = module.apply(variables, image, method=lambda m, x: m.encoder(x))
    z = module.apply(variables, image, method='z')
    ids = module.apply(variables, image, method='encode')
    f_hat = module.apply(variables, ids, method='f_hat')
    decoded = module.apply(variables, f_hat, method='decode_unbounded')
    return before, z, ids, f_hat, decoded

  return run


@pytest.mark.golden
@pytest.mark.parametrize('precision', ['f64', 'f32'])
@pytest.mark.parametrize('name', ['lvq16', 'lvq8'])
def test_tokenizer(name, precision):
  """llamagen_vq.npz: features, tokens, vectors, images, half of one."""
  golden = golden_io.load('llamagen_vq.npz')
  config, params = weights_by_rule(golden, name)
  pixels = codec.Pixels()
  exact = precision == 'f64'
  with golden_io.precision(precision) as dtype:
    params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), params)
    stored = golden_io.nhwc(golden[f'{name}/images_u8'])
    image = stored.astype(dtype) / dtype(127.5) - 1
    if not exact:
      image = pixels.encode({}, stored, None)
    before, z, ids, f_hat, decoded = tokenize(config.module())(params, image)
    half = vqvae.resize(
      decoded[:1], vqvae.bicubic_matrix(stored.shape[1], stored.shape[1] // 2)
    )
    written = np.asarray(pixels.decode({}, decoded))
  wanted = golden_io.nhwc(golden[f'{name}/z_{precision}'])
  assert golden_io.max_error(z, wanted) <= (1e-10 if exact else 2e-5)
  np.testing.assert_array_equal(ids, golden[f'{name}/ids'])
  wanted = golden_io.nhwc(golden[f'{name}/decoded_{precision}'])
  assert golden_io.max_error(decoded[:1], wanted) <= (1e-10 if exact else 5e-5)
  wanted = golden_io.nhwc(golden[f'{name}/z_q_entries_f64'])
  assert golden_io.max_error(f_hat, wanted) <= (1e-10 if exact else 1e-6)
  wanted = golden_io.nhwc(golden[f'{name}/decoded_u8']).astype(int)
  assert np.abs(written - wanted).max() <= 1
  assert np.mean(written != wanted) < 1e-3
  wanted = golden_io.nhwc(golden[f'{name}/bicubic_half_f64'])
  assert golden_io.max_error(half, wanted) <= (1e-10 if exact else 5e-5)
  if exact:
    wanted = golden_io.nhwc(golden[f'{name}/enc_out_f64'])
    assert golden_io.max_error(before[..., :8], wanted) <= 1e-10
