"""The methods that the demonstration compares, each as settings of the trainer.

All methods of a stage get the same number of rows, training and reference together; what a method
spends on references it cannot spend on steps.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ogpsa_jax.evaluation.records import NAIVE
from ogpsa_jax.training.config import RunConfig
from ogpsa_jax.training.presets import PRESETS

PLENTY: Final = 400
SCARCE: Final = 80
# Few samples are soon learnt by heart, and their gradient dwindles; see docs/recommended.md.
SCARCE_REPLAY_WEIGHT: Final = 8.0
RECOMMENDED_IN_STEP: Final = PRESETS["recommended"]["references"]["in_step"]
RECOMMENDED: Final = "ogpsa-recommended"
PAPER: Final = "ogpsa-paper"


@dataclass(frozen=True)
class Stage:
    """SFT on refusals, or DPO on pairs (refusal chosen, answer rejected).

    Attributes:
      objective: ``sft`` or ``dpo``.
      batch_size: rows (pairs) a step.
      steps: of the naive run.
      learning_rate: its peak; cosine to zero.
    """

    objective: str
    batch_size: int
    steps: int
    learning_rate: float

    @property
    def width(self) -> int:
        """Sequences a training row holds."""
        return 2 if self.objective == "dpo" else 1

    @property
    def sequences(self) -> int:
        """Sequences that a run may put through forward and backward passes, references included."""
        return self.steps * self.batch_size * self.width


@dataclass(frozen=True)
class Method:
    """One way of aligning.

    Attributes:
      label: the name shown; unique.
      kind: decides the colour in the figure.
      why: one line for the progress display.
      ogpsa: section ``ogpsa`` of the configuration; None: no projection.
      in_step: section ``references.in_step``.
      mixing: share of general rows in every batch.
      equal_data: mixing comes on top of the naive run's safety rows instead of in their place.
      lora: section ``model.lora``.
      general: how many general samples there are, for references or for mixing.
      learning_rate: relative to the stage's.
    """

    label: str
    kind: str
    why: str
    ogpsa: Mapping[str, Any] | None = None
    in_step: Mapping[str, Any] | None = None
    mixing: float = 0.0
    equal_data: bool = False
    lora: Mapping[str, Any] | None = None
    general: int = PLENTY
    learning_rate: float = 1.0


@dataclass(frozen=True)
class Plan:
    """What a method does in a stage.

    Attributes:
      config: of the trainer.
      steps: of the optimizer.
      reference_sets: how many sets of general samples are refreshed on.
      training_sequences: through forward and backward passes.
      reference_sequences: the same, for the basis.
    """

    config: RunConfig
    steps: int
    reference_sets: int
    training_sequences: int
    reference_sequences: int


def plan(method: Method, stage: Stage, seed: int, output_dir: str) -> Plan:
    """The settings of a run, with as many steps as its share of the rows allows.

    Args:
      method: what to do.
      stage: where, and how many rows it may use.
      seed: of the data order.
      output_dir: of the run.
    """
    raw = _raw(method, stage, seed, output_dir)
    config = RunConfig.model_validate(raw)
    riding = config.reference_rows
    training = (stage.batch_size - riding) * stage.width
    referring = riding * (stage.width if config.references.loss == "dpo" else 1)
    sets = config.ogpsa.rank if config.projects and not riding else 0
    if method.equal_data:
        steps = round(stage.steps / (1 - method.mixing))
    elif sets:
        every = steps_between(config)
        affordable = range(1, stage.steps + 1)
        steps = max(
            n
            for n in affordable
            if n * training + math.ceil(n / every) * method.general <= stage.sequences
        )
    else:
        steps = stage.sequences // (training + referring)
    refreshes = math.ceil(steps / steps_between(config)) if sets else 0
    return Plan(
        config=RunConfig.model_validate(raw | {"train": raw["train"] | {"steps": steps}}),
        steps=steps,
        reference_sets=sets,
        training_sequences=steps * training,
        reference_sequences=steps * referring + refreshes * method.general,
    )


def steps_between(config: RunConfig) -> int:
    """Steps between refreshes, which the demonstration must know beforehand to plan a run.

    Raises:
      ValueError: the run refreshes by distance.
    """
    refresh = config.ogpsa.refresh
    if refresh is None or refresh.every is None:
        raise ValueError("ogpsa.refresh: a run of the demonstration needs `every`")
    return refresh.every


def _raw(method: Method, stage: Stage, seed: int, output_dir: str) -> dict[str, Any]:
    references: dict[str, Any] = {}
    if method.ogpsa is not None:
        # Refreshed at intervals, the loss on references is cross-entropy in both stages, as in the
        # official code; here they are single answers, so there is no rejected one to count.
        references = {
            "sets": [{"path": "general"}],
            "loss": "dpo" if method.in_step and stage.objective == "dpo" else "response",
            "in_step": method.in_step,  # None: refreshes, also where the preset says otherwise
        }
    return {
        "objective": stage.objective,
        "seed": seed,
        "model": {"dtype": "float32", "lora": method.lora},
        "ogpsa": {"preset": "off"} if method.ogpsa is None else dict(method.ogpsa),
        "references": references,
        "optimizer": {"learning_rate": stage.learning_rate * method.learning_rate},
        "dpo": {"beta": 0.1},
        "train": {
            "batch_size": stage.batch_size,
            "micro_batch_size": stage.batch_size,
            "remat": "none",
            "loss_chunk": 64,
            "save_every": 10**6,
            "log_every": max(stage.steps // 2, 1),
        },
        "output_dir": output_dir,
    }


NAIVE_METHOD: Final = Method("naive", NAIVE, "safety data alone: it pays the whole tax")
PAPER_METHOD: Final = Method(
    "OGPSA, paper",
    PAPER,
    "gradient projected, two reference sets, refreshed every 30 steps, momentum left alone",
    ogpsa={"preset": "paper", "rank": 2, "refresh": {"every": 30}},
)
RECOMMENDED_METHOD: Final = Method(
    "OGPSA, recommended",
    RECOMMENDED,
    "references ride in every batch, and are trained on as well",
    ogpsa={"preset": "recommended"},
    in_step=RECOMMENDED_IN_STEP,
)
MIXING_METHOD: Final = Method(
    "mixing 50 %", "mixing", "half of every batch is general data, equal compute", mixing=0.5
)
MORE_MIXING_METHOD: Final = dataclasses.replace(
    MIXING_METHOD,
    label="mixing 75 %",
    why="three quarters of every batch are general data, equal compute",
    mixing=0.75,
)
LORA_METHOD: Final = Method(
    "LoRA",
    "LoRA",
    "only adapters of rank 8 are trained",
    lora={"rank": 8, "alpha": 16.0},
    learning_rate=2.0,
)
REPLAY_METHOD: Final = Method(
    "replay alone",
    "replay alone",
    "the recommended setting without its projection",
    ogpsa={"preset": "recommended-gradients", "rank": 1, "rule": "none"},
    in_step={"share": 0.5, "window": 1, "replay_weight": 1.0},
)
REPROJECTED_METHOD: Final = Method(
    "momentum re-projected",
    "momentum re-projected",
    "the paper's refreshes, and the first moment projected at each",
    ogpsa={"preset": "paper", "rank": 2, "refresh": {"every": 30}, "project_momentum": True},
)
UPDATE_METHOD: Final = Method(
    "update placement",
    "update placement",
    "what leaves Adam is projected, not what enters it",
    ogpsa={"preset": "paper", "rank": 2, "refresh": {"every": 30}, "placement": "update"},
)
MIXING_DATA_METHOD: Final = Method(
    "mixing 50 %, equal data",
    "mixing, equal data",
    "all of the naive run's safety rows and as many general ones: twice the compute",
    mixing=0.5,
    equal_data=True,
)


REPLAY_PROJECTED_METHOD: Final = Method(
    "recommended, momentum projected",
    "recommended, momentum projected",
    "the recommended setting, and the first moment projected at every step",
    ogpsa={"preset": "recommended-gradients", "rank": 4, "project_momentum": True},
    in_step=RECOMMENDED_IN_STEP,
)


def scarce(method: Method) -> Method:
    """The same with few general samples, replayed with the weight that we recommend for them."""
    in_step = method.in_step
    if in_step is not None:
        in_step = {**in_step, "replay_weight": SCARCE_REPLAY_WEIGHT}
    return dataclasses.replace(
        method,
        label=f"{method.label}, {SCARCE} samples",
        kind=f"{method.kind}, {SCARCE} samples",
        general=SCARCE,
        in_step=in_step,
    )
