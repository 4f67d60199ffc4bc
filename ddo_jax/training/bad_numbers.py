"""What becomes of a step whose loss or gradient is not what it should be."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ddo_jax import errors

POLICIES = ('stop', 'skip', 'rollback')
# The gradients whose mean a spike is held against. Those of the first steps
# grow by themselves: the last layer of most networks begins at zero.
SETTLED = 20


def _setting(default: Any) -> Any:
  """A field that takes no part in a step whose numbers are good."""
  return dataclasses.field(default=default, metadata={'science': False})


@dataclasses.dataclass(unsafe_hash=True)
class BadNumbers:
  """The policy for bad steps.

  A step is bad if its loss or the norm of its gradient is not finite, over all
  rows, microbatches and devices; or, where `spike` is set, if that norm is
  above `spike` times the root mean square of those before it. Adam's second
  moment is that mean, so nothing more is kept: it reaches back 1/(1 − adam_b2)
  steps, leaves bad steps out, and is of the clipped gradients where `clip_norm`
  cuts them. Spikes are looked for once Adam has taken 20 steps.

  Each bad step is a record of metrics.jsonl, of kind 'bad', and the report says
  how many there were; what counts are the checkpoints, which carry the records,
  too. These settings may change inside one run's folder: a run that stopped
  goes on under another policy.

  Attributes:
    policy: 'stop' ends the run, with one line. 'skip' leaves weights, averages
      and Adam's moments as they were, and takes the next step's rows; the clock
      and the schedule go on, so that a resumed run skips the same steps.
      'rollback' goes back to the newest state that was due to be saved
      (`rhythm.save_images`, `eval_images`) and puts it in the place of the one
      after the bad step: all rows in between are left out, for what went bad
      may have begun there. That state is saved under its new step at once, so
      that a rollback is a checkpoint like others, from which a run resumes; a
      run that is killed before goes bad at the same step and does the same.
    spike: the factor of a spike; 0 looks for none.
    limit: the bad steps of a phase at which it stops under any policy.
  """

  policy: str = _setting('stop')
  spike: float = _setting(0.0)
  limit: int = _setting(10)

  @property
  def watches(self) -> bool:
    """Whether the step itself judges its numbers."""
    return self.policy != 'stop' or self.spike > 0

  def are_bad(
    self,
    loss: jax.Array,
    grad_norm: jax.Array,
    opt_state: Any,
    adam_b2: float,
  ) -> jax.Array:
    """Returns [] bool, for any device the same.

    Args:
      loss: [], of the global batch.
      grad_norm: [], of the global batch.
      opt_state: the state of the optimizer before the step.
      adam_b2: the decay of its second moment.
    """
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
    if self.spike:
      adam = optax.tree.get(opt_state, 'ScaleByAdamState')
      mean = optax.tree.sum(adam.nu) / (1 - adam_b2**adam.count)
      spiked = grad_norm > self.spike * jnp.sqrt(mean)
      bad |= spiked & (adam.count >= SETTLED)
    return bad

  def reason(self, loss: float, grad_norm: float) -> str:
    """Says why a step is bad, e.g. 'loss is nan'."""
    for name, value in (('loss', loss), ('grad_norm', grad_norm)):
      if not math.isfinite(value):
        return f'{name} is {value}'
    return (
      f'grad_norm is {grad_norm:.4g}, more than {self.spike:g} times that of'
      ' the steps before'
    )

  def check(self, name: str) -> None:
    """Raises UserError, naming the field, where a value makes no sense."""
    errors.require_choice(f'{name}.policy', self.policy, POLICIES)
    wanted = '0, or a factor above 1'
    good = self.spike == 0 or self.spike > 1
    errors.require(good, f'{name}.spike', self.spike, wanted)
    errors.require_integer(f'{name}.limit', self.limit, 1)
