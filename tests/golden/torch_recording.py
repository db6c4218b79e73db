"""Recordings of freshly drawn runs, made by the official rules in torch.

    python tests/golden/torch_recording.py check GOLDEN RUN    beside an official recording
    python tests/golden/torch_recording.py draw FOLDER [SEED]  writes a recording ``drawn``

Nothing of this package is used here.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch_trainer import KEYS, Batch, Trainer


def draw_model(rng: random.Random, folder: Path, family: str, tied: bool) -> Any:
    """A random model of a family, saved as transformers saves it, of today or of two years ago."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if family == "llama3":
        rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    theta = rng.choice([1e4, 5e5])
    heads = rng.choice([2, 4])
    kind = transformers.Qwen2Config if family == "qwen2" else transformers.LlamaConfig
    config = kind(
        vocab_size=rng.randint(60, 90),
        hidden_size=heads * 8,
        intermediate_size=rng.randint(30, 60),
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=rng.choice([1, heads]),
        max_position_embeddings=128,
        rms_norm_eps=rng.choice([1e-5, 1e-6]),
        tie_word_embeddings=tied,
        rope_parameters={**rope, "rope_theta": theta},
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(rng.randrange(2**31))
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1)
            if "norm" in name:
                parameter.add_(1.0)
    model.save_pretrained(folder)
    if rng.random() < 0.5:
        path = folder / "config.json"
        written = json.loads(path.read_text())
        del written["rope_parameters"]
        written |= {"rope_theta": theta, "rope_scaling": None if family == "qwen2" else rope}
        path.write_text(json.dumps(written))
    return model


def draw_batches(rng: random.Random, rows: int, size: int, vocabulary: int, *, pairs: bool) -> Any:
    """Batches of random rows, each as wide as its longest; of pairs, chosen rows come first."""

    def answered(prompt: list[int]) -> tuple[list[int], list[int]]:
        answer = [rng.randrange(3, vocabulary) for _ in range(rng.randint(1, 10))] + [2]
        return prompt + answer, [-100] * len(prompt) + answer

    prompts = [
        [rng.randrange(3, vocabulary) for _ in range(rng.randint(2, 10))] for _ in range(rows)
    ]
    order = rng.sample(range(rows), rows)
    batches = []
    for first in range(0, rows, size):
        chunk = [prompts[i] for i in order[first : first + size]]
        made = [answered(prompt) for prompt in (chunk * 2 if pairs else chunk)]
        width = max(len(ids) for ids, _ in made)
        batches.append(
            {
                "input_ids": np.array([ids + [0] * (width - len(ids)) for ids, _ in made]),
                "attention_mask": np.array(
                    [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in made]
                ),
                "labels": np.array([lab + [-100] * (width - len(lab)) for _, lab in made]),
            }
        )
    return batches


def draw_args(rng: random.Random, stage: str, method: str = "") -> dict[str, Any]:
    """Settings of a run, as on the official command line."""
    args = {
        "stage": stage,
        "model_name_or_path": "models/drawn",
        "learning_rate": rng.choice([1e-3, 3e-4]) * (0.1 if stage.startswith("dpo") else 1.0),
        "lr_scheduler_type": rng.choice(["linear", "cosine", "constant", "constant_with_warmup"]),
        "warmup_steps": rng.choice([0, 0, 2]),
        "warmup_ratio": rng.choice([0.0, 0.3]),
        "weight_decay": rng.choice([0.0, 0.1]),
        "max_grad_norm": rng.choice([0.0, 0.3, 1.0]),
        "per_device_train_batch_size": rng.randint(2, 4),
        "gradient_accumulation_steps": rng.randint(1, 3),
        "max_steps": 6,
        "pref_beta": rng.choice([0.1, 0.2, 0.5]),
        "pref_loss": "sigmoid",
    }
    if stage.endswith("_pg"):
        args |= {"base_num_steps": rng.randint(1, 4), "base_method": method}
        args["base_scale"] = rng.choice([0.0, 0.5, 2.0])
    return args


def draw(
    folder: Path,
    seed: int,
    *,
    name: str = "drawn",
    family: str | None = None,
    tied: bool | None = None,
    stage: str | None = None,
    sets: int | None = None,
    method: str | None = None,
    wrong: str = "",
    **fixed: Any,
) -> dict[str, Any]:
    """Draw a run, train it, and write its recording; what is not given is drawn; returns `args`."""
    rng = random.Random(seed)
    choice = {
        "family": rng.choice(["qwen2", "llama3"]),
        "tied": rng.random() < 0.5,
        "stage": rng.choice(["sft", "sft_pg", "dpo", "dpo_pg"]),
        "sets": rng.choice([1, 2]),
    }
    given = {"family": family, "tied": tied, "stage": stage, "sets": sets}
    choice |= {key: value for key, value in given.items() if value is not None}
    drawn_method = rng.choice(["orthogonal_projection", "threshold"])
    # With two sets the official `threshold` is broken.
    method = method or ("orthogonal_projection" if choice["sets"] == 2 else drawn_method)
    args = draw_args(rng, choice["stage"], method) | fixed
    model = draw_model(rng, folder / args["model_name_or_path"], choice["family"], choice["tied"])
    pairs = args["stage"].startswith("dpo")
    vocabulary, size = model.config.vocab_size, args["per_device_train_batch_size"]
    windows: list[list[Batch]] = []
    rows = size * args["gradient_accumulation_steps"] * 3 - rng.randint(1, 2 * size - 1)
    while len(windows) < args["max_steps"]:  # by epochs, whose last window and batch may be short
        batches = draw_batches(rng, rows, size, vocabulary, pairs=pairs)
        count = args["gradient_accumulation_steps"]
        windows += [batches[i : i + count] for i in range(0, len(batches), count)]
    windows = windows[: args["max_steps"]]
    references = {
        str(idx): draw_batches(rng, rng.randint(size + 1, 3 * size), size, vocabulary, pairs=pairs)
        for idx in range(1, 1 + choice["sets"] * args["stage"].endswith("_pg"))
    }
    kept = [name for name, _ in model.named_parameters() if "norm" in name or "bias" in name]
    groups = [
        {"weight_decay": decay, "betas": [0.9, 0.999], "eps": 1e-8, "params": names}
        for decay, names in (
            (args["weight_decay"], [n for n, _ in model.named_parameters() if n not in kept]),
            (0.0, kept),
        )
    ]
    scheduler = {
        "type": f"SchedulerType.{args['lr_scheduler_type'].upper()}",
        **{key: args[key] for key in ("warmup_steps", "warmup_ratio", "max_steps")},
    }
    trainer = Trainer(model, args, scheduler, {"groups": groups}, wrong)
    found, arrays = trainer.record(windows, references)
    recording = {"run": name, "args": args, "optimizer": {"groups": groups}, **found}
    (folder / "runs").mkdir(exist_ok=True)
    path = folder / "runs" / f"{name}.json"
    path.write_text(json.dumps({**recording, "scheduler": scheduler}))
    np.savez(path.with_suffix(".npz"), **arrays)
    return {"seed": seed, **choice, **args, "wrong": wrong}


def check(golden: Path, run: str) -> dict[str, float]:
    """The largest deviation of these rules from an official recording, by quantity."""
    recording = json.loads((golden / "runs" / f"{run}.json").read_text())
    stored = np.load(golden / "runs" / f"{run}.npz")
    args = {"pref_beta": 0.1, "base_scale": 1.0, **recording["args"]}

    def batch(prefix: str) -> Batch:
        return {key: stored[f"{prefix}/{key}"] for key in KEYS}

    windows = [[batch(f"mb/{i}") for i in step["micro"]] for step in recording["steps"]]
    places = sorted({tuple(key.split("/")[1:3]) for key in stored.files if key.startswith("ref/")})
    sets: dict[str, list[Batch]] = {}
    for idx, j in sorted(places, key=lambda place: (int(place[0]), int(place[1]))):
        sets.setdefault(idx, []).append(batch(f"ref/{idx}/{j}"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        golden / args["model_name_or_path"], dtype=torch.float32
    )
    trainer = Trainer(model, args, recording["scheduler"], recording["optimizer"])
    found, arrays = trainer.record(windows, sets)
    assert found["layout"] == recording["layout"]
    worst = {
        "weights": np.abs(arrays["weights"][recording["weight_rows"]] - stored["weights"]).max(),
        "losses": max(
            abs(ours["loss"] - theirs["loss"])
            for ours, theirs in zip(found["micro"], recording["micro"], strict=True)
        ),
    }
    bases = [key for key in stored.files if key.startswith("base/") and key in arrays]
    if bases:
        worst["bases"] = max(np.abs(arrays[key] - stored[key]).max() for key in bases)
    return {key: float(value) for key, value in worst.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "check":
        print(check(Path(sys.argv[2]), sys.argv[3]))
    else:
        seed = int(sys.argv[3]) if len(sys.argv) > 3 else random.randrange(2**32)
        print(draw(Path(sys.argv[2]), seed))
