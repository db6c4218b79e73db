"""OGPSA for JAX: remove from safety gradients what would cost general ability.

The core of arXiv 2602.07892 as an Optax transformation; it imports jax and optax alone.
"""

from ogpsa_jax.projection.column_adam import column_adamw, scale_by_column_adam
from ogpsa_jax.projection.diagnostics import diagnostics, first_order_change
from ogpsa_jax.projection.input_state import InputState
from ogpsa_jax.projection.kernels import Kernel, flax_kernels
from ogpsa_jax.projection.reference import reference_gradients
from ogpsa_jax.projection.refresh import project_parameters, refresh
from ogpsa_jax.projection.second_moments import (
    SecondMoment,
    gradient_moments,
    input_moments,
    second_moment,
)
from ogpsa_jax.projection.state import OgpsaState
from ogpsa_jax.projection.streaming import push_reference
from ogpsa_jax.projection.transform import ogpsa, ogpsa_project

__all__ = [
    "InputState",
    "Kernel",
    "OgpsaState",
    "SecondMoment",
    "column_adamw",
    "diagnostics",
    "first_order_change",
    "flax_kernels",
    "gradient_moments",
    "input_moments",
    "ogpsa",
    "ogpsa_project",
    "project_parameters",
    "push_reference",
    "reference_gradients",
    "refresh",
    "scale_by_column_adam",
    "second_moment",
]
