"""Kills a phase of training."""

import pytest

from ddo_jax import train


def interrupted(job, step):
  """Runs a job until it is killed after a step."""
  push = train._Logger.push

  def killing(logger, at, *args):
    if at == step:
      raise KeyboardInterrupt
    push(logger, at, *args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train._Logger, 'push', killing)
    with pytest.raises(KeyboardInterrupt):
      train.run(job)
