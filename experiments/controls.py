"""The control of every round: pretraining goes on for the same compute."""

import dataclasses

from ddo_jax import config as config_lib
from ddo_jax.method import objective

# A DDO step on B real and B fake rows runs θ forward and backward on 2B rows
# and the reference forward: 2 + 4 + 2 units. An MLE step on B rows takes 3.
DDO_STEP = 8
MLE_STEP = 3


def longer(phase: config_lib.Phase) -> config_lib.Phase:
  """Returns a phase whose MLE steps cost what the phase's DDO steps cost.

  It is evaluated as often in all.
  """
  ratio = DDO_STEP / MLE_STEP
  rhythm = dataclasses.replace(
    phase.rhythm, eval_images=round(phase.rhythm.eval_images * ratio)
  )
  return dataclasses.replace(
    phase,
    objective=objective.MLE(),
    images=round(phase.images * ratio),
    rhythm=rhythm,
  )


def continued(config: config_lib.Config, rate: float) -> config_lib.Phase:
  """Returns the control's phase: pretraining goes on at a constant rate.

  Args:
    config: the recipe. The noise law, the label drop and the half-life of the
      average are those of its pretraining.
    rate: the learning rate.
  """
  return dataclasses.replace(
    longer(config.ddo),
    label_drop=config.pretrain.label_drop,
    optimizer=dataclasses.replace(
      config.ddo.optimizer, learning_rate=(rate,), warmup_images=0
    ),
    averages=dataclasses.replace(
      config.ddo.averages, halflife=config.pretrain.averages.halflife
    ),
    noise=config.pretrain.noise,
  )
