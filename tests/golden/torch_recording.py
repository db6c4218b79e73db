"""The official trainer's rules in plain torch, and recordings of freshly drawn runs.

    python tests/golden/torch_recording.py check GOLDEN RUN    beside an official recording
    python tests/golden/torch_recording.py draw FOLDER [SEED]  writes a recording ``drawn``

Nothing of this package is used here. The models are transformers'; AdamW, clipping and schedules
are torch's and transformers' own, as in the official trainer. The rest follows the rules that
accompany the official recordings.
"""

import copy
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

Batch = dict[str, np.ndarray]
Vector = torch.Tensor
KEYS = ("input_ids", "attention_mask", "labels")
WRONG = ("global projection", "never refreshed", "preference loss on references")


def token_losses(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of every shifted label, 0 where there is none, and which there are."""
    ids, attended, labels = (torch.tensor(batch[key]).long() for key in KEYS)
    logits = model(input_ids=ids, attention_mask=attended).logits[:, :-1].float()
    labels = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, reduction="none", ignore_index=-100
    )
    return losses, labels != -100


def preference(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> dict[str, Any]:
    """DPO's terms out of log-probabilities ``[2B]``, chosen rows first."""
    (chosen, rejected), (ref_chosen, ref_rejected) = policy.chunk(2), reference.chunk(2)
    margin = (chosen - rejected) - (ref_chosen - ref_rejected)
    return {
        "losses": -torch.nn.functional.logsigmoid(beta * margin),
        "policy_chosen_logps": chosen,
        "policy_rejected_logps": rejected,
        "reference_chosen_logps": ref_chosen,
        "reference_rejected_logps": ref_rejected,
        "chosen_rewards": beta * (chosen - ref_chosen),
        "rejected_rewards": beta * (rejected - ref_rejected),
    }


def projected(gradient: Vector, bases: list[Vector], args: dict[str, Any]) -> Vector:
    """The rule of one parameter tensor."""
    if len(bases) == 2:
        first = bases[0] / (bases[0].norm() + 1e-8)
        rest = bases[1] - (bases[1] * first).sum() * first
        norm = rest.norm() + 1e-8
        second = torch.zeros_like(rest) if norm < 1e-6 else rest / norm
        along = (gradient * first).sum() * first + (gradient * second).sum() * second
        return gradient - along
    [base] = bases
    overlap = (gradient * base).sum()
    if args["base_method"] == "threshold" and overlap >= 0:
        return gradient * args["base_scale"] if overlap > 0 else gradient
    return gradient - overlap / ((base * base).sum() + 1e-8) * base


class Trainer:
    """One run: ``record`` gives what the official recordings hold of it."""

    def __init__(
        self,
        model: Any,
        args: dict[str, Any],
        scheduler: dict[str, Any],
        optimizer: dict[str, Any],
        wrong: str = "",
    ) -> None:
        """Set the run up.

        Args:
          model: of transformers, float32; trained in place.
          args: of the official command line.
          scheduler: ``type``, ``warmup_steps``, ``warmup_ratio``, ``max_steps``.
          optimizer: ``groups`` with their settings and the names of their parameters.
          wrong: one of `WRONG`: a rule to break.
        """
        self.model, self.args, self.wrong = model.eval(), args, wrong
        self.reference_model = copy.deepcopy(model)
        self.named = dict(model.named_parameters())
        self.pairs = args["stage"].startswith("dpo")
        self.optimizer = torch.optim.AdamW(
            [
                {**group, "params": [self.named[name] for name in group["params"]]}
                for group in optimizer["groups"]
            ],
            lr=args["learning_rate"],
        )
        warmup = scheduler["warmup_steps"] or math.ceil(
            scheduler["max_steps"] * (scheduler["warmup_ratio"] or 0.0)
        )
        self.schedule = transformers.get_scheduler(
            scheduler["type"].rpartition(".")[2].lower(),
            self.optimizer,
            num_warmup_steps=warmup,
            num_training_steps=scheduler["max_steps"],
        )
        self.bases: dict[str, list[Vector]] = {}

    def flat(self, tensors: dict[str, torch.Tensor]) -> np.ndarray:
        return np.concatenate([tensors[name].detach().numpy().ravel() for name in self.named])

    def gradient(self, loss: torch.Tensor) -> dict[str, Vector]:
        found = torch.autograd.grad(loss, list(self.named.values()))
        return dict(zip(self.named, found, strict=True))

    def dpo(self, batch: Batch) -> dict[str, Any]:
        policy = -token_losses(self.model, batch)[0].sum(-1)
        with torch.no_grad():
            reference = -token_losses(self.reference_model, batch)[0].sum(-1)
        return preference(policy, reference, self.args["pref_beta"])

    def micro_loss(self, batch: Batch, micros: int, items: int) -> tuple[torch.Tensor, Any]:
        if self.pairs:
            terms = self.dpo(batch)
            return terms["losses"].mean() / micros, terms
        losses, _ = token_losses(self.model, batch)
        return losses.sum() / items, None

    def refresh(self, sets: dict[str, list[Batch]]) -> dict[str, dict[str, float]]:
        """New bases; the norms of the raw gradients by set and parameter."""
        self.bases = {name: [] for name in self.named}
        norms: dict[str, dict[str, float]] = {}
        for idx, batches in sets.items():
            total = {name: torch.zeros_like(p) for name, p in self.named.items()}
            for batch in batches:
                if self.wrong == "preference loss on references":
                    loss = self.dpo(batch)["losses"].mean()
                else:
                    losses, learnt = token_losses(self.model, batch)
                    loss = losses.sum() / learnt.sum()
                for name, part in self.gradient(loss / len(batches)).items():
                    total[name] += part
            norms[idx] = {name: g.norm().item() for name, g in total.items()}
            for name, g in total.items():
                self.bases[name].append(g / (g.norm() + 1e-10))
        return norms

    def project(self, gradient: dict[str, Vector]) -> dict[str, Vector]:
        if not self.bases:
            return gradient
        if self.wrong == "global projection":
            whole = torch.cat([g.ravel() for g in gradient.values()])
            count = len(next(iter(self.bases.values())))
            bases = [torch.cat([self.bases[n][i].ravel() for n in gradient]) for i in range(count)]
            bases = [base / base.norm() for base in bases]
            parts = projected(whole, bases, self.args).split([g.numel() for g in gradient.values()])
            return {
                name: part.view_as(gradient[name])
                for name, part in zip(gradient, parts, strict=True)
            }
        return {n: projected(g, self.bases[n], self.args) for n, g in gradient.items()}

    def record(
        self, windows: list[list[Batch]], sets: dict[str, list[Batch]]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Train on the micro-batches of every step; the parts of the JSON, and the arrays."""
        weights, grads, arrays = [self.flat(self.named)], [], {}
        steps: list[Any] = []
        micros: list[Any] = []
        refreshes: list[Any] = []
        for number, window in enumerate(windows, start=1):
            due = sets and (number - 1) % self.args["base_num_steps"] == 0
            if due and not (self.wrong == "never refreshed" and number > 1):
                for idx, norms in self.refresh(sets).items():
                    refreshes.append({"at_step": number - 1, "idx": int(idx), "raw_norm": norms})
                    bases = {name: found[int(idx) - 1] for name, found in self.bases.items()}
                    arrays[f"base/{number - 1}/{idx}"] = self.flat(bases)
            items = sum(int((batch["labels"] != -100).sum()) for batch in window)
            total = {name: torch.zeros_like(p) for name, p in self.named.items()}
            step = {"step": number, "lr": self.schedule.get_last_lr()[0], "micro": [], "loss": 0.0}
            for batch in window:
                index = len(micros)
                loss, terms = self.micro_loss(batch, len(window), items)
                raw = self.gradient(loss)
                kept = self.project(raw)
                for name, part in kept.items():
                    total[name] += part
                arrays[f"micro_raw/{index}"] = self.flat(raw)
                arrays[f"micro_proj/{index}"] = self.flat(kept)
                arrays |= {f"mb/{index}/{key}": batch[key].astype(np.int32) for key in KEYS}
                micro = {"index": index, "step": number, "accum": len(window), "loss": loss.item()}
                micro["num_items_in_batch"] = None if self.pairs else items
                if terms:
                    micro["dpo"] = {name: value.tolist() for name, value in terms.items()}
                micros.append(micro)
                step["micro"].append(index)
                step["loss"] += loss.item()
            for name, parameter in self.named.items():
                parameter.grad = total[name]
            limit = self.args["max_grad_norm"]
            norm = torch.nn.utils.clip_grad_norm_(
                list(self.named.values()), limit if limit else math.inf
            )
            step["grad_norm_before_clip"] = norm.item()
            steps.append(step)
            grads.append(self.flat({name: p.grad for name, p in self.named.items()}))
            self.optimizer.step()
            self.schedule.step()
            weights.append(self.flat(self.named))
        arrays |= {"weights": np.stack(weights), "grads": np.stack(grads)}
        for idx, batches in sets.items():
            for j, batch in enumerate(batches):
                arrays |= {f"ref/{idx}/{j}/{key}": batch[key].astype(np.int32) for key in KEYS}
        return {
            "weight_rows": list(range(len(weights))),
            "grad_rows": list(range(1, len(weights))),
            "micro_grad_rows": list(range(len(micros))),
            "layout": self.layout(),
            "steps": steps,
            "micro": micros,
            "refresh": refreshes,
        }, arrays

    def layout(self) -> list[dict[str, Any]]:
        """Where each parameter stands in a flat vector."""
        out: list[dict[str, Any]] = []
        offset = 0
        for name, p in self.named.items():
            item = {"name": name, "shape": list(p.shape), "offset": offset, "size": p.numel()}
            out.append({**item, "requires_grad": True})
            offset += p.numel()
        return out


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
