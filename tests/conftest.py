"""Eight simulated devices, strict rank promotion, quick compilation.

Under FSDP every leaf is split, since the tests' networks are tiny.
"""

from importlib import metadata
import os
import signal

# Tests compile much and compute little. Before jax is imported, or too late.
FLAGS = [os.environ.get('XLA_FLAGS', ''), '--xla_backend_optimization_level=0']
# Two fifths of the time; later versions do not know the flag and would abort.
if metadata.version('jaxlib').startswith('0.10.'):
  FLAGS.append('--xla_cpu_use_fusion_emitters=false')
os.environ['XLA_FLAGS'] = ' '.join(FLAGS)

# No test asks a publisher for a file: nobody listens at the discard port.
os.environ['DDO_JAX_ASSETS'] = 'http://127.0.0.1:9'

import jax  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')

from ddo_jax.runtime import layout  # noqa: E402

layout.SMALLEST_SPLIT = 1

# Tests send them, to themselves and to processes that they start. nohup has the
# one ignored, and a shell's script what it runs in the background the other.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)
