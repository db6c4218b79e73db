"""What a bfloat16 checkpoint keeps of a stage at a small learning rate, by type of the parameters.

stories260k is cast to bfloat16 and trained on safety rows three times: with float32 parameters,
with bfloat16 parameters, and with these and stochastic rounding. A stage of one step follows each,
to measure the loss at which it starts. Losses are of held-out safety rows, in nats per token. Each
step takes few rows, because the size of Adam's steps depends on the rate and not on the batch.

    python scripts/measure_precision.py [--rate 1e-6] [--steps 120] [--seeds 1] [--out DIR]

OGPSA_DATA names the folder that contains data/; default ../shared.
"""

import argparse
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import yaml
from safetensors.numpy import load_file, save_file

from ogpsa_jax.training.metrics import read_metrics
from ogpsa_jax.training.run import train_stages

PARAMETERS = {
    "float32": [],
    "bfloat16": ["model.param_dtype=bfloat16"],
    "bfloat16, stochastic": [
        "model.param_dtype=bfloat16",
        "optimizer.stochastic_rounding=true",
    ],
}
COLUMNS = (
    *("parameters", "seed", "before", "after", "exported", "next stage", "moved", "applied"),
    *("update norm", "applied norm"),
)


def data() -> Path:
    """The folder of models and data sets."""
    return Path(os.environ.get("OGPSA_DATA", "../shared")) / "data"


def narrow_model(target: Path) -> Path:
    """stories260k in bfloat16; created if it is missing."""
    if not target.exists():
        beside = target.with_suffix(".tmp")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(data() / "models/stories260k", beside)
        weights = load_file(beside / "model.safetensors")
        narrow = {name: value.astype(ml_dtypes.bfloat16) for name, value in weights.items()}
        save_file(narrow, beside / "model.safetensors", metadata={"format": "pt"})
        beside.rename(target)
    return target


def configuration(model: Path, rate: float) -> dict[str, object]:
    """A stage of plain SFT."""
    safety = str(data() / "safety_tuned_llamas/safety_only_data_Instructions.json")
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {
            "template": "alpaca",
            "max_length": 128,
            "train": [{"path": safety, "split": "train[:2200]"}],
            "eval": {"safety": {"path": safety, "split": "train[2200:]", "samples": 100}},
        },
        "ogpsa": {"preset": "off"},
        "optimizer": {"learning_rate": rate},
        "train": {"batch_size": 8, "micro_batch_size": 8, "remat": "none"},
    }


def flat(folder: Path) -> np.ndarray:
    """All weights of a folder in one row."""
    weights = load_file(folder / "model.safetensors")
    return np.concatenate([weights[name].astype(np.float32).ravel() for name in sorted(weights)])


def measure(name: str, seed: int, base: Path, out: Path, steps: int) -> list[str]:
    """A row of the table."""
    run = out / f"{name.replace(', ', '-')}-seed{seed}"
    first, second = train_stages(
        [out / "sft.yaml"] * 2,
        [f"seed={seed}", *PARAMETERS[name]],
        output_dirs=[str(run), f"{run}-next"],
        stage_overrides=[[f"train.steps={steps}"], ["train.steps=1"]],
    )
    unrounded = run / "export/unrounded"
    trained = flat(unrounded if unrounded.is_dir() else run / "export")
    after = first.after["safety/loss"]
    exported = first.rounding.rounded["safety/loss"] if first.rounding else after
    losses = (first.before["safety/loss"], after, exported, second.before["safety/loss"])
    lines = [line for line in read_metrics(run) if "loss" in line]
    norms = [sum(line[key] for line in lines) for key in ("update_norm", "applied_update_norm")]
    applied = sum(line["applied_fraction"] * line["update_norm"] for line in lines) / norms[0]
    return [
        *(name, str(seed), *(f"{loss:.4f}" for loss in losses)),
        *(f"{(flat(base) != trained).mean():.1%}", f"{applied:.1%}"),
        *(f"{norm / len(lines):.2e}" for norm in norms),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=1e-6)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/precision"))
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    parsed.out.mkdir(parents=True, exist_ok=True)
    base = narrow_model(parsed.out / "stories260k-bfloat16")
    text = yaml.safe_dump(configuration(base, parsed.rate))
    (parsed.out / "sft.yaml").write_text(text, encoding="utf-8")
    rows = [
        measure(name, seed, base, parsed.out, parsed.steps)
        for seed in range(parsed.seeds)
        for name in PARAMETERS
    ]
    print(f"rate {parsed.rate:g}, {parsed.steps} steps; norms are means over the steps")
    for row in [list(COLUMNS), *rows]:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
