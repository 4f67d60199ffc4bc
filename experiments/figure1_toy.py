"""Figure 1 of the paper: DDO on 1-D densities, against Theorem 3.3.

A dispersed reference covers a mixture of narrow modes. DDO (eq. 13) at α = α*
turns it into p_ref^(1−1/β) p_data^(1/β) / Z. This is shown once for a free
density on a grid under exact expectations, and once for a smooth network that
sees only samples.

  python -m experiments.figure1_toy --out=experiments/results/figure1

It takes half a minute on 2 CPU cores. The expected total variation to the
theorem is below 1e-3 on the grid; from samples it is 0.02 at β = 1, 0.03 at 1/2
and 0.06 at 1/4. Another α misses the theorem (the last rows), and above α* mass
leaks to where neither density has any.
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
from ddo_jax.method import objective as objective_lib

MEANS = np.array([-3.2, -1.2, 0.8, 3.0])
STDS = np.array([0.30, 0.22, 0.30, 0.45])
SHARES = np.array([0.25, 0.20, 0.30, 0.25])
BLUR = 0.5  # The reference is the data plus N(0, BLUR²): it covers every mode.
GRID, BIN = np.linspace(-6, 6, 401, retstep=True)  # room beyond the mass
NUM_SAMPLES = 20_000
STEPS = 2_000
BATCH = 512
_EMPTY = 1e-3  # the share of the largest probability that counts as none


def mixture(blur: float = 0.0) -> np.ndarray:
  """Returns the data blurred by N(0, blur²), [K] probabilities on GRID."""
  density = stats.norm.pdf(GRID[:, None], MEANS, np.hypot(STDS, blur)) @ SHARES
  return density / density.sum()


def draw(key: jax.Array, blur: float = 0.0) -> jax.Array:
  """Draws [NUM_SAMPLES] of the same mixture, not confined to GRID."""
  key_mode, key_noise = jax.random.split(key)
  logits = jnp.array(np.log(SHARES))
  mode = jax.random.categorical(key_mode, logits, shape=(NUM_SAMPLES,))
  normal = jax.random.normal(key_noise, mode.shape)
  std = jnp.hypot(jnp.array(STDS), blur)[mode]
  return jnp.array(MEANS)[mode] + std * normal


@jax.jit
@jax.value_and_grad
def population_loss(logits, reference, data, alpha, beta):
  """Returns eq. 13 with its expectations as sums, and its gradient.

  Args:
    logits: [K], of the density softmax(logits).
    reference: [K] probabilities.
    data: [K] probabilities.
    alpha: α.
    beta: β.

  Returns:
    [] and [K].
  """
  log_ratio = jax.nn.log_softmax(logits) - jnp.log(reference)
  rows = objective_lib.Rows.plain(len(logits))
  # α goes with the probabilities of the fakes, over which the sum is a mean.
  unweighted = ddo.DDO(alpha=1.0, beta=beta)
  real, fake = unweighted.loss(log_ratio, log_ratio, rows)
  return jnp.sum(data * real) + jnp.sum(alpha * reference * fake)


def grid_optimum(
  reference: np.ndarray, data: np.ndarray, alpha: float, beta: float
) -> np.ndarray:
  """Minimises eq. 13 over every density on a grid, exactly.

  Args:
    reference: [K] probabilities, all positive, with sum 1.
    data: [K] probabilities, all positive, with sum 1.
    alpha: α.
    beta: β.

  Returns:
    [K] probabilities, float64.

  Raises:
    RuntimeError: L-BFGS stops before it has converged.
  """
  # From uniform: at α > α* the reference leads to a poorer local optimum.
  start = np.zeros_like(reference)
  # BLAS's threads only wait for each other: one took a tenth of the CPU time.
  with jax.enable_x64(True), threadpoolctl.threadpool_limits(1):
    found = optimize.minimize(
      population_loss,
      start,
      args=(reference, data, alpha, beta),
      method='L-BFGS-B',
      jac=True,
      options={'maxcor': 20, 'maxiter': 10_000, 'ftol': 1e-10, 'gtol': 1e-9},
    )
    if not found.success:
      raise RuntimeError(f'L-BFGS did not converge: {found.message}')
    return np.asarray(jax.nn.softmax(found.x))


class Residual(nn.Module):
  """A log-ratio up to a constant, 0 at initialisation."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the log-ratio [...] at x [...], in nats."""
    phase = jnp.multiply.outer(x, jnp.pi / 12 * jnp.arange(1, 9))
    h = jnp.concatenate([x[..., None], jnp.sin(phase), jnp.cos(phase)], -1)
    for _ in range(2):
      h = nn.gelu(nn.Dense(64)(h))
    return nn.Dense(1, kernel_init=nn.initializers.zeros)(h)[..., 0]


@jax.jit
def sampled_optimum(
  key: jax.Array, real: jax.Array, fake: jax.Array, objective: ddo.DDO
) -> jax.Array:
  """Minimises eq. 13 over p_ref exp(f) / Z_f, f a network, by minibatches.

  Args:
    key: draws the network's initial weights and the minibatches.
    real: [N] samples of the data.
    fake: [N] samples of the reference.
    objective: a `ddo.DDO` with a number in place of each tuple.

  Returns:
    [K] probabilities on GRID.
  """
  network = Residual()
  optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))
  grid = jnp.array(GRID)
  log_reference = jnp.array(np.log(mixture(BLUR)))

  def log_ratio(params, x):
    log_z = jax.nn.logsumexp(log_reference + network.apply(params, grid))
    return network.apply(params, x) - log_z

  def loss(params, index):
    x = jnp.stack([real[index[0]], fake[index[1]]])
    log_ratio_real, log_ratio_fake = log_ratio(params, x)
    rows = objective_lib.Rows.plain(BATCH)
    terms = objective.loss(log_ratio_real, log_ratio_fake, rows)
    return jnp.mean(terms[0]) + jnp.mean(terms[1])

  def step(state, index):
    params, opt_state = state
    grads = jax.grad(loss)(params, index)
    updates, opt_state = optimizer.update(grads, opt_state)
    return (optax.apply_updates(params, updates), opt_state), None

  key_init, key_rows = jax.random.split(key)
  params = network.init(key_init, grid)
  state = (params, optimizer.init(params))
  index = jax.random.randint(key_rows, (STEPS, 2, BATCH), 0, len(real))
  (params, _), _ = jax.lax.scan(step, state, index)
  return jnp.exp(log_reference + log_ratio(params, grid))


def solve(
  beta: float, alpha: float | None = None, seed: int | None = None
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
  """Runs DDO at one (α, β).

  Args:
    beta: β.
    alpha: α; None takes α*.
    seed: the seed of the run from samples; None leaves that run out.

  Returns:
    The table's row, and the densities [K] by name. In the row, 'tv_*' is the
    total variation to the theorem, 'rkl_*' the reverse KL to the data in nats,
    and 'leak' the mass of the grid's optimum where neither the data nor the
    reference has any.
  """
  data = mixture()
  reference = mixture(BLUR)
  with jax.enable_x64(True):
    theory, alpha_star = ddo.optimal_density(reference, data, beta)
  theory = np.asarray(theory)
  alpha_star = float(alpha_star)
  if alpha is None:
    alpha = alpha_star
  grid = grid_optimum(reference, data, alpha, beta)
  found = {'ref': reference, 'grid': grid}
  if seed is not None:
    key_real, key_fake, key = jax.random.split(rng.stream(seed, 'figure1'), 3)
    real = draw(key_real)
    fake = draw(key_fake, BLUR)
    objective = ddo.DDO(alpha=alpha, beta=beta)
    found['samples'] = np.asarray(sampled_optimum(key, real, fake, objective))
  empty = np.maximum(data, reference) < _EMPTY * reference.max()
  row = {
    'beta': beta,
    'alpha': alpha,
    'alpha_star': alpha_star,
    'leak': grid[empty].sum(),
  }
  for name, density in found.items():
    row[f'tv_{name}'] = np.abs(density - theory).sum() / 2
    row[f'rkl_{name}'] = stats.entropy(density, data)
  return row, found | {'data': data, 'theory': theory}


def plot(results, path: pathlib.Path) -> None:
  """Draws a panel for each result of `solve`, in Okabe and Ito's palette."""
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
  handles, labels = axes[0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc='outside upper center', ncols=5, frameon=False
  )
  figure.savefig(path, dpi=150)


def main(_) -> None:
  plt.switch_backend('Agg')
  start = time.perf_counter()
  out = pathlib.Path(flags.FLAGS.out)
  out.mkdir(parents=True, exist_ok=True)
  results = [solve(beta, seed=flags.FLAGS.seed) for beta in (1.0, 0.5, 0.25)]
  plot(results, out / 'figure1.png')
  results += [solve(0.5, alpha=alpha) for alpha in (1.0, 4.0)]
  rows = [row for row, _ in results]
  print(' '.join(f'{name:>11}' for name in rows[0]))
  for row in rows:
    print(' '.join(f'{value:11.3g}' for value in row.values()))
  record = {module.__name__: module.__version__ for module in (jax, np, optax)}
  record |= {
    'device': jax.devices()[0].device_kind,
    'seed': flags.FLAGS.seed,
    'seconds': round(time.perf_counter() - start, 1),
    'rows': rows,
  }
  (out / 'figure1.json').write_text(json.dumps(record, indent=1) + '\n')


if __name__ == '__main__':
  flags.DEFINE_string('out', 'experiments/results/figure1', 'Folder to write.')
  flags.DEFINE_integer('seed', 0, 'Seed of samples and network.', 0)
  app.run(main)
