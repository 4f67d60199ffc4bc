"""How a round is tuned: the knobs of a sweep."""

import dataclasses
import math

from ddo_jax import errors
from ddo_jax.tuning import alarms as alarms_lib

# The numbers whose range a config or the probe gives.
RANGES = ('alpha', 'beta', 'learning_rate')


def _where(default: str) -> str:
  """A field that may change inside one run's folder."""
  return dataclasses.field(default=default, metadata={'science': False})


@dataclasses.dataclass(unsafe_hash=True)
class Tune:
  """A sweep in place of a round's one phase of training.

  Every member trains from the same reference, on the same pool and under the
  same noise, with numbers of its own. What a round would read of
  `config.ddo.objective` and `optimizer.learning_rate` takes the place of a
  range where the objective has no such number.

  Attributes:
    members: how many there are; 0 plays the round once, with the config's own
      numbers.
    alpha: the lowest and the highest α, between which members lie evenly in
      the logarithm; () leaves the range to the probe.
    beta: likewise of β.
    learning_rate: likewise of the peak learning rate; () takes the probe's.
    reduction: a member goes on past 1, η, η² … quarters of its round only if
      it is among the best 1/η of those that came so far; η, 2 or more. 1 lets
      all go on to the end.
    finalists: how many of the members are scored once more, on images that
      chose none of them, of which the best is promoted.
    merges: the weights w of θ_ref + w(θ − θ_ref) that are tried for each
      finalist.
    widths: the relative widths of the power-function averages that are made
      after training, for each finalist, of those in `ddo.averages.width`.
    alarms: when a member is past its best, and ended.
    max_rounds: the most rounds that config.rounds='auto' plays; a run that
      reached it goes on where it is raised.
    storage: where the processes of a sweep meet: an address that Optuna knows,
      such as 'postgresql://…'; '' is a file in the round's folder.
  """

  members: int = 0
  alpha: tuple[float, ...] = ()
  beta: tuple[float, ...] = ()
  learning_rate: tuple[float, ...] = ()
  reduction: int = 3
  finalists: int = 3
  merges: tuple[float, ...] = ()
  widths: tuple[float, ...] = ()
  alarms: alarms_lib.Alarms = dataclasses.field(
    default_factory=alarms_lib.Alarms
  )
  max_rounds: int = dataclasses.field(default=12, metadata={'science': False})
  storage: str = _where('')

  def given(self) -> tuple[str, ...]:
    """Returns the names of the numbers whose range is given."""
    return tuple(name for name in RANGES if getattr(self, name))

  def ranges(self) -> dict[str, tuple[float, float]]:
    """Returns (lowest, highest) of each number whose range is given."""
    given = {name: getattr(self, name) for name in self.given()}
    return {name: (r[0], r[1]) for name, r in given.items()}

  def check(self, name: str) -> None:
    """Raises UserError, naming the field, where a value makes no sense."""
    errors.require_integer(f'{name}.members', self.members, 0)
    errors.require_integer(f'{name}.reduction', self.reduction, 1)
    errors.require_integer(f'{name}.finalists', self.finalists, 1)
    errors.require_integer(f'{name}.max_rounds', self.max_rounds, 1)
    for field in RANGES:
      value = getattr(self, field)
      good = not value or (
        len(value) == 2
        and all(math.isfinite(number) for number in value)
        and 0 < value[0] <= value[1]
      )
      wanted = '(lowest, highest), both positive, or () for the probe to say'
      errors.require(good, f'{name}.{field}', value, wanted)
    self.alarms.check(f'{name}.alarms')
    if self.merges:
      errors.require_positive(f'{name}.merges', self.merges)
    good = all(0 < width < 0.288 for width in self.widths)
    errors.require(good, f'{name}.widths', self.widths, 'in (0, 0.288)')
