"""Replay a recorded run of the official PyTorch trainer through this package, and compare.

    python scripts/replay_golden.py --golden DIR --run NAME

DIR contains ``runs/NAME.json``, ``runs/NAME.npz`` and the model folder that the run names. The
recorded micro-batches and reference batches go through the package's own decoder, objectives,
transformation, optimizer and compiled step; for each recorded quantity the largest deviation is
printed beside its tolerance. Exit code 0 when all are within, 1 when one is not, 2 for bad input.
"""

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ogpsa_jax import ogpsa_project, reference_gradients
from ogpsa_jax.config import RunConfig
from ogpsa_jax.errors import InputError
from ogpsa_jax.models import load_pretrained, to_huggingface
from ogpsa_jax.objectives.cross_entropy import sequence_log_probs
from ogpsa_jax.objectives.dpo import dpo_loss
from ogpsa_jax.objectives.sft import sft_loss
from ogpsa_jax.training.optimizer import learning_rate, make_optimizer, projection_settings
from ogpsa_jax.training.refreshing import is_due, row_shares, spread_rows
from ogpsa_jax.training.step import (
    Network,
    TrainState,
    make_loss,
    make_refresh,
    make_train_step,
)

Batch = dict[str, np.ndarray]
# Stated with the recordings: a fresh torch replay of the same rules stays well within them.
TOLERANCES = {
    "weights, max": 1e-4,
    "weights, rms": 1e-6,
    "clipped gradients, of the largest entry": 5e-5,
    "bases": 5e-6,
    "micro-gradients, of the largest entry": 5e-5,
    "projected micro-gradients, of the largest entry": 5e-5,
    "losses": 1e-5,
    "log-probabilities": 1e-3,
    # A reward is β times the difference of two log-probabilities that the recording contains as
    # float32: what remains of a deviation after two units of each.
    "rewards, beyond float32 units": 1e-5,
    "learning rate, relative": 1e-5,
    "gradient norm before clipping, relative": 5e-5,
    "reference gradient norms, relative": 5e-5,
}


class Recording:
    """A recorded run, its arrays in the package's terms."""

    def __init__(self, golden: Path, name: str) -> None:
        path = golden / "runs" / f"{name}.json"
        try:
            self.json = json.loads(path.read_text())
            self.arrays = np.load(path.with_suffix(".npz"), allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: cannot be read ({error}); check --golden and --run."
            ) from error
        self.args = self.json["args"]
        self.pairs = self.args["stage"].startswith("dpo")
        self.model_folder = golden / self.args["model_name_or_path"]
        # The official code uses the first two reference sets, whatever was asked for.
        sets = {key.split("/")[1] for key in self.arrays.files if key.startswith("ref/")}
        self.sets = sorted(sets, key=int)[:2]
        micros = [self.batch(f"mb/{micro['index']}") for micro in self.json["micro"]]
        # One shape for all, so that everything is compiled once: empty rows weigh nothing.
        self.shape = np.max([micro["input_ids"].shape for micro in micros], axis=0)
        self.micros_per_step = max(len(step["micro"]) for step in self.json["steps"])

    def batch(self, prefix: str) -> Batch:
        """A recorded batch ``[rows, T]``."""
        ids = self.arrays[f"{prefix}/input_ids"]
        attended = self.arrays[f"{prefix}/attention_mask"] != 0
        return {
            "input_ids": np.where(attended, ids, 0).astype(np.int32),
            "loss_mask": (self.arrays[f"{prefix}/labels"] != -100) & attended,
            "segment_ids": attended.astype(np.int32),
            "positions": np.maximum(np.cumsum(attended, axis=1) - 1, 0).astype(np.int32),
        }

    def training_batch(self, index: int) -> Batch:
        """Micro-batch `index`: rows, or pairs ``[B, 2, T]`` out of chosen rows, then rejected."""
        batch = self.batch(f"mb/{index}")
        if not self.pairs:
            return {key: grown(value, self.shape) for key, value in batch.items()}
        shape = (self.shape[0] // 2, 2, self.shape[1])
        return {
            key: grown(np.stack(np.split(value, 2), axis=1), shape) for key, value in batch.items()
        }

    def reference_set(self, idx: str) -> Batch:
        """All batches of a reference set."""
        prefix = f"ref/{idx}/"
        numbers = {int(k.split("/")[2]) for k in self.arrays.files if k.startswith(prefix)}
        return stacked([self.batch(f"{prefix}{n}") for n in sorted(numbers)])

    def config(self) -> RunConfig:
        """The run's settings in this package's terms."""
        args = self.args
        groups = self.json["optimizer"]["groups"]
        method = args.get("base_method", "orthogonal_projection")
        rule = {"orthogonal_projection": "orthogonal", "threshold": "conflict"}[method]
        if rule == "conflict" and len(self.sets) == 2:
            # Official bug: with two sets `threshold` projects fully in SFT, not at all in DPO.
            rule = "none" if self.pairs else "orthogonal"
        scheduler = self.json["scheduler"]
        kind = scheduler["type"].rpartition(".")[2].lower()
        # As transformers resolves them: steps go before the ratio, and `constant` has no warm-up.
        warmup = scheduler.get("warmup_steps") or math.ceil(
            scheduler["max_steps"] * (scheduler.get("warmup_ratio") or 0.0)
        )
        scale = args.get("base_scale")
        ogpsa: dict[str, Any] = {"preset": "off"}
        if self.sets:
            ogpsa = {
                "preset": "paper",
                "rank": len(self.sets),
                "rule": rule,
                "scale": 1.0 if scale is None else scale,
                "refresh": {"every": args["base_num_steps"]},
            }
        return RunConfig.model_validate(
            {
                "objective": "dpo" if self.pairs else "sft",
                "model": {"path": str(self.model_folder), "dtype": "float32"},
                "references": {"sets": [{"path": f"ref/{idx}"} for idx in self.sets]},
                "ogpsa": ogpsa,
                "optimizer": {
                    "learning_rate": args["learning_rate"],
                    "schedule": "constant" if kind.startswith("constant") else kind,
                    "warmup_steps": 0 if kind == "constant" else warmup,
                    "betas": groups[0]["betas"],
                    "eps": groups[0]["eps"],
                    "weight_decay": max(group["weight_decay"] for group in groups),
                    "max_grad_norm": args.get("max_grad_norm", 1.0) or None,
                },
                "dpo": {
                    "beta": args.get("pref_beta", 0.1),
                    "loss": args.get("pref_loss", "sigmoid"),
                },
            }
        )


def stacked(batches: list[Batch]) -> Batch:
    """Batches of different sizes as one array each, filled up with rows that weigh nothing."""
    out = {}
    for key in batches[0]:
        arrays = [batch[key] for batch in batches]
        shape = np.max([array.shape for array in arrays], axis=0)
        out[key] = np.stack([grown(array, shape) for array in arrays])
    return out


def empty(batch: Batch) -> Batch:
    """A batch of that shape that weighs nothing."""
    return {key: np.zeros_like(value) for key, value in batch.items()}


def grown(array: np.ndarray, shape: Any) -> np.ndarray:
    """`array` filled up with zeros at the end of every axis."""
    return np.pad(array, [(0, to - size) for size, to in zip(array.shape, shape, strict=True)])


class Comparison:
    """The largest deviation of each quantity."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def add(self, quantity: str, ours: Any, theirs: Any, scale: Any = 1.0) -> None:
        """Note the deviation of `ours` from `theirs`."""
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        difference = np.abs(ours - theirs) / scale
        value = float(np.sqrt(np.mean(difference**2)) if "rms" in quantity else np.max(difference))
        if not np.isfinite(value):
            value = float("inf")
        self.found[quantity] = max(self.found.get(quantity, 0.0), value)

    def report(self) -> bool:
        """Print the table; whether everything is within its tolerance."""
        width = max(len(name) for name in self.found)
        good = True
        for name, value in self.found.items():
            within = value <= TOLERANCES[name]
            good &= within
            verdict = "within" if within else "BEYOND"
            print(f"{name:<{width}}  {value:9.2e}  {verdict} {TOLERANCES[name]:.0e}")
        return good


def replay(recording: Recording, compare: Comparison) -> None:
    """Run the recorded batches through the package and compare what was recorded."""
    config = recording.config()
    network = Network.of(load_pretrained(recording.model_folder, dtype="float32"))
    graphdef = network.graphdef

    def flat(tree: Any) -> np.ndarray:
        """A tree like the parameters as the recorded flat vector."""
        state = nnx.state(nnx.merge(graphdef, tree, network.frozen), nnx.Param)
        tensors = dict(to_huggingface(state))
        parts = [np.asarray(tensors[item["name"]]) for item in recording.json["layout"]]
        return np.concatenate([part.astype(np.float32).ravel() for part in parts])

    def objective(model: Any, batch: Any) -> Any:
        if not recording.pairs:
            return sft_loss(model, batch)
        # The official loss is the mean over micro-batches of each one's mean.
        total, pairs, _ = dpo_loss(model, batch, loss=config.dpo.loss, beta=config.dpo.beta)
        return total / jnp.maximum(pairs, 1.0), (pairs > 0).astype(jnp.float32), {}

    steps = recording.json["steps"]
    schedule = learning_rate(config.optimizer, recording.json["scheduler"]["max_steps"])
    optimizer = make_optimizer(config, recording.json["scheduler"]["max_steps"])
    train_step = make_train_step(graphdef, objective, optimizer)
    # The official hooks project every micro-batch's gradient. That is the same as projecting their
    # sum, but for `threshold`, which decides each time again: there their sum is the gradient.
    decides = config.projects and config.ogpsa.rule == "conflict"
    off = config.model_copy(update={"ogpsa": config.ogpsa.model_copy(update={"preset": "off"})})
    plain = make_optimizer(off, recording.json["scheduler"]["max_steps"])

    @jax.jit
    def step_along(state: TrainState, projected: Any) -> TrainState:
        updates, inner = plain.update(projected, state.opt_state.inner, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, state.opt_state._replace(inner=inner))

    refresh = make_refresh(graphdef, sft_loss, project_momentum=config.ogpsa.project_momentum)
    gradient = jax.jit(jax.value_and_grad(make_loss(graphdef, objective), has_aux=True))
    project = jax.jit(ogpsa_project(**projection_settings(config.ogpsa)).update)
    log_probs = jax.jit(
        lambda params, batch: sequence_log_probs(nnx.merge(graphdef, params), batch)
    )
    loss_of_references = make_loss(graphdef, sft_loss)

    def mean_loss(params: Any, batch: Any) -> jax.Array:
        total, (weight, _) = loss_of_references(params, {}, batch)
        return total / weight

    reference_gradient = jax.jit(partial(reference_gradients, mean_loss))
    references = tuple(recording.reference_set(idx) for idx in recording.sets)
    spread = tuple(
        spread_rows({**s, "row_share": row_shares(s, pairs=False)}, 1, len(s["input_ids"][0]))
        for s in references
    )
    initial = jax.tree.map(jnp.copy, network.trained)
    state = TrainState(network.trained, optimizer.init(network.trained))
    compare_weights(recording, compare, 0, flat(state.params))
    for number, step in enumerate(steps):
        if references and config.ogpsa.refresh and is_due(state, number, config.ogpsa.refresh):
            found = reference_gradient(state.params, references)
            compare_references(recording, compare, number, [flat(tree) for tree in found])
            state, _ = refresh(state, network.frozen, spread)
        micros = [recording.json["micro"][index] for index in step["micro"]]
        batches = [recording.training_batch(index) for index in step["micro"]]
        if recording.pairs:
            for batch in batches:
                batch["reference_logps"] = np.asarray(log_probs(initial, batch)[0])
        results = [gradient(state.params, {}, batch) for batch in batches]
        weight = float(sum(weight for (_, (weight, _)), _ in results))
        total = None
        for micro, batch, ((loss, _), grads) in zip(micros, batches, results, strict=True):
            compare.add("losses", loss / weight, micro["loss"])
            if recording.pairs:
                compare_pairs(
                    compare, micro["dpo"], log_probs(state.params, batch)[0], batch, config
                )
            grads = optax.tree.scale(1.0 / weight, grads)
            projected = project(grads, state.opt_state.projection)[0] if config.projects else grads
            total = projected if total is None else jax.tree.map(jnp.add, total, projected)
            compare_rows(compare, recording, f"micro_raw/{micro['index']}", flat(grads), "micro-gr")
            compare_rows(
                compare, recording, f"micro_proj/{micro['index']}", flat(projected), "projected"
            )
        summed = flat(total)
        norm = np.linalg.norm(summed.astype(np.float64))
        recorded = step["grad_norm_before_clip"]
        compare.add("gradient norm before clipping, relative", norm, recorded, recorded)
        if step["step"] in recording.json["grad_rows"]:
            row = recording.json["grad_rows"].index(step["step"])
            theirs = recording.arrays["grads"][row]
            limit = config.optimizer.max_grad_norm
            clipped = summed if limit is None else summed * min(1.0, limit / norm)
            quantity = "clipped gradients, of the largest entry"
            compare.add(quantity, clipped, theirs, np.abs(theirs).max())
        compare.add("learning rate, relative", schedule(number), step["lr"], step["lr"] or 1.0)
        batches += [empty(batches[0])] * (recording.micros_per_step - len(batches))
        if decides:
            state = step_along(state, total)
        else:
            state, metrics = train_step(state, network.frozen, stacked(batches))
            compare.add("losses", metrics["loss"], step["loss"])
        compare_weights(recording, compare, step["step"], flat(state.params))


def compare_weights(recording: Recording, compare: Comparison, step: int, ours: Any) -> None:
    if step in recording.json["weight_rows"]:
        theirs = recording.arrays["weights"][recording.json["weight_rows"].index(step)]
        compare.add("weights, max", ours, theirs)
        compare.add("weights, rms", ours, theirs)


def compare_rows(
    compare: Comparison, recording: Recording, key: str, ours: np.ndarray, start: str
) -> None:
    if key in recording.arrays.files:
        quantity = next(name for name in TOLERANCES if name.startswith(start))
        theirs = recording.arrays[key]
        # A `threshold` of scale 0 leaves nothing of a gradient that agrees everywhere.
        compare.add(quantity, ours, theirs, np.abs(theirs).max() or 1.0)


def compare_references(
    recording: Recording,
    compare: Comparison,
    step: int,
    found: list[np.ndarray],
) -> None:
    """Reference gradients, unit-normalised per tensor as the official code keeps them."""
    for idx, vector in zip(recording.sets, found, strict=True):
        key = f"base/{step}/{idx}"
        for item in recording.json["layout"]:
            part = slice(item["offset"], item["offset"] + item["size"])
            norm = float(np.linalg.norm(vector[part].astype(np.float64)))
            for refresh in recording.json["refresh"]:
                if refresh["at_step"] == step and str(refresh["idx"]) == idx:
                    recorded = refresh["raw_norm"].get(item["name"], 0.0)
                    compare.add(
                        "reference gradient norms, relative", norm, recorded, max(recorded, 1e-3)
                    )
            vector[part] = vector[part] / (norm + 1e-10) if norm > 1e-10 else 0.0
        if key in recording.arrays.files:
            compare.add("bases", vector, recording.arrays[key])


def compare_pairs(
    compare: Comparison, recorded: dict[str, Any], policy: Any, batch: Batch, config: RunConfig
) -> None:
    count = len(recorded["losses"])  # without the rows that fill up a short batch
    policy, reference = np.asarray(policy)[:count], batch["reference_logps"][:count]
    for side, name in enumerate(("chosen", "rejected")):
        compare.add("log-probabilities", policy[:, side], recorded[f"policy_{name}_logps"])
        compare.add("log-probabilities", reference[:, side], recorded[f"reference_{name}_logps"])
        beta, theirs = config.dpo.beta, np.asarray(recorded[f"{name}_rewards"])
        deviation = np.abs(beta * (policy[:, side] - reference[:, side]) - theirs)
        units = beta * 2 * (np.spacing(np.abs(policy)) + np.spacing(np.abs(reference)))[:, side]
        compare.add("rewards, beyond float32 units", np.maximum(deviation - units, 0.0), 0.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, required=True, help="folder of the recordings")
    parser.add_argument("--run", required=True, help="name of the run")
    arguments = parser.parse_args()
    compare = Comparison()
    try:
        replay(Recording(arguments.golden, arguments.run), compare)
    except InputError as error:
        print(f"replay_golden: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.run}: largest deviation from the official trainer")
    return 0 if compare.report() else 1


if __name__ == "__main__":
    sys.exit(main())
