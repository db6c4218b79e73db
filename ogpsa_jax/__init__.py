"""OGPSA for JAX: remove from safety gradients what would cost general ability.

The core of arXiv 2602.07892 as an Optax transformation; it imports jax and optax alone.
"""

from ogpsa_jax.projection.diagnostics import diagnostics, first_order_change
from ogpsa_jax.projection.reference import reference_gradients
from ogpsa_jax.projection.refresh import refresh
from ogpsa_jax.projection.state import OgpsaState
from ogpsa_jax.projection.streaming import push_reference
from ogpsa_jax.projection.transform import ogpsa, ogpsa_project

__all__ = [
    "OgpsaState",
    "diagnostics",
    "first_order_change",
    "ogpsa",
    "ogpsa_project",
    "push_reference",
    "reference_gradients",
    "refresh",
]
