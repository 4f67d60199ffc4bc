"""Law 8: the population optimum of DDO is Theorem 3.3's density at α* only."""

import importlib.util
import pathlib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
PATH = ROOT / 'experiments' / 'figure1_toy.py'


@pytest.fixture(scope='module')
def toy():
  spec = importlib.util.spec_from_file_location('figure1_toy', PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize('beta', [1.0, 0.5, 0.25])
def test_grid_optimum_is_theorem_3_3_at_alpha_star(toy, beta):
  row, found = toy.solve(beta)
  density = found['ref'] ** (1 - 1 / beta) * found['data'] ** (1 / beta)
  assert row['alpha'] == pytest.approx(density.sum() ** beta, rel=1e-9)
  np.testing.assert_allclose(found['theory'], density / density.sum())
  assert row['tv_ref'] > 0.25  # so the next line is no accident
  assert row['tv_grid'] < 1e-3
  assert row['leak'] < 1e-4


def test_alpha_star_is_one_at_beta_one(toy):
  row, found = toy.solve(1.0)
  assert row['alpha_star'] == pytest.approx(1.0, abs=1e-9)
  np.testing.assert_allclose(found['theory'], found['data'])


def test_smaller_alpha_misses_without_leak(toy):
  row, _ = toy.solve(0.5, alpha=1.0)
  assert row['tv_grid'] > 0.03
  assert row['leak'] < 1e-4


def test_larger_alpha_leaks_off_both_supports(toy):
  row, _ = toy.solve(0.5, alpha=4.0)
  assert row['tv_grid'] > 0.5
  assert row['leak'] > 0.5


def test_network_approaches_theory_from_samples(toy, monkeypatch):
  monkeypatch.setattr(toy, 'STEPS', 200)
  monkeypatch.setattr(toy, 'BATCH', 256)
  row, found = toy.solve(1.0, seed=0)
  assert found['samples'].sum() == pytest.approx(1.0, abs=1e-4)
  assert row['tv_samples'] < 0.2 * row['tv_ref']
  assert row['rkl_samples'] < 0.1 * row['rkl_ref']
