"""The code in README and CONTRIBUTING does what it says."""

import dataclasses
import importlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ddo_jax
from ddo_jax import config as config_lib
from ddo_jax import main
from ddo_jax import recipes

ROOT = pathlib.Path(__file__).parents[1]


def code_of(document, beginning):
  """Returns the Python block of a document that begins with some words."""
  text = (ROOT / document).read_text()
  blocks = re.findall(r'```python\n(.*?)```', text, re.S)
  (block,) = [block for block in blocks if block.startswith(beginning)]
  return block


def test_the_loss_in_a_loop_of_ones_own():
  """A Gaussian's mean moves from the fakes to the real rows."""

  def log_prob(params, x):
    return -0.5 * jnp.sum((x - params[None]) ** 2, axis=-1)

  optimizer = optax.adam(1e-2)
  names = {'log_prob': log_prob, 'optimizer': optimizer}
  exec(code_of('README.md', 'import ddo_jax'), names)
  reference = jnp.zeros(3)
  numbers = np.random.default_rng(0)
  real = jnp.asarray(numbers.normal(size=(64, 3)) + 1, jnp.float32)
  fake = jnp.asarray(numbers.normal(size=(64, 3)), jnp.float32)
  loss = names['loss_fn'](reference, reference, real, fake)
  np.testing.assert_allclose(loss, 5 * np.log(2), rtol=1e-6)
  params = reference
  opt_state = optimizer.init(params)
  for _ in range(20):
    params, opt_state = names['step'](params, opt_state, reference, real, fake)
  assert params.min() > 0.1


def test_the_objective_of_contributing():
  names = {}
  exec(code_of('CONTRIBUTING.md', '# hinge.py'), names)
  config = names['get_config']()
  config_lib.validate(config)
  hinge = config_lib.at_round(config.ddo, 0).objective
  rows = ddo_jax.Rows.plain(2)
  real, fake = jax.jit(hinge.loss)(jnp.array([0.0, 20.0]), jnp.zeros(2), rows)
  np.testing.assert_allclose(real, [1, 0])
  np.testing.assert_allclose(fake, [1, 1])


def test_the_public_names():
  assert re.fullmatch(r'\d+\.\d+\.\d+', ddo_jax.__version__)
  for name in ddo_jax.__all__:
    assert getattr(ddo_jax, name).__doc__, name


DOCUMENTS = sorted(
  [
    *ROOT.glob('*.md'),
    *ROOT.glob('docs/**/*.md'),
    *ROOT.glob('experiments/*.md'),
  ]
)
# What was renamed is told with its old name.
FREE = {'CHANGELOG.md', 'changes.md'}


def fields_of(group, name):
  """The dotted names of all fields of a config that the package knows."""
  if not dataclasses.is_dataclass(group):
    return {name}
  return {name}.union(
    *(
      fields_of(getattr(group, field.name), f'{name}.{field.name}')
      for field in dataclasses.fields(group)
    )
  )


def test_the_flags_that_documents_name():
  """They are there: recipes, modes, flags, and the fields of a config."""
  fields = set()
  for name in recipes.names():
    module = importlib.import_module(f'ddo_jax.configs.{name}')
    fields |= fields_of(module.get_config(), 'config')
  fields |= {'config.x.y', 'config.at_round'}
  fields |= {'config.json', 'config.py', 'config.yaml'}
  for path in DOCUMENTS:
    if path.name in FREE:
      continue
    text = path.read_text()
    for field in re.findall(r'\bconfig\.[a-z_0-9]+(?:\.[a-z_0-9]+)*', text):
      assert field in fields, f'{path.name}: {field}'
    for given in re.findall(r'--config=(?:configs/)?(\w+)(?:\.py)?\b', text):
      assert given in {*recipes.names(), 'hinge'}, f'{path.name}: {given}'
    for mode in re.findall(r'--mode=(\w+)', text):
      assert mode in main.flags.FLAGS['mode'].parser.enum_values, path.name
    for line in text.splitlines():
      if 'ddo-jax' in line or 'ddo_jax.main' in line:
        line = line.rpartition('&& ')[2]  # a setup that stands before it
        for flag in re.findall(r'(?<=[ `])--([a-z_0-9-]+)', line):
          assert flag in main.flags.FLAGS, f'{path.name}: --{flag}'


def test_the_links_between_documents():
  for path in DOCUMENTS:
    for link in re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', path.read_text()):
      assert (path.parent / link).exists(), f'{path.name}: {link}'
