"""Kills a phase of training."""

import pytest

from ddo_jax.training import loop as loop_lib


def interrupted(job, step):
  """Runs a job until it is killed after a step."""
  push = loop_lib._Logger.push

  def killing(logger, at, *args):
    if at == step:
      raise KeyboardInterrupt
    push(logger, at, *args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop_lib._Logger, 'push', killing)
    with pytest.raises(KeyboardInterrupt):
      loop_lib.run(job)
