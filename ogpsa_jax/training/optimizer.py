"""AdamW with clipping and a schedule, and the projection before it, after it, or both."""

from typing import Any, NamedTuple

import jax
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
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
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


def make_optimizer(config: RunConfig, total_steps: int) -> Optimizer:
    """The optimizer of a run: clipping comes after the projection, as in the official code."""
    section = config.optimizer
    adamw = optax.adamw(
        learning_rate(section, total_steps),
        b1=section.betas[0],
        b2=section.betas[1],
        eps=section.eps,
        weight_decay=section.weight_decay,
        mask=decays,
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
