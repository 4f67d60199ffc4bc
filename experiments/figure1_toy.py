"""Figure 1 of the paper: DDO on 1-D densities, against Theorem 3.3.

A dispersed reference covers a mixture of narrow modes. DDO (eq. 13) at α = α*
turns it into p_ref^(1−1/β) p_data^(1/β) / Z: once as a free density on a grid
under exact expectations, once as a smooth network that sees only samples.

  python -m experiments.figure1_toy --out=experiments/results/figure1

Half a minute on 2 CPU cores. Expected total variation to the theorem: below
1e-3 on the grid; from samples 0.02 at β = 1, 0.03 at 1/2, 0.06 at 1/4. Another
α misses it (last rows); above α* mass leaks to where neither density has any.
"""

import json
import pathlib
import time

from absl import app
from absl import flags
from flax import linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from scipy import optimize
from scipy import stats
import threadpoolctl

from ddo_jax import rng
from ddo_jax.method import ddo

MEANS = np.array([-3.2, -1.2, 0.8, 3.0])
STDS = np.array([0.30, 0.22, 0.30, 0.45])
SHARES = np.array([0.25, 0.20, 0.30, 0.25])
BLUR = 0.5  # The reference is the data plus N(0, BLUR²): it covers every mode.
GRID, BIN = np.linspace(-6, 6, 401, retstep=True)  # room beyond the mass
NUM_SAMPLES, STEPS, BATCH = 20_000, 2_000, 512


def mixture(blur: float = 0.0) -> np.ndarray:
  """[K] probabilities on GRID of the data blurred by N(0, blur²)."""
  density = stats.norm.pdf(GRID[:, None], MEANS, np.hypot(STDS, blur)) @ SHARES
  return density / density.sum()


def draw(key: jax.Array, blur: float = 0.0) -> jax.Array:
  """[NUM_SAMPLES] samples of the same mixture, not confined to GRID."""
  key_mode, key_noise = jax.random.split(key)
  logits, means, stds = map(jnp.array, (np.log(SHARES), MEANS, STDS))
  mode = jax.random.categorical(key_mode, logits, shape=(NUM_SAMPLES,))
  normal = jax.random.normal(key_noise, mode.shape)
  return means[mode] + jnp.hypot(stds, blur)[mode] * normal


@jax.jit
@jax.value_and_grad
def population_loss(logits, reference, data, alpha, beta):
  """Eq. 13 [] of softmax(logits [K]), expectations as sums; gradient [K]."""
  r = jax.nn.log_softmax(logits) - jnp.log(reference)
  w_fake = alpha * reference  # probabilities as weights: a sum is a mean
  return sum(map(jnp.sum, ddo.per_example_loss(r, r, data, w_fake, beta)))


def grid_optimum(
  reference: np.ndarray, data: np.ndarray, alpha: float, beta: float
) -> np.ndarray:
  """Minimises eq. 13 over every density on a grid, exactly.

  `reference` and `data` [K] are positive and sum to 1; returns [K], float64.
  Raises RuntimeError if L-BFGS stops before it has converged.
  """
  # From uniform: at α > α* the reference leads to a poorer local optimum.
  start, args = np.zeros_like(reference), (reference, data, alpha, beta)
  options = {'maxcor': 20, 'maxiter': 10_000, 'ftol': 1e-10, 'gtol': 1e-9}
  # BLAS's threads only wait for each other: one took a tenth of the CPU time.
  with jax.enable_x64(True), threadpoolctl.threadpool_limits(1):
    found = optimize.minimize(
      population_loss, start, args, 'L-BFGS-B', jac=True, options=options
    )
    if not found.success:
      raise RuntimeError(f'L-BFGS did not converge: {found.message}')
    return np.asarray(jax.nn.softmax(found.x))


class Residual(nn.Module):
  """x [...] → log-ratio [...] up to a constant [nats]; 0 at initialisation."""

  @nn.compact
  def __call__(self, x):
    phase = jnp.multiply.outer(x, jnp.pi / 12 * jnp.arange(1, 9))
    h = jnp.concatenate([x[..., None], jnp.sin(phase), jnp.cos(phase)], -1)
    for _ in range(2):
      h = nn.gelu(nn.Dense(64)(h))
    return nn.Dense(1, kernel_init=nn.initializers.zeros)(h)[..., 0]


@jax.jit
def sampled_optimum(
  key: jax.Array, samples: jax.Array, alpha: float, beta: float
) -> jax.Array:
  """Minimises eq. 13 over p_ref exp(f) / Z_f, f a network, by minibatches.

  `samples` [2, N] are of the data and of the reference; returns [K] on GRID.
  """
  net, tx = Residual(), optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))
  grid, log_reference = jnp.array(GRID), jnp.array(np.log(mixture(BLUR)))

  def log_ratio(params, x):
    log_z = jax.nn.logsumexp(log_reference + net.apply(params, grid))
    return net.apply(params, x) - log_z

  def loss(params, rows):
    real, fake = log_ratio(params, jnp.take_along_axis(samples, rows, 1))
    ones = jnp.ones_like(real)
    terms = ddo.per_example_loss(real, fake, ones, alpha * ones, beta)
    return sum(map(jnp.mean, terms))

  def step(state, rows):
    params, opt_state = state
    updates, opt_state = tx.update(jax.grad(loss)(params, rows), opt_state)
    return (optax.apply_updates(params, updates), opt_state), None

  key_init, key_rows = jax.random.split(key)
  params = net.init(key_init, grid)
  rows = jax.random.randint(key_rows, (STEPS, 2, BATCH), 0, samples.shape[1])
  (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), rows)
  return jnp.exp(log_reference + log_ratio(params, grid))


def solve(
  beta: float, alpha: float | None = None, seed: int | None = None
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
  """Runs DDO at (α, β): α* if alpha is None; from samples too, given a seed.

  Returns the table's row and the densities by name, [K] each. In the row: tv,
  total variation to the theorem; rkl, reverse KL to the data [nats]; leak, the
  mass of the grid's optimum where neither data nor reference has any.
  """
  data, reference = mixture(), mixture(BLUR)
  with jax.enable_x64(True):
    theory, alpha_star = ddo.optimal_density(reference, data, beta)
  theory, alpha_star = np.asarray(theory), float(alpha_star)
  alpha = alpha_star if alpha is None else alpha
  grid = grid_optimum(reference, data, alpha, beta)
  found = {'ref': reference, 'grid': grid}
  if seed is not None:
    key_real, key_fake, key = jax.random.split(rng.stream(seed, 'figure1'), 3)
    samples = jnp.stack([draw(key_real), draw(key_fake, BLUR)])
    found['samples'] = np.asarray(sampled_optimum(key, samples, alpha, beta))
  leak = grid[np.maximum(data, reference) < 1e-3 * reference.max()].sum()
  row = {'beta': beta, 'alpha': alpha, 'alpha_star': alpha_star, 'leak': leak}
  for name, p in found.items():
    row[f'tv_{name}'] = np.abs(p - theory).sum() / 2
    row[f'rkl_{name}'] = stats.entropy(p, data)
  return row, found | {'data': data, 'theory': theory}


def plot(results, path: pathlib.Path) -> None:
  """Draws one panel a result of `solve`, in the palette of Okabe and Ito."""
  curves = (
    ('ref', 'reference', {'color': '#009E73', 'lw': 2, 'ls': (0, (1, 1))}),
    ('theory', 'Theorem 3.3', {'color': '#56B4E9', 'lw': 5}),
    ('samples', 'DDO, samples', {'color': '#D55E00', 'lw': 1.8}),
    ('grid', 'DDO, grid', {'color': 'k', 'lw': 1.2, 'ls': (0, (4, 3))}),
  )
  figure, axes = plt.subplots(1, 3, figsize=(10, 3.3), layout='constrained')
  for axis, (row, found) in zip(axes, results, strict=True):
    axis.fill_between(GRID, found['data'] / BIN, fc='0.85', label='data')
    for name, label, style in curves:
      axis.plot(GRID, found[name] / BIN, label=label, **style)
    axis.set_title(f'β = {row["beta"]:g},  α* = {row["alpha"]:.2f}')
    axis.set(xlabel='x', xlim=(-4.5, 4.5), ylim=(0, None))
    axis.spines[['top', 'right']].set_visible(False)
  axes[0].set_ylabel('density')
  handles = axes[0].get_legend_handles_labels()
  figure.legend(*handles, loc='outside upper center', ncols=5, frameon=False)
  figure.savefig(path, dpi=150)


def main(_) -> None:
  plt.switch_backend('Agg')
  out, start = pathlib.Path(flags.FLAGS.out), time.perf_counter()
  out.mkdir(parents=True, exist_ok=True)
  results = [solve(beta, seed=flags.FLAGS.seed) for beta in (1.0, 0.5, 0.25)]
  plot(results, out / 'figure1.png')
  rows = [row for row, _ in results + [solve(0.5, a) for a in (1.0, 4.0)]]
  print(*(f'{name:>11}' for name in rows[0]))
  for row in rows:
    print(*(f'{value:11.3g}' for value in row.values()))
  record = {module.__name__: module.__version__ for module in (jax, np, optax)}
  record |= {'device': jax.devices()[0].device_kind, 'seed': flags.FLAGS.seed}
  record |= {'seconds': round(time.perf_counter() - start, 1), 'rows': rows}
  (out / 'figure1.json').write_text(json.dumps(record, indent=1) + '\n')


if __name__ == '__main__':
  flags.DEFINE_string('out', 'experiments/results/figure1', 'Folder to write.')
  flags.DEFINE_integer('seed', 0, 'Seed of samples and network.', 0)
  app.run(main)
