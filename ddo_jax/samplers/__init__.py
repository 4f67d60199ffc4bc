"""Samplers: settings that draw from a model; see `contract`.

All of them are imported here, so that a command line can name any.
"""

from ddo_jax.samplers import ablation as ablation
from ddo_jax.samplers import ancestral as ancestral
from ddo_jax.samplers import ddim as ddim
from ddo_jax.samplers import ddpm as ddpm
from ddo_jax.samplers import dpm_solver_v3 as dpm_solver_v3
from ddo_jax.samplers import flow_ode as flow_ode
from ddo_jax.samplers import flow_sde as flow_sde
from ddo_jax.samplers import heun as heun
