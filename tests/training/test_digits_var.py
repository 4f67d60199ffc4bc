"""The whole job for a model of tokens: tokenizer, pretraining, a round."""

import dataclasses
import json

import interruption
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_var
from ddo_jax import config as config_lib
from ddo_jax import errors
from ddo_jax import main
from ddo_jax.method import negatives
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import records
from ddo_jax.samplers import ancestral
from ddo_jax.training import loop as loop_lib
from ddo_jax.training import run as run_lib
from ddo_jax.training import workspace


def tiny() -> config_lib.Config:
  config = digits_var.get_config()
  config.model.depth, config.model.width = 1, 8
  config.model.dtype = 'bfloat16'  # its reference takes less memory
  config.model.tokenizer.mult = (1,)
  config.model.tokenizer.patch_nums = (1, 8)
  for phase in (config.tokenizer, config.pretrain, config.ddo):
    phase.batch_size = 8
    phase.images = 2 * 8
  config.ddo.rhythm.eval_images = 8
  # The round trip's step would compile for long.
  config.ddo.negatives = negatives.Online(round_trip=False)
  config.executor.sample_batch = 64
  config.evaluation = dataclasses.replace(
    config.evaluation, selection_samples=64, samples=64, seeds=1
  )
  return config


@pytest.fixture(scope='module')
def jobs():
  """The training jobs of the run, by name."""
  return {}


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, jobs):
  folder = tmp_path_factory.mktemp('run')
  run = loop_lib.run

  def watched(job):
    jobs[job.name] = job
    return run(job)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop_lib, 'run', watched)
    main.selfplay(tiny(), folder)
  return folder


def test_selfplay(workdir):
  summary = json.loads((workdir / 'summary.json').read_text())
  assert {'tokenizer', 'pretrain', 'round_000'} <= summary['seconds'].keys()
  assert summary['rounds'][0]['after']['fd_train']['mean'] > 0
  assert not (workdir / 'round_000' / 'fakes').exists()
  records = (workdir / 'metrics.jsonl').read_text().splitlines()
  stages = [json.loads(line)['stage'] for line in records]
  assert set(stages) == {'tokenizer', 'pretrain', 'round_000'}
  assert (workdir / 'report.html').stat().st_size > 10_000


def test_the_reference_is_reduced_and_the_start_is_not(workdir, jobs):
  job = jobs['round_000']

  def kernel(params):
    return params['blocks']['ffn']['fc1']['kernel']

  assert kernel(job.reference).dtype == jnp.bfloat16
  assert kernel(job.start()).dtype == np.float32
  leaves = jax.tree.leaves(job.model.rules.reduce(job.start()))
  for ours, kept in zip(jax.tree.leaves(job.reference), leaves, strict=True):
    np.testing.assert_array_equal(ours, kept)


def test_law_4_a_round_resumes_bit_for_bit(workdir, jobs, tmp_path):
  """Killed after a step; by the step that the run compiled."""
  job = jobs['round_000']

  def again(name, *scores):
    scores = iter(scores)
    return dataclasses.replace(
      job,
      folder=tmp_path / name / job.name,
      log=records.MetricsLog(tmp_path / name),
      evaluate=lambda params, folder: {job.metric: next(scores)},
    )

  falling = (3.0, 2.0, 1.0)  # the last state is promoted
  whole, cut = loop_lib.run(again('whole', *falling)), again('cut', *falling)
  interruption.interrupted(cut, 1)
  # Where a checkpoint is, nothing is read of the start.
  resumed = loop_lib.run(dataclasses.replace(cut, start=None))
  assert (resumed.step, resumed.selection) == (2, 1.0)
  sha256 = checkpoint.tree_hash(resumed.params)
  assert sha256 == checkpoint.tree_hash(whole.params)
  # And where nothing is better, the start as it was, not as products read it.
  start = checkpoint.tree_hash(job.start())
  kept = loop_lib.run(again('kept', 1.0, 2.0, 3.0))
  assert (kept.step, checkpoint.tree_hash(kept.params)) == (0, start)
  assert start not in (sha256, checkpoint.tree_hash(job.reference))


def test_online_fakes_are_drawn_without_guidance_or_filter(tmp_path):
  config = tiny()
  config.sampler = ancestral.Ancestral(2.0, 'minus_one', top_k=5, top_p=0.9)
  run = workspace.Run(config, tmp_path)

  def sampler_of(name, phase):
    job = run.job(
      folder=tmp_path / name,
      phase=phase,
      model=run.model,
      frozen={},
      start=None,
      reference=None,
      fake=None,
    )
    return job.sampler

  unguided = ancestral.Ancestral(1.0, 'minus_one')
  assert sampler_of('round_000', config.ddo) == unguided
  assert sampler_of('pretrain', config.pretrain) is None


def test_it_returns_at_once(workdir):
  before = (workdir / 'metrics.jsonl').read_bytes()
  main.selfplay(tiny(), workdir)
  assert (workdir / 'metrics.jsonl').read_bytes() == before


def test_another_run_takes_its_weights(workdir, tmp_path):
  config = tiny()
  config.init_from = str(workdir / 'pretrain' / 'params')
  run = workspace.Run(config, tmp_path / 'a')
  with pytest.raises(errors.UserError, match='tokenizer_from'):
    run_lib.pretrain(run)
  config.tokenizer_from = str(workdir / 'tokenizer' / 'params')
  run = workspace.Run(config, tmp_path / 'b')
  assert run_lib.pretrain(run) == workdir / 'pretrain' / 'params'
  assert not (tmp_path / 'b' / 'tokenizer').exists()
  own = workspace.Run(tiny(), workdir).frozen
  jax.tree.map(np.testing.assert_array_equal, run.frozen, own)
