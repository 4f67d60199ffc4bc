"""A recipe that plays one short round on the digits in seconds."""

from configs import digits
from ddo_jax import config as config_lib


def get_config() -> config_lib.Config:
  """Returns the digits' recipe, cut down to a few steps."""
  config = digits.get_config()
  config.rounds = 1
  config.model.hidden = 8
  for phase in (config.pretrain, config.ddo):
    phase.batch_size = 16
    phase.images = 4 * 16
    phase.optimizer.decay_images = 16
    phase.rhythm.eval_images = 2 * 16
  config.ddo.negatives.size = 64
  config.sampler.num_steps = 4
  config.executor.sample_batch = 64
  config.evaluation = config_lib.Evaluation(
    selection_samples=64, samples=64, seeds=2
  )
  return config
