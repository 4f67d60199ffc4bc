"""Candidates that cost a member no training: merges and other averages.

A merge θ_ref + w (θ − θ_ref) goes less far than training went, w < 1, or
farther. Averages of other widths are combined, after the training, of the
power-function averages that it tracked (EDM2, Karras et al. 2024, section 3).
To try one costs an evaluation.

Candidates are made one at a time, as they are asked for, and none is kept.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import functools

import jax
import numpy as np

from ddo_jax.method import likelihood
from ddo_jax.runtime import checkpoint
from ddo_jax.runtime import devices as devices_lib
from ddo_jax.training import averages as averages_lib
from ddo_jax.training import loop as loop_lib

Candidate = tuple[str, likelihood.Params]


@functools.cache
def _merge(rules: likelihood.WeightRules) -> Callable[..., likelihood.Params]:
  """Returns (θ_ref, θ, w) -> a merge; one function, and so compiled once."""

  def merge(reference, params, weight):
    def between(start, end):
      return start + weight.astype(start.dtype) * (end - start)

    return rules.project(jax.tree.map(between, reference, params))

  return merge


def merges(
  reference: likelihood.Params,
  params: likelihood.Params,
  weights: Sequence[float],
  rules: likelihood.WeightRules,
  executor: devices_lib.Executor,
) -> Iterator[Candidate]:
  """Yields θ_ref + w (θ − θ_ref) for each weight w, named 'merge_<w>'.

  A weight of 0 yields the reference itself, and 1 yields θ itself, bit for bit.
  All others are put back on the manifold that the model's weights are
  constrained to (EDM2's: vectors of one length).

  Args:
    reference: θ_ref, as the round starts with it: not reduced.
    params: θ.
    weights: the w.
    rules: those of the model.
    executor: where the params lie, and the merges will.
  """
  ends = {0.0: reference, 1.0: params}
  merge = _merge(rules)
  for weight in weights:
    merged = ends.get(weight)
    if merged is None:
      start, end = devices_lib.from_host((reference, params))
      number = executor.replicate(np.float32(weight))
      merged = executor.make_state(merge, start, end, number)
    yield f'merge_{weight:g}', merged


def posthoc(
  job: loop_lib.Job,
  evaluated: Sequence[int],
  step: int,
  widths: Sequence[float],
  target: likelihood.Params,
) -> Iterator[Candidate]:
  """Yields averages of other widths, named 'posthoc_<width>'.

  They are combined by least squares of the averages that the phase kept of its
  evaluated states (`Job.keep_averages`). The combination is badly conditioned,
  so it is formed on the host, in float64, of one snapshot after the other.

  Args:
    job: the phase that was trained.
    evaluated: the steps of its evaluations.
    step: the evaluated state where the averages end. There are none of step 0,
      which is the reference, nor of a phase without `averages.width`.
    widths: their relative widths σ_rel, in (0, 0.288).
    target: the shapes, types and placement of the params.
  """
  averages = job.phase.averages
  batch_size = job.phase.batch_size
  steps = [at for at in sorted(evaluated) if 0 < at <= step]
  if not steps or not averages.width:
    return
  coefficients = averages_lib.posthoc_coefficients(
    ends=np.repeat(steps, len(averages.width)) * batch_size,
    widths=np.tile(averages.width, len(steps)),
    end=step * batch_size,
    target=np.array(widths),
  )

  def snapshots() -> Iterator[likelihood.Params]:
    for at in steps:
      for name in averages.power_names():
        folder = loop_lib.averages_folder(job.folder, at) / name
        params, _ = checkpoint.load_params(folder, target)
        yield jax.device_get(devices_lib.gathered(params))

  for column, width in enumerate(widths):
    average = averages_lib.reconstruct(
      snapshots(), coefficients[:, column].tolist()
    )
    average = job.executor.make_state(job.model.rules.project, average)
    yield f'posthoc_{width:.3f}', average
