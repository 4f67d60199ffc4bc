"""The ledger of a sweep: every member, what it cost, and what was promoted."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import config as config_lib
from ddo_jax import rng
from ddo_jax.method import likelihood
from ddo_jax.method import negatives
from ddo_jax.report import cost
from ddo_jax.runtime import work

UNIT = (
  'A forward-equivalent is the arithmetic of one forward pass of one image. A'
  ' step on B real and B fake rows takes 8 B of them: θ forward on 2 B rows and'
  ' backward at twice that, the reference forward on 2 B. A drawn image takes'
  ' what its sampler computes.'
)
CURSE = (
  'The lowest of many noisy scores is low by chance too. So the best members by'
  ' `selection` were scored once more, on images that had chosen nothing, and'
  ' the lowest `rescored` was promoted; of several finalists that one is a'
  ' little low as well. The report measures on further images.'
)


def forwards_an_image(
  model: likelihood.LikelihoodModel,
  frozen: likelihood.Frozen,
  stored: np.ndarray,
  sampler: Any,
) -> float:
  """Returns the forward-equivalents of drawing one image.

  Args:
    model: the family, with a noise law.
    frozen: weights beside the params.
    stored: one row [1,...] as the data stores it.
    sampler: what draws.
  """

  def draw(params, frozen):
    keys = rng.per_example(rng.stream(0), jnp.zeros(1, jnp.uint32))
    return model.draw(params, frozen, jnp.zeros(1, jnp.int32), keys, sampler)

  params = jax.eval_shape(model.init, rng.stream(0))
  once = cost.describe(model, frozen, stored)['flops']
  return work.of(draw, params, frozen).total / once


def member_cost(
  result: dict[str, Any],
  phase: config_lib.Phase,
  profiles: int,
  evaluation_images: int,
  draw: float,
) -> dict[str, float]:
  """Returns what a member cost, in images and in forward-equivalents.

  Work that a killed process lost is left out.

  Args:
    result: see `member.result`.
    phase: its phase.
    profiles: the number of candidates at each evaluation.
    evaluation_images: the images that each of them is scored by.
    draw: see `forwards_an_image`.
  """
  real = result['trained'] * phase.batch_size
  second = phase.used_negatives
  contrastive = phase.objective.contrastive
  drawn = real if second.needs_sampler else 0
  # The evaluation of step 0 is the round's.
  scored = (len(result['evaluations']) - 1) * profiles * evaluation_images
  forwards = real * (8 if contrastive else 3) + (drawn + scored) * draw
  return {
    'real': real,
    'fake': real if contrastive else 0,
    'drawn_in_steps': drawn,
    'evaluation': scored,
    'forwards': round(forwards),
  }


def make(
  round_index: int,
  hashes: dict[str, Any],
  results: Sequence[dict[str, Any]],
  costs: Sequence[dict[str, float]],
  finals: list[dict[str, Any]],
  promoted: dict[str, Any],
  phase: config_lib.Phase,
  probe: dict[str, Any] | None,
  shared_images: int,
  draw: float,
) -> dict[str, Any]:
  """Returns the ledger of a round, as JSON values.

  Args:
    round_index: the round's number.
    hashes: of the reference and of the pool.
    results: the members', see `member.result`.
    costs: the members', see `member_cost`.
    finals: the scores of the finalists' candidates.
    promoted: which of them was promoted.
    phase: the round's.
    probe: what the probe proposed, and its cost in forward-equivalents; None
      where it was not asked.
    shared_images: the images that were drawn to score the reference and the
      finalists.
    draw: see `forwards_an_image`.
  """
  second = phase.used_negatives
  pool = second.size if isinstance(second, negatives.Pool) else 0
  total = {name: sum(cost[name] for cost in costs) for name in costs[0]}
  total['pool'] = pool
  total['evaluation'] += shared_images
  total['probe_forwards'] = probe['forwards'] if probe else 0
  total['forwards'] += round((pool + shared_images) * draw)
  total['forwards'] += total['probe_forwards']
  total['images'] = sum(
    total[name] for name in ('real', 'pool', 'drawn_in_steps', 'evaluation')
  )
  return {
    'round': round_index,
    **hashes,
    'probe': probe,
    'members': [
      result | {'cost': cost}
      for result, cost in zip(results, costs, strict=True)
    ],
    'finals': finals,
    'promoted': promoted,
    'cost': total | {'forwards_a_drawn_image': draw},
    'unit': UNIT,
    'note': CURSE,
  }
