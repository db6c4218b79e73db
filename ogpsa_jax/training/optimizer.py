"""AdamW with clipping and a schedule, and the projection before it, after it, or both."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ogpsa_jax import ogpsa, scale_by_column_adam
from ogpsa_jax.config import RunConfig
from ogpsa_jax.config.sections import OgpsaSection, OptimizerSection
from ogpsa_jax.models.decoder import DECODER_KERNELS

STACKED_LAYERS = {r"(^|\W)layers\W": 0}
"""Which parameters of the decoder stack layers, and along which axis."""


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


def apply_updates(params: Any, updates: Any, key: jax.Array | None = None) -> tuple[Any, Any, Any]:
    """``params + updates``, and how much of the update the parameters took.

    A bfloat16 parameter changes by steps of 2⁻⁸ of itself: rounded to the nearest, smaller updates
    are lost for good. Rounded up or down at random, with probabilities that make the mean exact
    (arXiv 1502.02551), they take effect on average.

    Args:
      params: pytree of arrays.
      updates: the same structure and shapes.
      key: of the random numbers; None: round to the nearest. Used for bfloat16 leaves alone.

    Returns:
      (new parameters, norm of what changed in them, ⟨change, update⟩ / ⟨update, update⟩); the last
      two float32 scalars, the last 1 where the update is zero.
    """
    leaves, structure = jax.tree.flatten(params)
    keys = [None] * len(leaves) if key is None else jax.random.split(key, len(leaves))
    new, sums = [], jnp.zeros(3, jnp.float32)
    for old, update, leaf_key in zip(leaves, jax.tree.leaves(updates), keys, strict=True):
        wide = jnp.promote_types(old.dtype, jnp.float32)
        total = old.astype(wide) + update.astype(wide)
        if leaf_key is not None and old.dtype == jnp.bfloat16:
            total = _round_stochastically(total, leaf_key)
        new.append(total.astype(old.dtype))
        # XLA may leave out a cast there and back, but not this.
        kept = jnp.finfo(old.dtype)  # type: ignore[no-untyped-call]
        rounded = jax.lax.reduce_precision(total, kept.nexp, kept.nmant)
        change, update = rounded - old.astype(wide), update.astype(wide)
        sums += jnp.stack([(change * change).sum(), (change * update).sum(), (update**2).sum()])
    squared, along, whole = sums
    share = jnp.where(whole > 0, along / jnp.where(whole > 0, whole, 1.0), 1.0)
    return structure.unflatten(new), jnp.sqrt(squared), share


def _round_stochastically(values: jax.Array, key: jax.Array) -> jax.Array:
    """Float32 to float32 of bfloat16's precision; the bits cut off are the odds of rounding up."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    noise = jax.random.bits(key, values.shape, jnp.uint16).astype(jnp.uint32)
    cut = (bits + noise) & jnp.uint32(0xFFFF0000)
    return jnp.where(jnp.isfinite(values), jax.lax.bitcast_convert_type(cut, jnp.float32), values)


def global_norm(tree: Any) -> jax.Array:
    """The norm of all leaves together, float32 whatever their dtypes.

    Optax adds the leaves' squares in their own: in bfloat16 the sum over a model's hundreds of
    leaves stops growing early.
    """
    return optax.tree.norm(optax.tree.cast(tree, jnp.float32))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """As :func:`optax.clip_by_global_norm`, by the norm in float32."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        norm = global_norm(updates)

        def clip(leaf: jax.Array) -> jax.Array:
            return jnp.where(norm < max_norm, leaf, (leaf / norm.astype(leaf.dtype)) * max_norm)

        return jax.tree.map(clip, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def make_optimizer(config: RunConfig, total_steps: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run: clipping comes after the projection, as in the official code.

    Where every step takes a reference batch, ``update`` requires its gradient as ``reference``.
    """
    section = config.optimizer
    adam = scale_by_adam(*section.betas, section.eps)
    if section.name == "column_adamw":
        adam = scale_by_column_adam(*section.betas, section.eps, kernels=DECODER_KERNELS)
    inner = optax.chain(
        adam,
        optax.add_decayed_weights(section.weight_decay, decays),
        optax.scale_by_learning_rate(learning_rate(section, total_steps)),
    )
    if section.max_grad_norm is not None:
        inner = optax.chain(clip_by_global_norm(section.max_grad_norm), inner)
    if not config.projects:
        return optax.with_extra_args_support(inner)
    settings = projection_settings(config.ogpsa)
    if config.ogpsa.subspace == "inputs" and config.model.lora is not None:
        settings["others"] = "leave"  # adapters have no others but `b`, which meets no input
    in_step = config.references.in_step
    if in_step is not None:
        settings["replay"] = in_step.replay_weight
        if config.ogpsa.subspace == "gradients":
            settings["window"] = in_step.window or 1
            settings["project_momentum"] = config.ogpsa.project_momentum
    return ogpsa(inner, placement=config.ogpsa.placement, **settings)


def projection_settings(section: OgpsaSection) -> dict[str, Any]:
    """Arguments of :func:`ogpsa_jax.ogpsa` that say what is projected off what in the decoder."""
    if section.subspace == "inputs":
        return {
            "rank": section.rank,
            "rule": section.rule,
            "basis_dtype": section.basis_dtype,
            "subspace": "inputs",
            "energy": section.energy,
            "kernels": DECODER_KERNELS,
            "others": section.others,
        }
    return {
        "rank": section.rank,
        "scope": section.scope,
        "rule": section.rule,
        "scale": section.scale,
        "basis_dtype": section.basis_dtype,
        "stacked": STACKED_LAYERS,
    }
