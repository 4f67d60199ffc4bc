"""How the products in a network are rounded, by JAX's names.

| | NVIDIA GPU | TPU | CPU |
|---|---|---|---|
| 'highest' | float32 | float32, of six products in bfloat16 | float32 |
| 'high' | TF32; some dots float32 | three products in bfloat16 | float32 |
| 'default' | TF32 | bfloat16 | float32 |

Only the operands of dots and convolutions are rounded; sums, norms, weights and
what lies between layers stay float32. JAX's names of algorithms for dots, such
as 'BF16_BF16_F32_X3', are not offered: convolutions ignore them, and would be
computed as under 'default' without a word.
"""

import contextlib

import jax

from ddo_jax import errors

NAMES = ('highest', 'high', 'default')


def check(field: str, name: str) -> None:
  """Raises UserError unless a field of the config holds one of the names."""
  errors.require_choice(field, name, NAMES)


def of(name: str) -> contextlib.AbstractContextManager:
  """Inside, products that do not say more have the precision of a name."""
  return jax.default_matmul_precision(name)
