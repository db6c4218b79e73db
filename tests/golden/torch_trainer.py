"""The official trainer's rules in plain torch.

Nothing of this package is used here. The models are transformers'; AdamW, clipping and schedules
are torch's and transformers' own, as in the official trainer. The rest follows the rules that
accompany the official recordings.
"""

import copy
import math
from typing import Any

import numpy as np
import torch
import transformers

Batch = dict[str, np.ndarray]
Vector = torch.Tensor
KEYS = ("input_ids", "attention_mask", "labels")


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
          wrong: a rule to break: "global projection", "never refreshed" or "preference loss on
            references".
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
                    losses, mask = token_losses(self.model, batch)
                    loss = losses.sum() / mask.sum()
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
