"""What a change of precision leaves of a training: measures it, reports it and writes it down.

An export in the type of a bfloat16 source rounds away whatever moved a weight by less than half of
that type's step: at the published rate of 1e-6, most of a stage.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from ogpsa_jax.config import RunConfig
from ogpsa_jax.models import Decoder, load_pretrained, merge_lora
from ogpsa_jax.models.folders import resolve_folder
from ogpsa_jax.models.safetensors_files import CheckpointReader, weights_reader
from ogpsa_jax.runs import Rounding, run_dir_of
from ogpsa_jax.training.evaluator import Evaluation, Evaluator
from ogpsa_jax.training.metrics import LEAST_KEPT
from ogpsa_jax.training.prepare import prepare_model
from ogpsa_jax.training.step import Network

_MOVED = 0.01  # a measure that moved by less of itself says nothing about what is left of it


def measure_rounding(
    config: RunConfig,
    mesh: Mesh,
    model: Decoder,
    exported: str | Path,
    evaluations: Mapping[str, Evaluation],
    before: Mapping[str, float],
) -> Rounding:
    """Compare an export that rounds with the model as trained and with the start.

    The start is what others read in the folder that the stage began with. Where that is the export
    of an earlier stage, which rounded too, what it had rounded away counts with this stage's
    update, because it is as much at stake.

    Args:
      config: what the model was trained with.
      mesh: the devices.
      model: as trained, with its adapters.
      exported: the folder that was written.
      evaluations: held-out sets, measured on both; may be empty.
      before: what they gave before the first step, as in ``summary.json``; may be empty.

    Returns:
      What is left of the update, and of the change of each measure.
    """
    rounded = load_pretrained(
        exported,
        dtype=config.model.dtype,
        remat=config.train.remat,
        mesh=mesh,
        attention=config.model.attention,
    )
    trained, start = _parameters(model), _parameters(prepare_model(config, mesh, unrounded=False))
    along, whole = _compare(_parameters(rounded), trained, start)
    del start, trained
    after, then = (
        Evaluator(network, evaluations, mesh).measure(network.trained)
        for network in (Network.of(model), Network.of(rounded))
    )
    kept = {
        name: (then[name] - before[name]) / (value - before[name])
        for name, value in after.items()
        if name in before and abs(value - before[name]) > _MOVED * abs(before[name])
    }
    return Rounding(
        dtype=_types(exported),
        update_kept=float(along) / float(whole) if float(whole) else 1.0,
        after=after,
        rounded=then,
        kept=kept,
    )


def _types(folder: str | Path) -> str:
    with CheckpointReader(Path(folder)) as reader:
        return ", ".join(sorted({reader.dtype(name).name for name in reader.names()}))


def _parameters(model: Decoder) -> Any:
    """All weights in float32, adapters merged."""
    state = nnx.state(model)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if _is_float(x) else x, state)
    merged = merge_lora(nnx.merge(nnx.graphdef(model), wide))
    return nnx.to_pure_dict(nnx.state(merged, nnx.Param))


def _is_float(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


@jax.jit
def _compare(rounded: Any, trained: Any, start: Any) -> tuple[jax.Array, jax.Array]:
    update, left = (optax.tree.sub(tree, start) for tree in (trained, rounded))
    return optax.tree.vdot(left, update), optax.tree.vdot(update, update)


def rounding_lines(rounding: Rounding) -> list[str]:
    """What :func:`measure_rounding` found, for people."""
    after, kept = rounding.after, rounding.kept
    lines = [f"exported in {rounding.dtype}: {rounding.update_kept:.1%} of the update is left"]
    for name, value in rounding.rounded.items():
        share = f", {kept[name]:.0%} of the change" if name in kept else ""
        lines.append(f"{name}: {after[name]:.4f} as trained, {value:.4f} exported{share}")
    return lines


def rounding_warning(rounding: Rounding) -> str | None:
    """A sentence where less than nine tenths are left, of the update or of what it achieved."""
    losses = {n: share for n, share in rounding.kept.items() if n.endswith("/loss")}
    least = min([rounding.update_kept, *losses.values()])
    if least >= LEAST_KEPT:
        return None
    worst = "".join(
        f", and {share:.0%} of what {name} changed by"
        for name, share in losses.items()
        if share == min(losses.values())
    )
    return (
        f"the export's {rounding.dtype} weights keep {rounding.update_kept:.0%} of the "
        f"update{worst}; set export.dtype to float32 to hand out all of it (a later stage that "
        "starts from this run has all of it)"
    )


def loading_warning(config: RunConfig) -> str | None:
    """A sentence if a stage cannot start from the exact weights of the previous one."""
    if config.model.initial_weights != "pretrained":
        return None
    folder = resolve_folder(str(config.model.path))
    if run_dir_of(folder) is None:
        return None
    own = jnp.dtype(config.model.param_dtype)
    with weights_reader(folder) as reader:
        held = functools.reduce(jnp.promote_types, (reader.dtype(n) for n in reader.names()))
    if jnp.promote_types(own, held) == own:
        return None
    return (
        f"model.param_dtype: {own.name} rounds the {held} weights of {config.model.path} before "
        "the first step, so this stage starts from less than that one learned; set it to float32"
    )
