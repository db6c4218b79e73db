"""The methods that the demonstration compares: each is a configuration of ``ogpsa-jax train``.

All methods of a stage put the same number of sequences through forward and backward passes,
references included; a forward pass alone counts a third. What a method spends on references it
cannot spend on steps.
"""

from dataclasses import dataclass
from typing import Any, Final

from ogpsa_jax.config import RunConfig
from ogpsa_jax.demo.folder import Folder
from ogpsa_jax.demo.settings import SETTINGS, Regime, Setting
from ogpsa_jax.demo.world import LONGEST
from ogpsa_jax.runs import NAIVE

BATCH: Final = 16
# Of a stage: sequences (a pair is two), and the peak of the learning rate in a regime of rate 1.
SEQUENCES: Final = {"sft": 1760, "dpo": 640}
RATE: Final = {"sft": 4e-4, "dpo": 2e-5}
MERGED: Final = (0.3, 0.5, 0.7, 0.8, 0.9)  # weights of naive in merges with the model before


@dataclass(frozen=True)
class Method:
    """One way of aligning.

    Attributes:
      label: the name shown.
      kind: decides the colour in the figure.
      why: one line for the progress display.
      uses_rows: whether general rows matter to it.
    """

    label: str
    kind: str
    why: str
    uses_rows: bool = True


METHODS: Final = {
    "naive": Method("naive", NAIVE, "safety data alone: it pays the whole tax", uses_rows=False),
    "lora": Method("LoRA", "LoRA", "only adapters of rank 8 are trained", uses_rows=False),
    "paper": Method(
        "OGPSA paper",
        "ogpsa-paper",
        "gradient projected off two reference gradients, momentum left alone",
    ),
    "momentum": Method(
        "momentum re-projected",
        "momentum re-projected",
        "refreshed more often than the paper's; each refresh also projects the first moment",
    ),
    "mixing": Method("mixing", "mixing", "a share of every batch is general rows"),
    "replay": Method(
        "replay alone",
        "replay alone",
        "half of every batch is general rows, trained on with a weight; nothing is projected",
    ),
    "replay-initial": Method(
        "replay of the model",
        "replay of the model",
        "the same, towards the initial model's predictions in place of the rows' answers",
    ),
    "recommended": Method(
        "OGPSA recommended",
        "ogpsa-recommended",
        "gradient and update projected off the inputs that the general rows make; nothing else",
    ),
    "recommended-replay": Method(
        "recommended + replay of the model",
        "recommended + replay of the model",
        "the same, and half of every batch replays the initial model's predictions",
    ),
}


def configuration(
    method: str, regime: Regime, folder: Folder, seed: int, objective: str = "sft"
) -> dict[str, Any]:
    """The configuration of a stage for ``ogpsa-jax train``, without its output_dir.

    Args:
      method: a key of :data:`METHODS`.
      regime: of what general rows there are.
      folder: the world's files.
      seed: of the data's order.
      objective: ``sft``, or ``dpo`` from what SFT came to.
    """
    setting = SETTINGS[regime][method]
    general = f"{'foreign' if regime.foreign else 'general'}-{regime.rows}"
    config: dict[str, Any] = {
        "objective": objective,
        "seed": seed,
        "model": {"path": str(folder.model), "dtype": "float32"},
        "data": {
            "train": [{"path": _data(folder, "refusals", objective)}],
            "eval": {"general": {"path": folder.data("unseen")}},
            "max_length": LONGEST,
            "packing": False,
        },
        "ogpsa": {"preset": "off"},
        "optimizer": {
            "learning_rate": float(f"{RATE[objective] * regime.rate * setting.rate:.6g}")
        },
        "train": {
            "batch_size": BATCH,
            "micro_batch_size": BATCH,
            "remat": "none",
            "loss_chunk": LONGEST,
            "eval_every": 10,
            "save_every": 1000,
            "log_every": 50,
        },
    }
    for name, section in _own(method, setting, folder, general, objective).items():
        config[name] = config.get(name, {}) | section
    if objective == "dpo":
        config["dpo"] = {"beta": 0.1}
    config["train"]["steps"] = affordable_steps(RunConfig.model_validate(config), regime.rows)
    return config


def _data(folder: Folder, name: str, objective: str) -> str:
    """Of pairs in DPO: in those of general rows the refusal is the worse answer."""
    return folder.data(f"{name}-pairs" if objective == "dpo" else name)


def _own(
    method: str, setting: Setting, folder: Folder, general: str, objective: str
) -> dict[str, dict[str, Any]]:
    """The sections by which a method differs from naive training."""
    dpo = objective == "dpo"
    halves = [{"path": folder.data(f"{general}-{half}")} for half in (1, 2)]
    refreshed = {"sets": halves, "loss": "response"}
    in_step = {"share": 0.5, "replay_weight": setting.weight}
    answers = {
        "sets": [{"path": _data(folder, general, objective)}],
        "loss": "dpo" if dpo else "response",
        "in_step": in_step,
    }
    initial = {
        "sets": [{"path": folder.data(general)}],
        "target": "initial",
        "batch_size": 40,
        "in_step": in_step,
    }
    # Nothing is projected, so that one direction will do, and nothing need be remembered.
    nothing = {"preset": "in-step", "rule": "none"}
    match method:
        case "lora":
            return {"model": {"lora": {"rank": 8, "alpha": 16.0}}}
        case "paper":
            return {
                "ogpsa": {"preset": "paper", "refresh": {"every": 5 if dpo else 30}},
                "references": refreshed | {"rows_per_refresh": 48, "batch_size": 8},
            }
        case "momentum":
            return {
                "ogpsa": {
                    "preset": "paper",
                    "project_momentum": True,
                    "refresh": {"every": 5 if dpo else 10},
                },
                "references": refreshed | {"rows_per_refresh": 40, "batch_size": 10},
            }
        case "mixing":
            safe = {"path": _data(folder, "refusals", objective), "weight": 1 - setting.share}
            mixed = {"path": _data(folder, general, objective), "weight": setting.share}
            return {"data": {"train": [safe, mixed]}}
        case "replay":
            return {"ogpsa": nothing, "references": answers}
        case "replay-initial":
            return {"ogpsa": nothing, "references": initial}
        case "recommended" | "recommended-replay":
            inputs = {"preset": "recommended", "energy": setting.energy}
            rows = {"sets": initial["sets"], "batch_size": 40}
            return {
                "ogpsa": inputs,
                "references": initial if method == "recommended-replay" else rows,
            }
    return {}


def affordable_steps(config: RunConfig, rows: int) -> int:
    """The steps that a stage's sequences allow, less what its method spends on other passes.

    Args:
      config: of the stage.
      rows: how many general rows there are.
    """
    references, width = config.references, 2 if config.objective == "dpo" else 1
    in_step_rows = config.reference_rows
    step = (BATCH - in_step_rows) * width + in_step_rows * (
        width if references.loss == "dpo" else 1
    )
    # The inputs are measured, and the initial model is asked, on every general row once.
    forward = (config.ogpsa.subspace == "inputs") + (references.target == "initial")
    left = SEQUENCES[config.objective] - forward * rows / 3
    refreshed, refresh = references.rows_per_refresh or 0, config.ogpsa.refresh
    every = (refresh.every if refresh else None) or 1
    steps = int(left // step)
    while steps * step + -(-steps // every) * refreshed > left:
        steps -= 1
    return steps
