"""AdamW with clipping and a schedule, and the projection before it, after it, or both."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ogpsa_jax import ogpsa, ogpsa_project
from ogpsa_jax.training.config import OgpsaSection, OptimizerSection, RunConfig

STACKED_LAYERS = {r"(^|\W)layers\W": 0}
"""Which parameters of the decoder stack layers, and along which axis."""


class Optimizer(NamedTuple):
    """Two parts, so that the first can also be applied to every micro-batch's gradient.

    ``optax.chain(gradient_part, step_part)`` is the whole; the state is the pair of states.
    """

    gradient_part: optax.GradientTransformationExtraArgs
    step_part: optax.GradientTransformationExtraArgs

    def init(self, params: Any) -> tuple[Any, Any]:
        """The pair of states."""
        return self.gradient_part.init(params), self.step_part.init(params)


def learning_rate(section: OptimizerSection, total_steps: int) -> optax.Schedule:
    """Linear warm-up, then cosine or linear decay to zero at `total_steps`, or constant."""
    peak, warmup = section.learning_rate, section.warmup_steps
    rest = max(total_steps - warmup, 1)

    def cosine(step: Any) -> jax.Array:
        # (1 + cos x) / 2 = sin²((π − x) / 2), without its cancellation where the rate is small.
        remaining = jnp.maximum(1.0 - jnp.asarray(step, jnp.float32) / rest, 0.0)
        return peak * jnp.square(jnp.sin(0.5 * math.pi * remaining))

    after = {
        "cosine": cosine,
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[section.schedule]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def decays(params: Any) -> Any:
    """Which parameters weight decay applies to: all but norms and biases, as in transformers."""

    def is_matrix(path: Any, _: Any) -> bool:
        name = jax.tree_util.keystr(path)
        return "norm" not in name and "bias" not in name

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam as :func:`optax.scale_by_adam`, with accurate bias corrections.

    In float32 1 − 0.999^t is off by 1.3e-5 of itself at the first steps, because 0.999 is; every
    step is then off by half of that, which shows in a trajectory beside the official trainer's.
    """
    plain = optax.scale_by_adam(b1, b2, eps)

    def correction(decay: float, count: jax.Array) -> jax.Array:
        if decay == 0.0:
            return jnp.ones([], jnp.float32)
        return -jnp.expm1(count.astype(jnp.float32) * math.log(decay))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        first, second = correction(b1, count), correction(b2, count)
        updates = jax.tree.map(
            lambda m, v: (
                (m / first.astype(m.dtype))
                / (jnp.sqrt(v / second.astype(v.dtype)) + jnp.asarray(eps, v.dtype))
            ),
            mu,
            nu,
        )
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(plain.init, update)


def make_optimizer(config: RunConfig, total_steps: int) -> Optimizer:
    """The optimizer of a run: clipping comes after the projection, as in the official code."""
    section = config.optimizer
    adamw = optax.chain(
        scale_by_adam(*section.betas, section.eps),
        optax.add_decayed_weights(section.weight_decay, decays),
        optax.scale_by_learning_rate(learning_rate(section, total_steps)),
    )
    inner = adamw
    if section.max_grad_norm is not None:
        inner = optax.chain(optax.clip_by_global_norm(section.max_grad_norm), adamw)
    inner = optax.with_extra_args_support(inner)
    identity = optax.with_extra_args_support(optax.identity())
    if not config.projects:
        return Optimizer(identity, inner)
    settings = projection_settings(config.ogpsa)
    if config.ogpsa.placement == "gradient":
        return Optimizer(ogpsa_project(**settings), inner)
    return Optimizer(identity, ogpsa(inner, placement=config.ogpsa.placement, **settings))


def projection_settings(section: OgpsaSection) -> dict[str, Any]:
    """Arguments of :func:`ogpsa_jax.ogpsa_project` for the decoder."""
    return {
        "rank": section.rank,
        "scope": section.scope,
        "rule": section.rule,
        "scale": section.scale,
        "basis_dtype": section.basis_dtype,
        "stacked": STACKED_LAYERS,
    }
